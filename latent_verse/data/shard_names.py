"""Which tar shards a setting names: a folder of them, patterns, lists, URLs and, if allowed, shell commands.

A shell command (`pipe:cat a.tar`) runs only if the caller hands it over itself and allows it: never one that a list or
a pattern names.
"""

from __future__ import annotations

import glob
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from latent_verse.config import printable
from latent_verse.config.messages import reason, shown
from latent_verse.config.settings import expand, split_shards
from latent_verse.data import DataError
from latent_verse.data.folders import EXTENSIONS, describe_files, walk
from latent_verse.files import lines_of, read_text

log = logging.getLogger(__name__)

TARS = (".tar", ".tgz", ".tar.gz")
SCHEMES = ("http", "https", "gs", "hf")  # webdataset opens them without a shell; it knows more
MAX_SHARDS = 1_000_000  # of all patterns and lists together
MAX_PATTERN = 1 << 16  # characters
MAX_LISTS = 20  # lists within lists


def is_remote(shard: str) -> bool:
    """Whether a shard is a URL or a pipe: nothing is known of it before it is read."""
    return shard.startswith("pipe:") or ("://" in shard and not shard.startswith("file:"))


def find_shards(
    source: str | os.PathLike | Sequence[str], key: str = "train_dir", allow_pipe: bool = False
) -> list[str]:
    """The shards that `source` names: a folder of tars, a brace or * pattern, a comma list, a .txt of them, a URL.

    Each comes once, however often it is named.

    Args:
        allow_pipe: `source`, or an item of the sequence, may also be `pipe:` and a shell command that writes a tar.

    Raises:
        DataError: a local shard is not a file, or a URL of an unknown kind; naming the setting `key` and the first one.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else source
    known: dict[str, list[str]] = {}
    shards = _joined((_expand(os.fspath(part).strip(), key, known, allow_pipe) for part in sources), source, key)
    if not allow_pipe and any(shard.startswith("pipe:") for shard in shards):
        raise DataError(f"{key}: {shown(source, 300)} hides a shell command, which is never run.")
    once, again, seen = [], [], set()
    for shard in shards:  # a.tar and ./a.tar are one; a command may write something else each time
        name = shard if is_remote(shard) else os.path.normpath(shard)
        (again if name in seen and not shard.startswith("pipe:") else once).append(shard)
        seen.add(name)
    if again:
        names = f"{len(again)} shards more than once, the first {again[0]}"
        log.warning("%s: %s names %s. Each is read once.", key, shown(source, 300), printable(names))
    missing = [shard for shard in once if not is_remote(shard) and not os.path.isfile(shard)]
    if missing:
        raise DataError(
            f"{key}: {len(missing)} of {len(once)} shards do not exist as files, the first is {missing[0]}. "
            f"Check {shown(source, 300)}: it must name existing tar files, or be a folder that holds them."
        )
    return once


def _local(path: str) -> str:
    """A path that stays one: a file or folder may be called `pipe:` and a command, and would be taken for it."""
    return os.path.join(os.curdir, path) if is_remote(path) else path


def _joined(parts: Iterable[list[str]], source: object, key: str) -> list[str]:
    """The shards of all parts of a source, of which there are not too many."""
    shards: list[str] = []
    for part in parts:
        if len(shards) + len(part) > MAX_SHARDS:
            raise DataError(
                f"{key}: {shown(source, 300)} names more than {MAX_SHARDS:,} shards. Check its lists and patterns."
            )
        shards += part
    return shards


def _expand(
    source: str, key: str, known: dict[str, list[str]], allow_pipe: bool = False, lists: tuple[str, ...] = ()
) -> list[str]:
    """The shards that one source names; `lists` are the .txt files that it stands in, `known` the shards of others."""
    if source.startswith("pipe:"):
        if not allow_pipe:
            raise DataError(
                f"{key}: {shown(source, 300)} is a shell command. It runs only with --allow_pipe, and only if --{key} "
                "itself gives it: not a list, a pattern or a YAML file."
            )
        return _braces(source, key, allow_pipe)
    parts = [part.strip() for part in split_shards(source)]
    if len(parts) > 1 and not os.path.exists(source):
        return _joined((_expand(part, key, known, lists=lists) for part in parts if part), source, key)
    path = _local(expand(source.removeprefix("file://").removeprefix("file:"), "shards", key))
    if os.path.isdir(path):
        others: Counter = Counter()
        shards = [os.path.join(path, name) for name in walk(path, TARS, others)]
        if not shards:
            images = any(others[extension] for extension in EXTENSIONS)
            hint = " For a folder of images use --dataset imagefolder or flat." if images else ""
            raise DataError(f"{key}: no shard ({' '.join(TARS)}) below {path}, {describe_files(others)}.{hint}")
        return shards
    if path.endswith(".txt") and os.path.isfile(path):
        real = os.path.realpath(path)
        if real in lists:
            raise DataError(f"{key}: {path} lists itself. Put one path or URL of a shard on each line.")
        if len(lists) == MAX_LISTS:
            raise DataError(f"{key}: {path} is a list within {MAX_LISTS} lists. Put the shards themselves into one.")
        if real in known:
            return known[real]
        lines = [line for text in lines_of(read_text(path)) if (line := text.strip()) and not line.startswith("#")]
        if not lines:
            raise DataError(f"{key}: {path} lists no shard. Put one path or URL on each line.")
        known[real] = _joined((_expand(line, key, known, lists=(*lists, real)) for line in lines), path, key)
        return known[real]
    if is_remote(source):
        return _braces(source, key)
    if "*" in path:
        found = sorted(map(_local, itertools.islice(glob.iglob(path), MAX_SHARDS + 1)))
        if not found:
            raise DataError(f"{key}: no file matches {path}. Check the folder and the pattern.")
        return found
    return _braces(path, key)


def _braces(pattern: str, key: str, allow_pipe: bool = False) -> list[str]:
    """The shards that a pattern with braces names, or the one it is."""
    from webdataset.shardlists import expand_urls

    if "${" in pattern or len(pattern) > MAX_PATTERN:
        why = "holds ${, and no variable is put in" if "${" in pattern else f"is longer than {MAX_PATTERN} characters"
        raise DataError(f"{key}: the pattern {shown(pattern, 300)} {why}. Write the shards' names out.")
    count, rest = 1, pattern
    while (without := re.sub(r"\{([^{}]*)\}", "", rest)) != rest:  # the innermost ones, level by level
        for inside in re.findall(r"\{([^{}]*)\}", rest):
            ends = re.match(r"(-?\d+)\.\.(-?\d+)", inside)
            count *= abs(int(ends[2]) - int(ends[1])) + 1 if ends else inside.count(",") + 1
        rest = without
    if count > MAX_SHARDS:
        raise DataError(
            f"{key}: {shown(pattern, 300)} names more than {MAX_SHARDS:,} shards. Check what is in its braces."
        )
    try:
        shards = expand_urls(pattern)
    except (ValueError, AssertionError) as error:
        raise DataError(f"{key}: the pattern {shown(pattern, 300)} cannot be expanded ({reason(error)}).") from error
    for shard in shards:
        if shard.startswith("pipe:") and not allow_pipe:
            raise DataError(f"{key}: {shown(pattern, 300)} hides a shell command, which is never run.")
        scheme, mark, _ = shard.partition("://")
        if mark and is_remote(shard) and not shard.startswith("pipe:") and scheme.lower() not in SCHEMES:
            kinds = ", ".join(f"{kind}://" for kind in SCHEMES)
            raise DataError(
                f"{key}: {shown(shard, 300)} is a URL of another kind than {kinds}. Download what it names."
            )
    return shards
