"""What several files of tests use: an AugVAE's checkpoint, and a guard against building."""

from __future__ import annotations

from pathlib import Path

import pytest

from latent_verse.biart.model import BiART
from tests.small_checkpoints import own_ckpt


@pytest.fixture
def file(tiny_augvae, tmp_path) -> Path:
    return own_ckpt(tiny_augvae(), tmp_path / "a.ckpt")


@pytest.fixture
def unbuilt_biart(monkeypatch):
    """Fails a test that makes a large BiART."""
    make = BiART.__init__

    def made(self, config):
        assert config.n_layer < 1000
        make(self, config)

    monkeypatch.setattr(BiART, "__init__", made)
