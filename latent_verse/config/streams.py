"""What programs print: it takes any text, and arrives, or they say that it could not be written."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from typing import TextIO

from latent_verse.config.messages import printable, reason

LONGEST = 2000  # characters of a line
NOT_PRINTED = "what was printed could not be written"


def print_error(said: str) -> None:
    """One line on stderr, if there is one to take it; items of a list follow, indented by two spaces.

    What a name or value in it could do to a terminal is escaped, and a very long line is shortened.
    """
    lines = [printable(line) for line in re.split(r"\n(?=  )", said)]
    lines = [line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}" for line in lines]
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed or full
        print("error: " + "\n".join(lines), file=sys.stderr, flush=True)


def open_streams() -> None:
    """Let standard streams take any text. One that is closed leads nowhere: else the next file would take its place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            with contextlib.suppress(OSError):
                setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: SIM115
        elif number and hasattr(stream, "reconfigure"):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")


def flushed(code: int) -> int:
    """The exit code, once what was printed has arrived; if it cannot, no later attempt is made, nor reported.

    Else Python would try at the very end, and leave with a code of its own, 120: for lost warnings on stderr too.
    """
    for stream in (sys.stdout, sys.stderr):
        if error := writing_fails(stream):
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
            if stream is sys.stdout and not code:
                print_error(f"{NOT_PRINTED}: {reason(error)}.")
                code = 141 if isinstance(error, BrokenPipeError) else 1
    return code


def writing_fails(stream: TextIO, more: str = "") -> Exception | None:
    """Write what was printed to a stream, and `more`; why that cannot be done."""
    try:
        if more:
            stream.write(more)
        stream.flush()
    except (OSError, ValueError) as error:
        return error
    return None
