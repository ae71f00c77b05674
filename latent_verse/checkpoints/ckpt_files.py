"""Reading any Lightning checkpoint: which file of a folder to take, what it holds, whether a run can resume from it.

Files are read with `weights_only=True`, so nothing in them can run code. Beyond tensors and plain types, only
argparse.Namespace is allowed: released files keep their settings in one. A file is used only if its checksums are
right and its tensors are ordinary and finite (`checks.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from latent_verse.checkpoints.checks import CheckpointError, check_tensors, number_in, settings_from
from latent_verse.checkpoints.pickle_scan import check_pickles
from latent_verse.checkpoints.shipped import located
from latent_verse.config import AugVAEConfig, BiARTConfig, as_plain, training_only
from latent_verse.config.messages import differences, reason
from latent_verse.config.settings import is_count, is_number

Kind = Literal["augvae", "biart"]  # what a checkpoint says of itself
Result = TypeVar("Result")
STEP = re.compile(r"step=(\d+)[^=/]*\.ckpt$")  # also of `step=4-v1.ckpt` and `step=4 (copy).ckpt`
MONITOR = "val/total_loss"  # the best checkpoint has the smallest
KNOWN = 64  # whole files that are remembered


def read_ckpt(file: str | os.PathLike) -> dict[str, Any]:
    """A Lightning checkpoint's content, on the CPU, memory-mapped. All of the file has been checked.

    Raises:
        CheckpointError: the file is missing, damaged, not a checkpoint, cannot be read without running code, or holds
            weights that are not finite.
    """
    file = Path(file)
    if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):  # would never end, or never begin
        raise CheckpointError(f"{file} is a pipe or device; expected a Lightning .ckpt.")
    if file.suffix == ".safetensors" and os.path.exists(file):  # PyTorch reads it, or takes it for a pickle of code
        remedy = "To train from its weights, give it as --pretrained_path."
        raise CheckpointError(f"{file} contains only weights; expected a Lightning .ckpt. {remedy}")
    try:
        with file.open("rb") as opened:
            identity = _identity(os.fstat(opened.fileno()))
    except (FileNotFoundError, NotADirectoryError) as error:
        near = ", ".join(sorted(p.name for p in file.parent.glob("*.ckpt"))) or "none"
        raise CheckpointError(f"checkpoint {file} does not exist; checkpoints beside it: {near}") from error
    except IsADirectoryError as error:
        there = ", ".join(sorted(p.name for p in file.glob("*"))[:10]) or "nothing"
        raise CheckpointError(f"{file} is a folder without a checkpoint; it holds {there}.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    known = identity in _whole
    if not known and zipfile.is_zipfile(file):
        _check_archive(file)
    content = _content(file)
    if not known:
        check_tensors(content["state_dict"], file)
        _whole[identity] = content.get("latent_verse") or {}
        if len(_whole) > KNOWN:
            del _whole[next(iter(_whole))]
    return content


# what whole files say of themselves, by their `_identity`: a command asks several times, and to read a file takes
# seconds per gigabyte, to unpickle its thousand tensors half a second
_whole: dict[tuple[int, ...], dict[str, Any]] = {}


def _identity(about: os.stat_result) -> tuple[int, ...]:
    """What tells a file from another that the same path held before."""
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def described(file: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint of this project says of itself: kind, model, settings and more, as plain types.

    Raises:
        CheckpointError: as `read_ckpt`, where the file is not known to be whole.
    """
    with contextlib.suppress(OSError, ValueError):
        if found := _whole.get(_identity(os.stat(file))):
            return found
    return read_ckpt(file).get("latent_verse") or {}


def read_named(file: Path) -> dict[str, Any]:
    """As `read_ckpt`, of a file that the user named: if it is damaged, the message names a whole one beside it."""
    try:
        return read_ckpt(file)
    except CheckpointError as error:
        near: list[Path] = []
        with contextlib.suppress(CheckpointError):
            near = checkpoints_in(file.parent) if os.path.isfile(file) else []
        if whole := next((other.name for other in near if other != file and _is_whole(other)), None):
            raise CheckpointError(f"{error} Whole beside it: {whole}.") from error
        raise


