"""The processes that share the computation of a metric: item i belongs to process i modulo their number.

What is exchanged is small or read once (features of images, scores), so it goes over gloo on the CPU, also between
processes with a GPU each. A single process uses nothing of torch.distributed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from latent_verse.progress import progress_bar

T = TypeVar("T")


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

    def follow(self, items: Iterable[T], what: str) -> Iterable[T]:
        """The items, with a progress bar in the first process."""
        return progress_bar(items, what=what, shown=self.is_first)

    def gather(self, items: dict[int, T]) -> dict[int, T]:
        """The items of all processes, {number: anything that can be pickled}, in order of their numbers."""
        parts = [items]
        if self.world > 1:
            import torch.distributed as dist

            parts = [None] * self.world
            dist.all_gather_object(parts, items)
        return dict(sorted((pair for part in parts for pair in part.items()), key=lambda pair: pair[0]))

    def sum(self, values: list[Tensor]) -> list[Tensor]:
        """Tensors on the CPU, each summed over all processes."""
        if self.world > 1:
            import torch.distributed as dist

            for value in values:
                dist.all_reduce(value)
        return values

    def share(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, in every process; a ValueError that it raises is raised in all."""
        if self.world == 1:
            return make()
        import torch.distributed as dist

        box: list[tuple[T | None, ValueError | None] | None] = [None]
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
