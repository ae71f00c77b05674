"""Writing files so that they appear whole or not at all; reading text; naming what differs between two settings."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from latent_verse.config import UserError

LINE_BYTES = 1 << 26  # of one line of a text file that is read line by line: 64 MiB
JSON_BYTES = 1 << 32  # of a JSON file, which is read whole: 4 GiB


class FileError(UserError):
    """A file cannot be read as what it should be. The message names it, the place in it and the remedy."""


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a regular file.

    Raises:
        FileError: it is absent, a folder, a pipe or device (which might never end), or cannot be read.
    """
    with _regular(path) as file:
        return file.read()


@contextmanager
def _regular(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A regular file, open. What goes wrong inside is a FileError that names it."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            kind = "a folder" if os.path.isdir(path) else "a pipe or device"
            raise FileError(f"{path} is {kind}; a file is needed.")
        with open(path, "rb") as file:
            yield file
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        if isinstance(error, UserError):
            raise
        raise FileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def decode_text(data: bytes, name: object) -> str:
    """The text of a file called `name` in messages: UTF-8, with or without a byte order mark.

    Raises:
        FileError: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FileError(f"{name} is not UTF-8 (line {line}, byte {error.start}). Save it as UTF-8.") from error


def read_text(path: str | os.PathLike) -> str:
    """The text of a file. Raises as `read_bytes` and `decode_text`."""
    return decode_text(read_bytes(path), path)


def lines_of(text: str) -> list[str]:
    """The lines of a text, which end at \\n or \\r\\n and at no other character: str.splitlines knows ten more."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def text_lines(path: str | os.PathLike) -> Iterator[str]:
    """The lines of a text file, by the rules of `decode_text` and `lines_of`; only one of them is in memory.

    Raises:
        FileError: as `read_bytes`; a line is not UTF-8, or longer than LINE_BYTES.
    """
    start = 0
    with _regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), start=1):
            if len(line) > LINE_BYTES:
                raise FileError(f"{path} line {number} is longer than {LINE_BYTES} bytes. Is it a text file?")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                place = f"line {number}, byte {start + error.start}"
                raise FileError(f"{path} is not UTF-8 ({place}). Save it as UTF-8.") from error
            start += len(line)
            yield text.removesuffix("\n").removesuffix("\r")


def parse_json(text: str, name: object) -> object:
    """The content of a JSON file or line called `name` in messages.

    Raises:
        FileError: it is not valid JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{name} is not valid JSON ({error}). Was it written or downloaded completely?") from error


def read_json(path: str | os.PathLike) -> object:
    """The content of a JSON file of at most JSON_BYTES. Raises as `read_text` and `parse_json`."""
    if os.path.isfile(path) and os.path.getsize(path) > JSON_BYTES:
        raise FileError(f"{path} is larger than {JSON_BYTES} bytes, which is what is read of a JSON file. Split it.")
    return parse_json(read_text(path), path)


def read_json_object(path: str | os.PathLike) -> dict[str, object]:
    """As `read_json`, of a file that has to hold an object, {...}."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise FileError(f"{path} holds a {type(content).__name__} where an object, {{...}}, is expected.")
    return content


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
    """Write a text file in UTF-8, whole or not at all.

    The names of files may hold lone surrogates, which stand for bytes that are not UTF-8. They are written as \\udcXX:
    JSON gives them back.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, content: object) -> None:
    """Write a JSON file for people to read too, whole or not at all."""
    write_text(path, json.dumps(valid_json(content), indent=1, allow_nan=False) + "\n")


def valid_json(content: object) -> object:
    """The same with None in place of numbers that are not finite: JSON has neither NaN nor Infinity."""
    if isinstance(content, Mapping):
        return {key: valid_json(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [valid_json(item) for item in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


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
