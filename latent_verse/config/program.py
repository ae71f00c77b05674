"""What every program does around its work: a signal ends it, an error becomes one line, the exit code says which.

| exit code | meaning |
|---|---|
| 0 | all was done, and what was printed has arrived |
| 2 | a mistake in settings, files or data (`UserError`, unless it sets another code) |
| 1 | the machine failed: disk, memory, a process, a package; or a fault of ours, with its traceback |
| 129, 130, 143 | stopped by SIGHUP, Ctrl-C (SIGINT) or SIGTERM |
| 141 | whoever read the output has closed it (`... | head`) |

What counts as the machine's is in faults.py; everything else is a fault of ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from latent_verse.config.faults import LOST_CONTACT, fault, lost_contact
from latent_verse.config.messages import ConfigError, UserError, printable, reason, shown
from latent_verse.config.settings import URL
from latent_verse.config.streams import NOT_PRINTED, flushed, open_streams, print_error, writing_fails

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
GRACE = 10.0  # seconds that a process of several leaves to others, which may say why they failed, or end it
# what torchrun, Lightning, Slurm and LSF call the number of a process, or of its machine
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
PARENT = "LATENT_VERSE_PARENT"  # environment: the process that has started this one, and watches it
LOST = 75  # exit code of such a process that knows only that it has lost the others
SAID = "LATENT_VERSE_SAID"  # environment: the file that the first of such processes to say why they end creates
OUTPUT_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)  # of a full disk, or a lost terminal


class Stopped(BaseException):
    """A signal asks the program to end. Not an Exception, so that nothing takes it for a failure and continues."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message or f"stopped by {signal_name(number)} before all was done")
        self.number, self.exit_code = number, 128 + number


def signal_name(number: int) -> str:
    """What messages call a signal: SIGINT by the keys that send it, too."""
    return "Ctrl-C (SIGINT)" if number == signal.SIGINT else signal.Signals(number).name


def one_line_errors(program: Callable[..., int]) -> Callable[..., int]:
    """Decorate a program that returns its exit code: what ends it early becomes one line on stderr and the code above.

    A fault of ours keeps its traceback. Of several processes, those after the first wait for `GRACE` seconds before
    they speak: the first one, or what started them, ends them in that time if all failed alike.
    """

    @functools.wraps(program)
    def wrapped(*args, **kwargs) -> int:
        open_streams()
        with _Signals() as signals, _short_warnings():
            try:
                _check_environment()
                return flushed(program(*args, **kwargs))
            except SystemExit as leaving:  # --help
                code = flushed(0)
                if code:
                    return code
                raise leaving from None
            except BaseException as error:
                signals.reporting = True
                reported = _report(error)
                if reported is None:
                    raise
                return flushed(reported)

    return wrapped


def die_with(parent: int) -> None:
    """Let the kernel kill this process as soon as its parent is gone, however that ends. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it was gone before
            os._exit(1)


def verdict(codes: Sequence[int | None]) -> int:
    """The exit code of a run whose processes ended with `codes` (None: not yet), one of which failed.

    Says what none of them could say: that one was killed, or that all have only lost each other.
    """
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            print_error(f"process {rank} of {len(codes)} {killed_by(-code)}.")
            return 1
    said = [code for code in codes if code not in (None, 0, LOST)]
    if not said:
        print_error(LOST_CONTACT)
    return max(said, default=1)


def killed_by(number: int) -> str:
    """What to say of a process that a signal has killed."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"was killed by {name}" + (", often because memory ran out" if name == "SIGKILL" else "")


