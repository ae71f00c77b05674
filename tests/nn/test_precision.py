"""float64 on a device that has none."""

from __future__ import annotations

import torch

from latent_verse.augvae.quantizer import perplexity
from latent_verse.nn.precision import in_float64


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
