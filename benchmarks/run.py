"""The suite: what L-Verse costs against the plain formulation and its peers, area by area, in one table.

    python benchmarks/run.py [name ...] [--device cuda] [--size toy|cpu|cuda] [--json FILE]
    python benchmarks/run.py --device cuda --warm-up    # before that, on the same machine

Areas: quantizer codes growth data startup biart sampling augvae (all of them by default). Every ratio is within one
run: implementations are timed alternately, and medians are reported. Peers are those of benchmarks/requirements.txt;
the table names those that are not installed. docs/performance.md explains the results.

    ours, theirs   seconds for the same work         ratio    theirs over ours: above 1 is faster
    limit          share of what the machine can do  memory   peak that the work adds, and theirs over ours
    same           whether ours gave what the plain one gave

The cases of an area run one after another in a process of its own. A row is printed and written to FILE as soon as it
is there, and FILE is whole at any moment. A case that raises, is killed or takes too long costs its own row, which says
why; the next one begins in a fresh process. On a GPU all areas together end within `--minutes`.

`--warm-up` runs the tests that need a GPU, every area at its toy size and, beside them, ours of each case that
torch.compile works on, so that the run after it finds the compiler's cache filled.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if Path(sys.path[0] or ".").resolve() == ROOT / "benchmarks":  # run as a script: this folder's names are common ones
    sys.path[0] = str(ROOT)

# area -> seconds that it may take on a GPU, from cheap to dear: the last one gets what the others leave
AREAS = {
    "quantizer": 35.0,
    "codes": 25.0,
    "growth": 25.0,
    "data": 30.0,
    "startup": 25.0,
    "biart": 75.0,
    "sampling": 100.0,
    "augvae": 225.0,
}
COMPILED = ("biart", "sampling", "augvae")  # areas with cases that torch.compile works on
PACKAGE = "benchmarks"  # that the areas are modules of
MINUTES = 9.0  # on a GPU, for all areas together
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # where the next run finds what this one has compiled
STARTING = 120.0  # seconds within which a process has to begin its first case
CASE = 60.0  # seconds that a case may take on a GPU, unless it says otherwise
MET = {True: "met", False: "MISSED", None: "not known"}
LIMITS = ("mfu", "share_of_bandwidth_bound", "share_of_matmul_rate")


def measure(module: str, device: str, size: str, first: int = 0, compiled_only: bool = False) -> Iterator[dict]:
    """Measure an area's cases here, from number `first` on. What happens comes as messages: the names and limits of all
    cases, which one begins, its row whenever there is something new in it, and why it ended early.

    compiled_only: only cases that torch.compile works on, and ours only.
    """
    from benchmarks.measure import cause, release

    found = importlib.import_module(module).cases(device, size)
    cases = [case for case in found if case.compiles or not compiled_only]
    yield {"cases": [[case.name, case.seconds or (CASE if device == "cuda" else float("inf"))] for case in cases]}
    for number, case in enumerate(cases[first:], first):
        yield {"begin": number}
        try:
            for row in case.run():
                yield {"row": row}
                if compiled_only:
                    break
            if "torch._dynamo" in sys.modules:
                sys.modules["torch._dynamo"].reset()
            release(device)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            yield {"failed": cause(error)}


def in_child(file: str, *arguments) -> None:
    """`measure` in a process of its own: each message becomes a line of JSON in `file`. Ends with a case that fails."""
    suite = os.dup(0)  # a pipe that only the suite holds the other end of
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def end_with_the_suite() -> None:
        os.read(suite, 1)
        os.killpg(0, signal.SIGKILL)  # with all processes that this one has started

    threading.Thread(target=end_with_the_suite, daemon=True).start()
    with open(file, "a") as out:
        for message in measure(*arguments):
            out.write(json.dumps(message) + "\n")
            out.flush()
            if "failed" in message:
                return


def in_children(area: str, device: str, size: str, seconds: float, compiled_only: bool = False) -> Iterator[dict]:
    """The rows of an area within `seconds`; a later row takes the place of an earlier one of the same case."""
    from benchmarks.measure import row

    if seconds <= 0:
        yield row(area, "(left out: the time is over)", {}, [])
        return
    end, cases, number = time.monotonic() + seconds, None, -1
    while cases is None or number + 1 < len(cases):
        began, limit, latest, cause = time.monotonic(), STARTING, None, None
        number += 1
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "messages")
            file.touch()
            child = _start(str(file), f"{PACKAGE}.{area}", device, size, number, compiled_only)
            try:
                for message in _messages(child, file):
                    now = time.monotonic()
                    if message is None:
                        if now > min(began + limit, end):
                            cause = f"stopped after {now - began:.0f} s"
                            break
                    elif "cases" in message:
                        cases = message["cases"]
                    elif "begin" in message:
                        number, began, latest = message["begin"], now, None
                        limit = cases[number][1]
                    elif "row" in message:
                        latest = message["row"]
                        yield latest
                    else:
                        cause = message["failed"]
                        break
                else:
                    code = child.returncode
                    if code:
                        cause = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
            finally:
                _kill(child)
        if cause:
            name = cases[number][0] if cases else f"(all of {area})"
            yield (latest or row(area, name, {}, [])) | {"failed": cause}
            if cases is None:
                return
        left = len(cases) - number - 1
        if left > 0 and time.monotonic() > end:
            yield row(area, f"(the last {left} left out: {seconds:.0f} s are over)", {}, [])
            return


def _start(*arguments) -> subprocess.Popen:
    """Call `in_child` in a process that leads a group of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(arguments)]
    caches = {name: str(Path(tempfile.gettempdir(), "latent_verse_benchmarks", name.lower())) for name in CACHES}
    return subprocess.Popen(command, env=caches | os.environ, stdin=subprocess.PIPE, start_new_session=True)


