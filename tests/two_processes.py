"""Running a function in two processes that are joined by gloo on the CPU."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def _process(rank: int, folder: str, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
        result = work(rank, *arguments)
        dist.destroy_process_group()
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, f"{folder}/rank{rank}.pt")


def in_two_processes(folder: Path, work: Callable, *arguments) -> list:
    """What work(rank, *arguments) returns in each process. They are forked, to start at once; results are files."""
    context = mp.get_context("fork")
    processes = [context.Process(target=_process, args=(r, str(folder), work, arguments)) for r in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    hung = [r for r, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hung, f"ranks {hung} hang"
    results = [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(WORLD)]
    failures = [r for r in results if isinstance(r, str)]
    assert not failures, "\n".join(failures)
    return results
