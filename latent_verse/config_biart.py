"""The old name of `latent_verse.config.train`."""

from latent_verse.config.train import *  # noqa: F403
