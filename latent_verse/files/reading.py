"""Reading text and JSON: one rule for all of it, and one line for what is wrong."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from latent_verse.config import UserError
from latent_verse.config.messages import no_file, reason, shown

LINE_BYTES = 1 << 26  # of one line of a text file that is read line by line: 64 MiB
JSON_BYTES = 1 << 32  # of a JSON file, which is read whole: 4 GiB


class FileError(UserError):
    """A file cannot be read as what it should be, or written. The message names it, the place in it and the remedy."""


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a regular file.

    Raises:
        FileError: it is absent, a folder, a pipe or device (which might never end), or cannot be read.
    """
    with _regular(path) as file:
        return file.read()


@contextmanager
def setting_named(setting: str) -> Iterator[None]:
    """What is said inside of a file names also the setting that gave the file."""
    try:
        yield
    except FileError as error:
        raise type(error)(f"{setting}: {error}") from error


@contextmanager
def _regular(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A regular file, open. What goes wrong inside is a FileError that names it."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise FileError(f"{path} {no_file(path)}.")
        with open(path, "rb") as file:
            yield file
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        if isinstance(error, UserError):
            raise
        raise FileError(f"{path} cannot be read: {reason(error)}.") from error


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
        FileError: it is not valid JSON, nested too deeply, or gives a key twice, of which Python would take the last.
    """

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise FileError(f"{name} gives the key {shown(twice)} twice in one object. Keep one.")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except FileError:
        raise
    except RecursionError as error:
        raise FileError(f"{name} cannot be read as JSON: it is nested too deeply.") from error
    except ValueError as error:
        remedy = "Was it written or downloaded completely?"
        raise FileError(f"{name} is not valid JSON ({reason(error)}). {remedy}") from error


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
