"""CUDA graphs for decoding.

A decoding step for a few samples runs about two hundred kernels, and each takes longer to launch than to run. A CUDA
graph holds them all and is launched once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn


def can_capture(model: nn.Module, device: torch.device) -> bool:
    """Whether decoding steps can become CUDA graphs."""
    if device.type != "cuda" or torch.is_autocast_enabled("cuda"):  # its cached casts may be freed between two replays
        return False
    return not any(hasattr(p, "device_mesh") for p in model.parameters())  # sharded ones are gathered anew in each step


class CUDAGraphs:
    """Calls `step(slots)`; with `capture` as CUDA graphs, one for each number of slots.

    The first call with a number of slots runs `step` itself, which initialises what a capture must not wait for. The
    second call captures it, and all later ones replay the graph. If a capture fails, `step` runs without graphs, with a
    warning. `step` must keep what changes between calls in tensors, update them in place, and not wait for the device.
    """

    def __init__(self, step: Callable[[int], None], capture: bool):
        self.step, self.capture = step, capture
        self._warm: set[int] = set()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if capture:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, slots: int) -> None:
        if self.capture and slots in self._warm and slots not in self._graphs:
            self._capture(slots)
        if not self.capture:
            self.step(slots)
        elif slots in self._graphs:
            self._graphs[slots].replay()
        else:
            self._warm.add(slots)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # as the capture will: libraries keep a workspace for each stream
                self.step(slots)
            torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self, slots: int) -> None:
        """Record a step without running it. If that fails, turn capturing off."""
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
            warnings.warn(f"Decoding runs without CUDA graphs: capturing a step failed: {error}", stacklevel=3)
            self.capture = False
            return
        torch.cuda.current_stream().wait_stream(self._stream)
        self._graphs[slots] = graph
