"""How the benchmarks measure: implementations timed alternately, medians, peak memory, and the machine's limits.

An area of the suite is a module with `cases(device, size) -> list[Case]`. A case measures one *row*, a plain dictionary
that goes to JSON as it is:

    area, case            what was measured
    ours                  {"seconds", "bytes"}: median time and peak extra memory, for the work that `unit` names
    peers                 [{"name", "seconds", "bytes", "ratio", "memory_ratio"} or {"name", "absent": why}]
    figures               further results: tokens/s, mfu, share of the bandwidth bound, ...
    same                  whether ours gave what the plain one gave (null where there is nothing to compare)
    goal, met             the goal in words, and whether it is met (null: no goal on this device)
    law                   {"name", "series", "x"}: the scaling law that the row is a point of
    failed                why the case ended early; what had been measured by then is in the row
"""

from __future__ import annotations

import functools
import gc
import os
import platform
import subprocess
import time
import weakref
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
PEAK_BF16 = 989e12  # FLOP/s, dense, of H100 and H200 (NVIDIA's data sheet): what MFU is held against
PACKAGES = ("torch", "torchvision", "vector-quantize-pytorch", "transformers", "x-transformers", "dalle-pytorch")
Row = dict[str, Any]
Step = Callable[[], Any]


class Case(NamedTuple):
    """One row of an area.

    run: yields the row as soon as ours is measured, and the same row again after each peer and each further figure, so
        that whatever ends the process later keeps what is there.
    seconds: after which it is stopped; None: run.py's own limit.
    compiles: whether torch.compile has work to do; a warm-up run fills the compiler's cache with such cases.
    """

    name: str
    run: Callable[[], Iterator[Row]]
    seconds: float | None = None
    compiles: bool = False


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str) -> Callable[[], float]:
    """Wall-clock seconds; with one thread on a CPU the process's CPU time, which other programs do not lengthen."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def seconds(run: Step, device: str) -> float:
    """Seconds of one call by `clock`, the device's work included."""
    now = clock(device)
    synchronise(device)
    start = now()
    run()
    synchronise(device)
    return now() - start


ENOUGH = 0.2  # seconds of measuring after which a race of quick steps ends


def race(ways: dict[str, Step], device: str, repeats: int, warm: int = 1) -> dict[str, float]:
    """Median seconds of each implementation. They are timed alternately, so that a busy machine slows all of them.

    Quick ones get up to ten times as many rounds, as long as that lasts no more than ENOUGH seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(warm):
        for run in ways.values():
            seconds(run, device)
    start = time.perf_counter()
    for turn in range(10 * repeats):
        if turn >= repeats and time.perf_counter() - start > ENOUGH:
            break
        for name, run in ways.items():
            times[name].append(seconds(run, device))
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time; temporaries inside an operator are left out."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in given or key in self.seen:
                continue
            self.seen.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def peak_bytes(run: Step, device: str, first: bool = False) -> int:
    """Bytes that a call adds to the peak: of the allocator (CUDA), or of what tensors hold (CPU, see PeakBytes).

    first: count the first call, with whatever it makes and keeps for later ones.
    """
    if device == "cuda":
        if not first:
            run()  # libraries keep a workspace from their first call on
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with PeakBytes() as count:
        run()
    return count.peak


def release(device: str) -> None:
    """Give back a GPU's memory that nothing uses any longer. Raises what went wrong on it, if something did."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------------- results


def measured(step: Step, device: str, repeats: int, warm: int = 1) -> Row:
    """Ours: median seconds and peak bytes of a step."""
    return {"seconds": race({"ours": step}, device, repeats, warm)["ours"], "bytes": peak_bytes(step, device)}


def against(
    result: Row, name: str, ours: Step, make: Callable[[], Step], device: str, repeats: int, apart=False, scale=1.0
) -> Row:
    """Race a peer with ours and add it to the row. One that fails costs its own entry only, which says why.

    Args:
        make: makes the peer's step.
        apart: time the peer alone, where the device's memory does not hold both.
        scale: how many steps of the peer do the work of one of ours.
    """
    try:
        theirs = make()
        times = race({name: theirs} if apart else {"ours": ours, name: theirs}, device, repeats)
        our_seconds, our_bytes = times.get("ours", result["ours"]["seconds"]), result["ours"].get("bytes")
        held = our_bytes and peak_bytes(theirs, device)
        entry = peer(name, our_seconds, times[name] * scale, held, our_bytes and our_bytes / scale)
    except Exception as error:
        entry = absent(name, error)
    result["peers"].append(entry)
    theirs = None
    release(device)
    return entry


def peer(name: str, ours: float, theirs: float, bytes_: int | None = None, our_bytes: float | None = None) -> Row:
    """A peer's entry: seconds for the same work, and how many times ours they are."""
    entry = {"name": name, "seconds": theirs, "ratio": theirs / ours}
    if bytes_ is not None:
        entry["bytes"] = bytes_
        if our_bytes:
            entry["memory_ratio"] = bytes_ / our_bytes
    return entry


def cause(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]


def absent(name: str, error: BaseException) -> Row:
    """The entry of a peer that cannot be measured here, with the reason."""
    return {"name": name, "absent": cause(error)}


def row(area: str, case: str, ours: Row, peers: list[Row], **more: Any) -> Row:
    """A row; `more` are the other entries, those not given are null."""
    empty = {"figures": {}, "same": None, "goal": None, "met": None, "law": None, "note": None}
    return {"area": area, "case": case, "ours": ours, "peers": peers, **empty, **more}


# ----------------------------------------------------------------------------------------------------- what is possible


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and written bytes counted."""
    size = 2**30 if device == "cuda" else 2**26
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / race({"copy": lambda: target.copy_(source)}, device, 9, warm=2)["copy"]


@functools.cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on random data."""
    n = 8192 if device == "cuda" and dtype != torch.float32 else 4096 if device == "cuda" else 768
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / race({"product": lambda: a @ b}, device, 9, warm=2)["product"]


# ---------------------------------------------------------------------------------------------------------- the machine


def version(package: str) -> str | None:
    """The installed version of a package, None where it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of the working tree, marked where it has been changed since."""
    try:
        name = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
        changed = subprocess.check_output(["git", "status", "--porcelain", "-uno"], cwd=ROOT, text=True).strip()
        return name + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCHMARK_COMMIT", "unknown")


def about(device: str) -> Row:
    """Machine, versions and commit, for the results."""
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    return {
        "device": gpu.name if gpu else f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()}",
        "gpu_memory_bytes": gpu.total_memory if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "clock": "CPU time" if clock(device) is time.process_time else "wall clock",
        "processor": platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability() + (", bfloat16" if cpu_has_bf16() else ""),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16; others only emulate it, many times slower than float32."""
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return any(has.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))


def in_bytes(count: float | None) -> str:
    """A number of bytes in readable units."""
    if count is None:
        return ""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
