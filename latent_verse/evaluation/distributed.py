"""The processes of an evaluation: how many there are, what each computes on, and how they are started."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable

from latent_verse.config import ConfigError
from latent_verse.config.evaluate import EvalWriteConfig
from latent_verse.metrics.processes import Ranks

PATIENCE = datetime.timedelta(hours=24)  # one process may score captions while the others wait
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR")  # what torchrun sets


def processes(write: EvalWriteConfig) -> int:
    """The number of processes to start; without a GPU, a note is printed.

    Raises:
        ConfigError: more GPUs are asked for than there are.
    """
    import torch

    if write.accelerator == "cpu":
        return max(1, write.gpus)
    present = torch.cuda.device_count()
    if write.gpus and not present and not torch.backends.mps.is_available() and "RANK" not in os.environ:
        print(f"No GPU on this machine: using the CPU in place of {write.gpus} GPU{'s' if write.gpus > 1 else ''}.")
    if present and write.gpus > present:
        raise ConfigError(f"gpus: {write.gpus}, but torch sees {present} on this machine. Give --gpus {present}.")
    return max(1, write.gpus) if present else 1


def device(gpus: int, accelerator: str = "auto", rank: int = 0) -> str:
    """Where process `rank` of this machine computes: its own CUDA GPU, Apple's (mps) or the CPU."""
    import torch

    from latent_verse.inference.pipeline import best_device

    kind = "cpu" if accelerator == "cpu" or not gpus else best_device()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % torch.cuda.device_count()}" if kind == "cuda" else kind


def launch(work: Callable[..., int], count: int, *arguments: object) -> int:
    """work(ranks, *arguments) in `count` processes, which import it, or in torchrun's; returns the worst exit code."""
    if all(name in os.environ for name in LAUNCHED):
        return _joined(work, "env://", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), arguments)
    if count == 1:
        return work(Ranks(), *arguments)
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.start_processes(_process, (work, count, f"file://{folder}/meet", arguments), nprocs=count)
        except mp.ProcessExitedException as ended:  # it has said why
            return ended.exit_code
    return 0


def _process(rank: int, work: Callable[..., int], world: int, meet: str, arguments: tuple) -> None:
    code = _joined(work, meet, rank, world, arguments)
    if code:
        raise SystemExit(code)


def _joined(work: Callable[..., int], meet: str, rank: int, world: int, arguments: tuple) -> int:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=PATIENCE)
    try:
        return work(Ranks(rank, world), *arguments)
    finally:
        dist.destroy_process_group()
