"""The processes of an evaluation: how many there are, what each computes on, and how they are started."""

from __future__ import annotations

import datetime
import multiprocessing.connection
import os
import tempfile
import traceback
from collections.abc import Callable

from latent_verse.config import ConfigError
from latent_verse.config.evaluate import EvalWriteConfig
from latent_verse.config.program import PARENT, SAID, SIGNALS, Stopped, one_line_errors, verdict
from latent_verse.metrics.processes import Ranks

PATIENCE = datetime.timedelta(hours=24)  # one process may score captions while the others wait
LEFT_TO_WRITE = 40  # seconds for the first process to write what is done, when another one has failed
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

    from latent_verse.inference.placement import best_device

    kind = "cpu" if accelerator == "cpu" or not gpus else best_device()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % torch.cuda.device_count()}" if kind == "cuda" else kind


def launch(work: Callable[..., int], count: int, *arguments: object) -> int:
    """work(ranks, *arguments) in `count` processes, which import it, or in torchrun's; returns the worst exit code."""
    if all(name in os.environ for name in LAUNCHED):
        return _joined(work, "env://", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), arguments)
    if count == 1:
        return work(Ranks(), *arguments)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_process, args=(rank, work, count, folder, arguments)) for rank in range(count)
        ]
        try:
            for process in processes:
                process.start()
            return watch(processes)
        except Stopped as stopped:  # the first one writes what is done and says so; a terminal has told it already
            if not processes[0].pid:
                raise
            processes[0].terminate()
            processes[0].join(LEFT_TO_WRITE)
            if processes[0].exitcode in (128 + number for number in SIGNALS):
                return stopped.exit_code
            raise
        finally:
            for process in processes:
                if process.pid:
                    process.kill()
                    process.join()


def watch(processes: list) -> int:
    """Wait for all; if one fails, for the first one, which writes what is done. Returns the exit code of the run."""
    running = list(processes)
    while running:
        multiprocessing.connection.wait([process.sentinel for process in running])
        codes = [process.exitcode for process in running]  # asked once: a moment after its sentinel, a process has one
        if any(codes):
            processes[0].join(LEFT_TO_WRITE)
            return verdict([process.exitcode for process in processes])
        running = [process for process, code in zip(running, codes, strict=True) if code is None]
    return 0


def _process(rank: int, work: Callable[..., int], world: int, folder: str, arguments: tuple) -> None:
    os.environ |= {PARENT: str(os.getppid()), SAID: f"{folder}/said", "RANK": str(rank)}  # for one_line_errors
    try:
        code = one_line_errors(_joined)(work, f"file://{folder}/meet", rank, world, arguments)
    except Exception:
        traceback.print_exc()
        code = 1
    # without Python's own end, in which gloo's threads may still want what is gone already, and abort the process
    os._exit(code)


def _joined(work: Callable[..., int], meet: str, rank: int, world: int, arguments: tuple) -> int:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=PATIENCE)
    code = work(Ranks(rank, world), *arguments)
    dist.destroy_process_group()  # not after a failure: the connections close when the process ends
    return code
