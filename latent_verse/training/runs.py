"""Run folders: where a run writes, and which checkpoints a rerun can resume from. Files and names only, no Lightning.

`<log_dir>/<name>/` holds config.yaml, run.json (the run's id), checkpoints/, backups/, images/, the logger's files and
metrics.json. All processes of a run decide the same: each reads files that none of them writes before all have met.
"""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from pathlib import Path
from typing import Any

from latent_verse.checkpoints.ckpt_files import step_of
from latent_verse.config import ConfigError
from latent_verse.config.settings import expand_paths
from latent_verse.files import differences, write_json, write_text

# sections of a configuration that decide what is computed; a rerun with others would be another run
COMPUTES = ("model", "data", "optim", "loss", "vae", "text")
TRAINER_COMPUTES = ("seed", "precision", "accumulate_grad_batches", "gradient_clip_val", "limit_train_batches")
MACHINE_ONLY = ("num_workers", "prefetch_factor", "test_dir")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's place."""

    folder: Path  # <log_dir>/<name>
    id: str  # unique; every process of a new run makes one, of which the first process's is used (backups.RunFolder)
    backup_dir: Path | None = None  # the folder for backups of several runs, None for inside the run folder

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def backups(self) -> Path:
        """Backups of this run and no other: with a shared backup_dir, the id is part of the path."""
        if self.backup_dir is None:
            return self.folder / "backups"
        return self.backup_dir / f"{self.folder.name}-{self.id}"


def open_run(log_dir: str, name: str, backup: bool, backup_dir: str | None, config: dict[str, Any]) -> Run:
    """Decide where a run writes. Nothing is written yet.

    With `backup`, a folder of that name is this run, interrupted: it resumes from its newest checkpoint by step.
    Without, a folder of that name is another run and stays as it is: this one becomes `<name>-2`, `<name>-3`, ...

    Raises:
        ConfigError: the folder belongs to a run with different settings or to no run; see `run_folder` as well.
    """
    folder = run_folder(log_dir, name)
    place = None if backup_dir is None else Path(backup_dir)
    if not (backup and folder.exists()):
        return Run(free(folder), uuid.uuid4().hex[:12], place)
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        run_id, old = about["id"], about["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder} exists but is not a run of this program ({error!r}). Choose --name.") from error
    run = Run(folder, run_id, place)
    before, now = _what_decides(old), _what_decides(config)
    changed = differences(before, {leaf: value for leaf, value in now.items() if leaf in before})  # others are newer
    if changed and states(run):  # without a checkpoint there is nothing to resume: it starts anew, as it is set now
        raise ConfigError(
            f"{folder} is a run with different settings, which --backup cannot resume. Give its settings, or another "
            "--name for a new run:\n  " + "\n  ".join(changed)
        )
    return run


def states(run: Run) -> list[Path]:
    """The checkpoints a run can resume from, newest first by step: its `last`, then, at the same step, its backup."""
    files = [*run.backups().glob("step=*.ckpt"), *run.checkpoints.glob("last-*.ckpt")]
    return sorted(files, key=lambda p: (step_of(p) or 0, p.parent == run.checkpoints, str(p)), reverse=True)


def start(run: Run, config: dict[str, Any], yaml_text: str) -> None:
    """Make the folder and write run.json and config.yaml. For one process, after all have called `open_run`."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / "run.json", {"id": run.id, "config": config})
    write_text(run.folder / "config.yaml", yaml_text)


def run_folder(log_dir: str, name: str) -> Path:
    """<log_dir>/<name>, which may exist.

    Raises:
        ConfigError: log_dir is a file, or the name cannot be a folder's.
    """
    if Path(log_dir).exists() and not Path(log_dir).is_dir():
        raise ConfigError(f"log_dir: {log_dir} is a file; name a folder.")
    if not name or name in (".", "..") or "/" in name or os.sep in name:
        raise ConfigError(f"name: {name!r} cannot be a folder name. Choose letters, digits, - and _.")
    return Path(log_dir) / name


def new_folder(log_dir: str, name: str) -> Path:
    """As `run_folder`, or <name>-2, <name>-3, ... where that exists. Nothing is written."""
    return free(run_folder(log_dir, name))


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


def _what_decides(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a run computes. No two sections have one of the same name."""
    decides = {leaf: value for name in COMPUTES for leaf, value in config.get(name, {}).items()}
    decides |= {leaf: config.get("trainer", {}).get(leaf) for leaf in TRAINER_COMPUTES}
    # earlier versions recorded paths with `~`
    decides = {leaf: expand_paths(value) if isinstance(value, str) else value for leaf, value in decides.items()}
    return {leaf: value for leaf, value in decides.items() if leaf not in MACHINE_ONLY}