def _is_whole(file: Path) -> bool:
    try:
        read_ckpt(file)
    except CheckpointError:
        return False
    return True


def _check_archive(file: Path) -> None:
    """Compare the checksums of a zip archive, which torch.save writes and torch.load does not read."""
    _check_parts(file)
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises many for a damaged file
        raise _unreadable(file, error) from error
    if damaged is not None:
        part = damaged.partition("/")[2]
        raise CheckpointError(f"{file} is not a complete checkpoint: it was damaged after it was written ({part}).")


def _check_parts(file: Path) -> None:
    """Check what a zip archive declares of its parts, before any is read."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except Exception as error:  # as above
        raise _unreadable(file, error) from error
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
        raise CheckpointError(f"{file} is refused: it is compressed, which torch.save does not do.")
    if sum(e.file_size for e in entries) > os.path.getsize(file):
        raise CheckpointError(f"{file} is damaged: its parts are larger than the file.")


def _content(file: Path) -> dict[str, Any]:
    """The content of a file, whose kind is checked, but not its checksums and tensors: quick."""
    if zipfile.is_zipfile(file):
        _check_parts(file)
    try:
        check_pickles(file)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except CheckpointError:
        raise
    except Exception as error:  # pickle, zipfile and torch each raise their own for a damaged file
        raise _unreadable(file, error) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{file} holds no state_dict; expected a Lightning checkpoint.")
    for name in ("state_dict", "latent_verse", "hyper_parameters", "callbacks"):
        if not isinstance(found := content.get(name) or {}, dict):
            raise CheckpointError(f"{file} is damaged, or of another program: its {name} is a {type(found).__name__}.")
    for name in ("global_step", "epoch"):
        if not is_count(content.get(name, 0)):
            kind = type(content[name]).__name__
            raise CheckpointError(f"{file} is damaged: its {name} is not a count ({kind}).")
    kind = (content.get("latent_verse") or {}).get("kind", "")
    if not isinstance(kind, str):
        raise CheckpointError(f"{file} is damaged: its kind is a {type(kind).__name__}.")
    return content


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    cause: BaseException = error
    what = "is not a complete checkpoint; was it cut off? Or is it another file?"
    if type(error).__name__ == "UnpicklingError":  # pickle's; nothing here imports pickle
        what = "is refused: it is not complete, or holds more than tensors and plain types, which could run code"
        cause = error.__context__ or error
    # the first sentence: torch adds advice, such as to allow the code
    why = reason(cause).split(". ")[0]
    return CheckpointError(f"{file} {what} ({type(cause).__name__}: {why})")


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The best checkpoint of a run folder, or its newest if none is named best; any other path as `located` gives it.

    The best has the smallest score, the newest the highest step that is stored. A damaged one is skipped with a
    warning.

    Raises:
        CheckpointError: the folder cannot be read, all are damaged, or nothing says which is the newest.
        ConfigError: as `config.settings.expand`.
    """
    path = Path(located(path))
    skipped: dict[Path, CheckpointError] = {}
    for folder in (path / "checkpoints", path):
        files = checkpoints_in(folder)
        stepped = [p for p in files if step_of(p) is not None]
        if stepped or os.path.isfile(folder / "config.json"):  # a saved AugVAE, whose weights are in another file
            files = stepped
        best = [p for p in files if p.name.startswith("best-")]
        for group in (best, [p for p in files if p not in best]):
            ordered = in_order(group, skipped, best=group is best)
            if found := first_usable(ordered, _if_whole, skipped):
                return found
    if skipped:
        raise next(iter(skipped.values()))
    return path


def _if_whole(file: Path) -> Path:
    read_ckpt(file)
    return file


