"""Run folders: where a run writes, and what a rerun continues from. Files and names only, no Lightning.

`<log_dir>/<name>/` holds config.yaml, run.json (the run's id), checkpoints/, backups/, images/, the logger's files and
metrics.json. Every process of a run decides for itself, from files that nobody writes before all processes have met,
so that all decide the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from latent_verse.config import ConfigError

STEP = re.compile(r"step=(\d+)\.ckpt$")
# sections of a configuration that decide what is computed; a rerun with others would be another run
COMPUTES = ("model", "data", "optim", "loss", "vae", "text")
TRAINER_COMPUTES = ("seed", "precision", "accumulate_grad_batches", "gradient_clip_val", "limit_train_batches")
MACHINE_ONLY = ("num_workers", "prefetch_factor", "test_dir")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's place.

    Attributes:
        folder: <log_dir>/<name>.
        id: unique to the run. Every process of a new run draws one; the first process's is taken (callbacks.RunFolder).
        backup_dir: the configured folder for backups, None for inside the run folder.
    """

    folder: Path
    id: str
    backup_dir: Path | None = None

    @property
    def continue_from(self) -> Path | None:
        """Newest checkpoint of this very run, None for a new one."""
        return next(iter(states(self)), None)

    @property
    def checkpoints(self) -> Path:
        """Best and last checkpoints."""
        return self.folder / "checkpoints"

    @property
    def images(self) -> Path:
        """Grids of pictures."""
        return self.folder / "images"

    def backups(self) -> Path:
        """Backups of this run and no other: with a shared backup_dir, the id is part of the path."""
        if self.backup_dir is None:
            return self.folder / "backups"
        return self.backup_dir / f"{self.folder.name}-{self.id}"


def open_run(log_dir: str, name: str, backup: bool, backup_dir: str | None, config: dict[str, Any]) -> Run:
    """Decide where a run writes. Nothing is written yet.

    With `backup`, a folder of that name is this run, interrupted: it goes on from its newest checkpoint by step.
    Without, a folder of that name is another run, left alone: this one becomes `<name>-2`, `<name>-3`, ...

    Raises:
        ConfigError: the folder's run was configured otherwise, or the name is no folder name.
    """
    if Path(log_dir).exists() and not Path(log_dir).is_dir():
        raise ConfigError(f"log_dir: {log_dir} is a file; name a folder.")
    if not name or name in (".", "..") or "/" in name or os.sep in name:
        raise ConfigError(f"name: {name!r} cannot be a folder name. Choose letters, digits, - and _.")
    folder = Path(log_dir) / name
    place = None if backup_dir is None else Path(backup_dir)
    if not backup:
        return Run(free(folder), new_id(), place)
    if not folder.exists():
        return Run(folder, new_id(), place)
    try:
        about = json.loads((folder / "run.json").read_text())
        run_id, old = about["id"], about["config"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} exists but is not a run of this program ({error!r}). Give another --name."
        ) from error
    run = Run(folder, run_id, place)
    if states(run):
        _check_same(folder, old, config)
    return run  # without a checkpoint there is nothing to continue: it begins anew, with the settings of now


def states(run: Run) -> list[Path]:
    """What a run can be continued from, newest first by step: its backups and the checkpoints of whole epochs."""
    files = [*run.backups().glob("step=*.ckpt"), *run.checkpoints.glob("last-*.ckpt")]
    return sorted(files, key=lambda p: (step_of(p) or 0, str(p)), reverse=True)


def newest(files: Iterable[Path], prefix: str = "") -> Path | None:
    """The checkpoint with the highest step in its name (`...step=N.ckpt`), whatever the order of names or times."""
    found = [(step_of(p), str(p), p) for p in files if p.name.startswith(prefix) and step_of(p) is not None]
    return max(found)[2] if found else None


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name, None where there is none."""
    match = STEP.search(checkpoint.name)
    return int(match[1]) if match else None


def start(run: Run, config: dict[str, Any], yaml_text: str) -> None:
    """Make the folder and write run.json and config.yaml. For one process, after all have called `open_run`."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_whole(run.folder / "run.json", json.dumps({"id": run.id, "config": config}, indent=1))
    write_whole(run.folder / "config.yaml", yaml_text)


def flush(path: Path) -> None:
    """Make the system put a file on the disk before it is given its final name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def new_id() -> str:
    """An id that no other run has."""
    return uuid.uuid4().hex[:12]


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def stem(checkpoint: str) -> str:
    """A short name for what was made from a checkpoint: its run's, its file's or its folder's."""
    path = Path(checkpoint)
    if path.parent.name in ("checkpoints", "backups"):
        return path.parent.parent.name
    return path.stem if path.suffix == ".ckpt" else path.name


def free(folder: Path) -> Path:
    """`folder`, or `<folder>-2`, `<folder>-3`, ... where it exists."""
    candidate, n = folder, 1
    while candidate.exists():
        n += 1
        candidate = folder.with_name(f"{folder.name}-{n}")
    return candidate


def _check_same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [
        f"{leaf}: {old.get(section, {}).get(leaf)!r} then, {value!r} now"
        for section in COMPUTES
        for leaf, value in new.get(section, {}).items()
        if leaf not in MACHINE_ONLY and old.get(section, {}).get(leaf) != value
    ]
    changed += [
        f"{leaf}: {old['trainer'].get(leaf)!r} then, {new['trainer'][leaf]!r} now"
        for leaf in TRAINER_COMPUTES
        if old["trainer"].get(leaf) != new["trainer"][leaf]
    ]
    if changed:
        raise ConfigError(
            f"{folder} is a run with other settings, so --backup cannot continue it:\n  "
            + "\n  ".join(changed)
            + "\nGive the old settings to continue it, or another --name for a new run."
        )
