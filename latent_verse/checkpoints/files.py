"""Reading any checkpoint: which file of a folder, whether it is whole, what training can resume from it.

Files are read with `weights_only=True`: nothing in them can run code. The one class allowed beyond tensors and plain
types is argparse.Namespace, which released files hold their settings in.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latent_verse.config import UserError, as_plain, training_only
from latent_verse.files import differences

STEP = re.compile(r"step=(\d+)\.ckpt$")


class CheckpointError(UserError):
    """A checkpoint is absent, damaged, of another kind, or does not fit. The message names the file and the remedy."""


def read_ckpt(file: str | os.PathLike) -> dict[str, Any]:
    """A Lightning checkpoint's content, on the CPU, memory-mapped.

    Raises:
        CheckpointError: absent, truncated, not a checkpoint, or in need of code to be run.
    """
    file = Path(file)
    if not file.is_file():
        near = sorted(p.name for p in file.parent.glob("*.ckpt")) if file.parent.is_dir() else []
        raise CheckpointError(
            f"checkpoint {file} does not exist.{' That folder holds: ' + ', '.join(near) if near else ''}"
        )
    if file.suffix == ".safetensors":  # some versions of PyTorch read it, others take it for a pickle of code
        raise CheckpointError(f"{file} holds weights alone: it is no Lightning checkpoint, whose name ends in .ckpt.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except PermissionError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except Exception as error:  # pickle, zipfile and torch raise kinds of their own for a damaged file
        refused = re.search(r"GLOBAL ([\w.]+)|global ([\w.]+)|class ([\w.]+)", str(error))
        if "Unsupported" in str(error) or refused:
            name = next(filter(None, refused.groups())) if refused else "something that is no plain data"
            raise CheckpointError(
                f"{file} is refused: it names {name}, and reading that would run code. "
                "Only tensors, plain types and argparse.Namespace are read."
            ) from error
        raise CheckpointError(f"{file} is no whole checkpoint; was it cut off? ({first_line(error)})") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{file} holds no state_dict: it is no Lightning checkpoint.")
    return content


def find_checkpoint(path: Path) -> Path:
    """The best checkpoint of a run folder, or its newest where none is best; any other path as it is."""
    for folder in (path / "checkpoints", path):
        files = list(folder.glob("*.ckpt")) if folder.is_dir() else []
        chosen = newest(files, "best-") or newest(files)
        if chosen:
            return chosen
    return path


def newest(files: Iterable[Path], prefix: str = "") -> Path | None:
    """The checkpoint with the highest step in its name (`...step=N.ckpt`), whatever the order of names or times."""
    found = [(step_of(p), str(p), p) for p in files if p.name.startswith(prefix) and step_of(p) is not None]
    return max(found)[2] if found else None


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name, None where there is none."""
    match = STEP.search(checkpoint.name)
    return int(match[1]) if match else None


def starting_point(states: list[Path], ckpt_path: str | None, kind: str, model=None) -> Path | None:
    """The checkpoint that training continues from, None to begin anew.

    Args:
        states: the run's own checkpoints, newest first (runs.states); a damaged one yields to the one before, with a
            warning.
        ckpt_path: of --resume; a run folder stands for its newest. The run's own go first where further on.
        model: configuration of the model to be trained, which the checkpoint's must equal in shape.

    Raises:
        CheckpointError: ckpt_path cannot be continued from, or none of the run's own checkpoints can.
    """
    given, given_step = None, -1
    if ckpt_path is not None:
        place = Path(ckpt_path)
        folders = [place / "backups", place / "checkpoints", place]
        given = newest(f for d in folders for f in d.glob("*.ckpt")) if place.is_dir() else place
        if given is None:
            raise CheckpointError(
                f"ckpt_path: the folder {place} holds no .ckpt to continue from. To start from the weights of a bundle "
                "or of save_pretrained, give it as --pretrained_path."
            )
        given_step = check_resumable(given, kind, model)
    problem = None
    for own in states:
        try:
            step = check_resumable(own, kind, model)
        except CheckpointError as error:
            problem = error
            warnings.warn(f"{error} Trying the checkpoint before it.", stacklevel=2)
            continue
        return own if step >= given_step else given
    if problem and given is None:
        raise problem
    return given


def check_resumable(file: str | os.PathLike, kind: str, model=None) -> int:
    """Refuse a file that training of `kind` cannot continue from. Returns its step.

    Raises:
        CheckpointError: damaged, of another kind or shape, or without the optimiser's state.
    """
    content = read_ckpt(file)
    own = content.get("latent_verse") or {}
    found = own.get("kind")
    if found != kind or "optimizer_states" not in content:
        what = f"a checkpoint of {found}" if found else "not one of this project's training checkpoints"
        remedy = {
            "augvae": "To start from its weights alone, give it as --pretrained_path.",
            "biart": "Give a checkpoint or run folder of train_biart.py; an AugVAE goes to --vae_path, a bundle to "
            "--pretrained_path.",
        }[kind]
        raise CheckpointError(f"{file} is {what}; training of {kind} cannot resume from it. {remedy}")
    if model is not None:
        wanted, there = as_plain(model), own.get("model", {})
        shape = {name: value for name, value in wanted.items() if name not in training_only(type(model))}
        defaults = {f.name: f.default for f in dataclasses.fields(model)}  # of settings newer than the file
        changed = differences(defaults | there, shape)
        if changed:
            raise CheckpointError(f"{file} is of a model with different settings:\n  " + "\n  ".join(changed))
    return int(content.get("global_step", 0))


def fill(model: nn.Module, state: dict[str, torch.Tensor], file: Path) -> None:
    """Load `state` into `model`; keys and shapes must be the same.

    Raises:
        CheckpointError: listing what is missing, unknown or of another shape.
    """
    wanted = model.state_dict()
    problems = [f"missing {k}" for k in wanted if k not in state]
    problems += [f"unknown {k}" for k in state if k not in wanted]
    problems += [
        f"{k} has shape {tuple(state[k].shape)}, not {tuple(wanted[k].shape)}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"{file} does not fit the model:\n  " + "\n  ".join(problems[:20]) + more)
    model.load_state_dict(state)


def fetch_from_hub(name: str, files: Iterable[str]) -> Path:
    """Fetch these files (names or patterns) of a hub id into Hugging Face's cache; returns their folder.

    Raises:
        CheckpointError: not a path here, and not to be fetched.
    """
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith((".ckpt", ".safetensors")):
        raise CheckpointError(f"{name} does not exist; give a .ckpt file, a folder of save_pretrained, or a hub id.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # huggingface_hub and its HTTP client raise kinds of their own
        raise CheckpointError(
            f"{name} is no file or folder here, and could not be fetched from the hub: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of a model's weights, their names, types and shapes: the same wherever the model lies.

    Settings are left out, or a version of this program with one more setting would not know its own models.
    """
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
