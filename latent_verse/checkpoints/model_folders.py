"""What is common to the two folders that hold a model, a bundle and a saved AugVAE: writing one, and its config.json.

All files take their places together. config.json records a fingerprint of the settings in it: those of which the
weights say nothing, such as the number of attention heads, would otherwise give other results without a word.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latent_verse.checkpoints.checks import CheckpointError, json_object
from latent_verse.config import ConfigError
from latent_verse.config.messages import reason
from latent_verse.config.settings import expand
from latent_verse.files import is_leftover, replacing_together, write_json

ABOUT = "config.json"
SETTINGS_FINGERPRINT = "settings_fingerprint"  # in config.json; earlier versions recorded none


@contextmanager
def writing(directory: str | os.PathLike, kind: str, names: Sequence[str], alone: bool) -> Iterator[dict[str, Path]]:
    """A path to write to for each of `names` and for config.json; see `files.replacing_together`.

    Args:
        kind: the format of such a folder, which config.json names.
        alone: whether the folder must be new, empty or of this kind. Otherwise it may hold other files, if none of them
            would be replaced.

    Raises:
        CheckpointError: the folder holds something else.
        FileError: it cannot be written.
        ConfigError: as `config.settings.expand`.
    """
    directory, names = Path(expand(directory, True, "directory")), [*names, ABOUT]  # config.json appears first
    there = None if kind_of(directory) == kind else _in_the_way(directory, None if alone else names)
    if there is not None:
        what = f"holds {there}" if there else "is a file"
        kinds = {"latent_verse/augvae": "an AugVAE", "latent_verse/bundle": "a bundle"}[kind] + " of L-Verse"
        raise CheckpointError(f"{directory} {what} and is not {kinds}. Name a new or empty folder.")
    with replacing_together(directory, names, "directory") as places:
        unfinished = dict(zip(names, places, strict=True))
        yield unfinished
        for file in places:  # safetensors lets nobody but the user read its files
            shutil.copymode(unfinished[ABOUT], file)


def kind_of(directory: Path) -> object:
    """The format that the config.json of a folder names; None without one."""
    try:
        return json_object(directory / ABOUT).get("format")
    except CheckpointError:
        return None


def _in_the_way(directory: Path, names: Sequence[str] | None) -> str | None:
    """The first of `names`, or any file, that a folder holds; "" if it is a file itself. Leftovers do not count."""
    if not os.path.isdir(directory):
        return "" if os.path.exists(directory) else None
    if names is not None:
        return next((name for name in names if os.path.lexists(directory / name)), None)
    files = (file.relative_to(directory) for file in directory.rglob("*") if file.is_symlink() or not file.is_dir())
    return next((str(file) for file in files if not is_leftover(file)), None)


def write_about(file: Path, content: dict[str, Any], settings: Sequence[str]) -> None:
    """Write a config.json with the fingerprint of those of its entries that are `settings`.

    Raises:
        ConfigError: JSON cannot hold them.
    """
    try:
        plain = json.loads(json.dumps(content, allow_nan=False))  # as it will be read
    except (TypeError, ValueError) as error:
        remedy = "Give texts, finite numbers, lists or dicts."
        raise ConfigError(f"{ABOUT} cannot be written: {reason(error)}. {remedy}") from error
    write_json(file, plain | {SETTINGS_FINGERPRINT: _fingerprint(plain, settings)})


def check_about(file: Path, content: dict[str, Any], settings: Sequence[str]) -> None:
    """Compare the `settings` in the `content` of a config.json with the fingerprint that it records of them.

    Raises:
        CheckpointError: they are not what was written.
    """
    try:
        same = content.get(SETTINGS_FINGERPRINT, found := _fingerprint(content, settings)) == found
    except RecursionError as error:
        raise CheckpointError(f"{file} is damaged: its settings are nested too deeply.") from error
    if not same:
        remedy = f"Copy or export it again; if they were changed on purpose, remove {SETTINGS_FINGERPRINT} there."
        raise CheckpointError(f"{file} is damaged: its settings are not those that were written. {remedy}")


def _fingerprint(content: dict[str, Any], settings: Sequence[str]) -> str:
    """16 hexadecimal digits of what was read from JSON, whatever the order of its keys and the form of its numbers.

    A setting that is not in the file does not count, so that files without newer settings keep their fingerprint.
    """
    chosen = {name: _canonical(content.get(name)) for name in settings}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def _canonical(value: object) -> object:
    """The same with whole numbers as int: a program that rewrites JSON may turn 1.0 into 1."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
