"""The shapes world: scenes, images and captions of them, exact readers of both, and datasets of pairs.

world.py      World: scenes, splits, presets
drawing.py    a scene's objects as pixels
captions.py   the grammar: a scene's captions, and what a caption states
reader.py     the scene that an image shows
dataset.py    ShapesDataset, and pairs as files
"""

from latent_verse.data.shapes.dataset import ShapesDataset, write_pairs
from latent_verse.data.shapes.drawing import Scene
from latent_verse.data.shapes.world import PRESETS, SPLITS, World

__all__ = ["PRESETS", "SPLITS", "Scene", "ShapesDataset", "World", "write_pairs"]
