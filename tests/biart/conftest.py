"""Fixtures of several files here."""

from __future__ import annotations

import pytest

from latent_verse.biart import kept, sampling
from latent_verse.biart.kept import Kept
from tests.biart.recorded_graphs import RecordedGraphs


@pytest.fixture
def recorded(monkeypatch):
    """On the CPU, decoders are kept and their steps recorded, as on a GPU."""
    monkeypatch.setattr(sampling, "CUDAGraphs", RecordedGraphs)
    monkeypatch.setattr(sampling, "can_capture", lambda model, device: True)
    monkeypatch.setattr(sampling, "_kept", Kept())
    monkeypatch.setattr(kept, "memory", lambda device: (2**40, 2**40))
    RecordedGraphs.captures = RecordedGraphs.replays = 0
    return RecordedGraphs
