"""What short runs of train_biart.py and eval_biart.py need."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from latent_verse.metrics import networks
from tests.biart_runs import TINY
from tests.stand_ins import Colours, Words, write_pairs
from tests.tiny_lverse import make_lverse


@pytest.fixture
def world(tmp_path, tiny_augvae):
    """Twelve training and three validation pairs, and a 16 px AugVAE of 16 codes. Returns the flags that name them."""
    for split, numbers in (("train", range(12)), ("val", range(12, 15))):
        place = tmp_path / split
        place.mkdir()
        for i in numbers:
            pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{i:02d}.png")
            (place / f"{i:02d}.txt").write_text(f"picture {i}\nthe number {i}, again")
    tiny_augvae(single_level=4).save_pretrained(tmp_path / "vae")
    folders = {"train_dir": "train", "val_dir": "val", "vae_path": "vae", "log_dir": "runs"}
    return [*TINY, *(word for flag, name in folders.items() for word in (f"--{flag}", str(tmp_path / name)))]


@pytest.fixture
def no_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)


@pytest.fixture
def bundle(tiny_augvae, tmp_path):
    make_lverse(tiny_augvae(single_level=4), text_len=48).save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(networks, "open_inception", Colours)
    monkeypatch.setattr(networks, "open_clip_network", lambda *arguments: Words())


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs", 12)
