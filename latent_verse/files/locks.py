"""Locks of files and folders, which end with the process that holds them."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from latent_verse.files.reading import FileError

fcntl: ModuleType | None
try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None


class InUse(FileError):
    """Another process holds the lock of a folder."""


def lock_of(file: Path, setting: str) -> Lock:
    """The lock of a file, which is made if it does not exist.

    Raises:
        InUse: another process holds it.
        OSError: there can be no such file.
    """
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = Lock(file, os.O_RDWR | os.O_CREAT)
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
        lock.release()  # of a file that its last holder has removed


class Lock:
    """A lock of a file or folder, held until it is released or the process ends, however it ends. Forks do not hold it.

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
                self.release()
                raise

    def release(self) -> None:
        if self.number in self.held:
            self.held.discard(self.number)
            os.close(self.number)

    @classmethod
    def close_all(cls) -> None:
        """In a forked process: a data loader's would hold the lock for seconds after its parent was killed."""
        while cls.held:
            os.close(cls.held.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=Lock.close_all)
