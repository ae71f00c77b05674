"""Every setting of L-Verse, once: typed dataclasses with defaults, help and validation.

Each field's metadata holds its one-line help and, where there is a fixed set, its choices; `latent_verse.cli` makes
flags and YAML keys from them. Leaf names are unique over the whole tree of a script, so that a leaf is also a flag.
This file imports nothing but the standard library: the models can use it without YAML or argparse being loaded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import List, Optional, Tuple  # OmegaConf reads these annotations at run time


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another. The message says what to do."""


def setting(default, help: str, choices: tuple | None = None):
    """A dataclass field with its one-line help and, where there is a fixed set, its allowed values."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# ------------------------------------------------------------------------------------------------------------- BiART


@dataclass(frozen=True)
class BiARTConfig:
    """The joint transformer (paper section 3.2). Vocabulary and lengths follow from the tokenizer and the AugVAE."""

    text_vocab: int = setting(49408, "text ids the tokenizer can produce")
    image_vocab: int = setting(8192, "codes in the AugVAE's codebook")
    text_len: int = setting(64, "tokens of a caption; shorter ones are padded")
    image_len: int = setting(1024, "codes of one image")
    n_layer: int = setting(12, "transformer blocks")
    n_head: int = setting(12, "attention heads")
    n_embd: int = setting(768, "width of the residual stream")
    embd_pdrop: float = setting(0.0, "dropout after the embeddings")
    resid_pdrop: float = setting(0.0, "dropout on each residual branch")
    attn_pdrop: float = setting(0.0, "dropout on the attention weights")

    def __post_init__(self):
        for name in ("text_vocab", "image_vocab", "text_len", "image_len", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}.")
