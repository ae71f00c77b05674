"""Reading the files that hold captions: text, JSON and tables. Errors name the file and the place in it.

captions.py makes datasets of what is read here.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator

from latent_verse.data import DataError

IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_name", "filename", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "title")

Pair = tuple[str, list[str]]  # an image's path, and its captions


def sorted_out(
    pairs: Iterable[tuple[str, list]], path: str, left_out: dict[str, list[str]] | None = None
) -> tuple[list[Pair], dict[str, list[str]]]:
    """The pairs that can be used, and the others by reason.

    Raises:
        DataError: a caption is no string.
    """
    kept, bare, empty, missing = [], [], [], []
    listings: dict[str, set[str]] = {}
    for image, captions in pairs:
        for caption in captions:
            if caption is not None and not isinstance(caption, str):
                raise DataError(f"{path}: the caption of {image} is {caption!r}; captions are strings.")
        if not captions:
            bare.append(image)
            continue
        texts = [text for text in (" ".join((caption or "").split()) for caption in captions) if text]
        empty.extend([image] * (len(captions) - len(texts)))
        folder, name = os.path.split(image)
        if folder not in listings:
            listings[folder] = _listing(folder)
        if texts and name not in listings[folder]:
            missing.append(image)
        elif texts:
            kept.append((image, texts))
    reasons = {"images without a caption": bare, "missing image files": missing, "empty captions": empty}
    return kept, reasons | (left_out or {})


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
    path = os.path.expanduser(os.fspath(path))
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
        DataError: it cannot be read, or is not UTF-8.
    """
    return [text for text in (" ".join(line.split()) for line in re.split("\r\n|\r|\n", _read_text(path))) if text]


def read_json(path: str | os.PathLike, key: str) -> tuple[object, str]:
    """The content of a JSON file, and its path as a str.

    Raises:
        DataError: it is absent, empty or not valid JSON; naming the setting `key`.
    """
    path = check_file(path, key)
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{key}: {path} is not valid JSON ({error}). Was it downloaded completely?") from error
    return content, path


def entries(
    content: object,
    name: str,
    fields: dict[str, type | tuple[type, ...]],
    path: str,
    key: str,
    optional: dict[str, type] | None = None,
) -> list[dict]:
    """The list content[name], whose entries have the given fields, of their types; `optional` fields may be absent.

    Raises:
        DataError: there is no such list, or an entry lacks a field or has one of another type.
    """
    entries = content.get(name) if isinstance(content, dict) else None
    if entries == []:
        raise DataError(f"{key}: the list {name!r} of {path} is empty. Is it the file of another split?")
    if not isinstance(entries, list):
        keys = ", ".join(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise DataError(f"{key}: {path} has no list {name!r}; it holds {keys or 'nothing'}. Is it a captions file?")
    for i, entry in enumerate(entries):
        for field in fields:
            if not isinstance(entry, dict) or field not in entry:
                keys = ", ".join(entry) if isinstance(entry, dict) else repr(entry)
                raise DataError(f"{key}: {name}[{i}] of {path} has no {field!r}, only {keys}. Is it a captions file?")
        for field, kind in (fields | (optional or {})).items():
            if field in entry and not isinstance(entry[field], kind):
                kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                raise DataError(f"{key}: {name}[{i}] of {path}: {field!r} is {entry[field]!r}, which is no {kinds}.")
    return entries


def read_rows(path: str, key: str) -> Iterator[tuple[str, dict]]:
    """(its place in the file, row) for each row of a .csv or .tsv with a header.

    Raises:
        DataError: a row has more or fewer fields than the header, or a quote is left open.
    """
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


def read_json_rows(path: str, key: str) -> Iterator[tuple[str, dict]]:
    """(its place in the file, row) for each line of a .jsonl, which holds an object.

    Raises:
        DataError: a line is not valid JSON, or no object.
    """
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


def find_column(row: dict, names: tuple[str, ...], where: str, key: str) -> str:
    """The column of a row that has one of the names, in their order of preference and in any case.

    Raises:
        DataError: there is none.
    """
    columns = {name.strip().lower(): name for name in row}
    for name in names:
        if name in columns:
            return columns[name]
    raise DataError(f"{key}: {where} has the columns {', '.join(row)}; one of {', '.join(names)} is needed.")
