"""A weighted mean over batches and processes."""

from __future__ import annotations

import torch
from torchmetrics import Metric


class Mean(Metric):
    """Mean of all values given, each with its weight; NaN if one of them is, or if there is none.

    torchmetrics' MeanMetric looks for NaN at each update, for which it waits for the device; told not to, it forgets
    the weights (1.9).
    """

    full_state_update = False
    sum: torch.Tensor
    weight: torch.Tensor

    def __init__(self):
        super().__init__()
        self.add_state("sum", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, value: torch.Tensor, weight: torch.Tensor | float = 1.0) -> None:
        """Add the values of a tensor of any shape; `weight` is that of each."""
        self.sum += (value * weight).sum()
        self.weight += weight * value.numel()

    def compute(self) -> torch.Tensor:
        """The mean, a scalar."""
        return self.sum / self.weight
