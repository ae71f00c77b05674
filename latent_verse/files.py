"""Writing files so that they appear whole or not at all, and naming what differs between two sets of settings."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path


def unfinished_at(path: Path) -> Path:
    """Where `replacing` writes until all is there; a killed process leaves it behind. Also for a glob pattern."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file or folder to; once the block has ended, it takes the place of `path`.

    A process that is killed, or a machine that loses power, leaves either what was there before or all that is new. (A
    folder is removed before the new one takes its name.) On an exception the unfinished file is removed. Only one
    process may write a path at a time.

    The path given is hidden and ends in `.tmp`, so that no pattern such as `*.ckpt` finds it. To libraries that choose
    the format by a name's end, name the format or give an open file.
    """
    unfinished = unfinished_at(path)
    _remove(unfinished)  # of a process that was killed
    try:
        yield unfinished
        for file in (*unfinished.rglob("*"), unfinished) if unfinished.is_dir() else (unfinished,):
            _sync(file)
        if unfinished.is_dir():
            _remove(path)  # a folder can only take the place of an empty one
        os.replace(unfinished, path)
    except BaseException:
        _remove(unfinished)
        raise
    _sync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: object) -> None:
    """Write a JSON file for people to read too, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """One line for each entry of `new` that `old` lacks or has another value of: `lr: 0.1 then, 0.2 now`."""
    return [f"{name}: {old.get(name)!r} then, {value!r} now" for name, value in new.items() if old.get(name) != value]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    folder = path.is_dir()
    with suppress(OSError) if folder else nullcontext():  # Windows and some network disks sync no folders
        number = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(number)
        finally:
            os.close(number)
