"""The shapes world: scenes, images and captions of them, exact readers of both, and datasets of pairs."""

from latent_verse.data.shapes.dataset import ShapesDataset, write_pairs
from latent_verse.data.shapes.drawing import Scene
from latent_verse.data.shapes.world import PRESETS, SPLITS, World

__all__ = ["PRESETS", "SPLITS", "Scene", "ShapesDataset", "World", "write_pairs"]
