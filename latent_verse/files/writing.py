"""Writing files and folders whole or not at all, and having a folder to oneself."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from latent_verse.config import UserError
from latent_verse.config.messages import reason
from latent_verse.files.locks import Lock, lock_of
from latent_verse.files.reading import FileError

# what is wrong with a path, rather than with the disk
MISTAKES = tuple(
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EEXIST", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "EINVAL", "EILSEQ", "ELOOP")
)


class NotWritten(FileError):
    """The machine cannot write a file that could be there: its disk is full or read-only, or has an error."""

    exit_code = 1


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A path to write a file or folder to; once the block has ended, it takes the place of `path`.

    A process that is killed, or a machine that loses power, leaves either what was there before or all that is new. (A
    folder is absent between two renames. If that is where it ended, the next write beside it puts the new one there.)
    Nothing passes through a temporary folder elsewhere. On an exception the unfinished file is removed; after a kill,
    the next process that writes to that folder removes it. Several processes may write the same path at once: one of
    their files stays, whole.

    Waiting for the disk takes as long as generating a small image. Without `durable` nothing waits: if the machine
    loses power, an empty file may be left. That is for images, which can be made again.

    The path given has another name than `path`, in a hidden folder beside it. To libraries that choose the format by a
    name's end, name the format or give an open file.

    Raises:
        NotWritten: the disk is full, for example. The message says why, and how much space is free.
        FileError: there can be no such file.
    """
    path = Path(path)
    with _refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.lstat(path)  # an impossible name is found before the work, not after it
        if (folder := path.parent.absolute()) not in _tidied:
            _tidied.add(folder)
            remove_leftovers(folder)
        place, lock = _place_beside(path)
        try:
            new, old = place / "new", place / "old" / path.name
            yield new
            if durable:
                for file in (*new.rglob("*"), new) if new.is_dir() else (new,):
                    _sync(file)
            if new.is_dir() and os.path.lexists(path):  # a folder can only take the place of an empty one
                old.parent.mkdir()
                os.rename(path, old)
            try:
                os.replace(new, path)
            except BaseException:
                if os.path.lexists(old):
                    os.rename(old, path)
                raise
        finally:
            _remove(place)
            lock.release()
        if durable:
            _sync(path.parent)


@contextmanager
def replacing_together(folder: Path, names: Sequence[str], setting: str) -> Iterator[list[Path]]:
    """As `replacing`, of several files in a folder and its subfolders: one path to write to for each of `names`.

    None takes its place before all are written and on the disk, so that an error or a kill while they are written
    leaves all that was there before. They take their places one after the other, the last of `names` first. Other
    files stay. Folders that were made for them and hold nothing in the end are removed.

    Args:
        setting: the name of the setting that names the folder, for the message.

    Raises:
        FileError: as `made_folder`; NotWritten: as `replacing`.
    """
    places = dict.fromkeys((folder / name).parent for name in names)
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(made_folder(place, setting))
        if found := next((folder / name for name in names if (folder / name).is_dir()), None):
            raise FileError(f"{setting}: {found} cannot be written: it is a folder.")
        # not durable each: between the first and the last that takes its place, nothing waits for the disk
        unfinished = [stack.enter_context(replacing(folder / name, durable=False)) for name in names]
        with _refusing(folder):
            yield unfinished
            for file in unfinished:
                _sync(file)
    for place in places:
        _sync(place)


_tidied: set[Path] = set()  # folders in which this process has looked for what killed ones have left
_LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # what `_place_beside` makes


def _place_beside(path: Path) -> tuple[Path, Lock]:
    """A new hidden folder beside `path`, and its lock."""
    while True:
        place, lock = path.parent / f".{path.name[:50]}.{secrets.token_hex(4)}.tmp", None
        try:
            place.mkdir(mode=0o700)
            with suppress(FileNotFoundError, BlockingIOError):
                lock = Lock(place)
                if place.exists():  # else another process took it for a leftover, before it was locked
                    return place, lock
                lock.release()
        except FileExistsError:
            continue
        except BaseException:  # a signal, or the folder has vanished
            _remove(place)
            if lock is not None:
                lock.release()
            raise


def _remove(place: Path) -> None:
    try:
        shutil.rmtree(place, ignore_errors=True)
    finally:  # again, if a signal has come meanwhile
        shutil.rmtree(place, ignore_errors=True)


