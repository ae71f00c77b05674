"""GroupNorm of channels-last maps: torch's numbers and gradients, and what it reads, writes and keeps on a GPU."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.augvae import SHAPES
from latent_verse.augvae.layers import GroupNorm, ResnetBlock, Upsample, channels_last_group_norm, make_norm
from latent_verse.augvae.model import AugVAE
from latent_verse.config import AugVAEConfig
from tests.fake_cuda import Kept, cudnn_convolutions, fake_cuda

EPS = 1e-6
# (B, C, H, W, groups)
MAPS = [(2, 64, 5, 7, 32), (1, 32, 1, 1, 32), (3, 96, 1, 1, 32), (1, 32, 3, 1, 32), (2, 128, 16, 16, 32)]
MAPS += [(1, 6, 4, 3, 3), (2, 6, 3, 3, 1), (1, 64, 1, 9, 32), (2, 1, 4, 4, 1)]


def map_of(B: int, C: int, H: int, W: int, dtype=torch.float64, offset: float = 0.0) -> torch.Tensor:
    """A channels-last map of mean `offset` and standard deviation 1."""
    generator = torch.Generator().manual_seed(B * C + H)
    x_BCHW = torch.randn(B, C, H, W, generator=generator, dtype=torch.float64) + offset
    return x_BCHW.to(dtype).to(memory_format=torch.channels_last)


def affine(C: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(C)
    weight_C, bias_C = torch.randn(2, C, generator=generator, dtype=torch.float64).to(dtype)
    return weight_C, bias_C


# ------------------------------------------------------------------------------------------------------- its numbers


@pytest.mark.parametrize(("B", "C", "H", "W", "groups"), MAPS)
def test_values_and_gradients_are_torchs(B, C, H, W, groups):
    """In float32 to 1e-5 of torch's in float64. Torch's own, in NCHW float32, is held to the same."""
    x_BCHW = map_of(B, C, H, W, torch.float32)
    g_BCHW = map_of(B, C, H, W, torch.float32).flip(0, 2)
    given = [t.requires_grad_() for t in (x_BCHW, *affine(C, torch.float32))]
    exact = [t.detach().double().requires_grad_() for t in given]
    y_BCHW = channels_last_group_norm(given[0], groups, *given[1:], EPS)
    expected = torch.group_norm(exact[0], groups, *exact[1:], EPS)  # F.group_norm refuses (1, C, 1, 1)
    assert y_BCHW.dtype == torch.float32
    assert y_BCHW.is_contiguous(memory_format=torch.channels_last)
    one_value = groups == H * W * C  # to a group: 1 / sqrt(var + eps) is 1000, and so much larger the rounding of x
    torch.testing.assert_close(y_BCHW.double(), expected, rtol=1e-5, atol=5e-4 if one_value else 1e-5)
    ours = torch.autograd.grad(y_BCHW, given, g_BCHW)
    theirs = torch.autograd.grad(expected, exact, g_BCHW.double())
    for name, a, b in zip(("x", "weight", "bias"), ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item(), 1e3 * one_value), name


def test_gradients_agree_with_finite_differences():
    weight_C, bias_C = affine(6)
    given = (map_of(2, 6, 3, 2).requires_grad_(), 3, weight_C.requires_grad_(), bias_C.requires_grad_(), EPS)
    assert torch.autograd.gradcheck(channels_last_group_norm, given)


@pytest.mark.parametrize("offset", [0, 1, 10, 100])
def test_is_as_exact_where_the_mean_is_large(offset):
    """An error that grows as rounding of x does, by 6e-8 times mean / deviation."""
    x_BCHW, (weight_C, bias_C) = map_of(2, 128, 32, 32, torch.float32, offset), affine(128, torch.float32)
    exact = F.group_norm(x_BCHW.double(), 32, weight_C.double(), bias_C.double(), EPS)
    error = (channels_last_group_norm(x_BCHW, 32, weight_C, bias_C, EPS) - exact).abs().max()
    assert error <= 1e-6 * (2 + offset)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    """Only the result is rounded, and under autocast not even that: torch's returns float32 there."""
    x_BCHW, (weight_C, bias_C) = map_of(2, 64, 8, 8, dtype, offset=3), affine(64, torch.float32)
    exact = F.group_norm(x_BCHW.double(), 32, weight_C.double(), bias_C.double(), EPS)
    y_BCHW = channels_last_group_norm(x_BCHW, 32, weight_C, bias_C, EPS)
    assert y_BCHW.dtype == dtype
    torch.testing.assert_close(y_BCHW.double(), exact, rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        y_BCHW = channels_last_group_norm(x_BCHW, 32, weight_C, bias_C, EPS)
    assert y_BCHW.dtype == torch.float32
    torch.testing.assert_close(y_BCHW.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_cpu_keeps_torchs(memory_format):
    norm, x_BCHW = make_norm("group", 64), map_of(2, 64, 5, 7, torch.float32).contiguous(memory_format=memory_format)
    nn.init.normal_(norm.weight)
    assert type(norm) is GroupNorm
    assert torch.equal(norm(x_BCHW), F.group_norm(x_BCHW, 32, norm.weight, norm.bias, EPS))
    assert norm.state_dict().keys() == nn.GroupNorm(32, 64).state_dict().keys()


# ----------------------------------------------------------------------------------------------- on a GPU, not compiled


class Moved(TorchDispatchMode):
    """Counts bytes that operators read and write, views left out, and notes copies of a map to NCHW."""

    def __init__(self):
        super().__init__()
        self.bytes, self.to_nchw = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        reads, writes = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in (args, out))
        if func.namespace == "aten" and not func.is_view:
            self.bytes += sum(t.numel() * t.element_size() for t in reads + writes)
        # the map's channels-last form went in, and something of its size came out in NCHW
        sizes = {t.numel() for t in reads if not t.is_contiguous() and t.ndim == 4}
        if any(t.ndim == 4 and t.is_contiguous() and t.numel() in sizes for t in writes):
            self.to_nchw.append(func)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_map_stays_channels_last_and_is_not_copied(dtype):
    with fake_cuda(autocast=dtype if dtype != torch.float32 else None) as waits:
        norm = make_norm("group", 128)
        x_BCHW = torch.empty(2, 128, 32, 32, dtype=dtype, memory_format=torch.channels_last)
        with Moved() as moved:
            y_BCHW = norm(x_BCHW)
        nchw = norm(x_BCHW.contiguous())
    assert not waits.seen and not moved.to_nchw
    assert y_BCHW.is_contiguous(memory_format=torch.channels_last) and not y_BCHW.is_contiguous()
    assert y_BCHW.dtype == nchw.dtype == torch.float32  # as torch's under autocast
    assert nchw.is_contiguous()  # torch's own
    # float32: read for the statistics, read and written when they are applied; bf16: converted once before
    per_value = {torch.float32: 4 * 3, torch.bfloat16: 2 + 4 * 4}[dtype]
    assert moved.bytes / x_BCHW.numel() == pytest.approx(per_value, rel=0.02)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_networks_stay_channels_last(autocast):
    seen = []
    with cudnn_convolutions(), fake_cuda(autocast=autocast):
        model = AugVAE(AugVAEConfig(**SHAPES["toy"], use_attn=True)).to(memory_format=torch.channels_last).train()
        for module in model.modules():
            if isinstance(module, (GroupNorm, nn.Conv2d, Upsample)):
                module.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
        model.decode(model.encode(torch.empty(2, 3, 16, 16, memory_format=torch.channels_last)).z_q)
    assert {type(module) for module, *_ in seen} == {GroupNorm, nn.Conv2d, Upsample}
    for module, *maps in seen:
        assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps), module


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_no_more_is_kept_for_the_backward_pass(autocast, monkeypatch):
    kept = {}
    for norm in (nn.GroupNorm, GroupNorm):
        monkeypatch.setattr("latent_verse.augvae.layers.GroupNorm", norm)
        with cudnn_convolutions(), fake_cuda(autocast=autocast):
            network = ResnetBlock(128, 128, 0.0, "group").to(memory_format=torch.channels_last)
            x_BCHW = torch.empty(2, 128, 64, 64, dtype=autocast, memory_format=torch.channels_last)
            with Kept(network) as held:
                network(x_BCHW.requires_grad_())
            kept[norm] = held.bytes
    assert kept[GroupNorm] <= 1.001 * kept[nn.GroupNorm]  # statistics of each channel, not of each group only


