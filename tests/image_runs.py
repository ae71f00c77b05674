"""Small pictures on disk and the flags of runs on them that take a second; for the tests of the scripts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

# 16 px, levels 8 and 4, 3 steps an epoch on 12 pictures
SMALL = (
    "--hidden_dim 32 --ch_mult 1 1 --num_res_blocks 1 --resolution 16 --attn_resolutions 8 4 --z_channels 16 "
    "--codebook_dim 8 --num_tokens 32 --batch_size 4 --num_workers 0 --epochs 1 --logger csv --log_every_n_steps 1 "
    "--refresh_rate 0 --gpus 0"
).split()


def write_pictures(folder: Path, count: int, classes: int = 2) -> Path:
    """`count` different PNG pictures of 20 x 24 px in class folders; returns `folder`."""
    for i in range(count):
        rng = np.random.RandomState(i)
        pixels = np.clip(rng.randint(0, 256, 3) + rng.randint(-40, 40, (24, 20, 3)), 0, 255).astype(np.uint8)
        place = folder / f"class{i % classes}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i:03d}.png")
    return folder
