"""Walking folders for images: which files count, and what is said of the others."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from latent_verse.config import printable
from latent_verse.config.messages import counted, reason
from latent_verse.config.settings import expand
from latent_verse.data import DataError

log = logging.getLogger(__name__)

# of decoding.FORMATS, in the order in which a sample of tar shards is searched for its image
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".jfif")
SAID_KINDS = 4  # of files that are not read; more are only counted
MAX_VISITS = 100  # of one folder, by links: more of them can lead through a few folders in millions of ways


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not the user's data: hidden, or what macOS adds to an archive."""
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"


def walk(root: str, extensions: tuple[str, ...], others: Counter) -> Iterator[str]:
    """Names of the files below `root` with one of `extensions`, relative to it, in sorted order, links followed.

    Hidden names are skipped. Files of another kind are counted by extension in `others`. What else might
    be missed is logged in one line: folders that cannot be read, links to nothing, pipes and devices.

    Raises:
        DataError: links lead to one folder more than MAX_VISITS times.
    """
    special: Counter = Counter()
    visits: Counter = Counter()
    closed = ""  # the first folder that cannot be read
    folders: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(root, "", ())]
    while folders:
        folder, prefix, above = folders.pop()
        inside = []
        try:
            info = os.stat(folder)
            itself = info.st_dev, info.st_ino
            if itself in above:  # a link back up would never end
                continue
            visits[itself] += 1
            if visits[itself] > MAX_VISITS:
                real = os.path.realpath(folder)
                raise DataError(
                    f"{root}: its links lead to {real} more than {MAX_VISITS} times, the last one as {folder}. "
                    "Remove some."
                )
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda e: e.name):
                    if is_hidden(entry.name):
                        continue
                    if is_kind(entry.is_dir):
                        inside.append((entry.path, f"{prefix}{entry.name}/", (*above, itself)))
                    elif not entry.name.lower().endswith(extensions):
                        others[extension_of(entry.name)] += 1
                    elif is_kind(entry.is_file):
                        yield prefix + entry.name
                    else:
                        special["links to nothing, pipes or devices"] += 1
        except OSError as error:
            closed = closed or f"{folder}: {reason(error)}"
            special["folders that cannot be read"] += 1
        folders += reversed(inside)
    if special:
        about = ", ".join(f"{n} {what}" for what, n in special.items())
        log.warning("%s", printable(f"{root}: left out: {about}" + (closed and f" (the first folder, {closed})")))


def is_kind(kind: Callable[[], bool]) -> bool:
    """A directory entry's answer; a link that cannot be followed is nothing."""
    try:
        return kind()
    except OSError:  # links in a circle
        return False


def extension_of(name: str) -> str:
    """What files of another kind are counted by: `.heic`."""
    return os.path.splitext(name)[1].lower() or "extensionless"


def describe_found(number: int, what: str, others: Mapping[str, int]) -> str:
    """'43 images (6 .heic, 1 .svg not read)': how many of `what` there are, and which files are not read."""
    text = counted(number, what)
    kinds = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    first, rest = kinds[:SAID_KINDS], kinds[SAID_KINDS:]
    left = [f"{n:,} {kind}" for kind, n in first]
    left += [f"{sum(n for _, n in rest):,} of other kinds"] if rest else []
    return f"{text} ({printable(', '.join(left))} not read)" if left else text


def describe_files(others: Counter) -> str:
    """'found 12 .txt, 3 .md' or 'found no file at all', for error messages."""
    found = ", ".join(f"{n} {kind}" for kind, n in others.most_common(5))
    return f"found {found}" if found else "found no file at all"


def nothing_found(others: Counter) -> str:
    """What was looked for in a folder without images and what was found, for error messages."""
    hint = " For tar shards use --dataset webdataset." if others[".tar"] else ""
    return f"looked for {' '.join(EXTENSIONS)} (any case), {describe_files(others)}.{hint}"


def check_folder(root: str | os.PathLike, key: str) -> str:
    """`root` as a str with ~ expanded.

    Raises:
        DataError: it is not a folder; naming the setting `key`.
    """
    root = expand(root, True, key)
    if not os.path.isdir(root):
        kind = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise DataError(f"{key}: {root} {kind}. Give the folder that holds the images.")
    return root