def in_order(files: Iterable[Path], skipped: dict[Path, CheckpointError], best: bool = False) -> list[Path]:
    """Checkpoints, the newest first by the step that they store, or the `best` first by their score.

    Those that cannot be read are left out, and noted in `skipped`. Equals are in the order given.

    Raises:
        CheckpointError: neither says which of several is the newest.
    """
    keys: dict[Path, tuple] = {}
    for file in files:
        try:
            content = _content(file)
        except CheckpointError as error:
            skipped[file] = error
            continue
        named, score = step_of(file), score_of(content) if best else None
        step = (content.get("global_step", 0), -1 if named is None else named)
        keys[file] = (score is not None, -(score or 0.0), *step)
    ordered = sorted(keys, key=lambda file: keys[file], reverse=True)
    if len(ordered) > 1 and step_of(ordered[0]) is None and keys[ordered[0]] == keys[ordered[1]]:
        shown = ", ".join(map(str, sorted(ordered)))
        raise CheckpointError(f"No step=N says which is the newest; give one of {shown}.")
    return ordered


def first_usable(
    files: Iterable[Path], use: Callable[[Path], Result], skipped: dict[Path, CheckpointError]
) -> Result | None:
    """What `use` gives for the first file that it does not refuse; a warning names those that were `skipped` for it.

    None, without a warning, if it refuses all; they are added to `skipped`.
    """
    for file in files:
        try:
            result = use(file)
        except CheckpointError as error:
            skipped[file] = error
            continue
        for said in skipped.values():
            warnings.warn(f"{said} Taking {file} in its place.", stacklevel=3)
        return result
    return None


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name, None where there is none."""
    match = STEP.search(checkpoint.name)
    return int(match[1]) if match else None


def score_of(content: dict[str, Any]) -> float | None:
    """The validation loss of a checkpoint when it was saved; older ones have it in the state of ModelCheckpoint."""
    scores = (content.get("latent_verse") or {}).get("score")
    found = [scores.get(MONITOR)] if isinstance(scores, dict) else []
    for state in (content.get("callbacks") or {}).values():
        if isinstance(state, dict) and state.get("monitor") == MONITOR:
            found.append(state.get("current_score"))
    return next((float(score) for score in map(number_in, found) if is_number(score)), None)


def checkpoints_in(folder: Path) -> list[Path]:
    """The .ckpt files of a folder, sorted backwards; none if it is not a folder.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return sorted((p for p in folder.glob("*.ckpt") if p.is_file()), reverse=True) if os.path.isdir(folder) else []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


def check_resumable(
    file: str | os.PathLike,
    kind: Kind,
    model: AugVAEConfig | BiARTConfig | None = None,
    content: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Refuse a file that training of `kind` cannot resume from. Returns its content, which may be given if it is read.

    Raises:
        CheckpointError: the file is damaged, of another kind or shape, or lacks the optimiser's state.
    """
    content = read_ckpt(file) if content is None else content
    own = content.get("latent_verse") or {}
    found = own.get("kind")
    if found != kind or "optimizer_states" not in content:
        what = f"a checkpoint of {found}" if found else "not one of this project's training checkpoints"
        remedy = "To start from its weights alone, give it as --pretrained_path."
        if kind == "biart":
            remedy = "Give one of train_biart.py; an AugVAE belongs to --vae_path, a bundle to --pretrained_path."
        raise CheckpointError(f"{file} is {what}; training of {kind} cannot resume from it. {remedy}")
    if model is not None:
        check_shape(own, model, file)
    return content


def check_shape(own: dict[str, Any], model: AugVAEConfig | BiARTConfig, file: str | os.PathLike) -> None:
    """Check that a file which says this of itself (`described`) holds a model of this shape.

    Raises:
        CheckpointError: naming the settings that differ.
    """
    there = as_plain(settings_from(type(model), own.get("model"), file))  # or newer defaults
    shape = {name: value for name, value in as_plain(model).items() if name not in training_only(type(model))}
    if changed := differences(there, shape):
        raise CheckpointError(f"{file} is of a model with different settings:\n  " + "\n  ".join(changed))


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of a model's weights, names, types and shapes, but not of its device or settings."""
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
