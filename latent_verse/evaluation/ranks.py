"""The processes that share an evaluation: item i belongs to process i modulo their number, whatever is computed of it.

Everything that is exchanged is small or read once (features of pictures, scores), so it goes over gloo on the CPU,
also between processes with a GPU each. With one process nothing of torch.distributed is used.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from latent_verse.config import ConfigError

PATIENCE = datetime.timedelta(hours=24)  # one process may score captions while the others wait
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR")  # what torchrun sets


@dataclass(frozen=True)
class Ranks:
    """This process among `world`."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def mine(self, count: int) -> range:
        """The items of 0 .. count - 1 that are this process's."""
        return range(self.rank, count, self.world)

    def follow(self, items: Iterable, what: str) -> Iterable:
        """The items, with a bar in the first process where a person looks on."""
        from tqdm import tqdm

        return tqdm(items, desc=what, disable=None if self.is_first else True)

    def gather(self, items: dict[int, Any]) -> dict[int, Any]:
        """The items of all processes, {number: anything that can be pickled}, in order of their numbers."""
        parts = [items]
        if self.world > 1:
            import torch.distributed as dist

            parts = [None] * self.world
            dist.all_gather_object(parts, items)
        return {
            number: part[number] for number in sorted(n for p in parts for n in p) for part in parts if number in part
        }

    def sum(self, values: list) -> list:
        """Tensors on the CPU, each summed over all processes."""
        if self.world > 1:
            import torch.distributed as dist

            for value in values:
                dist.all_reduce(value)
        return values

    def share(self, make: Callable[[], Any]) -> Any:
        """What `make` gives in the first process, in every process. A ConfigError or DataError is raised in all."""
        if self.world == 1:
            return make()
        import torch.distributed as dist

        box: list[Any] = [None]
        if self.is_first:
            try:
                box = [(make(), None)]
            except ValueError as error:
                box = [(None, error)]
        dist.broadcast_object_list(box, src=0)
        made, error = box[0]
        if error is not None:
            raise error
        return made


def processes(write: Any) -> int:
    """Processes to start, from `config_eval.EvalWriteConfig`; says so where there is no GPU.

    Raises:
        ConfigError: more GPUs are asked for than the machine has.
    """
    import torch

    if write.accelerator == "cpu":
        return max(1, write.gpus)
    present = torch.cuda.device_count()
    if write.gpus and not present and "RANK" not in os.environ:
        print(f"No GPU on this machine: using the CPU in place of {write.gpus} GPU{'s' if write.gpus > 1 else ''}.")
    if present and write.gpus > present:
        raise ConfigError(f"gpus: {write.gpus}, but torch sees {present} on this machine. Give --gpus {present}.")
    return max(1, write.gpus) if present else 1


def device(write: Any, rank: int) -> str:
    """Where process `rank` of this machine computes."""
    import torch

    if write.accelerator == "cpu" or not write.gpus or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', rank)) % torch.cuda.device_count()}"


def launch(work: Callable[..., int], count: int, *arguments: Any) -> int:
    """work(ranks, *arguments) in `count` processes, or in those that torchrun has started; the worst exit code.

    `work` is a function of a module: new processes import it.
    """
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
