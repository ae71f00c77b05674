"""The name under which earlier versions had `load_augvae`: `from latent_verse.checkpoint import load_augvae`."""

from latent_verse.checkpoints.augvae import load_augvae

__all__ = ["load_augvae"]
