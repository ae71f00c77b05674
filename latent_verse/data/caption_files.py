"""Reading the files that hold captions: text, JSON and tables. Errors name the file and the place in it."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache

from latent_verse.config.settings import expand
from latent_verse.data import DataError

IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_name", "filename", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "title")

Pair = tuple[str, list[str]]  # an image's path, and its captions


def sorted_out(pairs: Iterable[tuple[str, list]], path: str) -> tuple[list[Pair], dict[str, list[str]]]:
    """The pairs that can be used, and the images of the others by reason.

    Raises:
        DataError: a caption is no string.
    """
    kept, bare, empty, missing = [], [], [], []
    names_in = cache(_listing)
    for image, captions in pairs:
        for caption in captions:
            if caption is not None and not isinstance(caption, str):
                raise DataError(f"{path}: the caption of {image} is {caption!r}; captions are strings.")
        texts = [text for text in (" ".join((caption or "").split()) for caption in captions) if text]
        empty.extend([image] * (len(captions) - len(texts)))
        folder, name = os.path.split(image)
        if not captions:
            bare.append(image)
        elif texts and name in names_in(folder):
            kept.append((image, texts))
        elif texts:
            missing.append(image)
    return kept, {"images without a caption": bare, "missing image files": missing, "empty captions": empty}


def _listing(folder: str) -> set[str]:
    """The names in a folder: one listing costs far less than looking for each of a hundred thousand files."""
    try:
        return set(os.listdir(folder or "."))
    except OSError:
        return set()


def check_file(path: str | os.PathLike, key: str) -> str:
    """`path` as a str with ~ expanded.

    Raises:
        DataError: it is no file, or an empty one; naming the setting `key`.
    """
    path = expand(path, True, key)
    if not os.path.isfile(path):
        kind = "is a folder, not a file" if os.path.isdir(path) else "does not exist"
        raise DataError(f"{key}: {path} {kind}. Give the file that holds the captions.")
    if os.path.getsize(path) == 0:
        raise DataError(f"{key}: {path} is empty (0 bytes). Was it downloaded or written completely?")
    return path


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def caption_lines(path: str) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    return [text for text in (" ".join(line.split()) for line in re.split("\r\n|\r|\n", _read_text(path))) if text]


def read_json(path: str | os.PathLike, key: str) -> tuple[object, str]:
    """The content of a JSON file, and its path as a str.

    Raises:
        DataError: it cannot be read, or is not valid JSON; naming the setting `key`.
    """
    path = check_file(path, key)
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{key}: {path} is not valid JSON ({error}). Was it downloaded completely?") from error
    return content, path


def entries(content: object, name: str, fields: dict[str, type | tuple[type, ...]], path: str, key: str) -> list[dict]:
    """The list content[name], whose entries have the given fields, of the given types.

    Raises:
        DataError: there is no such list, or an entry lacks a field or has one of another type.
    """
    found = content.get(name) if isinstance(content, dict) else None
    if found == []:
        raise DataError(f"{key}: the list {name!r} of {path} is empty. Is it the file of another split?")
    if not isinstance(found, list):
        keys = ", ".join(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise DataError(f"{key}: {path} has no list {name!r}; it holds {keys or 'nothing'}. Is it a captions file?")
    for i, entry in enumerate(found):
        for field, kinds in fields.items():
            if not isinstance(entry, dict) or field not in entry:
                keys = ", ".join(entry) if isinstance(entry, dict) else repr(entry)
                raise DataError(f"{key}: {name}[{i}] of {path} has no {field!r}, only {keys}. Is it a captions file?")
            if not isinstance(entry[field], kinds):
                wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
                raise DataError(f"{key}: {name}[{i}] of {path}: {field!r} is {entry[field]!r}, which is no {wanted}.")
    return found


def table_rows(path: str, key: str) -> Iterator[tuple[str, str, list]]:
    """(its place in the file, image path as given, captions) for each row of a .csv, .tsv or .jsonl.

    Raises:
        DataError: the file is of another kind or damaged, or lacks a column; naming the setting `key`.
    """
    readers = {".csv": _separated_rows, ".tsv": _separated_rows, ".jsonl": _json_rows}
    extension = os.path.splitext(path)[1].lower()
    if extension not in readers:
        raise DataError(f"{key}: {path} is no table of captions; known are {', '.join(readers)}.")
    for where, row in readers[extension](path, key):
        columns = {name.strip().lower(): name for name in row}
        found = []
        for names in (IMAGE_COLUMNS, CAPTION_COLUMNS):
            column = next((columns[name] for name in names if name in columns), None)
            if column is None:
                raise DataError(f"{key}: {where} has the columns {', '.join(row)}; it needs one of {', '.join(names)}.")
            found.append(row[column])
        image, caption = found
        yield where, str(image or ""), caption if isinstance(caption, list) else [caption]


def _separated_rows(path: str, key: str) -> Iterator[tuple[str, dict]]:
    delimiter = "\t" if path.lower().endswith(".tsv") else ","
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), delimiter=delimiter)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{key}: {path} line {reader.line_num}: {error}. Is a quote left open?") from error
        if row is None:
            return
        where = f"{path} line {reader.line_num}"
        if None in row or None in row.values():
            raise DataError(
                f"{key}: {where} has more or fewer fields than the {len(reader.fieldnames)} of the header "
                f"({', '.join(reader.fieldnames)}). Quote fields that contain {delimiter!r}."
            )
        yield where, row


def _json_rows(path: str, key: str) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{key}: {path} line {number} is not valid JSON ({error}).") from error
        if not isinstance(row, dict):
            raise DataError(f"{key}: {path} line {number} is {type(row).__name__}, not an object with columns.")
        yield f"{path} line {number}", row
