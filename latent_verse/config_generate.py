"""The old name of `latent_verse.config.generate`."""

from latent_verse.config.generate import *  # noqa: F403
