"""float64 on a device that has none; float32 where settings ask for less; norms and the stream in bfloat16."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from latent_verse.augvae.quantizer import perplexity
from latent_verse.nn.precision import FLOAT32_SETTINGS, LayerNorm, as_residual_stream, full_float32, in_float64


class OnMPS(torch.Tensor):
    """A tensor that says it is on mps."""

    device = torch.device("mps")

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64")


def test_float64_is_on_the_cpu_where_the_device_is_mps():
    x = torch.tensor([0.1, 0.2])
    for found in (in_float64(x), in_float64(x.as_subclass(OnMPS))):
        assert type(found) is torch.Tensor and torch.equal(found, x.double())


def test_perplexity_of_counts_on_mps():
    counts_K = torch.tensor([5, 3, 0, 2])
    assert torch.equal(perplexity(counts_K.as_subclass(OnMPS)), perplexity(counts_K))


# ------------------------------------------------------------------------------------------------------- full float32

# Each case in a process of its own: PyTorch cannot take all of these settings back.
IN_A_PROCESS = """
import json, os, sys, warnings, torch
from latent_verse.nn.precision import full_float32
warnings.simplefilter("ignore")
B = torch.backends
PLACES = [("generic", "all"), *((b, op) for b in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn"))]
LEGACY = (torch.get_float32_matmul_precision, torch._C._get_cublas_allow_tf32, torch._C._get_cudnn_allow_tf32)

def legacy(getter):
    try:
        return getter()
    except RuntimeError:
        return "raises"

def state():
    return [torch._C._get_fp32_precision_getter(*p) for p in PLACES] + [legacy(g) for g in LEGACY]

def following():  # what comes of a later change of the general setting
    before, out = B.fp32_precision, []
    for B.fp32_precision in ("ieee", "tf32"):
        out.append(state())
    B.fp32_precision = before
    return out

def case(change):
    exec(change)
    before = state(), following()
    try:
        with full_float32("cpu"):
            inside = state()
            with full_float32("cpu"):
                nested = state()
            assert nested == state() == inside
            1 / 0
    except ZeroDivisionError:
        pass
    wanted = [p for p in PLACES if p[1] in ("matmul", "conv")]
    return all(inside[PLACES.index(p)] == "ieee" for p in wanted), (state(), following()) == before

for change in json.loads(sys.argv[1]):
    sys.stdout.flush()
    if os.fork() == 0:
        print(json.dumps([change, *case(change)]))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""
CHANGES = [
    "pass",
    *(f"torch.set_float32_matmul_precision('{p}')" for p in ("medium", "high", "highest")),
    "B.cuda.matmul.allow_tf32 = True",
    "B.cudnn.allow_tf32 = False",
    *(f"B.cuda.matmul.fp32_precision = '{p}'" for p in ("tf32", "ieee")),
    *(f"B.cudnn.conv.fp32_precision = '{p}'" for p in ("tf32", "ieee", "none")),
    "B.cudnn.fp32_precision = 'tf32'",
    *(f"B.fp32_precision = '{p}'" for p in ("tf32", "bf16", "ieee")),
    *(f"B.mkldnn.{op}.fp32_precision = 'bf16'" for op in ("matmul", "conv")),
    "torch.set_float32_matmul_precision('high'); B.cuda.matmul.fp32_precision = 'none'",
    "B.cuda.matmul.fp32_precision = 'tf32'; B.mkldnn.matmul.fp32_precision = 'bf16'; B.fp32_precision = 'tf32'",
]


def test_every_setting_is_ieee_inside_and_afterwards_what_it_was():
    """Also what older switches say, the errors of mixed ones among it, and after an exception."""
    command = [sys.executable, "-c", IN_A_PROCESS, json.dumps(CHANGES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [[change, True, True] for change in CHANGES], done.stderr


def test_full_float32_switches_autocast_off():
    x = torch.randn(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_float32("cpu"):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.parametrize("autocast", [False, True])
def test_codes_are_computed_in_full_float32_from_the_image_on(tiny_augvae, tiny_images, autocast):
    model, x, seen = tiny_augvae(), tiny_images(), []
    plain = model.codes(x)
    conv = torch.backends.mkldnn.conv
    before = conv.fp32_precision
    model.encoders[0].conv_in.register_forward_hook(
        lambda *_: seen.append({s.fp32_precision for s in FLOAT32_SETTINGS})
    )
    try:
        conv.fp32_precision = "bf16"  # on a CPU with such units, convolutions change by 1 %
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            assert torch.equal(model.codes(x), plain)
        assert conv.fp32_precision == "bf16"
        model.features(x)
    finally:
        conv.fp32_precision = before
    assert seen[0] == {"ieee"}
    assert "bf16" in seen[1]  # training may choose


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_the_residual_stream_is_lowered_under_an_autocast_to_bfloat16_only(autocast, given):
    x = torch.randn(3, 4, dtype=given)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        stream = as_residual_stream(x)
    assert stream.dtype == (torch.bfloat16 if autocast is torch.bfloat16 else given)
    torch.testing.assert_close(stream, x.to(stream.dtype), rtol=0, atol=0)


def norms(dtype: torch.dtype, autocast: bool) -> list[torch.Tensor]:
    """LayerNorm(x) of float32 weights for x in `dtype`, and the gradients of x and the weights; then nn.LayerNorm's."""
    torch.manual_seed(0)
    found = []
    ours, plain = LayerNorm(256), nn.LayerNorm(256)
    with torch.no_grad():
        ours.weight.normal_(1, 0.2)
        ours.bias.normal_()
    plain.load_state_dict(ours.state_dict())
    upstream = torch.randn(64, 256)
    x = (torch.randn(64, 256) + 30).to(dtype)  # statistics in bfloat16 would lose the mean's last digits
    for norm, given in ((ours, x.clone()), (plain, x.float())):
        given.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = norm(given)
        (y.float() * upstream).sum().backward()
        found += [y, given.grad, norm.weight.grad, norm.bias.grad]
    return found


@pytest.mark.parametrize("autocast", [False, True])
def test_layer_norm_of_bfloat16_has_statistics_in_float32(autocast):
    y, *gradients, plain, dx, dw, db = norms(torch.bfloat16, autocast)
    assert y.dtype == gradients[0].dtype == torch.bfloat16
    assert gradients[1].dtype == gradients[2].dtype == torch.float32
    torch.testing.assert_close(y.float(), plain, rtol=2**-7, atol=2**-6)
    for gradient, expected in zip(gradients, (dx, dw, db), strict=True):
        assert (gradient.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_layer_norm_of_float32_is_torchs_to_the_bit(autocast):
    found = norms(torch.float32, autocast)
    torch.testing.assert_close(found[:4], found[4:], rtol=0, atol=0)


def test_layer_norm_of_bfloat16_weights_is_torchs():
    norm = LayerNorm(16).bfloat16()
    x = torch.randn(3, 16).bfloat16()
    assert torch.equal(norm(x), nn.LayerNorm(16).bfloat16()(x))
    assert list(norm.state_dict()) == ["weight", "bias"]
