"""Run folders: where a run writes, and which checkpoints a rerun can resume from. Files and names only, no Lightning.

`<log_dir>/<name>/` holds config.yaml, run.json (the run's id), checkpoints/, backups/, images/, the logger's files and
metrics.json, and .lock, which the first of its processes holds. That one decides where the run writes; the others learn
it once all have met (backups.RunFolder).
"""

from __future__ import annotations

import dataclasses
import os
import re
import uuid
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from latent_verse.checkpoints.ckpt_files import step_of
from latent_verse.config import ConfigError
from latent_verse.config.messages import differences, reason, shown
from latent_verse.config.program import is_first_process
from latent_verse.config.settings import expand_paths
from latent_verse.files import (
    FileError,
    InUse,
    made_folder,
    only_writer,
    read_json_object,
    remove_leftovers,
    write_json,
    write_text,
)

# sections of a configuration that decide what is computed; a rerun with others would be another run
COMPUTES = ("model", "data", "optim", "loss", "vae", "text")
TRAINER_COMPUTES = ("seed", "precision", "accumulate_grad_batches", "gradient_clip_val", "limit_train_batches")
LONGEST_NAME = 200  # bytes: most file systems allow 255, and `free` and `Run.backups` append a number or an id
SAFE_ID = re.compile(r"[0-9A-Za-z_-]{1,40}")  # it becomes part of a path
WAITS = "{} Training continues, and tries again."  # of a log that cannot be written
LOST = "{} What was logged since is lost."
MACHINE_ONLY = ("num_workers", "prefetch_factor", "allow_pipe", "test_dir")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's place."""

    folder: Path  # <log_dir>/<name>
    id: str  # unique; every process of a new run makes one, of which the first process's is used
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
    place = Path(backup_dir) if backup and backup_dir is not None else None
    if not backup or not os.path.lexists(folder) or _holds_nothing(folder):
        return Run(folder if backup else free(folder), uuid.uuid4().hex[:12], place)
    try:
        about = read_json_object(folder / "run.json")
        run_id, old = about["id"], about["config"]
        if not isinstance(run_id, str) or not SAFE_ID.fullmatch(run_id):
            raise TypeError(f"The id in its run.json is {shown(run_id)}.")
        if not isinstance(old, dict) or not all(isinstance(old.get(name, {}), dict) for name in (*COMPUTES, "trainer")):
            raise TypeError("The config in its run.json does not have an object for each section.")
    except (FileError, KeyError, TypeError) as error:
        why = f"Its run.json lacks {error}." if isinstance(error, KeyError) else reason(error)
        remedy = "choose another --name"
        raise ConfigError(f"{folder} exists but is not a run of this program: {remedy}. {why}") from error
    run = Run(folder, run_id, place)
    if place is not None and (other := _owner_of_backups(run)):
        run = Run(folder, uuid.uuid4().hex[:12], place)
        if is_first_process():
            warnings.warn(f"{folder} is a copy of {other}, whose backups in {place} it leaves alone.", stacklevel=2)
    before, now = _what_decides(old), _what_decides(config)
    changed = differences(before, {leaf: value for leaf, value in now.items() if leaf in before})  # others are newer
    if changed and states(run):  # without a checkpoint there is nothing to resume: it starts anew, as it is set now
        raise ConfigError(
            f"{folder} is a run with different settings, which --backup cannot resume. Give its settings, or another "
            "--name for a new run:\n  " + "\n  ".join(changed)
        )
    return run


@contextmanager
def hold_run(log_dir: str, name: str, backup: bool, backup_dir: str | None, config: dict[str, Any]) -> Iterator[Run]:
    """`open_run`, for as long as the run lasts: its folders are made, tried and locked, in the first process.

    What killed processes were writing there is removed.

    Raises:
        InUse: another process runs there.
        FileError: nothing can be written there.
        ConfigError: as `open_run`.
    """
    with ExitStack() as held:
        while True:
            run = open_run(log_dir, name, backup, backup_dir, config)
            if not is_first_process():
                break
            try:
                held.enter_context(only_writer(run.folder, "log_dir"))
                break
            except InUse:
                if backup:
                    raise
        if is_first_process():
            for folder in (run.folder, run.checkpoints, run.images, run.folder / "backups"):
                remove_leftovers(folder)
                for file in folder.glob(".*.tmp"):  # of an earlier version
                    if file.is_file():
                        file.unlink()
            if backup and run.backup_dir is not None:
                held.enter_context(only_writer(run.backups(), "backup_dir"))
        yield run


