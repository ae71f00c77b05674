"""Run cases again: python -m tests.fuzz AREA SEED, or AREA FIRST-LAST, or AREA alone for the usual number of cases.

Prints what each changed, how it ended, and what it printed; its folder is kept. --all prints accepted cases too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.fuzz.cases import areas
from tests.fuzz.client import Servers


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("area")
    parser.add_argument("seeds", nargs="?", help="SEED, or FIRST-LAST")
    parser.add_argument("--folder", type=Path, help="of the valid inputs and the cases; by default a new one")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    flags = parser.parse_args()
    area = areas()[flags.area]
    first, _, last = (flags.seeds or f"0-{area.cases - 1}").partition("-")
    folder = flags.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    endings: Counter[str] = Counter()
    seconds, grown = 0.0, 0
    with Servers(folder.absolute(), flags.processes) as servers:
        for seed, answer in servers.run(flags.area, range(int(first), int(last or first) + 1)):
            endings[answer["ended"]] += 1
            seconds, grown = seconds + answer["seconds"], max(grown, answer.get("grown", 0))
            if answer["ended"] not in ("accepted", "refused") or flags.all:
                print(f"{flags.area} {seed}: {answer['ended']} {answer['why']} ({answer['seconds']} s)")
                print(f"  changed: {answer['changed']}")
                print("\n".join(f"    {line}" for line in answer.get("printed", "").splitlines()), flush=True)
    print(f"{dict(endings)}: {seconds:.0f} s in all, memory grew by at most {grown} MiB; {folder}")
    return int(any(ending not in ("accepted", "refused") for ending in endings))


if __name__ == "__main__":
    sys.exit(main())
