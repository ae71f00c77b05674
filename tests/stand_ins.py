"""Small networks in the places of Inception, CLIP and a trained model, and images to evaluate."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from latent_verse.data.shapes import Scene, World
from latent_verse.data.shapes.drawing import Obj


class Colours(nn.Module):
    """In place of `networks.Inception`: mean colours of the four quarters, and five classes made of them."""

    num_features = 12
    described = "mean colours"

    def features_and_logits(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        assert x_BCHW.dtype == torch.uint8
        features_BF = F.adaptive_avg_pool2d(x_BCHW.float(), 2).flatten(1)
        mix_FV = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
        return features_BF, features_BF @ mix_FV / 50

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.features_and_logits(x_BCHW)[0]


class Words:
    """In place of `networks.ClipNetwork`: an image is its mean colour, a text three numbers of its hash."""

    described = "no CLIP"

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        colours = [np.asarray(image, dtype=np.float32).mean((0, 1)) / 255 for image in images]
        return F.normalize(torch.tensor(np.array(colours)), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        numbers = [[b / 255 for b in hashlib.sha256(text.encode()).digest()[:3]] for text in texts]
        return F.normalize(torch.tensor(numbers), dim=-1)


class Oracle:
    """In place of an `LVerse`: images that show exactly what a text says, captions that say what an image shows."""

    def __init__(self, world: World):
        self.world = world
        self.calls: list[dict] = []

    def text_to_image(self, texts, **settings):
        self.calls.append(settings)
        return [[self.world.render(self.scene_of(text))] for text in texts]

    def scene_of(self, text) -> Scene:
        asked, side = self.world.parse_caption(text), self.world.image_size // self.world.grid
        for cells in itertools.permutations(range(self.world.grid**2), len(asked.things)):
            corners = [divmod(cell, self.world.grid) for cell in cells]
            objects = [
                Obj(t.shape, t.colour, "large", column * side + side // 2, row * side + side // 2)
                for t, (row, column) in zip(asked.things, corners, strict=True)
            ]
            if self.world.satisfies(Scene(tuple(objects)), asked):
                return Scene(tuple(objects))
        raise AssertionError(text)

    def image_to_text(self, images, **settings):
        return [[self.world.caption(self.world.parse_image(image), random.Random(0))] for image in images]

    def reconstruct(self, images):
        return [image.copy() for image in images]


def write_pairs(folder: Path, count: int, captions: int = 2, side: int = 20) -> Path:
    """A pair folder of `count` different images with `captions` captions each; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        pixels = np.clip(rng.integers(0, 256, 3) + rng.integers(-40, 40, (side, side + 4, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"p{i:03d}.png")
        words = ("red", "blue", "green", "round", "small")
        texts = [f"a {words[(i + j) % 5]} circle number {i}" for j in range(captions)]
        (folder / f"p{i:03d}.txt").write_text("\n".join(texts) + "\n")
    return folder
