"""The random number generators of a process continue where they were saved."""

from __future__ import annotations

import random

import numpy as np
import torch

from latent_verse.training.process_state import random_state, set_random_state


def test_random_numbers_go_on_where_they_were_saved_on_a_gpu_too(monkeypatch):
    gpu = torch.Generator().manual_seed(7)  # stands in for the GPU's, which dropout uses there
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", gpu.get_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", gpu.set_state)

    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(())), float(torch.rand((), generator=gpu))]

    state = random_state()
    first, second = draw(), draw()
    set_random_state(state)
    assert draw() == first != second
