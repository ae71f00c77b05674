"""A tiny LVerse with random weights, and texts and images for it."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.config import BiARTConfig
from latent_verse.data.text import BPETokenizer
from latent_verse.inference.pipeline import LVerse

TEXTS = ["a red circle", "two small blue squares", "красный круг", "赤い丸 🔴", ""]


def make_lverse(vae: AugVAE, reference_dropout: float = 0.1, **changes) -> LVerse:
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


def photo(width: int = 30, height: int = 20, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def same(a, b, within=1) -> bool:
    """Whether two lists of lists of images are equal. Other batch sizes may round a pixel the other way."""
    a, b = (np.array([[np.asarray(p) for p in row] for row in rows], dtype=int) for rows in (a, b))
    return a.shape == b.shape and np.abs(a - b).max() <= within
