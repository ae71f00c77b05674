"""A tiny BiART with random weights."""

from __future__ import annotations

import torch

from latent_verse.biart.model import BiART
from latent_verse.config import BiARTConfig

CONFIG = BiARTConfig(text_vocab=11, image_vocab=13, text_len=5, image_len=7, n_layer=2, n_head=2, n_embd=32)


def lively(config=CONFIG, seed=0) -> BiART:
    """A model whose weights are large enough for its predictions to differ visibly."""
    torch.manual_seed(seed)
    model = BiART(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
