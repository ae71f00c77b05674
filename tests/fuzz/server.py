"""A process that has imported everything, and forks a process for each case: milliseconds, and nothing is left behind.

Reads lines "AREA SEED" or "prepare AREA" and answers each with a line of JSON. A case that hangs is killed with all
its processes; one that crashes ends alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from pathlib import Path

MEMORY = 1 << 30  # bytes by which the memory of a case may grow
PATIENCE = 3  # times its limit of processor time that a case may take
ADDRESSES = 4 << 30  # and its address space
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.startfile", "pty.spawn")
ALLOWED = ("git", "uname")  # what describes the machine and the commit of a result
FETCHING = ("curl", "gsutil", "aws", "ais")  # of URLs that were given as such: not noted, but not started either
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
LINES = 40  # of stderr, at most; a message lists at most 20 items
WIDTH = 5000  # characters of a line of it


def serve(folder: Path) -> None:
    """Answer until stdin ends. `folder` holds the valid inputs and the cases."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing but answers goes there
    from tests.fuzz.cases import areas

    table = areas()
    folder.mkdir(parents=True, exist_ok=True)
    _warm_up()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        first, second = line.split()
        if first == "prepare":
            answer = _in_a_fork(600, folder, lambda _, need=table[second].needs: _prepare(folder, need))
        else:
            place = folder / f"{first}-{second}"
            shutil.rmtree(place, ignore_errors=True)
            (place / "given").mkdir(parents=True)
            area = table[first]
            answer = _in_a_fork(area.seconds, place, lambda place, it=(area, first, second): _case(folder, place, *it))
            if answer["ended"] in ("accepted", "refused"):
                _remove(place)
        print(json.dumps(answer), file=answers)


def _warm_up() -> None:
    import platform

    import pytorch_lightning  # noqa: F401
    import torch
    import webdataset  # noqa: F401

    from latent_verse.evaluation import worker  # noqa: F401
    from latent_verse.inference import tasks  # noqa: F401

    torch.set_num_threads(1)
    platform.processor()


def _in_a_fork(seconds: float, place: Path, work) -> dict:
    """What work(place) returns in a process of its own, as a dict with `ended`."""
    began, result = time.monotonic(), place / "result.json"
    result.unlink(missing_ok=True)
    number = os.fork()
    if number == 0:
        try:
            os.setsid()
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: it ends with the server
            _limit(resource.RLIMIT_CPU, int(seconds))
            _to_files(place)
            content = work(place)
        except BaseException:
            content = {"ended": "the fuzz failed", "why": traceback.format_exc()}
        with contextlib.suppress(BaseException):
            _limit(resource.RLIMIT_AS, None)
            result.write_text(json.dumps(content))
        os._exit(0)
    status = None
    while status is None and time.monotonic() - began < PATIENCE * seconds:
        done, code = os.waitpid(number, os.WNOHANG)
        status = code if done else time.sleep(0.003)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(number, signal.SIGKILL)  # what it has left running, too
    if status is None:
        os.waitpid(number, 0)
        answer = {"ended": "hang", "why": f"not done after {PATIENCE * seconds:g} s"}
    elif result.is_file():
        answer = json.loads(result.read_text())
    elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        answer = {"ended": "hang", "why": f"not done after {seconds:g} s of the processor's time"}
    else:
        answer = {"ended": "crash", "why": f"wait status {status}: signal {os.WTERMSIG(status)}"}
    notes = place / "changed.txt"
    answer["changed"] = notes.read_text() if notes.is_file() else ""
    answer["seconds"] = round(time.monotonic() - began, 2)
    if answer["ended"] not in ("accepted", "refused", "ready"):
        answer["printed"] = _tail(place / "stderr.txt") or _tail(place / "stdout.txt")
    return answer


def _to_files(place: Path) -> None:
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        file = os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    os.dup2(sys.stdin.fileno(), 0)


def _prepare(folder: Path, needs: tuple[str, ...]) -> dict:
    from tests.fuzz.valid import Valid

    valid = Valid(folder / "valid")
    for need in needs:
        getattr(valid, need)()
    return {"ended": "ready"}


def _case(folder: Path, place: Path, area, name: str, seed: str) -> dict:
    from tests.fuzz.cases import VALID_EVERY, Bench
    from tests.fuzz.mutations import Mutator
    from tests.fuzz.valid import Valid

    mutate, unchanged = Mutator(f"{name} {seed}"), int(seed) % VALID_EVERY == 0
    case = area.make(Bench(Valid(folder / "valid"), place, mutate, unchanged))
    notes = f"{'; '.join(mutate.notes) or 'nothing'}\n  {case.replayed}"
    (place / "changed.txt").write_text(notes, encoding="utf-8", errors="backslashreplace")
    before = None if area.changes_given else _contents(place / "given")
    os.chdir(place)
    os.environ.update(TMPDIR=str(place), HOME=str(place))
    tempfile.tempdir = None  # it was found out before
    broken: list[str] = []
    sys.addaudithook(_watch(place, broken))
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, addresses + ADDRESSES)
    _limit(resource.RLIMIT_FSIZE, MEMORY)
    ended, why = _run(case, area.codes)
    sys.stdout.flush()
    sys.stderr.flush()
    _limit(resource.RLIMIT_AS, None)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024
    if ended in ("accepted", "refused"):
        problems = [*broken, *_problems((place / "stderr.txt").read_bytes(), ended)]
        if grown > MEMORY:
            problems.append(f"memory grew by {grown / 2**20:.0f} MiB")
        if before is not None and (changed := _differing(before, _contents(place / "given"))):
            problems.append(f"inputs were changed: {changed}")
        if unchanged and ended == "refused":
            problems.append("an unchanged input was refused")
        if problems:
            ended, why = "wrong", "; ".join(problems)
    return {"ended": ended, "why": why, "grown": grown >> 20}


