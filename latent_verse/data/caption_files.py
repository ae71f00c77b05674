"""Reading the files that hold captions: text, JSON and tables. Errors name the setting, the file and the place in it.

All text is read by the rules of files/reading.py: UTF-8 with or without a byte order mark; lines end at \\n or \\r\\n
only. A table or JSON file that is damaged is an error. A single caption that cannot be used is left out and counted.
"""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from functools import cache

from latent_verse.config import printable
from latent_verse.config.messages import no_file, shown
from latent_verse.config.settings import expand
from latent_verse.data import DataError
from latent_verse.data.folders import EXTENSIONS
from latent_verse.files import lines_of, parse_json, read_json, read_text, reading, setting_named, text_lines

IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_name", "filename", "path")
CAPTION_COLUMNS = ("caption", "captions", "text", "title")
ROW_LINES = 10_000  # of one row of a table; more are not a caption, but a quote that was left open
TEXT_BYTES = 1 << 24  # of one image's .txt: 16 MiB
INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")  # Unicode's categories of spaces, controls and characters of no width
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, as in UTF-16 read as UTF-8, and lone surrogates, as JSON can hold
COCO_NAME = re.compile(r"(?:^|_)([0-9]{12})$")  # 000000391895.jpg, COCO_val2014_000000391895.jpg
DECIMAL = re.compile("0|-?[1-9][0-9]{0,999}")

Pair = tuple[str, list[str]]  # an image's path, and its captions


def clean(caption: str) -> str:
    """A caption on one line, with one space between words; "" if none of its characters can be seen.

    Raises:
        DataError: it is not text: it holds a NUL or a lone surrogate.
    """
    if found := NO_TEXT.search(caption):
        raise DataError(f"holds the character {found[0]!a} at {found.start()}, which is not text")
    text = " ".join(caption.split())
    if text[:1].isalnum():  # nearly all are: this saves looking on
        return text
    return text if any(unicodedata.category(letter) not in INVISIBLE for letter in text) else ""


def caption_lines(path: str) -> list[str]:
    """The captions of an image's .txt, one per line.

    Raises:
        DataError: the file is larger than TEXT_BYTES, or a line is not text.
        FileError: it cannot be read, or is not UTF-8.
    """
    if os.path.isfile(path) and os.path.getsize(path) > TEXT_BYTES:
        raise DataError(f"{path} is larger than {TEXT_BYTES} bytes. Is it the text of one image?")
    texts = []
    for number, line in enumerate(lines_of(read_text(path)), start=1):
        try:
            texts.append(clean(line))
        except DataError as error:
            raise DataError(f"{path} line {number} {error}") from error
    return [text for text in texts if text]


def image_file(folder: str, *names: str) -> str:
    """The path of an image that a file lists as names below `folder`, one path however they are written.

    a.jpg, ./a.jpg, x/../a.jpg and the absolute path are one image.
    """
    path = os.path.join(folder, *names)
    if os.path.basename(path) in ("", ".", ".."):  # no file's name: the image is missing
        return path
    whole, root = os.path.abspath(path), os.path.join(os.path.abspath(folder), "")
    return os.path.join(folder, whole.removeprefix(root)) if whole.startswith(root) else os.path.normpath(path)


def usable_pairs(pairs: Iterable[tuple[str, list]], path: str, key: str) -> tuple[list[Pair], dict[str, list[str]]]:
    """The pairs that can be used, and the images of the others by reason.

    Raises:
        DataError: a caption is neither a string nor null; naming the setting `key`.
    """
    kept, bare, empty, missing, no_text = [], [], [], [], []
    names_in = cache(_listing)
    for image, captions in pairs:
        texts = []
        for caption in captions:
            if caption is not None and not isinstance(caption, str):
                raise DataError(f"{key}: {path}: the caption of {image} is {shown(caption)}; captions are strings.")
            try:
                text = clean(caption or "")
            except DataError as error:
                no_text.append(f"{image}, which {error}")
            else:
                (texts if text else empty).append(text or image)
        folder, name = os.path.split(image)
        if not captions:
            bare.append(image)
        elif texts and name in names_in(folder):
            kept.append((image, texts))
        elif texts:
            missing.append(image)
    reasons = {"images without a caption": bare, "missing image files": missing, "empty captions": empty}
    return kept, reasons | ({"captions that are not text": no_text} if no_text else {})