# --------------------------------------------------------------------------------------------------- on a GPU, compiled


def as_torch_compiles_it(x_BCHW, groups, weight_C, bias_C, eps):
    """What the compiler makes of F.group_norm on a GPU: `native_group_norm` of torch/_refs."""
    B, C, H, W = x_BCHW.shape
    x_BGS = x_BCHW.float().contiguous().reshape(B, groups, C // groups, H * W)
    var, mean = torch.var_mean(x_BGS, (2, 3), correction=0, keepdim=True)
    y_BCHW = ((x_BGS - mean) * torch.rsqrt(var + eps)).view(B, C, H, W)
    return y_BCHW * weight_C.view(1, C, 1, 1) + bias_C.view(1, C, 1, 1)


def block(channels: int, side: int, norm):
    """Makes what `generate` takes: a residual block whose norms are computed by `norm`, and 8 maps of bfloat16."""

    class Norm(nn.GroupNorm):
        def forward(self, x_BCHW):
            return norm(x_BCHW, self.num_groups, self.weight, self.bias, self.eps)

    def make():
        network = ResnetBlock(channels, channels, 0.0, "group").to(memory_format=torch.channels_last)
        for name in ("norm1", "norm2"):
            setattr(network, name, Norm(32, channels, eps=EPS))
        x_BCHW = torch.empty(8, channels, side, side, dtype=torch.bfloat16, memory_format=torch.channels_last)
        return network, (x_BCHW.requires_grad_(),)

    return make


def accesses(kernel: str) -> list[str]:
    """The index expressions of a kernel's loads and stores."""
    found = []
    for match in re.finditer(r"tl\.(?:load|store)\(\w+ \+ ", kernel):
        depth, end = 0, match.end()
        while depth or kernel[end] != ",":
            depth += {"(": 1, ")": -1}.get(kernel[end], 0)
            end += 1
        found.append(kernel[match.end() : end])
    return found


def scattered(kernel: str) -> list[str]:
    """Accesses of a kernel of maps whose neighbours lie apart in memory, along whichever of its indices one walks.

    Triton gives consecutive threads consecutive values of the index along which addresses are consecutive. Where runs
    are shorter than 32, a warp's access falls into several transactions.
    """
    numel = {name: int(n) for name, n in re.findall(r"^ +(\w+?)numel = (\d+)$", kernel, re.M)}
    if math.prod(n for name, n in numel.items() if name != "r") < 2**20:  # of weights or statistics
        return []
    parts = re.findall(r"^ +((?:[xy]|r\d_)\d+) = ([\w %/*+()]+)$", kernel, re.M)
    found = []
    for expression in accesses(kernel):
        near = []
        for walked, n in numel.items():
            at = {f"{name}index": torch.zeros(min(n, 4096), dtype=torch.long) for name in numel}
            at[f"{walked}index"] = torch.arange(min(n, 4096))
            for name, value in parts:
                at[name] = eval(value, {}, at)
            step = torch.as_tensor(eval(expression, {}, at)).expand(min(n, 4096)).diff()
            near.append(((step == 0) | (step == 1)).double().mean().item() if n > 1 else 0.0)
        if max(near) < 31 / 32:
            found.append(expression)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "side"), [(256, 32), (128, 128)])
def test_compiled_for_an_h100_it_reads_as_memory_lies_and_moves_less(channels, side):
    pytest.importorskip("triton")
    from tests.sm90 import generate

    moved, apart = {}, {}
    for norm in (channels_last_group_norm, as_torch_compiles_it):
        with cudnn_convolutions():
            codes = generate(block(channels, side, norm), autocast=torch.bfloat16)
        moved[norm] = sum(code.triton_bytes for code in codes)
        kernels = {name: kernel for code in codes for name, kernel in code.kernels.items()}
        apart[norm] = {name: s for name, kernel in kernels.items() if (s := scattered(kernel))}
    assert not apart[channels_last_group_norm]
    assert apart[as_torch_compiles_it] or channels != 256  # with 128, torch's compiled form reads well too
    assert moved[channels_last_group_norm] < 0.5 * moved[as_torch_compiles_it]
