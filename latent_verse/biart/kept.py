"""Decoders that are kept from one call of `generate` to the next, because their CUDA graphs take long to capture."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

MOST = 4  # decoders kept on a device
# Share of a GPU's memory that all kept decoders may use. Larger caches belong to larger batches, where capturing costs
# relatively little, and decoding images and metrics need the memory.
MOST_SHARE = 0.25


def _addresses(model: nn.Module) -> list[tuple[int, torch.dtype, torch.device]]:
    """Where CUDA graphs read a model's weights. Weights changed in place are read, replaced ones are not."""
    return [(p.data_ptr(), p.dtype, p.device) for p in model.parameters()]


class Kept:
    """Decoders by model and plan, within `MOST` and `MOST_SHARE`; the least recently used goes first.

    A decoder has a `device`, and `bytes` that it takes there. One that is in use is not among them, so that no two
    calls share it. Models are held weakly: a model's decoders are dropped when it is freed or its weights move.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[weakref.ref, Hashable], tuple[list, Any]] = {}  # the most recently used last

    def take(self, model: nn.Module, plan: Hashable) -> Any | None:
        """Remove and return the decoder of this plan, if there is one for the model's weights."""
        addresses = _addresses(model)
        for key, (read, _) in list(self._kept.items()):
            if key[0]() is model and read != addresses:
                self._kept.pop(key, None)
        _, decoder = self._kept.pop((weakref.ref(model), plan), (None, None))
        return decoder

    def put(self, model: nn.Module, plan: Hashable, decoder: Any) -> None:
        """Keep a decoder whose use has ended."""
        self._kept[weakref.ref(model, self._drop_dead), plan] = (_addresses(model), decoder)
        most = MOST_SHARE * memory(decoder.device)[1]
        while len(self._on(decoder.device)) > MOST or self.bytes(decoder.device) > most:
            self._drop_oldest(decoder.device)

    def make_room(self, device: torch.device, size: int) -> None:
        """Drop decoders until a GPU has `size` bytes free, as far as that helps."""
        while self.bytes(device) and memory(device)[0] < size:
            self._drop_oldest(device)

    def bytes(self, device: torch.device) -> int:
        """How much of a device's memory would be free without them."""
        return sum(decoder.bytes for _, (_, decoder) in self._on(device))

    def _on(self, device: torch.device) -> list[tuple[Any, Any]]:
        """Those on a device with their keys, the least recently used first."""
        return [(key, value) for key, value in list(self._kept.items()) if value[1].device == device]

    def drop(self, model: nn.Module | None = None) -> None:
        """Drop the decoders of a model, or all."""
        for key in list(self._kept):
            if model is None or key[0]() is model:
                self._kept.pop(key, None)

    def _drop_dead(self, dead: weakref.ref) -> None:
        for key in list(self._kept):
            if key[0] is dead:
                self._kept.pop(key, None)

    def _drop_oldest(self, device: torch.device) -> None:
        for key, _ in self._on(device)[:1]:
            self._kept.pop(key, None)

    def __len__(self) -> int:
        return len(self._kept)


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU that PyTorch can allocate, with what it holds unused, and all."""
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
