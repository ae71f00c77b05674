"""What people read when something is wrong: the two errors at the ground of all others, and the words of messages."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping


class UserError(ValueError):
    """What a program reports as one line: a mistake of the user, mostly. The message says what to do."""

    exit_code = 2  # of the program


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another. The message says what to do."""


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """A caption, a file's name or another text from outside as one line that is safe to print.

    Control characters, which could move the cursor or change the terminal, line separators, characters that turn the
    direction of writing, and lone surrogates, which stand for bytes of a name that are not UTF-8, become escapes.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def shown(value: object, limit: int = 80) -> str:
    """A value, file's name or other text as messages show it: as `repr` on one line, cut after `limit` characters.

    No more than that is made of it: files may hold lists of lists that share their items, or that hold themselves.
    """
    text = ""
    for piece in _pieces(value, limit):
        text += piece
        if len(text) > limit:
            return f"{printable(text[:limit])}..."
    return printable(text)


def _pieces(value: object, limit: int) -> Iterator[str]:
    """The parts of `repr(value)`, one after the other; of texts at least the first `limit` characters."""
    if isinstance(value, (str, bytes)):
        yield repr(value[: limit + 1])
    elif isinstance(value, (dict, list, tuple)):
        start, end = "{}" if isinstance(value, dict) else "[]" if isinstance(value, list) else "()"
        yield start
        for i, item in enumerate(value):
            yield ", " if i else ""
            yield from _pieces(item, limit)
            if isinstance(value, dict):
                yield ": "
                yield from _pieces(value[item], limit)
        yield f",{end}" if isinstance(value, tuple) and len(value) == 1 else end
    else:
        try:
            yield " ".join(repr(value).split())
        except (ValueError, RecursionError):  # an integer of more than 4300 digits
            yield f"a value of type {type(value).__name__}"


def reason(error: BaseException, limit: int = 200) -> str:
    """Why something failed, for the end of a message: the first line of an error's own, cut after `limit` characters.

    Libraries add advice after it, and paths, which the message names itself. An error without words gives its name.
    """
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines() or [type(error).__name__]
    text = printable(" ".join(lines[0].split()))
    return text if len(text) <= limit else f"{text[:limit]}..."


def differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """One line for each entry of `new` that `old` lacks or has another value of: `lr: 0.1 then, 0.2 now`."""
    changed = {name: (old.get(name), value) for name, value in new.items() if old.get(name) != value}
    return [f"{name}: {shown(before, 300)} then, {shown(now, 300)} now" for name, (before, now) in changed.items()]


def counted(number: int, noun: str) -> str:
    """'1 image', '1,200 images', '2 batches'."""
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """'images', 'batches', 'processes'."""
    return f"{noun}es" if noun.endswith(("tch", "s")) else f"{noun}s"


def closest(name: str, valid: Iterable[str], prefix: str = "", otherwise: str = ". See --help.") -> str:
    """'. Did you mean X?' for the nearest valid names, or `otherwise`."""
    near = difflib.get_close_matches(name[:100], list(valid), n=2, cutoff=0.6)
    return f". Did you mean {' or '.join(prefix + n for n in dict.fromkeys(near))}?" if near else otherwise


def no_file(path: str | os.PathLike) -> str:
    """What is wrong with a path that is not a regular file, after its name in a message."""
    if os.path.isdir(path):
        return "is a folder, not a file"
    if os.path.exists(path):
        return "is a pipe or device, not a file"
    return "is a link to a file that does not exist" if os.path.islink(path) else "does not exist"
