"""Small checkpoints as runs write them, and ways to damage files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_verse.augvae.model import AugVAE
from latent_verse.checkpoints.ckpt_files import CheckpointError
from latent_verse.config.train import TrainVAEConfig
from latent_verse.training.augvae import LitAugVAE
from tests.messages import naming

WEIGHT = "model.encoders.0.conv_in.bias"  # (32,)


def own_ckpt(model: AugVAE, file: Path, **changes) -> Path:
    """A file as LitAugVAE under Lightning writes it: the module's state dict, and what describes it."""
    lit = LitAugVAE(model, TrainVAEConfig(model=model.config))
    content = {"state_dict": lit.state_dict(), "global_step": 1, "optimizer_states": [{}]}
    lit.on_save_checkpoint(content)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | changes, file)
    return file


def put(*path: object, value: object) -> Callable[[Any], None]:
    """A change of a checkpoint's content: `put("state_dict", "a", value=1)`; callable values get what is there."""

    def change(content: Any) -> None:
        *rest, last = path
        for name in rest:
            content = content[name]
        content[last] = (
            value(content.get(last) if isinstance(content, dict) else content[last]) if callable(value) else value
        )

    return change


def changed(file: Path, change: Callable[[Any], object], to: Path | None = None) -> Path:
    """Write a checkpoint again, to the same file or another, after `change` has been made in its content."""
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, to or file)
    return to or file


def flip(file: Path, position: int) -> None:
    """Change one byte of a file."""
    data = bytearray(file.read_bytes())
    data[position] ^= 0x5A
    file.write_bytes(data)


def one_line(load, file, *facts) -> str:
    """The message that loading a damaged file fails with: one line, not long, that names it and `facts`."""
    with pytest.raises(CheckpointError, match=naming(file, *facts)) as error:
        load(file)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600, message
    return message


def many() -> list:
    """A list of 2**60 items, in a few bytes of a file: each of 60 lists holds the one before it twice."""
    items: list = [0]
    for _ in range(60):
        items = [items, items]
    return items


def replaced_by(file: Path, kind: str) -> None:
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
