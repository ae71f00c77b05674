"""AugVAE: a multi-level VQ-VAE with one shared codebook, and its single-level form (paper section 3.1).

Level 0 is the largest. Encoder 0 reads the image; each further encoder halves the *unquantised* map of the one before.
Decoding runs from the smallest level up: each decoder reads the codes of its level and what has been decoded so far.
The single-level form keeps one level's codes; 1x1 `connectors` replace the missing inputs.

Shapes: B batch, C channels, H x W pixels, R image resolution, h of a level, D code dimension, K codebook size, N codes.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, cast

import torch
from einops import rearrange
from torch import nn

from latent_verse.augvae.layers import Decoder, Encoder
from latent_verse.augvae.quantizer import Quantizer, count, make_quantizer, perplexity, to_vectors
from latent_verse.config import AugVAEConfig
from latent_verse.nn.memory import check_memory
from latent_verse.nn.precision import full_float32

INNER_CH_MULT = (2, 4)  # of each encoder and decoder between two levels, as released
BEYOND = 1.001  # the largest value of an image: resizing may overshoot 1 a little


class Encoded(NamedTuple):
    """What `AugVAE.encode` returns; the lists hold one entry per level, largest first."""

    z_q: list[torch.Tensor]  # quantised maps (B, D, h, h)
    indices: list[torch.Tensor]  # codes (B, h, h) int64
    embed_loss: torch.Tensor  # sum of the levels' quantiser losses, ()
    perplexity: torch.Tensor  # of the codes of all levels together, ()


class AugVAE(nn.Module):
    """AugVAE-ML, or AugVAE-SL if `config.single_level` is set. State-dict names are those of the release.

    Raises:
        ConfigError: the configuration cannot be built.
    """

    # set by checkpoints/augvae.py: a network may not import the readers of its files
    from_pretrained: ClassVar[Callable[[str | os.PathLike], AugVAE]]
    save_pretrained: ClassVar[Callable[[AugVAE, str | os.PathLike], None]]
    push_to_hub: ClassVar[Callable[..., str]]
    model_card: ClassVar[Callable[[AugVAE, str], str]]

    def __init__(self, config: AugVAEConfig):
        super().__init__()
        config.validate()
        weights = "hidden_dim, ch_mult, num_res_blocks, num_tokens or codebook_dim"
        check_memory("AugVAE's weights", config.least_weights, weights)
        check_memory("AugVAE's feature maps of one image", config.least_features, "resolution or hidden_dim", True)
        self.config = config
        levels, z = config.attn_resolutions, config.z_channels
        # (ch_mult, resolution, attend_at). The original gives an inner decoder attention at the level it reads and an
        # inner encoder at the one it writes: the same level of the pair.
        outer = (config.ch_mult, config.resolution, levels[0])
        inner = [(INNER_CH_MULT, above, level) for above, level in itertools.pairwise(levels)]
        encoders = [Encoder(config, config.in_channels, *outer), *(Encoder(config, z, *stage) for stage in inner)]
        decoders = [Decoder(config, 2 * z, z, *stage) for stage in reversed(inner)]
        decoders.append(Decoder(config, 2 * z, config.out_channels, *outer))
        deepest = decoders[0]  # nothing has been decoded before it: it reads z channels, not 2z
        deepest.conv_in = nn.Conv2d(z, deepest.conv_in.out_channels, 3, padding=1)
        depth = len(levels) if config.single_level is None else levels.index(config.single_level) + 1
        decoders = decoders[-depth:]
        self.encoders = nn.ModuleList(encoders[:depth])
        self.decoders = nn.ModuleList(decoders)

        pre_quants = [nn.Conv2d(z, config.codebook_dim, 1) for _ in levels]
        post_quants = [nn.Conv2d(config.codebook_dim, z, 1) for _ in levels]
        for convs in (pre_quants, post_quants):  # weights are shared by the levels, biases are not
            for conv in convs[1:]:
                conv.weight = convs[0].weight
        self.pre_quants, self.post_quants = nn.ModuleList(pre_quants), nn.ModuleList(post_quants)
        # one module for all levels: shared buffers would come apart
        self.quantizers = nn.ModuleList([make_quantizer(config)] * len(levels))

        if config.single_level is not None:
            self.connectors = nn.ModuleList(
                nn.Identity() if decoder.conv_in.in_channels == z else nn.Conv2d(z, 2 * z, 1) for decoder in decoders
            )
            # The unused ones stay in the state dict, as in a release, but DDP must not wait for their gradients.
            # The original reads every single level through the first post_quant.
            for conv in [*pre_quants[depth:], *post_quants[1:]]:
                cast(nn.Parameter, conv.bias).requires_grad_(False)

    @property
    def quantizer(self) -> Quantizer:
        """The quantiser that all levels share."""
        return cast(Quantizer, self.quantizers[0])

    @property
    def device(self) -> torch.device:
        """The device of the weights, which images and codes must be on."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, which images must have. A codebook stays float32 in half precision."""
        return next(self.parameters()).dtype

    @property
    def levels(self) -> tuple[int, ...]:
        """Resolutions at which `encode` quantises, largest first. The last one of an AugVAE-SL is its own level."""
        return self.config.attn_resolutions[: len(self.encoders)]

    @property
    def code_levels(self) -> tuple[int, ...]:
        """Resolutions whose codes stand for an image, largest first."""
        return self.config.attn_resolutions if self.config.single_level is None else (self.config.single_level,)

    @property
    def num_codes(self) -> int:
        """N, the number of codes of one image."""
        return sum(level * level for level in self.code_levels)

    def features(self, x_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, C, R, R) in [-1, 1] -> unquantised maps of all `levels`, (B, D, h, h), largest first.

        Raises:
            ValueError: they are no tensor of floats, or their channels or size differ from the model's. That they are
                in [-1, 1] is checked by `codes` alone, which reads their values.
        """
        expected = (self.config.in_channels, self.config.resolution, self.config.resolution)
        shape = _shape_of(x_BCHW, "images")
        if len(shape) != 4 or shape[1:] != expected:
            raise ValueError(
                f"images have shape {shape}; this AugVAE takes (B, {', '.join(map(str, expected))}). "
                "Resize and crop them first (latent_verse.data.transforms.centre_crop)."
            )
        if not x_BCHW.is_floating_point():
            raise ValueError(f"images are {x_BCHW.dtype}; give floats in [-1, 1], of bytes x / 127.5 - 1.")
        out, h_BCHW = [], x_BCHW
        for encoder, pre_quant in zip(self.encoders, self.pre_quants, strict=False):
            h_BCHW = encoder(h_BCHW)
            out.append(pre_quant(h_BCHW))
        return out

    def encode(self, x_BCHW: torch.Tensor) -> Encoded:
        """Quantise images (B, C, R, R) in [-1, 1] at all `levels`.

        In training mode the codebook learns, level by level: as in the original, each level is quantised with the
        codebook that the levels before it have changed.

        Raises:
            ValueError: as `features`.
        """
        quantised = [quantizer(z) for quantizer, z in zip(self.quantizers, self.features(x_BCHW), strict=False)]
        z_q, indices, losses = (list(column) for column in zip(*quantised, strict=True))
        counts_K = count(torch.cat([level.flatten() for level in indices]), self.quantizer.codebook_size)
        embed_loss = torch.stack(losses).sum()
        return Encoded(z_q, indices, embed_loss, perplexity(counts_K).to(embed_loss))

    def decode(self, z_q: list[torch.Tensor]) -> torch.Tensor:
        """Maps (B, D, h, h) of all `levels` or of `code_levels` -> images (B, C, R, R), not clamped to [-1, 1]."""
        if self.config.single_level is not None:
            h_BCHW = self.post_quants[0](z_q[-1])
            for connector, decoder in zip(self.connectors, self.decoders, strict=True):
                h_BCHW = decoder(connector(h_BCHW))
            return h_BCHW
        decoded: list[torch.Tensor] = []  # from the levels below, if any
        # the original pairs the *first* post_quant (its bias: the weight is shared) with the smallest level
        for post_quant, z_BDHW, decoder in zip(self.post_quants, reversed(z_q), self.decoders, strict=True):
            decoded = [decoder(torch.cat([post_quant(z_BDHW), *decoded], dim=1))]
        return decoded[0]

    def forward(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images (B, C, R, R) in [-1, 1] -> their reconstruction, and embed_loss and perplexity as from `encode`."""
        encoded = self.encode(x_BCHW)
        return self.decode(encoded.z_q), encoded.embed_loss, encoded.perplexity

    @torch.no_grad()
    def codes(self, x_BCHW: torch.Tensor, validate: bool = True) -> torch.Tensor:
        """Images (B, C, R, R) in [-1, 1] -> codes (B, N) int64 of `code_levels`, largest first, row by row.

        The codebook learns nothing, not even in training mode. Float32 weights compute in float32 throughout, whatever
        autocast or TF32 is on: a GPU then gives the codes that a CPU gives, up to rounding. `encode` and `features`
        follow the settings in force.

        Args:
            validate: check the images' values. That waits for a GPU, so training, whose loader gives floats in [-1, 1],
                leaves it out. What torch.export records leaves it out too.

        Raises:
            ValueError: as `features`, or they are not of the model's type, on its device and in [-1, 1].
        """
        if validate:
            self._check_images(x_BCHW)
        with full_float32(x_BCHW.device.type):  # TF32, a GPU's default for convolutions, changes 0.3 % of the codes
            maps = self.features(x_BCHW)[-len(self.code_levels) :]
            codes = [self.quantizer.nearest(to_vectors(z_BDHW)) for z_BDHW in maps]
        return torch.cat([c_N.view(len(x_BCHW), r * r) for c_N, r in zip(codes, self.code_levels, strict=True)], dim=1)

    @torch.no_grad()
    def decode_codes(self, codes_BN: torch.Tensor) -> torch.Tensor:
        """Codes (B, N) int64 in [0, K), as `codes` returns them -> images (B, C, R, R) clamped to [-1, 1].

        What torch.export records of it does not check that codes are in [0, K).

        Raises:
            ValueError: they are not int64 (or int32) on the model's device, their number is not N, or a code is not in
                the codebook.
        """
        shape = _shape_of(codes_BN, "codes")
        if len(shape) != 2 or shape[1] != self.num_codes:
            raise ValueError(f"codes have shape {shape}; levels {self.code_levels} take (B, {self.num_codes}).")
        if codes_BN.dtype not in (torch.int64, torch.int32) or codes_BN.device != self.device:
            found = f"codes are {codes_BN.dtype} on {codes_BN.device}"
            raise ValueError(f"{found}; this AugVAE takes torch.int64 on {self.device}. Convert them with .to().")
        K = self.quantizer.codebook_size
        low, high = _extremes(codes_BN, (0, K - 1))
        if not 0 <= low <= high < K:
            raise ValueError(
                f"codes run from {low} to {high}; this codebook has 0 to {K - 1}. Were they made by another AugVAE?"
            )
        parts = codes_BN.split([r * r for r in self.code_levels], dim=1)
        z_q = [
            rearrange(self.quantizer.lookup(part_BN), "b (h w) d -> b d h w", h=r).to(self.dtype)
            for part_BN, r in zip(parts, self.code_levels, strict=True)
        ]
        return self.decode(z_q).clamp(-1, 1)

    @torch.no_grad()
    def initialise_codebook(self, x_BCHW: torch.Tensor) -> None:
        """Start the codebook from all levels' maps of images (B, C, R, R). A collective."""
        self.quantizer.initialise(torch.cat([to_vectors(z_BDHW) for z_BDHW in self.features(x_BCHW)]))

    def _check_images(self, x_BCHW: torch.Tensor) -> None:
        _shape_of(x_BCHW, "images")
        if (x_BCHW.dtype, x_BCHW.device) != (self.dtype, self.device):
            found = f"images are {x_BCHW.dtype} on {x_BCHW.device}"
            raise ValueError(
                f"{found}; this AugVAE takes {self.dtype} on {self.device}, floats in [-1, 1]. Convert them with "
                ".to(), bytes with x / 127.5 - 1."
            )
        low, high = _extremes(x_BCHW, (-1.0, 1.0))
        if not -BEYOND <= low <= high <= BEYOND:  # nor NaN
            raise ValueError(f"images have values from {low:g} to {high:g}; give floats in [-1, 1] (x / 127.5 - 1).")

    def to_single_level(self, resolution: int) -> AugVAE:
        """A new AugVAE-SL that keeps the level of this resolution; only its connectors are untrained: fine-tune it.

        Raises:
            ValueError: this model is single-level already.
            ConfigError: it has no such level.
        """
        if self.config.single_level is not None:
            raise ValueError(f"this AugVAE has one level ({self.config.single_level}) already; use an AugVAE-ML.")
        single = AugVAE(dataclasses.replace(self.config, single_level=resolution))
        single.to(device=self.device, dtype=self.dtype)
        single.encoders.load_state_dict(self.encoders[: len(single.encoders)].state_dict())
        single.decoders.load_state_dict(self.decoders[-len(single.decoders) :].state_dict())
        for name in ("pre_quants", "post_quants", "quantizers"):
            getattr(single, name).load_state_dict(getattr(self, name).state_dict())
        return single.train(self.training)


def _shape_of(x: torch.Tensor, what: str) -> tuple[int, ...]:
    """The shape of an ordinary tensor.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(x, torch.Tensor) or x.layout is not torch.strided or x.is_nested or x.is_quantized:
        found = x.layout if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{what} are a {found}; give a dense torch.Tensor (of an array: torch.from_numpy).")
    return tuple(x.shape)


def _extremes(x: torch.Tensor, allowed: tuple[float, float]) -> Sequence[float]:
    """The smallest and the largest number; NaN if there is one. Waits for a GPU once.

    `allowed` without any number, and while torch.export records, as no graph can depend on numbers.
    """
    if not x.numel() or torch.compiler.is_exporting():
        return allowed
    return torch.stack(torch.aminmax(x.detach())).tolist()
