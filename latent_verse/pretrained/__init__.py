"""The names of earlier versions; see checkpoints/biart.py."""

from latent_verse.checkpoints.biart import Pretrained, load_checkpoint, load_pretrained, take_over  # noqa: F401