def _listing(folder: str) -> set[str]:
    """The names in a folder: one listing costs far less than looking for each of a hundred thousand files."""
    try:
        return set(os.listdir(folder or "."))
    except (OSError, ValueError):  # ValueError: a name that no file can have, with a NUL for example
        return set()


def check_file(path: str | os.PathLike, key: str) -> str:
    """`path` as a str with ~ expanded.

    Raises:
        DataError: it is not a file, or an empty one; naming the setting `key`.
    """
    path = expand(path, True, key)
    if not os.path.isfile(path):
        raise DataError(f"{key}: {path} {no_file(path)}. Give the file that holds the captions.")
    if os.path.getsize(path) == 0:
        raise DataError(f"{key}: {path} is empty (0 bytes). Was it downloaded or written completely?")
    return path


def read_captions_json(path: str | os.PathLike, key: str) -> tuple[object, str]:
    """The content of a JSON file, and its path as a str.

    Raises:
        DataError: it is not a file, or empty; naming the setting `key`.
        FileError: it cannot be read, or is not valid JSON; naming the setting too.
    """
    path = check_file(path, key)
    with setting_named(key):
        return read_json(path), path


def identifier(value: object) -> int | str | None:
    """An image's id, so that equal ones are equal: 139, 139.0 and "139" are 139. None if it is neither int nor str."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and DECIMAL.fullmatch(value):
        value = int(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def coco_number(name: str) -> int | None:
    """The id in a file's name that is like COCO's, with or without folders and extension; None in any other name."""
    found = COCO_NAME.search(os.path.splitext(os.path.basename(name))[0])
    return int(found[1]) if found else None


def entries(content: object, name: str, fields: dict[str, type], path: str, key: str) -> list[dict]:
    """The list content[name], whose entries have the given fields, of the given types.

    Raises:
        DataError: there is no such list, or an entry lacks a field or has one of another type.
    """
    found = content.get(name) if isinstance(content, dict) else None
    if found == []:
        raise DataError(f"{key}: the list {name!r} of {path} is empty. Is it the file of another split?")
    if not isinstance(found, list):
        keys = _names(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise DataError(f"{key}: {path} has no list {name!r}; it holds {keys}. Is it a captions file?")
    for i, entry in enumerate(found):
        for field, kind in fields.items():
            if not isinstance(entry, dict) or field not in entry:
                keys = _names(entry) if isinstance(entry, dict) else shown(entry)
                raise DataError(f"{key}: {name}[{i}] of {path} has no {field!r}, only {keys}. Is it a captions file?")
            if not isinstance(entry[field], kind):
                value = shown(entry[field])
                raise DataError(f"{key}: {name}[{i}] of {path}: {field!r} is {value}, which is not a {kind.__name__}.")
    return found


def ids_of(found: list[dict], field: str, name: str, path: str, key: str) -> list[int | str]:
    """The `identifier` in this field of every entry of the list `name`.

    Raises:
        DataError: one is neither int nor str.
    """
    ids = []
    for i, entry in enumerate(found):
        value = identifier(entry[field])
        if value is None:
            value = shown(entry[field])
            raise DataError(f"{key}: {name}[{i}] of {path}: {field!r} is {value}, which is neither int nor str.")
        ids.append(value)
    return ids


def _names(names: Iterable[str]) -> str:
    return printable(", ".join(names))[:160] or "nothing"


def table_rows(path: str, key: str) -> Iterator[tuple[str, str, list]]:
    """(its place in the file, image path as given, captions) for each row of a .csv, .tsv or .jsonl.

    Only one row is in memory. In .csv, fields may be quoted as in RFC 4180, line breaks included. In .tsv, which knows
    no quotes, quotes of that form are read so too, as other programs write them; any other quote is a character.

    Raises:
        DataError: the file is of another kind or damaged, or lacks a column; naming the setting `key`.
        FileError: it cannot be read, or is not UTF-8 or not JSON; naming the setting too.
    """
    readers = {".csv": _separated_rows, ".tsv": _separated_rows, ".jsonl": _json_rows}
    extension = os.path.splitext(path)[1].lower()
    if extension not in readers:
        raise DataError(f"{key}: {path} is not a table of captions; known are {', '.join(readers)}.")
    with setting_named(key):
        for where, image, caption in readers[extension](path, key):
            if image is not None and not isinstance(image, str):
                raise DataError(f"{key}: {where}: the image is {shown(image)}; it has to be a path.")
            yield where, image or "", caption if isinstance(caption, list) else [caption]


def _columns(names: Collection[str], where: str, key: str, hint: str = "") -> tuple[str, str]:
    """The names of the image's and the caption's column."""
    found = []
    for wanted in (IMAGE_COLUMNS, CAPTION_COLUMNS):
        there = {column: [n for n in names if n.strip().lower() == column] for column in wanted}
        column = next((column for column in wanted if there[column]), None)
        if column is None:
            wanted_names = ", ".join(wanted)
            raise DataError(f"{key}: {where} has the columns {_names(names)}; it needs one of {wanted_names}.{hint}")
        if len(there[column]) > 1:
            raise DataError(f"{key}: {where} has {len(there[column])} columns {column!r}. Keep one.")
        found += there[column]
    return found[0], found[1]


class _OpenQuote(Exception):
    """A quoted field would swallow a line that looks like a row of its own."""


def _separated_rows(path: str, key: str) -> Iterator[tuple[str, object, object]]:
    tabs = path.lower().endswith(".tsv")
    delimiter = "\t" if tabs else ","
    csv.field_size_limit(max(csv.field_size_limit(), reading.LINE_BYTES))  # csv's own is shorter than some captions
    source = text_lines(path)
    waiting: deque[str] = deque()  # lines to be read again
    of_row: list[str] = []
    header: list[str] = []
    image_at = caption_at = 0

    def looks_like_a_row(line: str) -> bool:
        cells = line.split(delimiter)
        if tabs or len(cells) != len(header):
            return len(cells) == len(header)
        return cells[image_at].strip().lower().strip('"').endswith(EXTENSIONS)  # prose has commas too, but no such name

    def lines() -> Iterator[str]:
        while True:
            line = waiting.popleft() if waiting else next(source, None)
            if line is None:
                return
            if of_row and (looks_like_a_row(line) or not header):
                waiting.appendleft(line)
                raise _OpenQuote
            if len(of_row) == ROW_LINES:
                raise csv.Error(f"a row of more than {ROW_LINES:,} lines")
            of_row.append(line)
            yield line + "\n"

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    number = 0  # of lines before the row
    while True:
        of_row.clear()
        try:
            row = next(reader, None)
        except (_OpenQuote, csv.Error) as error:
            where = f"{path} line {number + 1}"
            if not tabs:
                left_open = isinstance(error, _OpenQuote) or "end of data" in str(error)
                why = "a quote is left open" if left_open else str(error).partition(" - ")[0]
                remedy = 'Quote a field that holds quotes, and double these: "a ""big"" dog"'
                if isinstance(error, _OpenQuote) and header:  # of a caption of several lines, one may look like that
                    why += f", or line {number + len(of_row) + 1} is part of a caption and looks like a row of its own"
                    remedy += ", or write that caption in one line"
                raise DataError(f"{key}: {where}: {why}. {remedy}; lines end at \\n.") from error
            waiting.extendleft(reversed(of_row[1:]))
            del of_row[1:]
            row = of_row[0].split(delimiter)
            reader = csv.reader(lines(), delimiter=delimiter, strict=True)
        if row is None:
            return
        number += len(of_row)
        where = f"{path} line {number}"
        if not any(line.strip(" \r") for line in of_row):
            continue
        if not header:
            header = row
            image, caption = _columns(header, where, key, _hint(of_row[0], delimiter))
            image_at, caption_at = header.index(image), header.index(caption)
            continue
        if len(row) != len(header):
            raise DataError(
                f"{key}: {where} has {len(row)} fields, and the header {len(header)} ({_names(header)}). "
                + ("Replace tabs in them by spaces." if tabs else f"Quote fields that contain {delimiter!r}.")
            )
        yield where, row[image_at], row[caption_at]


def _hint(header: str, delimiter: str) -> str:
    """What may be wrong with a header without the columns."""
    names = {",": "commas", ";": "semicolons", "\t": "tabs"}
    for other, name in names.items():
        if other in header and delimiter not in header:
            return f" It seems to be separated by {name}; {names[delimiter]} are expected."
    return " The first line has to name the columns."


def _json_rows(path: str, key: str) -> Iterator[tuple[str, object, object]]:
    for number, line in enumerate(text_lines(path), start=1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise DataError(f"{key}: {where} is {type(row).__name__}, not an object with columns.")
        image, caption = _columns(row, where, key)
        if row[caption] is None:  # caption may be null where captions is a list
            others = (name for name in row if name.strip().lower() in CAPTION_COLUMNS and row[name] is not None)
            caption = next(others, caption)
        yield where, row[image], row[caption]
