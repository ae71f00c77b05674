"""Reading any Lightning checkpoint: which file of a folder to take, what it holds, whether a run can resume from it.

Files are read with `weights_only=True`, so nothing in them can run code. Beyond tensors and plain types, only
argparse.Namespace is allowed: released files keep their settings in one.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from latent_verse.config import AugVAEConfig, BiARTConfig, UserError, as_plain, training_only
from latent_verse.files import differences

Kind = Literal["augvae", "biart"]  # what a checkpoint says of itself
STEP = re.compile(r"step=(\d+)\.ckpt$")


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, of another kind, or does not fit. The message names the file and the remedy."""


def read_ckpt(file: str | os.PathLike) -> dict[str, Any]:
    """A Lightning checkpoint's content, on the CPU, memory-mapped.

    Raises:
        CheckpointError: the file is missing, truncated, not a checkpoint, or cannot be read without running code.
    """
    file = Path(file)
    if file.suffix == ".safetensors" and os.path.exists(file):  # PyTorch reads it, or takes it for a pickle of code
        raise CheckpointError(f"{file} contains only weights; expected a Lightning .ckpt.")
    try:
        file.open("rb").close()
    except (FileNotFoundError, NotADirectoryError) as error:
        near = ", ".join(sorted(p.name for p in file.parent.glob("*.ckpt"))) or "none"
        raise CheckpointError(f"checkpoint {file} does not exist; checkpoints beside it: {near}") from error
    except IsADirectoryError as error:
        there = ", ".join(sorted(p.name for p in file.glob("*"))[:10]) or "nothing"
        raise CheckpointError(f"{file} is a folder without a checkpoint; it holds {there}.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except Exception as error:  # pickle, zipfile and torch each raise their own for a damaged file
        cause: BaseException = error
        what = "is not a complete checkpoint; was it cut off? Or is it another file?"
        if type(error).__name__ == "UnpicklingError":  # pickle's; nothing here imports pickle
            what = "is refused: it is not complete, or holds more than tensors and plain types, which could run code"
            cause = error.__context__ or error
        # the first sentence: torch adds advice, such as to allow the code
        reason = f"{type(cause).__name__}: {first_line(cause).split('. ')[0]}".removesuffix(": ")
        raise CheckpointError(f"{file} {what} ({reason})") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{file} holds no state_dict; expected a Lightning checkpoint.")
    return content


def find_checkpoint(path: Path) -> Path:
    """The best checkpoint of a run folder, or its newest if none is named best; any other path unchanged.

    Raises:
        CheckpointError: the folder cannot be read, or see `newest`.
    """
    try:
        for folder in (path / "checkpoints", path):
            files = list(folder.glob("*.ckpt")) if folder.is_dir() else []
            stepped = [p for p in files if step_of(p) is not None]
            if stepped or (folder / "config.json").is_file():  # a saved AugVAE, whose weights are in another file
                files = stepped
            if chosen := newest(p for p in files if p.name.startswith("best-")) or newest(files):
                return chosen
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return path


def newest(files: Iterable[Path]) -> Path | None:
    """The checkpoint with the highest step in its name (`...step=N.ckpt`), or the only one. None if there is none.

    Raises:
        CheckpointError: there are several, and no name has a step.
    """
    ordered = sorted(files, key=lambda p: (step_of(p) is not None, step_of(p) or 0, str(p)))
    if len(ordered) > 1 and all(step_of(p) is None for p in ordered):
        raise CheckpointError(f"No step=N says which is the newest; give one of {', '.join(map(str, ordered))}.")
    return ordered[-1] if ordered else None


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name, None where there is none."""
    match = STEP.search(checkpoint.name)
    return int(match[1]) if match else None


def check_resumable(file: str | os.PathLike, kind: Kind, model: AugVAEConfig | BiARTConfig | None = None) -> int:
    """Refuse a file that training of `kind` cannot resume from. Returns its step.

    Raises:
        CheckpointError: the file is damaged, of another kind or shape, or lacks the optimiser's state.
    """
    content = read_ckpt(file)
    own = content.get("latent_verse") or {}
    found = own.get("kind")
    if found != kind or "optimizer_states" not in content:
        what = f"a checkpoint of {found}" if found else "not one of this project's training checkpoints"
        remedy = "To start from its weights alone, give it as --pretrained_path."
        if kind == "biart":
            remedy = "Give one of train_biart.py; an AugVAE belongs to --vae_path, a bundle to --pretrained_path."
        raise CheckpointError(f"{file} is {what}; training of {kind} cannot resume from it. {remedy}")
    if model is not None:
        wanted, there = as_plain(model), own.get("model", {})
        shape = {name: value for name, value in wanted.items() if name not in training_only(type(model))}
        defaults = {f.name: f.default for f in dataclasses.fields(model)}  # of settings newer than the file
        if changed := differences(defaults | there, shape):
            raise CheckpointError(f"{file} is of a model with different settings:\n  " + "\n  ".join(changed))
    return int(content.get("global_step", 0))


def fill(model: nn.Module, state: dict[str, torch.Tensor], file: Path) -> None:
    """Load `state`, which `file` holds, into `model`; keys and shapes must be the same.

    Raises:
        CheckpointError: keys are missing, unknown or of another shape; the message lists them.
    """
    wanted = model.state_dict()
    problems = [f"missing {k}" for k in wanted if k not in state]
    problems += [f"unknown {k}" for k in state if k not in wanted]
    shapes = {k: (tuple(state[k].shape), tuple(wanted[k].shape)) for k in wanted if k in state}
    problems += [f"{k} has shape {there}, not {here}" for k, (there, here) in shapes.items() if there != here]
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"{file} does not fit the model:\n  " + "\n  ".join(problems[:20]) + more)
    model.load_state_dict(state)


def fetch_from_hub(name: str, files: Iterable[str]) -> Path:
    """Fetch files (names or patterns) of a hub id into Hugging Face's cache. Returns their folder.

    Raises:
        CheckpointError: `name` is an absent path, or cannot be fetched.
    """
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith((".ckpt", ".safetensors")):
        raise CheckpointError(f"{name} does not exist; give a .ckpt file, a folder of save_pretrained, or a hub id.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # huggingface_hub and its HTTP client each raise their own
        raise CheckpointError(f"{name} is not a file or folder, nor on the hub: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """An error's message without the details that follow its first line."""
    return str(error).strip().split("\n")[0]


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of a model's weights, names, types and shapes, but not of its device or settings."""
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
