"""A tiny LVerse, and the bundle that it is saved as."""

from __future__ import annotations

import pytest

from tests.tiny_lverse import make_lverse


@pytest.fixture
def model(tiny_augvae):
    return make_lverse(tiny_augvae(single_level=4))


@pytest.fixture
def bundle(model, tmp_path):
    model.save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"
