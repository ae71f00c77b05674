"""Convolutional blocks of AugVAE (paper appendix A; the VQGAN family of Esser et al. 2021).

Module names are those of the released checkpoints, which tests/checkpoints/test_release_layout.py checks.

Shapes: B batch, C channels, H height, W width, T = H * W positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from latent_verse.config import AugVAEConfig
from latent_verse.nn.activation_checkpointing import ActivationCheckpointing


class PixelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position (as in ConvNeXt): no position depends on another."""

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def channels_last_group_norm(
    x_BCHW: torch.Tensor, groups: int, weight_C: torch.Tensor, bias_C: torch.Tensor, eps: float
) -> torch.Tensor:
    """F.group_norm by operators that read and write a channels-last map as it lies in memory.

    Statistics are of each channel, then of each group, and are float32 at least. As F.group_norm, it returns float32
    under autocast and x's type otherwise.
    """
    dtype = torch.promote_types(x_BCHW.dtype, torch.float32)
    x_BCHW, given = x_BCHW.to(dtype), x_BCHW.dtype
    B, C = x_BCHW.shape[:2]
    var_BGc, mean_BGc = (t_BC.unflatten(1, (groups, -1)) for t_BC in torch.var_mean(x_BCHW, (2, 3), correction=0))
    mean_BG1 = mean_BGc.mean(2, keepdim=True)
    var_BG1 = (var_BGc + (mean_BGc - mean_BG1).square()).mean(2, keepdim=True)  # each channel has as many values
    scale_BGc = (var_BG1 + eps).rsqrt() * weight_C.unflatten(0, (groups, -1))
    shift_BGc = bias_C.unflatten(0, (groups, -1)) - mean_BG1 * scale_BGc
    # as_strided makes the compiler store these two. Left to itself, it computes them at each pixel from five tensors,
    # and rather than do that again in the backward pass, it stores and reads back the whole result in float32.
    scale_BC11, shift_BC11 = (t.contiguous().as_strided((B, C, 1, 1), (C, 1, 1, 1)) for t in (scale_BGc, shift_BGc))
    y_BCHW = torch.addcmul(shift_BC11, x_BCHW, scale_BC11)
    return y_BCHW if torch.is_autocast_enabled(x_BCHW.device.type) else y_BCHW.to(given)


class GroupNorm(nn.GroupNorm):
    """GroupNorm. On a GPU, torch's copies a channels-last map to NCHW and returns that (2.11); this one does not."""

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        if x_BCHW.device.type == "cuda" and x_BCHW.is_contiguous(memory_format=torch.channels_last):
            return channels_last_group_norm(x_BCHW, self.num_groups, self.weight, self.bias, self.eps)
        return super().forward(x_BCHW)


def make_norm(kind: str, channels: int) -> nn.Module:
    """What AugVAEConfig.norm names: GroupNorm with the release's 32 groups, or PixelNorm, whose keys are the same."""
    return GroupNorm(32, channels, eps=1e-6) if kind == "group" else PixelNorm(channels, eps=1e-6)


