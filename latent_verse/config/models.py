"""Shapes of the two networks, and the settings of each that only training reads."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Optional, Tuple

from latent_verse.config.messages import ConfigError
from latent_verse.config.settings import Settings, same, setting


@dataclass(frozen=True)
class AugVAEConfig(Settings):
    """Shape of AugVAE, multi-level (-ML) or, with `single_level`, its one-level fine-tune (-SL); paper section 3.1."""

    in_channels: int = setting(3, "channels of the input image", at_least=1, at_most=1024, hidden=True)
    out_channels: int = setting(3, "channels of the reconstruction", at_least=1, at_most=1024, hidden=True)
    hidden_dim: int = setting(
        128, "width of the first convolution; a multiple of 32 with norm: group", at_least=1, at_most=2**14
    )
    ch_mult: Tuple[int, ...] = setting(
        (1, 2, 4), "width multipliers of the outer networks, one per stage", at_least=1, at_most=1024
    )
    num_res_blocks: int = setting(2, "residual blocks per stage", at_least=1, at_most=1000)
    resolution: int = setting(256, "height and width of the images, in pixels", at_least=1, at_most=2**14)
    attn_resolutions: Tuple[int, ...] = setting((64, 32, 16, 8), "sides of the code grids (levels), largest first")
    norm: str = setting("group", "group: GroupNorm(32), as released; pixel: LayerNorm per pixel", ("group", "pixel"))
    use_attn: bool = setting(False, "use self-attention at the levels and in the middle of each network")
    dropout: float = setting(0.0, "dropout in the residual blocks", training_only=True, at_least=0, at_most=1)
    double_z: bool = setting(False, "the original's flag for KL models; must be false with a codebook", hidden=True)
    z_channels: int = setting(256, "channels of the feature maps between the networks", at_least=1, at_most=2**16)
    codebook_dim: int = setting(256, "length of a code vector", at_least=1, at_most=2**16)
    num_tokens: int = setting(8192, "codes in the codebook", at_least=1, at_most=2**24)
    quantizer: str = setting("ema", "how vectors become codes; ema: a codebook of moving averages, as released")
    quant_beta: float = setting(0.25, "weight of the commitment loss", training_only=True, at_least=0)
    quant_ema_decay: float = setting(0.99, "EMA decay of the codebook", training_only=True, at_least=0, at_most=1)
    quant_ema_eps: float = setting(1e-5, "smoothing of the codes' counts", training_only=True, at_least=0, at_most=1)
    restart_threshold: float = setting(
        0.0, "codes used less than this per batch become encoder outputs; 0: never", training_only=True, at_least=0
    )
    single_level: Optional[int] = setting(None, "keep only this level (AugVAE-SL); null keeps all (AugVAE-ML)")

    def __post_init__(self):
        for name in ("ch_mult", "attn_resolutions"):  # lists from YAML become hashable
            object.__setattr__(self, name, tuple(getattr(self, name)))
        super().__post_init__()
        if self.double_z:
            raise ConfigError("double_z: true cannot work: a codebook has no variance to encode. Set double_z: false.")

    def validate(self) -> None:
        """Refuse a shape that cannot be built. Called by AugVAE, not on creation: a -SL recipe names only its level.

        Raises:
            ConfigError: naming the key, its value and the remedy.
        """
        if self.norm == "group" and self.hidden_dim % 32:
            raise ConfigError(f"hidden_dim {self.hidden_dim} is not a multiple of 32. Make it one, or set norm: pixel.")
        first = self.resolution / 2 ** (len(self.ch_mult) - 1)
        levels = self.attn_resolutions
        if not levels or levels[0] != first:
            raise ConfigError(
                f"ch_mult {list(self.ch_mult)} halves resolution {self.resolution} {len(self.ch_mult) - 1} times, to "
                f"{first:g}, but attn_resolutions {list(levels)} begins with {levels[0] if levels else 'nothing'}. "
                f"Make the first level {first:g}, or change ch_mult or resolution."
            )
        for above, level in itertools.pairwise(levels):
            if level * 2 != above:
                raise ConfigError(f"attn_resolutions {list(levels)}: {level} follows {above}, but must be half of it.")
        if self.single_level is not None and self.single_level not in levels:
            raise ConfigError(f"single_level {self.single_level} is not one of the levels {list(levels)}.")

    @property
    def least_weights(self) -> int:
        """Weights that the network has at the least: a 3x3 convolution per residual block, both ends, the codebook."""
        stages = sum((self.hidden_dim * multiplier) ** 2 for multiplier in self.ch_mult)
        codebook = self.num_tokens * self.codebook_dim if self.quantizer == "ema" else 0
        ends = 2 * 9 * self.hidden_dim * self.ch_mult[-1] * self.z_channels
        return 2 * 9 * self.num_res_blocks * stages + ends + codebook

    @property
    def least_features(self) -> int:
        """Numbers that one image takes at the least: at its resolution, what a residual block reads and what its two
        convolutions give."""
        return self.hidden_dim * (1 + 2 * self.ch_mult[0]) * self.resolution**2


@dataclass(frozen=True)
class BiARTVariant(Settings):
    """What may differ between two transformers of one size. A run's settings and the transformer's own both have it."""

    pos_by_modality: bool = setting(False, "count text and image positions separately, the same in both directions")
    embd_pdrop: float = setting(0.0, "dropout after the embeddings", training_only=True, at_least=0, at_most=1)
    resid_pdrop: float = setting(0.0, "dropout on each residual branch", training_only=True, at_least=0, at_most=1)
    attn_pdrop: float = setting(0.0, "dropout on the attention weights", training_only=True, at_least=0, at_most=1)


@dataclass(frozen=True)
class BiARTConfig(BiARTVariant):
    """The joint transformer (paper section 3.2). Vocabulary and lengths follow from the tokenizer and the AugVAE."""

    text_vocab: int = setting(49408, "text ids the tokenizer can produce", at_least=1, at_most=2**24)
    image_vocab: int = setting(8192, "codes in the AugVAE's codebook", at_least=1, at_most=2**24)
    text_len: int = setting(64, "length of a caption in tokens; shorter captions are padded", at_least=1, at_most=2**16)
    image_len: int = setting(1024, "codes of one image", at_least=1, at_most=2**24)
    n_layer: int = setting(12, "transformer blocks", at_least=1, at_most=1024)
    n_head: int = setting(12, "attention heads", at_least=1, at_most=2**16)
    n_embd: int = setting(768, "width of the residual stream, a multiple of n_head", at_least=1, at_most=2**16)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}.")

    @property
    def least_weights(self) -> int:
        """Weights that the network has at the least: the matrices of the blocks, and one vector for each token."""
        return 12 * self.n_layer * self.n_embd**2 + (self.text_vocab + self.image_vocab) * self.n_embd


# Layers x channels. They are our choice: no source we could read gives the depth and width of the paper's BiART.
PRESETS = {
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 192},  # minutes on a CPU
    "12x768": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # GPT-2 small
    "24x1024": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # GPT-2 medium
}


@dataclass(frozen=True)
class BiARTSize(Settings):
    """A run's choice of depth and width."""

    preset: str = setting("12x768", "size, named by layers x channels; the settings n_* override it", tuple(PRESETS))
    n_layer: Optional[int] = same(BiARTConfig, "n_layer", None, "transformer blocks; default the preset's")
    n_head: Optional[int] = same(BiARTConfig, "n_head", None, "attention heads; default the preset's")
    n_embd: Optional[int] = same(BiARTConfig, "n_embd", None, "width, a multiple of n_head; default the preset's")


@dataclass(frozen=True)
class BiARTModelConfig(BiARTVariant, BiARTSize):  # --help lists the last base's settings first
    """What a run says of the transformer's shape; the rest of it follows from tokenizer and AugVAE."""

    def resolve(self, text_vocab: int, image_vocab: int, text_len: int, image_len: int) -> BiARTConfig:
        """The transformer's whole shape.

        Raises:
            ConfigError: n_embd is not a multiple of n_head, or a number is below 1.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "preset"}
        size = {name: preset if own[name] is None else own[name] for name, preset in PRESETS[self.preset].items()}
        return BiARTConfig(
            text_vocab=text_vocab, image_vocab=image_vocab, text_len=text_len, image_len=image_len, **{**own, **size}
        )