def is_leftover(path: Path) -> bool:
    """Whether it is what a killed process was writing, or something in it."""
    return any(_LEFTOVER.fullmatch(part) for part in path.parts)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were writing to a folder with `replacing`; not what is still being written.

    A folder that was renamed and has no successor yet gets it. On a file system without locks all is left as it is.
    """
    for place in folder.glob(".*.tmp"):
        if not _LEFTOVER.fullmatch(place.name) or place.is_symlink() or not place.is_dir():
            continue
        with suppress(FileNotFoundError, BlockingIOError):
            lock = Lock(place)
            if lock.works:
                for old in place.glob("old/*"):
                    if (place / "new").exists() and not os.path.lexists(folder / old.name):
                        os.rename(place / "new", folder / old.name)
                shutil.rmtree(place, ignore_errors=True)
            lock.release()


@contextmanager
def made_folder(folder: Path, setting: str) -> Iterator[None]:
    """Make a folder and try it: a file is written there and removed. If it is empty in the end, it is removed again.

    Args:
        setting: the name of the setting that names the folder, for the message.

    Raises:
        FileError: there can be no such folder, or nothing can be written there.
    """
    absent: list[Path] = []
    try:
        with _refusing(folder, f"{setting}: "):
            absent += [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)  # they may hold the space
            with tempfile.TemporaryFile(dir=folder, prefix=".", suffix=".tmp", buffering=0) as file:
                file.write(bytes(4096))
                os.fsync(file.fileno())
        yield
    finally:
        with suppress(OSError, ValueError):  # of a folder that holds something, or an impossible one
            for place in absent:
                place.rmdir()


@contextmanager
def only_writer(folder: Path, setting: str) -> Iterator[int]:
    """As `made_folder`, and hold the folder's lock (the file .lock in it), which no other process gets meanwhile.

    A killed process leaves no lock behind. Where the file system has none, a warning says so. Yields the lock's file
    descriptor: a process that inherits it holds the lock as well. It is -1 on Windows.

    Raises:
        InUse: another process holds it.
        FileError: as `made_folder`.
    """
    file = folder / ".lock"
    with made_folder(folder, setting):
        with _refusing(file, f"{setting}: "):
            lock = lock_of(file, setting)
            if lock.works:
                file.write_text(f"{os.getpid()} {os.uname().nodename}", encoding="utf-8")
            else:
                remedy = "make sure that no other process writes there"
                warnings.warn(f"{setting}: the file system of {folder} has no locks; {remedy}.", stacklevel=3)
        try:
            yield lock.number
        finally:
            with suppress(OSError):
                file.unlink()
            lock.release()


@contextmanager
def _refusing(path: Path, of: str = "") -> Iterator[None]:
    """Turn the error of writing `path`, or of a folder on the way to it, into a FileError; others are left as they are.

    It is NotWritten unless the path is a mistake. torch and safetensors wrap the system's errors in their own.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__context__ if type(error) is RuntimeError else error  # torch.save
        number = re.search(r"\(os error (\d+)\)", str(error))  # safetensors
        if number:
            cause = OSError(int(number[1]), os.strerror(int(number[1])))
        if isinstance(cause, ValueError) and "embedded null" in str(cause):  # in the path
            cause = OSError(errno.EINVAL, str(cause))
        if not isinstance(cause, OSError) or not _concerns(path.absolute(), cause.filename):
            raise
        why = reason(cause)
        if cause.errno in (errno.EEXIST, errno.ENOTDIR):
            for there in (p for p in (path, *path.parents) if os.path.lexists(p) and not p.is_dir()):
                why = f"{there} is not a folder" if there.exists() else f"{there} is a link to what does not exist"
        kind = FileError if cause.errno in MISTAKES else NotWritten
        room = _room(path) if kind is NotWritten else ""
        raise kind(f"{of}{path} cannot be written: {why}{room}.") from error


def _concerns(path: Path, named: str | bytes | int | None) -> bool:
    """Whether an error that names a file, or none, is about writing `path`: not about a file that was to be read."""
    if named is None or isinstance(named, int):
        return True
    named_path = Path(os.fsdecode(named)).absolute()
    return named_path in (path, *path.parents) or path.parent in named_path.parents


def _room(path: Path) -> str:
    """How much space is free where `path` would be."""
    for place in path.absolute().parents:
        with suppress(OSError, ValueError):
            free = shutil.disk_usage(place).free
            return f" ({free / 1e9:.1f} GB free)" if free >= 1e9 else f" ({free / 1e6:.1f} MB free)"
    return ""


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file, all of `data` or nothing; it is made if it is absent.

    Raises:
        FileError: as `replacing`.
    """
    with _refusing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            left = memoryview(data)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(size)  # so that no part of it stays
                raise


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


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    folder = path.is_dir()
    with suppress(OSError) if folder else nullcontext():  # Windows and some network disks sync no folders
        number = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(number)
        finally:
            os.close(number)