class _Signals:
    """While a program runs, a signal raises `Stopped`. While that unwinds, another Ctrl-C ends the process at once.

    Where Python would print and forget what a handler raises (in a finalizer, or a callback of C code), the signal
    comes again a moment later. In `nothing_begun` there is nothing to unwind, so that the process ends there and then.
    No handler runs while C code waits, for another process that does not answer for example. So a thread sees signals
    as they arrive, and ends the process that a second Ctrl-C has not ended after `GRACE` seconds.
    """

    def __init__(self) -> None:
        self.stopping = self.reporting = False
        self._before: dict[int, object] = {}
        self._pid = os.getpid()
        self._is_main = _is_watched() or _runs_the_process()
        self._unraisable = sys.unraisablehook
        self._arrived: tuple[int, int] | None = None  # the ends of a pipe that each signal's number is written to
        self._woken = -1  # what signals were written to before
        self._watch = threading.Thread(target=self._insist, daemon=True)
        self._over = threading.Event()

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            if _is_watched():
                die_with(os.getppid())
            for number in SIGNALS:
                # one that is ignored (nohup, a shell's background job) stays so, a caller's own handler as well
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._stop)
            sys.unraisablehook = self._raise_again
            if self._is_main and hasattr(os, "fork"):
                with contextlib.suppress(OSError, RuntimeError):  # no more files or threads may be opened
                    self._arrived = os.pipe()
                    os.set_blocking(self._arrived[1], False)
                    self._watch.start()
                    self._woken = signal.set_wakeup_fd(self._arrived[1], warn_on_full_buffer=False)
        return self

    def _insist(self) -> None:
        assert self._arrived is not None
        asked = 0
        while asked < 2:
            number = os.read(self._arrived[0], 1)[0]
            if not number:  # the program has ended
                return
            asked += number == signal.SIGINT
        if not self._over.wait(GRACE):
            if is_first_process():
                print_error("stopped at once by a second Ctrl-C (SIGINT): something that it waits for does not answer.")
            os._exit(128 + signal.SIGINT)

    def __exit__(self, *_: object) -> None:
        if self._arrived is not None:
            if self._watch.ident:
                signal.set_wakeup_fd(self._woken)
                self._over.set()
                os.write(self._arrived[1], b"\0")
                self._watch.join()
            for end in self._arrived:
                os.close(end)
        if self.reporting and self._is_main:
            return  # while the interpreter ends, Python's own handlers would print tracebacks
        sys.unraisablehook = self._unraisable
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _stop(self, number: int, frame: object) -> None:
        if os.getpid() != self._pid:  # a forked process, which inherits this
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self.reporting or (self.stopping and number == signal.SIGINT):
            os._exit(128 + number)
        elif not self.stopping:
            self.stopping = True
            stopped = Stopped(number)
            if _begun:
                raise stopped
            self.reporting = True
            os._exit(flushed(_report(stopped) or stopped.exit_code))

    def _raise_again(self, what: sys.UnraisableHookArgs) -> None:
        if isinstance(what.exc_value, Stopped) and os.getpid() == self._pid:
            self.stopping = False
            again = threading.Timer(0.1, os.kill, (self._pid, what.exc_value.number))
            again.daemon = True
            again.start()
        elif not self.reporting:  # what a program that has failed leaves half made cannot be tidied up either
            self._unraisable(what)


if hasattr(os, "register_at_fork"):  # what a forked process is told does not concern its parent
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


_begun = True  # whether a program may have made anything


@contextlib.contextmanager
def nothing_begun() -> Iterator[None]:
    """Inside, a signal ends the program at once: for imports, in which libraries may swallow what a handler raises."""
    global _begun
    before, _begun = _begun, False
    try:
        yield
    finally:
        _begun = before


def _runs_the_process() -> bool:
    """Whether the program is what the process was started for: a script's call of it, not a test's or notebook's."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("latent_verse."):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == "__main__" and not hasattr(sys, "ps1")


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Print warnings as one line, without the place in the code and its source."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _report(error: BaseException) -> int | None:
    """Print why the program ends; its exit code, or None for a fault of ours."""
    said, code = _one_line(error)
    may_be_output = isinstance(error, OSError) and error.filename is None and error.errno in OUTPUT_FAILS
    if may_be_output and (failed := writing_fails(sys.stdout, "\n")):
        said = f"{NOT_PRINTED}: {reason(failed)}."  # of a print, or as a process was started, which flushes
    if said == LOST_CONTACT and _is_watched():
        return LOST
    if said == LOST_CONTACT or not is_first_process():
        time.sleep(GRACE)
    if (isinstance(error, Stopped) and not is_first_process()) or _another_has_spoken():
        return code
    if said is None:
        if isinstance(error, Exception):
            print_error("this is a bug in L-Verse. Please report it with the traceback that follows.")
        return None
    print_error(said)
    return code


def _one_line(error: BaseException) -> tuple[str | None, int]:
    """What to say, or None for a fault of ours; and the exit code."""
    if isinstance(error, (UserError, Stopped)):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return str(Stopped(signal.SIGINT)), 128 + signal.SIGINT
    if isinstance(error, BrokenPipeError):
        return "whoever read the output has closed it before all was printed.", 141
    return LOST_CONTACT if lost_contact(error) else fault(error), 1


def _is_watched() -> bool:
    return os.environ.get(PARENT) == str(os.getppid())


def _another_has_spoken() -> bool:
    """Whether another process has said why all end; if not, this one now does.

    `GRACE` alone is not enough: on a busy machine it passes before one that has spoken has ended.
    """
    try:
        os.close(os.open(os.environ[SAID], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return True
    except (KeyError, OSError):  # not such a process, or a full disk
        pass
    return False


def is_first_process() -> bool:
    """Whether this is the first of a run's processes; known before they meet."""
    return not any(os.environ.get(name, "").strip("0").isdecimal() for name in RANKS)


def _check_environment() -> None:
    """Refuse what PyTorch and Lightning would read as numbers and cannot. Empty variables are unset, `RANK=$ABSENT`.

    Where no launcher is at work, so is a MASTER_PORT that is not meant for them: Kubernetes sets it to a URL beside any
    service called master.

    Raises:
        ConfigError: naming the variable.
    """
    for name in (*RANKS, "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        value = os.environ.get(name, "0")
        if not value or (name == "MASTER_PORT" and URL.match(value) and not os.environ.keys() & RANKS):
            del os.environ[name]
        elif not value.isdecimal():
            remedy = "It has to be a whole number from 0: unset it"
            raise ConfigError(f"the environment variable {name} is {shown(value)}. {remedy}.")
