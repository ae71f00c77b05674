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
MACHINE_ONLY = ("num_workers", "prefetch_factor", "test_dir")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's place.

    Attributes:
        folder: <log_dir>/<name>.
        id: unique to the run; None for a new one until its first process has drawn it.
        backup_dir: the configured folder for backups, None for inside the run folder.
        continue_from: newest checkpoint of this very run, None for a new one.
    """

    folder: Path
    id: str | None = None
    backup_dir: Path | None = None
    continue_from: Path | None = None

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
    if not name or name in (".", "..") or "/" in name or os.sep in name:
        raise ConfigError(f"name: {name!r} cannot be a folder name. Choose letters, digits, - and _.")
    folder = Path(log_dir) / name
    place = None if backup_dir is None else Path(backup_dir)
    if not backup:
        return Run(free(folder), backup_dir=place)
    if not folder.exists():
        return Run(folder, backup_dir=place)
    try:
        about = json.loads((folder / "run.json").read_text())
        run_id, old = about["id"], about["config"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} exists but is not a run of this program ({error!r}). Give another --name."
        ) from error
    _check_same(folder, old, config)
    run = Run(folder, run_id, place)
    return dataclasses.replace(run, continue_from=newest([*run.backups().glob("*"), *run.checkpoints.glob("last-*")]))


def newest(files: Iterable[Path], prefix: str = "") -> Path | None:
    """The checkpoint with the highest step in its name (`...step=N.ckpt`), whatever the order of names or times."""
    found = [(step_of(p), str(p), p) for p in files if p.name.startswith(prefix) and step_of(p) is not None]
    return max(found)[2] if found else None


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name, None where there is none."""
    match = STEP.search(checkpoint.name)
    return int(match[1]) if match else None


def start(run: Run, run_id: str, config: dict[str, Any], yaml_text: str) -> None:
    """Make the folder and write run.json and config.yaml. For one process, after all have called `open_run`."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_whole(run.folder / "run.json", json.dumps({"id": run_id, "config": config}, indent=1))
    write_whole(run.folder / "config.yaml", yaml_text)


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
    if old["trainer"]["seed"] != new["trainer"]["seed"]:
        changed.append(f"seed: {old['trainer']['seed']} then, {new['trainer']['seed']} now")
    if changed:
        raise ConfigError(
            f"{folder} is a run with other settings, so --backup cannot continue it:\n  "
            + "\n  ".join(changed)
            + "\nGive the old settings to continue it, or another --name for a new run."
        )