def _limit(what: int, value: int | None) -> None:
    """Set a limit of this process; None: as high as it may be."""
    highest = resource.getrlimit(what)[1]
    resource.setrlimit(what, (highest if value is None else value, highest))


def _run(case, codes: tuple[int, ...]) -> tuple[str, str]:
    from latent_verse.config import UserError

    try:
        code = case.run()
    except UserError as error:  # of a loader; a command prints it itself
        print(f"error: {error}", file=sys.stderr)
        return "refused", ""
    except SystemExit as leaving:
        if leaving.code in (0, None):  # --help
            return "accepted", ""
        return "wrong", f"SystemExit {leaving.code!r}"
    except BaseException as error:
        traceback.print_exc()
        return "traceback", _shortened(f"{type(error).__name__}: {error}")
    if code and code not in codes:
        return "wrong", f"exit code {code}"
    return "refused" if code else "accepted", ""


def _watch(place: Path, broken: list[str]):
    """An audit hook that notes what a case may not do."""
    allowed = str(place)

    def outside(path) -> bool:
        if not isinstance(path, (str, bytes)):
            return False
        path = os.path.realpath(os.path.join(allowed, os.fsdecode(path)))
        return not path.startswith((allowed + os.sep, "/dev/null", "/dev/shm/", "/proc/self/")) and path != allowed

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(STARTS):
            what = arguments[0] if event.startswith("os.system") else arguments[1] if len(arguments) > 1 else ""
            program = os.fsdecode(what[0]) if isinstance(what, (list, tuple)) and what else str(what)
            if os.path.basename(program) not in ALLOWED:
                if os.path.basename(program) not in FETCHING:
                    broken.append(f"started a program: {event} {_shortened(what)}")
                raise OSError("no program may be started here")
        elif event in ("socket.connect", "socket.getaddrinfo"):
            if event == "socket.getaddrinfo" or not isinstance(arguments[1], (str, bytes)):  # a local socket is a path
                broken.append(f"connected: {_shortened(arguments[1:3])}")
                raise OSError("there is no network here")
        elif event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else False
            if (writes or (isinstance(mode, str) and set(mode) & set("wax+"))) and outside(path):
                broken.append(f"wrote {_shortened(path)}")
        elif event in CHANGES and any(map(outside, arguments[event in ("os.symlink", "os.link") : 2])):
            broken.append(f"{event} {_shortened(arguments)}")

    return hook


def _problems(printed: bytes, ended: str) -> list[str]:
    """What is wrong with what was printed to stderr."""
    text = printed.decode("utf-8", "replace")
    lines, problems = re.split("[\r\n]+", text), []
    if "Traceback (most recent call last)" in text:
        problems.append("a traceback was printed")
    if len(lines) > LINES:
        problems.append(f"{len(lines)} lines on stderr")
    if longest := [line for line in lines if len(line) > WIDTH]:
        problems.append(f"a line of {len(longest[0])} characters on stderr")
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    if ended == "refused" and len(errors) != 1:
        problems.append(f"{len(errors)} lines begin with `error: `")
    elif ended == "refused":
        after = [line for line in lines[errors[0] + 1 :] if line and not line.startswith(" ")]
        if len(after) > 1 or (after and not any(line.startswith("  ") for line in lines[errors[0] + 1 :])):
            problems.append(f"the message has more than one line: {_shortened(after[0])}")
    if "\x1b" in text or "\0" in text:
        problems.append("control characters on stderr")
    return problems


def _contents(folder: Path) -> dict[str, str]:
    """Every entry below a folder and what it holds."""
    found = {}
    for parent, folders, files in os.walk(os.fsencode(folder)):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            kind = os.lstat(path).st_mode
            held = b""
            if stat.S_ISREG(kind):
                with open(path, "rb") as file:
                    held = hashlib.sha256(file.read(1 << 26)).digest()
            found[repr(path)] = f"{kind} {held.hex()}"
    return found


def _differing(before: dict[str, str], after: dict[str, str]) -> str:
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return _shortened(", ".join(names[:3]))


def _tail(file: Path, size: int = 6000) -> str:
    if not file.is_file():
        return ""
    text = file.read_bytes().decode("utf-8", "backslashreplace")
    return text if len(text) <= size else f"{text[: size // 4]}\n[...]\n{text[-size * 3 // 4 :]}"


def _remove(place: Path) -> None:
    for parent, folders, _ in os.walk(place):
        for name in folders:
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(place, ignore_errors=True)


def _shortened(value: object, size: int = 300) -> str:
    text = str(value)
    return text if len(text) <= size else text[:size] + "..."


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
