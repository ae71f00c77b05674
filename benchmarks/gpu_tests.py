"""Part of a warm-up: the test files that need a GPU, and the dry run on fake CUDA tensors, each in its own process."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial

from benchmarks.measure import ROOT, Case, Row, row

NEEDS = "needs a GPU"  # why such tests are skipped elsewhere
DRY_RUN = "tests/test_cuda_dry_run.py"


def cases(device: str, size: str) -> list[Case]:
    """One for each file."""
    files = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if NEEDS in file.read_text()]
    names = [*(str(file.relative_to(ROOT)) for file in files), DRY_RUN]
    return [Case(name, partial(_test, name), seconds=150) for name in dict.fromkeys(names)]


def _test(name: str) -> Iterator[Row]:
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", name]
    done = subprocess.run(command, cwd=ROOT)
    yield row(
        "gpu_tests",
        name,
        {"seconds": time.perf_counter() - start},
        [],
        unit="file of tests",
        same=done.returncode == 0,
    )
