"""The old name of `latent_verse.config.cli`."""

from latent_verse.config.cli import *  # noqa: F403
