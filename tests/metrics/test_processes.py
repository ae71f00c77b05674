"""Items shared among processes, and what lacks float64 on mps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from latent_verse.metrics.image_quality import FrechetDistance
from latent_verse.metrics.processes import Ranks


def test_sums_in_float64_stay_on_the_cpu_beside_mps():
    """Moved as `module.to("mps")` does it, which lacks float64."""
    metric = FrechetDistance(2)
    assert metric._apply(lambda tensor: SimpleNamespace(device=torch.device("mps"))) is metric
    for real in (True, False):
        metric.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]) + real, real)
    assert metric.real_features_sum.dtype == torch.float64 and metric.compute().item() == pytest.approx(2)


def test_items_of_all_processes_are_in_order_of_their_numbers():
    assert list(Ranks().gather({3: "c", 1: "a"}).items()) == [(1, "a"), (3, "c")]
    assert list(Ranks(1, 3).mine(8)) == [1, 4, 7]
