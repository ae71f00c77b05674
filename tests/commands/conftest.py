"""Pairs and an AugVAE for short runs of train_biart.py."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.biart_runs import TINY


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
