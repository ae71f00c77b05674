"""Small networks in the places of Inception and CLIP, and things to judge, for the tests of evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


class Colours(nn.Module):
    """In the place of `networks.Inception`: mean colours of the four quarters, and five classes made of them."""

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
    """In the place of `networks.ClipNetwork`: a picture is its mean colour, a text some numbers of its letters."""

    described = "no CLIP"

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        colours = [np.asarray(picture, dtype=np.float32).mean((0, 1)) / 255 for picture in pictures]
        return F.normalize(torch.tensor(np.array(colours)), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        numbers = [[b / 255 for b in hashlib.sha256(text.encode()).digest()[:3]] for text in texts]
        return F.normalize(torch.tensor(numbers), dim=-1)


def write_pairs(folder: Path, count: int, captions: int = 2, side: int = 20) -> Path:
    """A pair folder of `count` different pictures with `captions` captions each; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        pixels = np.clip(rng.integers(0, 256, 3) + rng.integers(-40, 40, (side, side + 4, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"p{i:03d}.png")
        words = ("red", "blue", "green", "round", "small")
        texts = [f"a {words[(i + j) % 5]} circle number {i}" for j in range(captions)]
        (folder / f"p{i:03d}.txt").write_text("\n".join(texts) + "\n")
    return folder
