"""Small networks in place of Inception and CLIP, a tiny LVerse, and images and pairs, for the tests of evaluation,
inference and generation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from latent_verse.biart.model import BiART
from latent_verse.config import BiARTConfig
from latent_verse.pipeline import LVerse
from latent_verse.text import BPETokenizer


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
    """In place of `networks.ClipNetwork`: an image is its mean colour, a text some numbers from its letters."""

    described = "no CLIP"

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        colours = [np.asarray(image, dtype=np.float32).mean((0, 1)) / 255 for image in images]
        return F.normalize(torch.tensor(np.array(colours)), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        numbers = [[b / 255 for b in hashlib.sha256(text.encode()).digest()[:3]] for text in texts]
        return F.normalize(torch.tensor(numbers), dim=-1)


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


def make_lverse(vae, reference_dropout=0.1, **changes) -> LVerse:
    """A model whose predictions differ visibly: 16 px, 4 x 4 codes (or those of `vae`), captions of 24 tokens."""
    tokenizer = BPETokenizer.train(["a red circle", "two small blue squares"] * 2, 280)
    config = {"text_vocab": tokenizer.vocab_size, "image_vocab": vae.config.num_tokens, "image_len": vae.num_codes}
    config |= {"text_len": 24, "n_layer": 2, "n_head": 2, "n_embd": 32} | changes
    torch.manual_seed(0)
    biart = BiART(BiARTConfig(**config)).eval()
    with torch.no_grad():
        for parameter in biart.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return LVerse(vae, biart, tokenizer, {"reference_dropout": reference_dropout})


def photo(width=30, height=20, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def same(a, b, within=1) -> bool:
    """Whether two lists of lists of images are equal. Other batch sizes may round a pixel the other way."""
    a, b = (np.array([[np.asarray(p) for p in row] for row in rows], dtype=int) for rows in (a, b))
    return a.shape == b.shape and np.abs(a - b).max() <= within
