"""Decoders that are kept from one call of `generate` to the next, because their CUDA graphs take long to capture."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any, Protocol

import torch
from torch import nn

MOST = 4  # decoders kept


class Sized(Protocol):
    """What can be kept."""

    device: torch.device
    bytes: int  # on the device


def _addresses(model: nn.Module) -> list[tuple[int, torch.dtype, torch.device]]:
    """Where CUDA graphs read a model's weights. Weights changed in place are read, replaced ones are not."""
    return [(p.data_ptr(), p.dtype, p.device) for p in model.parameters()]


class Kept:
    """At most `MOST` decoders, by model and plan; the least recently used goes first.

    One that is in use is not among them, so that no two calls share it. Models are not held, copied or saved: with a
    model its decoders go, and so do they when its weights move.
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

    def put(self, model: nn.Module, plan: Hashable, decoder: Sized) -> None:
        """Keep a decoder whose use has ended."""
        self._kept[weakref.ref(model, self._drop_dead), plan] = (_addresses(model), decoder)
        while len(self._kept) > MOST:
            self._drop_oldest()

    def make_room(self, device: torch.device, size: int) -> None:
        """Drop decoders until a GPU has `size` bytes free, as far as that helps."""
        while self.bytes(device) and free_bytes(device) < size:
            self._drop_oldest()

    def bytes(self, device: torch.device) -> int:
        """How much of a device's memory would be free without them."""
        return sum(decoder.bytes for _, decoder in list(self._kept.values()) if decoder.device == device)

    def drop(self, model: nn.Module | None = None) -> None:
        """Drop the decoders of a model, or all."""
        for key in list(self._kept):
            if model is None or key[0]() is model:
                self._kept.pop(key, None)

    def _drop_dead(self, dead: weakref.ref) -> None:
        for key in list(self._kept):
            if key[0] is dead:
                self._kept.pop(key, None)

    def _drop_oldest(self) -> None:
        self._kept.pop(next(iter(self._kept)), None)

    def __len__(self) -> int:
        return len(self._kept)


def free_bytes(device: torch.device) -> int:
    """How much PyTorch can allocate on a GPU, with what it holds unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
