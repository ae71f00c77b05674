"""A tiny BiART with random weights, and random pairs for it."""

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


def pairs(model, batch=4, seed=1):
    """Random texts of up to text_len tokens, padded (batch, L), and image codes (batch, N)."""
    generator = torch.Generator().manual_seed(seed)
    vocab = model.vocab
    lengths = torch.randint(0, vocab.text_len + 1, (batch,), generator=generator).tolist()
    ids = [torch.randint(vocab.text_vocab, (n,), generator=generator).tolist() for n in lengths]
    codes_BN = torch.randint(vocab.image_vocab, (batch, vocab.image_len), generator=generator)
    return vocab.pad_text(ids), codes_BN