class ResnetBlock(ActivationCheckpointing):
    """norm -> swish -> conv, twice, plus the input (through a 1x1 convolution if the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, norm: str):
        super().__init__()
        self.norm1 = make_norm(norm, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = make_norm(norm, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = self.recomputed(lambda x: self.conv1(F.silu(self.norm1(x))), x_BCHW)
        h_BCHW = self.recomputed(lambda h: self.conv2(self.dropout(F.silu(self.norm2(h)))), h_BCHW, self.dropout.p)
        if hasattr(self, "nin_shortcut"):
            x_BCHW = self.nin_shortcut(x_BCHW)
        return x_BCHW + h_BCHW


class AttnBlock(nn.Module):
    """Single-head self-attention over the positions of a feature map, plus the input."""

    def __init__(self, channels: int, norm: str):
        super().__init__()
        self.norm = make_norm(norm, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = self.norm(x_BCHW)
        q, k, v = (rearrange(f(h_BCHW), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        h_B1TC = F.scaled_dot_product_attention(q, k, v)
        return x_BCHW + self.proj_out(rearrange(h_B1TC, "b 1 (h w) c -> b c h w", h=x_BCHW.shape[2]))


class Downsample(nn.Module):
    """Halve height and width by a strided convolution, padded by one on the right and the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width by nearest neighbour and convolve (3x3), in one step.

    Each output pixel sees 2x2 pixels of the input, whose weights are sums of the 3x3 ones: a transposed 4x4 convolution
    with stride 2. It takes 4 products per pixel and channel instead of 9, and keeps nothing enlarged for training.
    """

    windows: torch.Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        # (16, 9): the entries of the 4x4 kernel are sums over the 2x2 windows of the 3x3 one, rotated by 180 degrees
        along = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
        self.register_buffer("windows", torch.kron(along, along), persistent=False)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x_BCHW.device.type, enabled=False):  # sums of weights in the weights' precision
            kernel = F.linear(self.conv.weight.flatten(2), self.windows)
        kernel = rearrange(kernel, "o i (h w) -> i o h w", h=4)
        return F.conv_transpose2d(x_BCHW, kernel, self.conv.bias, stride=2, padding=1)


class Middle(nn.Module):
    """Two residual blocks at the smallest resolution, with attention between them if `use_attn`."""

    def __init__(self, channels: int, dropout: float, use_attn: bool, norm: str):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout, norm)
        if use_attn:
            self.attn_1 = AttnBlock(channels, norm)
        self.block_2 = ResnetBlock(channels, channels, dropout, norm)

    def forward(self, h_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = self.block_1(h_BCHW)
        if hasattr(self, "attn_1"):
            h_BCHW = self.attn_1(h_BCHW)
        return self.block_2(h_BCHW)


class Stage(nn.Module):
    """The blocks at one resolution, each followed by attention if `attend`; then a change of resolution."""

    def __init__(self, widths: list[int], dropout: float, attend: bool, norm: str, resample: Mapping[str, nn.Module]):
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.block = nn.ModuleList(ResnetBlock(i, o, dropout, norm) for i, o in pairs)
        self.attn = nn.ModuleList(AttnBlock(o, norm) for _, o in pairs if attend)
        for name, module in resample.items():  # "downsample" or "upsample": the released names
            self.add_module(name, module)

    def forward(self, h_BCHW: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            h_BCHW = block(h_BCHW)
            if self.attn:
                h_BCHW = self.attn[i](h_BCHW)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                h_BCHW = getattr(self, name)(h_BCHW)
        return h_BCHW


class Encoder(ActivationCheckpointing):
    """(B, in_channels, R, R) -> (B, z_channels, r, r), R = `resolution` = r * 2**(len(ch_mult) - 1).

    Stage i is hidden_dim * ch_mult[i] wide. With `use_attn` the one at the resolution `attend_at` has attention.
    """

    def __init__(self, c: AugVAEConfig, in_channels: int, ch_mult: tuple[int, ...], resolution: int, attend_at: int):
        super().__init__()
        width = c.hidden_dim
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        for i, mult in enumerate(ch_mult):
            widths = [width] + [c.hidden_dim * mult] * c.num_res_blocks
            width = widths[-1]
            attend = c.use_attn and resolution // 2**i == attend_at
            resample = {"downsample": Downsample(width)} if i < len(ch_mult) - 1 else {}
            self.down.append(Stage(widths, c.dropout, attend, c.norm, resample))
        self.mid = Middle(width, c.dropout, c.use_attn, c.norm)
        self.norm_out = make_norm(c.norm, width)
        self.conv_out = nn.Conv2d(width, c.z_channels, 3, padding=1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = self.conv_in(x_BCHW)
        for stage in self.down:
            h_BCHW = stage(h_BCHW)
        return self.recomputed(lambda h: self.conv_out(F.silu(self.norm_out(h))), self.mid(h_BCHW))


class Decoder(ActivationCheckpointing):
    """(B, in_channels, r, r) -> (B, out_channels, R, R), as an Encoder in reverse: the first stage runs last."""

    def __init__(
        self,
        c: AugVAEConfig,
        in_channels: int,
        out_channels: int,
        ch_mult: tuple[int, ...],
        resolution: int,
        attend_at: int,
    ):
        super().__init__()
        width = c.hidden_dim * ch_mult[-1]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.mid = Middle(width, c.dropout, c.use_attn, c.norm)
        stages = []
        for i in reversed(range(len(ch_mult))):
            widths = [width] + [c.hidden_dim * ch_mult[i]] * (c.num_res_blocks + 1)
            width = widths[-1]
            attend = c.use_attn and resolution // 2**i == attend_at
            resample = {"upsample": Upsample(width)} if i else {}
            stages.append(Stage(widths, c.dropout, attend, c.norm, resample))
        self.up = nn.ModuleList(reversed(stages))  # released order: up.0 is the last to run
        self.norm_out = make_norm(c.norm, width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, z_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = self.mid(self.conv_in(z_BCHW))
        for stage in reversed(self.up):
            h_BCHW = stage(h_BCHW)
        return self.recomputed(lambda h: self.conv_out(F.silu(self.norm_out(h))), h_BCHW)
