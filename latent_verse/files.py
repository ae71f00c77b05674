"""Writing files whole or not at all, locking folders; reading text and JSON."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, ClassVar

from latent_verse.config import UserError
from latent_verse.config.settings import reason

fcntl: ModuleType | None
try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

LINE_BYTES = 1 << 26  # of one line of a text file that is read line by line: 64 MiB
JSON_BYTES = 1 << 32  # of a JSON file, which is read whole: 4 GiB
# what is wrong with a path, rather than with the disk
MISTAKES = tuple(
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EEXIST", "ENOTDIR", "EISDIR", "ENAMETOOLONG", "EINVAL", "EILSEQ", "ELOOP")
)


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
            kind = "a folder" if os.path.isdir(path) else "a pipe or device"
            raise FileError(f"{path} is {kind}; a file is needed.")
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
        FileError: it is not valid JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{name} is not valid JSON ({reason(error)}). Was it written or downloaded completely?"
        ) from error


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


class NotWritten(FileError):
    """The machine cannot write a file that could be there: its disk is full or read-only, or has an error."""

    exit_code = 1


class InUse(FileError):
    """Another process holds the lock of a folder."""


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
            shutil.rmtree(place, ignore_errors=True)
            lock.let_go()
        if durable:
            _sync(path.parent)


_tidied: set[Path] = set()  # folders in which this process has looked for what killed ones have left
_LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # what `_place_beside` makes


def _place_beside(path: Path) -> tuple[Path, _Lock]:
    """A new hidden folder beside `path`, and its lock."""
    while True:
        place = Path(tempfile.mkdtemp(".tmp", f".{path.name[:50]}.", path.parent))
        with suppress(FileNotFoundError, BlockingIOError):
            lock = _Lock(place)
            if place.exists():  # else another process took it for a leftover, before it was locked
                return place, lock
            lock.let_go()


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were writing to a folder with `replacing`; not what is still being written.

    A folder that was renamed and has no successor yet gets it. On a file system without locks all is left as it is.
    """
    for place in folder.glob(".*.tmp"):
        if not _LEFTOVER.fullmatch(place.name) or place.is_symlink() or not place.is_dir():
            continue
        with suppress(FileNotFoundError, BlockingIOError):
            lock = _Lock(place)
            if lock.works:
                for old in place.glob("old/*"):
                    if (place / "new").exists() and not os.path.lexists(folder / old.name):
                        os.rename(place / "new", folder / old.name)
                shutil.rmtree(place, ignore_errors=True)
            lock.let_go()


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
def only_writer(folder: Path, setting: str) -> Iterator[None]:
    """As `made_folder`, and hold the folder's lock (the file .lock in it), which no other process gets meanwhile.

    A killed process leaves no lock behind. Where the file system has none, a warning says so.

    Raises:
        InUse: another process holds it.
        FileError: as `made_folder`.
    """
    file = folder / ".lock"
    with made_folder(folder, setting):
        with _refusing(file, f"{setting}: "):
            lock = _lock_of(file, setting)
            if lock.works:
                file.write_text(f"{os.getpid()} {os.uname().nodename}", encoding="utf-8")
            else:
                remedy = "see to it that no other process writes there"
                warnings.warn(f"{setting}: the file system of {folder} has no locks; {remedy}.", stacklevel=3)
        try:
            yield
        finally:
            with suppress(OSError):
                file.unlink()
            lock.let_go()


def _lock_of(file: Path, setting: str) -> _Lock:
    """The lock of a file, which is made if it does not exist."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = _Lock(file, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # its last holder has removed the folder
            continue
        except BlockingIOError:
            with open(file, encoding="utf-8", errors="replace") as holder:
                found = re.fullmatch(r"(\d+) ([\w.-]+)", holder.read(300))
            by = f"process {found[1]} on {found[2]}" if found else "another process"
            raise InUse(f"{setting}: {file.parent} is in use by {by}. Wait for it, or name another.") from None
        with suppress(FileNotFoundError):
            if not lock.works or os.path.samestat(os.stat(file), os.fstat(lock.number)):
                return lock
        lock.let_go()  # of a file that its last holder has removed


class _Lock:
    """A lock of a file or folder, held until it is let go or the process ends, however it ends. Forks do not hold it.

    Raises:
        BlockingIOError: another process holds it.
    """

    WITHOUT = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
    held: ClassVar[set[int]] = set()

    def __init__(self, path: Path, flags: int = os.O_RDONLY):
        self.works = False  # whether there are locks, in this operating system and file system
        self.number = -1
        if fcntl is None:
            return
        self.number = os.open(path, flags, 0o666)
        self.held.add(self.number)
        try:
            fcntl.flock(self.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.works = True
        except OSError as error:
            if error.errno not in self.WITHOUT:  # some network file systems
                self.let_go()
                raise

    def let_go(self) -> None:
        if self.number in self.held:
            self.held.discard(self.number)
            os.close(self.number)

    @classmethod
    def close_all(cls) -> None:
        """In a forked process: a data loader's would hold the lock for seconds after its parent was killed."""
        while cls.held:
            os.close(cls.held.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_Lock.close_all)


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
            why = next((f"{p} is not a folder" for p in (path, *path.parents) if p.exists() and not p.is_dir()), why)
        kind = FileError if cause.errno in MISTAKES else NotWritten
        raise kind(f"{of}{path} cannot be written: {why}{_room(path)}.") from error


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