@contextmanager
def hold_new_folder(log_dir: str, name: str) -> Iterator[Path]:
    """`new_folder`, made and tried in the first process. If it is empty in the end, it is removed again.

    Raises:
        FileError: nothing can be written there.
        ConfigError: as `run_folder`.
    """
    folder = new_folder(log_dir, name)
    with made_folder(folder, "log_dir") if is_first_process() else ExitStack():
        yield folder


def states(run: Run) -> list[Path]:
    """The checkpoints a run can resume from, newest first by step: its `last`, then, at the same step, its backup."""
    backups = [*run.backups().glob("step=*.ckpt")]
    if not backups and run.backup_dir is not None:  # the run folder had another name
        backups = [*run.backup_dir.glob(f"*-{run.id}/step=*.ckpt")]
    files = [*backups, *run.checkpoints.glob("last-*.ckpt")]
    return sorted(files, key=lambda p: (step_of(p) or 0, p.parent == run.checkpoints, str(p)), reverse=True)


def _owner_of_backups(run: Run) -> Path | None:
    """The run folder that the backups of this run's id belong to, if it is another one that is there: one is a copy."""
    assert run.backup_dir is not None
    for about in run.backup_dir.glob(f"*-{run.id}/run.json"):
        with suppress(FileError, KeyError, TypeError, OSError):  # of a run that was moved, or nothing that says so
            owner = Path(read_json_object(about)["folder"])
            if not owner.samefile(run.folder) and read_json_object(owner / "run.json")["id"] == run.id:
                return owner
    return None


def start(run: Run, config: dict[str, Any], yaml_text: str) -> None:
    """Write run.json and config.yaml, and whose backups a backup_dir holds. For one process, after all have met."""
    if run.backup_dir is not None:
        write_json(run.backups() / "run.json", {"folder": str(run.folder.absolute())})
    write_json(run.folder / "run.json", {"id": run.id, "config": config})
    write_text(run.folder / "config.yaml", yaml_text)


def run_folder(log_dir: str, name: str) -> Path:
    """<log_dir>/<name>, which may exist.

    Raises:
        ConfigError: log_dir is a file, or the name cannot be a folder's.
    """
    if os.path.exists(log_dir) and not os.path.isdir(log_dir):
        raise ConfigError(f"log_dir: {log_dir} is not a folder. Name one.")
    if not name or name in (".", "..") or "/" in name or os.sep in name or not name.isprintable():
        raise ConfigError(f"name: {shown(name)} cannot be a folder name. Choose letters, digits, - and _.")
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise ConfigError(f"name: {shown(name)} has more than {LONGEST_NAME} bytes. Choose a shorter one.")
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
    while os.path.lexists(candidate):
        n += 1
        candidate = folder.with_name(f"{folder.name}-{n}")
    return candidate


def _holds_nothing(folder: Path) -> bool:
    """Whether a folder is empty, or holds no more than what `hold_run` makes before a run begins."""
    try:
        return all(name == ".lock" or name.endswith(".tmp") for name in os.listdir(folder))
    except OSError:
        return False


def _what_decides(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a run computes. No two sections have one of the same name."""
    decides = {leaf: value for name in COMPUTES for leaf, value in config.get(name, {}).items()}
    decides |= {leaf: config.get("trainer", {}).get(leaf) for leaf in TRAINER_COMPUTES}
    # earlier versions recorded paths with `~`
    decides = {leaf: expand_paths(value) if isinstance(value, str) else value for leaf, value in decides.items()}
    return {leaf: value for leaf, value in decides.items() if leaf not in MACHINE_ONLY}
