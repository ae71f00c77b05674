"""Repeating one step of decoding: as it is, or as a CUDA graph.

A step for a few samples is some two hundred kernels, and each takes longer to launch than to run. A CUDA graph holds
them all and is launched once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn


def can_capture(model: nn.Module, device: torch.device) -> bool:
    """Whether a step of `model` may become a CUDA graph.

    Not under autocast, whose cache of cast weights may be freed between two replays, and not where parameters are
    sharded and gathered step by step.
    """
    if device.type != "cuda" or torch.is_autocast_enabled("cuda"):
        return False
    return not any(hasattr(p, "device_mesh") for p in model.parameters())


class Repeat:
    """Calls `step(slots)` again and again; with `capture` as CUDA graphs, one for each number of slots.

    The first call with a number of slots runs as it is, which warms up what a capture must not wait for. The second is
    captured, and replayed from then on. A graph repeats the work on the same memory: `step` has to keep all that
    changes from call to call in tensors that it updates in place, and must not wait for the device (tests hold both).
    """

    def __init__(self, step: Callable[[int], None], capture: bool):
        self.step, self.capture = step, capture
        self._warm: set[int] = set()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if capture:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, slots: int) -> None:
        if self.capture and slots in self._warm and slots not in self._graphs:
            self._graphs[slots] = self._captured(slots)
        if self.capture and slots in self._graphs:
            self._graphs[slots].replay()
            return
        self._warm.add(slots)
        if not self.capture:
            self.step(slots)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # where the capture will run: libraries keep a workspace for each stream
            self.step(slots)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _captured(self, slots: int) -> torch.cuda.CUDAGraph | None:
        """The graph of a step, which capturing does not run; None, and no more captures, where it cannot be had."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                # thread_local: a loader's thread may pin memory meanwhile
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    self.step(slots)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            warnings.warn(f"No CUDA graph of decoding, which goes on without: {error}", stacklevel=2)
            self.capture = False
            return None
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph
