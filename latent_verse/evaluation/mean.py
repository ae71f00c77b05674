"""A weighted mean over batches and processes, and a count, which a half-precision run leaves exact."""

from __future__ import annotations

import torch
from torchmetrics import Metric

from latent_verse.precision import keeping_float32


class Mean(Metric):
    """Mean of all values given, each with its weight; NaN if one of them is, or if there is none.

    torchmetrics' MeanMetric looks for NaN at each update, for which it waits for the device; told not to, it forgets
    the weights (1.9). Cast to half precision with the module that holds it, its sums soon stand still; these do not.
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
    """How many there were, in all batches and processes."""

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
