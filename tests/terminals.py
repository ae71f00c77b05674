"""A terminal to print to, and what a person sees on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator

import pytest


class Terminal:
    """What was written to it, as text."""

    def __init__(self, columns: int):
        self.columns = columns
        self.main, self.end = pty.openpty()
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self._parts: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # nobody writes any more
            while part := os.read(self.main, 65536):
                self._parts.append(part)

    @property
    def written(self) -> str:
        """What was written so far."""
        return b"".join(self._parts).decode(errors="replace")

    def close(self) -> str:
        """All that was written, once its writers are gone."""
        os.close(self.end)
        self._reader.join(timeout=30)
        os.close(self.main)
        return self.written


@contextlib.contextmanager
def on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> Iterator[list[str]]:
    """Inside, this process prints to a terminal; afterwards the list holds all that was written to it."""
    terminal, written = Terminal(columns), []
    streams = [os.fdopen(os.dup(terminal.end), "w", encoding="utf-8", buffering=1) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))  # shutil asks the stream that Python was started with
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        try:
            yield written
        finally:
            for stream in streams:
                stream.close()
            written.append(terminal.close())


def screens(written: str, columns: int, wraps: bool = False) -> Iterator[list[str]]:
    """The lines on the terminal each time that something has been written at its last line; spaces at ends are cut.

    Raises:
        AssertionError: a line was longer than the terminal, unless such ones may go on in the next line (`wraps`).
    """
    lines, at = [""], 0
    for piece in re.findall(r"\x1b\[K|\r|\n|\x1b|[^\r\n\x1b]+", written):
        if piece == "\r":
            at = 0
            yield [line.rstrip() for line in lines]
        elif piece == "\n":
            lines.append("")
        elif piece == "\x1b[K":
            lines[-1] = lines[-1][:at]
        else:
            assert piece != "\x1b", "a sequence that is not known here"
            lines[-1] = lines[-1][:at].ljust(at) + piece + lines[-1][at + len(piece) :]
            at += len(piece)
            assert wraps or len(lines[-1]) <= columns, lines[-1]
            while len(lines[-1]) > columns:
                lines[-1:] = lines[-1][:columns], lines[-1][columns:]
                at -= columns
    yield [line.rstrip() for line in lines]