def _messages(child: subprocess.Popen, file: Path) -> Iterator[dict | None]:
    """What a child writes, message by message until it has ended; None in between, ten times a second."""
    with file.open() as lines:
        text, ended = "", False
        while not ended:
            ended = child.poll() is not None  # asked first: what it wrote last is read below
            *whole, text = (text + lines.read()).split("\n")
            yield from map(json.loads, whole)
            yield None
            time.sleep(0.1)


def _kill(child: subprocess.Popen) -> None:
    """End a child and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    child.stdin.close()


# ------------------------------------------------------------------------------------------------------------ the table


def header(area: str) -> str:
    columns = f"{'ours':>10} {'theirs':>10} {'ratio':>7} {'limit':>7} {'memory':>10} {'ratio':>6}  same  goal"
    return f"\n{area.upper():58} {columns}"


def table(row: dict) -> Iterator[str]:
    """Lines: one for a row, then one for each of its peers."""
    from benchmarks.measure import in_bytes

    ours, figures = row["ours"], row["figures"]
    limit = next((figures[name] for name in LIMITS if figures.get(name) is not None), None)
    goal = "" if row["goal"] is None else f"{MET[row['met']]}: {row['goal']}"
    yield (
        f"{row['case']:58} {_time(ours.get('seconds'))} {'':>10} {'':>7} "
        f"{'' if limit is None else f'{limit:.0%}':>7} {in_bytes(ours.get('bytes')):>10} {'':>6}  "
        f"{ {True: 'yes', False: 'NO', None: ''}[row['same']]:4}  {goal}"
    ).rstrip()
    if row.get("failed"):
        yield f"    FAILED: {row['failed']}"
    for peer in row["peers"]:
        if "absent" in peer:
            yield f"    {peer['name'] + ': absent, ' + peer['absent']}"
            continue
        ratio, memory = peer.get("ratio"), peer.get("memory_ratio")
        yield (
            f"    {peer['name']:54} {'':>10} {_time(peer.get('seconds'))} "
            f"{'' if ratio is None else f'{ratio:.2f}x':>7} {'':>7} {in_bytes(peer.get('bytes')):>10} "
            f"{'' if memory is None else f'{memory:.1f}x':>6}"
        ).rstrip()
    shown = {k: v for k, v in figures.items() if k not in LIMITS and v is not None}
    if shown:
        yield "    " + ", ".join(f"{k} {v:.4g}" for k, v in shown.items())


def _time(seconds: float | None) -> str:
    if seconds is None:
        return f"{'':>10}"
    return f"{seconds:8.2f} s" if seconds >= 1 else f"{seconds * 1e3:7.2f} ms"


class Results:
    """All rows, which go to the screen and into the file as they come."""

    def __init__(self, file: Path | None, device: str, size: str):
        from benchmarks.measure import about

        self.file, self.about, self.begin = file, about(device) | {"size": size}, time.monotonic()
        self.rows: dict[tuple[str, str], dict] = {}
        self._lock = threading.Lock()
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)

    def take(self, area: str, rows: Iterable[dict]) -> None:
        """Take the rows of an area; each is printed once it is complete."""
        begin, last = time.monotonic(), None
        print(header(area), flush=True)
        for row in rows:
            if last and last["case"] != row["case"]:
                print("\n".join(table(last)), flush=True)
            last = row
            with self._lock:
                self.rows[row["area"], row["case"]] = row
                self._write()
        if last:
            print("\n".join(table(last)))
        print(f"({time.monotonic() - begin:.0f} s for {area})", flush=True)

    def _write(self) -> None:
        from latent_verse.files import write_json

        if self.file:
            seconds = time.monotonic() - self.begin
            write_json(self.file, {"about": self.about | {"seconds": seconds}, "rows": list(self.rows.values())})

    def close(self) -> int:
        """Print what went wrong; 1 if a case failed or ours gave something else than the plain implementation."""
        rows = self.rows.values()
        missed, seconds = sum(row["met"] is False for row in rows), time.monotonic() - self.begin
        print(f"\n{len(rows)} rows, {missed} goals missed, {seconds:.0f} s")
        wrong = [row for row in rows if row["same"] is False or row.get("failed")]
        for row in wrong:
            print(f"WRONG: {row['area']}, {row['case']}: {row.get('failed') or 'not what the plain one gives'}")
        return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 if a case failed or ours gave something else than the plain implementation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"areas: {' '.join(AREAS)}; default all")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", choices=("toy", "cpu", "cuda"), help="default: the device's")
    parser.add_argument("--warm-up", action="store_true", help="check the machine and fill the compiler's cache")
    parser.add_argument("--minutes", type=float, help=f"time for all; default {MINUTES:g} on cuda, a day on the CPU")
    parser.add_argument("--json", type=Path, help="write rows, machine, versions and commit here")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in AREAS]
    if unknown:
        parser.error(f"no area {', '.join(unknown)}; there are {' '.join(AREAS)}")
    if args.child:
        in_child(*args.child)
        return 0

    cuda, size, names = args.device == "cuda", args.size or args.device, args.names or list(AREAS)
    end = time.monotonic() + 60 * (args.minutes or (MINUTES if cuda else 24 * 60.0))
    results = Results(args.json, args.device, size)

    def run(area: str, size: str, seconds: float = float("inf"), compiled_only: bool = False) -> None:
        left = end - time.monotonic()
        results.take(area, in_children(area, args.device, size, min(seconds, left), compiled_only))

    def check() -> None:
        for name in ["gpu_tests", *names]:
            run(name, "toy")

    def fill() -> None:
        for name in names:
            if name in COMPILED:
                run(name, size, compiled_only=True)

    if args.warm_up:
        lanes = [threading.Thread(target=lane, daemon=True) for lane in (check, fill)]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
    else:
        for name in names:
            run(name, size, AREAS[name] if cuda else float("inf"))
    return results.close()


if __name__ == "__main__":
    raise SystemExit(main())
