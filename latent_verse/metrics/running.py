"""Running mean and count over batches and processes, exact also in half-precision runs."""

from __future__ import annotations

import torch
from torchmetrics import Metric

from latent_verse.nn.precision import keeping_float32


class Mean(Metric):
    """Weighted mean of all values; NaN if one of them is NaN, or if there are none.

    torchmetrics' MeanMetric looks for NaN at each update and so waits for the device; without that check it ignores the
    weights (version 1.9). Its sums follow their module to half precision and then stop growing; these stay float32.
    """

    full_state_update = False
    sum: torch.Tensor
    weight: torch.Tensor

    def __init__(self):
        super().__init__()
        self.add_state("sum", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros(()), dist_reduce_fx="sum")

    def _apply(self, fn, *args, **kwargs):
        return super()._apply(keeping_float32(fn), *args, **kwargs)

    def update(self, value: torch.Tensor, weight: torch.Tensor | float = 1.0) -> None:
        """Add the values of a tensor of any shape; `weight` is that of each."""
        self.sum += (value.to(self.sum.dtype) * weight).sum()
        self.weight += weight * value.numel()

    def compute(self) -> torch.Tensor:
        """The mean, a scalar."""
        return self.sum / self.weight


class Count(Metric):
    """A count over all batches and processes."""

    full_state_update = False
    number: torch.Tensor

    def __init__(self):
        super().__init__()
        self.add_state("number", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, more: int) -> None:
        """Add `more`."""
        self.number += more

    def compute(self) -> torch.Tensor:
        """The sum, a scalar, int64."""
        return self.number
