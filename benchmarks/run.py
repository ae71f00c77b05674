"""The suite: what L-Verse costs against the plain formulation and its peers, area by area, in one table.

    python benchmarks/run.py [name ...] [--device cuda] [--size toy|cpu|cuda] [--json FILE]

Areas: quantizer augvae biart sampling data codes startup growth (all of them by default). Each runs in a process of its
own with a limit on its time, within `--minutes` in all; what was measured before a limit is kept, and the table says
what is left out. Peers are those of benchmarks/requirements.txt; the table names those that are not installed. Every
ratio is within one run: implementations are timed alternately, and medians are reported. docs/performance.md explains
the results.

    ours, theirs   seconds for the same work         ratio    theirs over ours: above 1 is faster
    limit          share of what the machine can do  memory   peak that the work adds, and theirs over ours
    same           whether ours gave what the plain one gave
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if Path(sys.path[0] or ".").resolve() == ROOT / "benchmarks":  # run as a script: this folder's names are common ones
    sys.path[0] = str(ROOT)

# area -> seconds within which it may begin new rows on a GPU, where all have to fit into 8 minutes
AREAS = {
    "quantizer": 40,
    "augvae": 110,
    "biart": 95,
    "sampling": 80,
    "data": 30,
    "codes": 30,
    "startup": 20,
    "growth": 35,
}
GRACE = 25  # seconds that a row may take beyond its area's time before the area is stopped
LIMITS = ("mfu", "share_of_bandwidth_bound", "share_of_matmul_rate")


def measure_area(name: str, device: str, size: str, seconds: float) -> Iterator[dict]:
    """The rows of an area; none begins after `seconds`, and a row says so."""
    begin = time.monotonic()
    rows = importlib.import_module(f"benchmarks.{name}").suite(device, size)
    while True:
        if time.monotonic() - begin > seconds:
            rows.close()
            yield _note(name, f"the rest left out: {seconds:.0f} s are over")
            return
        try:
            yield next(rows)
        except StopIteration:
            return


def _note(area: str, text: str) -> dict:
    empty = dict.fromkeys(("unit", "same", "goal", "met", "law"))
    return {"area": area, "case": f"({text})", "ours": {}, "peers": [], "figures": {}, "note": text, **empty}


def in_process(name: str, device: str, size: str, seconds: float, file: Path) -> None:
    """Measure an area here; each row is written to `file`, a JSON line, as soon as it is there."""
    with file.open("a") as out:
        for row in measure_area(name, device, size, seconds):
            out.write(json.dumps(row) + "\n")
            out.flush()


def in_child(name: str, device: str, size: str, seconds: float, file: Path) -> None:
    """The same in a process of its own, which is stopped when it takes too long; how it failed becomes a row.

    With one thread on a CPU times are the process's CPU time, so that a busy machine makes the suite slower, not wrong.
    """
    command = [sys.executable, __file__, name, "--device", device, "--size", size, "--child", str(file), str(seconds)]
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=seconds + GRACE)
        failure = None
        if done.returncode:
            failure = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        failure = f"stopped after {seconds + GRACE:.0f} s"
    if failure:
        with file.open("a") as out:
            out.write(json.dumps(_note(name, failure) | {"failed": True}) + "\n")


# ------------------------------------------------------------------------------------------------------------ the table


def table(rows: list[dict]) -> Iterator[str]:
    """Lines: one for each row, then one for each of its peers."""
    from benchmarks.measure import in_bytes

    head = f"{'':58} {'ours':>10} {'theirs':>10} {'ratio':>7} {'limit':>7} {'memory':>10} {'ratio':>6}  same  goal"
    area = None
    for row in rows:
        if row["area"] != area:
            area = row["area"]
            yield f"\n{area.upper():58}" + head[58:]
        ours, figures = row["ours"], row["figures"]
        limit = next((figures[name] for name in LIMITS if figures.get(name) is not None), None)
        goal = "" if row["goal"] is None else f"{'met' if row['met'] else 'MISSED'}: {row['goal']}"
        yield (
            f"{row['case']:58} {_time(ours.get('seconds'))} {'':>10} {'':>7} "
            f"{'' if limit is None else f'{limit:.0%}':>7} {in_bytes(ours.get('bytes')):>10} {'':>6}  "
            f"{ {True: 'yes', False: 'NO', None: ''}[row['same']]:4}  {goal}"
        ).rstrip()
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


def _write(file: Path, device: str, size: str, seconds: float, rows: list[dict]) -> None:
    from benchmarks.measure import about

    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"about": about(device) | {"size": size, "seconds": seconds}, "rows": rows}
    file.write_text(json.dumps(content, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 if an area failed or ours gave something else than the plain implementation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"areas: {' '.join(AREAS)}; default all")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", choices=("toy", "cpu", "cuda"), help="default: the device's")
    parser.add_argument("--minutes", type=float, help="time for all areas; default 7.5 on cuda, a day on the CPU")
    parser.add_argument("--json", type=Path, help="write rows, machine, versions and commit here")
    parser.add_argument("--here", action="store_true", help="in this process, without limits on time")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in AREAS]
    if unknown:
        parser.error(f"no area {', '.join(unknown)}; there are {' '.join(AREAS)}")
    size = args.size or args.device
    if args.child:
        in_process(args.names[0], args.device, size, float(args.child[1]), Path(args.child[0]))
        return 0

    limited = args.device == "cuda"
    minutes = args.minutes or (7.5 if limited else 24 * 60.0)
    begin, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names or AREAS:
            file = Path(folder) / f"{name}.jsonl"
            left = minutes * 60 - (time.monotonic() - begin)
            if args.here:
                in_process(name, args.device, size, float("inf"), file)
            elif left < 10:
                file.write_text(json.dumps(_note(name, "left out: no time left")) + "\n")
            else:
                in_child(name, args.device, size, min(AREAS[name] if limited else left, left - 5), file)
            area = [json.loads(line) for line in file.read_text().splitlines()]
            print("\n".join(table(area)), flush=True)
            rows += area
            if args.json:  # after each area: a run that is stopped keeps what it has
                _write(args.json, args.device, size, time.monotonic() - begin, rows)
    missed = sum(row["met"] is False for row in rows)
    wrong = [row["case"] for row in rows if row["same"] is False or row.get("failed")]
    print(
        f"\n{len(rows)} rows, {missed} goals missed, {time.monotonic() - begin:.0f} s"
        + "".join(f"\nWRONG: {w}" for w in wrong)
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
