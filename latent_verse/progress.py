"""Progress of what takes long: a bar on a terminal; elsewhere, as in a log file, a plain line from time to time."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from tqdm import tqdm

from latent_verse.config.messages import plural

LINE_EVERY = 30.0  # seconds between two lines where there is no terminal
BAR = 10, 30  # columns that a bar takes, at least and at most
TO_THE_END = "\x1b[K"  # deletes the rest of a terminal's line


def duration(seconds: float) -> str:
    """'2.1 s', '45 s', '3 min', '1 h 30 min' or '2 d 3 h': as precise as a person needs."""
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 60:
        return f"{minutes} min"
    large, small, units = (*divmod(minutes, 60), ("h", "min")) if hours < 48 else (*divmod(hours, 24), ("d", "h"))
    return f"{large} {units[0]}" + (f" {small} {units[1]}" if small else "")


def rate(per_second: float) -> str:
    """'0.450', '4.46', '12.3', '1,234' or '56.7k': three digits, or more from 1,000 on."""
    number, unit = (per_second, "") if per_second < 9999.5 else (per_second / 1000, "k")
    return f"{number:#.3g}{unit}" if number < 99.95 else f"{number:,.0f}{unit}"


class Lines(tqdm):
    """tqdm that prints plain lines: none in the first LINE_EVERY seconds, then one each so often, and a last one."""

    monitor_interval = 0  # no thread of tqdm's

    def __init__(self, items: Iterable | None = None, **settings: Any):
        super().__init__(items, mininterval=LINE_EVERY, miniters=1, delay=LINE_EVERY, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is not None:  # tqdm's way to clear a bar
            return
        now = self.format_dict
        done, total, elapsed = now["n"], now["total"], now["elapsed"]
        text = f"{self.desc.removesuffix(': ')}: {done:,.0f}{f' of {total:,.0f}' if total else ''}"
        text += f" {plural(now['unit'])} in {duration(elapsed)}"
        if total and now["initial"] < done < total:
            text += f", {duration(elapsed * (total - done) / (done - now['initial']))} left"
        self.fp.write(f"{text}\n")
        self.fp.flush()

    def close(self) -> None:
        if not self.disable and self.last_print_t > self.start_t:
            self.display()
        self.leave = False
        super().close()


def progress_bar(
    items: Iterable | None = None,
    *,
    what: str,
    total: float | None = None,
    unit: str = "item",
    done: int = 0,
    shown: bool = True,
) -> tqdm:
    """A bar on stderr, to iterate over or to `update`, or `Lines` if stderr is no terminal. Silent if not `shown`.

    Args:
        done: how many of `total` were done before.
    """
    settings: dict[str, Any] = {"desc": what, "total": total, "unit": unit, "initial": done, "disable": not shown}
    many = (total or 0) >= 10_000
    return tqdm(items, unit_scale=many, **settings) if sys.stderr.isatty() else Lines(items, **settings)


def on_terminal() -> bool:
    """Whether all that is printed goes to a terminal, and none of it to a file or pipe."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def terminal_columns() -> int:
    """How many of them a line may take; in the last one, some terminals begin another line."""
    return shutil.get_terminal_size().columns - 1


def as_fits(beginning: str, facts: Sequence[str], columns: int) -> str:
    """The beginning and the facts, the first one always, but of the others only those that fit."""
    count = len(facts)
    while count > 1 and len(beginning + ", ".join(facts[:count])) > columns:
        count -= 1
    return beginning + ", ".join(facts[:count])


class LastLine:
    """A bar on the last line of the terminal; what is printed, warned of or logged meanwhile appears above it."""

    def __init__(self) -> None:
        self._stream, self._text = sys.stderr, ""
        utf_8 = (getattr(self._stream, "encoding", None) or "").lower().replace("-", "") == "utf8"
        self._full, self._empty = "█░" if utf_8 else "#."
        self._above = contextlib.ExitStack()
        self._above.enter_context(_lines_above(self))

    def show(self, title: str, done: int, total: int, facts: Sequence[str] = ()) -> None:
        """Draw the bar between `title` and the `facts`, of which the last ones are left out where there is no room."""
        columns = terminal_columns()
        told = as_fits("", [f"{done}/{total}", *facts], columns - len(title) - 2 - BAR[0])
        room = max(0, min(columns - len(title) - 2 - len(told), BAR[1]))
        full = room * done // max(1, total)
        self._text = f"{title} {self._full * full}{self._empty * (room - full)} {told}"[:columns]
        self.draw()

    def draw(self) -> None:
        """Draw it again."""
        with contextlib.suppress(OSError, ValueError):  # the terminal may have been closed
            self._stream.write(f"\r{self._text}{TO_THE_END}")
            self._stream.flush()

    def close(self) -> None:
        """Delete it."""
        self._above.close()
        self._text = ""
        self.draw()


class _Above:
    """A stream of the terminal whose lines appear above a bar. A forked process leaves the bar to the first one."""

    def __init__(self, stream: TextIO, bar: LastLine):
        self._stream, self._bar, self._pid = stream, bar, os.getpid()
        self._begun = ""  # of a line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        lines, end, self._begun = (self._begun + text).rpartition("\n")
        if end:
            self._stream.write("\r" + "".join(f"{line}{TO_THE_END}\n" for line in lines.split("\n")))
            self._stream.flush()
            if os.getpid() == self._pid:
                self._bar.draw()
        return len(text)

    def flush(self) -> None:
        """The beginning of a line may be a question, a debugger's for example: it takes the place of the bar."""
        if self._begun:
            self._stream.write(f"\r{self._begun}{TO_THE_END}")
            self._begun = ""
        self._stream.flush()


@contextlib.contextmanager
def _lines_above(bar: LastLine) -> Iterator[None]:
    out, err = sys.stdout, sys.stderr
    above = {id(stream): _Above(stream, bar) for stream in (out, err)}
    loggers = [logging.root, *(a for a in logging.root.manager.loggerDict.values() if isinstance(a, logging.Logger))]
    handlers = [
        h for a in loggers for h in a.handlers if isinstance(h, logging.StreamHandler) and id(h.stream) in above
    ]
    before = [(handler, handler.stream) for handler in handlers]  # libraries' keep the stream that was there first
    sys.stdout, sys.stderr = above[id(out)], above[id(err)]  # type: ignore[assignment]
    for handler, stream in before:
        handler.stream = above[id(stream)]
    try:
        yield
    finally:
        for handler, stream in before:
            handler.stream = stream
        for wrapper in above.values():
            with contextlib.suppress(OSError, ValueError):
                wrapper.flush()
        sys.stdout, sys.stderr = out, err
