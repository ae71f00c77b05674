"""float64 on a device that has none; norms and the residual stream in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from latent_verse.augvae.quantizer import perplexity
from latent_verse.nn.precision import LayerNorm, as_residual_stream, in_float64


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
    ours, plain = LayerNorm(32), nn.LayerNorm(32)
    with torch.no_grad():
        ours.weight.normal_(1, 0.2)
        ours.bias.normal_()
    plain.load_state_dict(ours.state_dict())
    upstream = torch.randn(8192, 32)
    x = (torch.randn(8192, 32) + 30).to(dtype)
    for norm, given in ((ours, x.clone()), (plain, x.float())):
        given.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = norm(given)
        (y.float() * upstream).sum().backward()
        found += [y, given.grad, norm.weight.grad, norm.bias.grad]
    return found


@pytest.mark.parametrize("autocast", [False, True])
def test_layer_norm_of_bfloat16_is_computed_in_float32(autocast):
    """With x far from 0 and many rows: statistics, or sums over rows, in bfloat16 would be off by some per cent."""
    y, *gradients, plain, dx, dw, db = norms(torch.bfloat16, autocast)
    assert y.dtype == gradients[0].dtype == torch.bfloat16
    assert gradients[1].dtype == gradients[2].dtype == torch.float32
    assert torch.equal(y, plain.bfloat16())
    for gradient, expected in zip(gradients, (dx, dw, db), strict=True):
        assert (gradient.float() - expected).norm() < 0.004 * expected.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_layer_norm_of_float32_is_torchs_to_the_bit(autocast):
    found = norms(torch.float32, autocast)
    torch.testing.assert_close(found[:4], found[4:], rtol=0, atol=0)


def test_layer_norm_of_bfloat16_weights_is_torchs():
    norm = LayerNorm(16).bfloat16()
    x = torch.randn(3, 16).bfloat16()
    assert torch.equal(norm(x), nn.LayerNorm(16).bfloat16()(x))
    assert list(norm.state_dict()) == ["weight", "bias"]
