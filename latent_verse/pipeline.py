"""The name under which earlier versions had `LVerse`: `from latent_verse.pipeline import LVerse`."""

from latent_verse.inference.pipeline import LVerse

__all__ = ["LVerse"]
