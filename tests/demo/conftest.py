"""Demos whose stages cost nothing."""

from __future__ import annotations

import pytest

from latent_verse.demo import results
from latent_verse.demo import run as demo
from latent_verse.demo.run import Stage


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Replaces the plan by the stages that the test puts into this list, and the page by a file."""
    planned: list[Stage] = []
    monkeypatch.setattr(demo, "plan", lambda s, out: planned)
    monkeypatch.setattr(results, "write", lambda out, world, stages, seconds: (out, seconds))
    return planned
