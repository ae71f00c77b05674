"""The old name of `latent_verse.config.evaluate`."""

from latent_verse.config.evaluate import *  # noqa: F403
