"""CUDA graphs for decoding.

A decoding step for a few samples runs a hundred kernels or more, and each takes longer to launch than to run. A CUDA
graph holds them all and is launched once.
"""

from __future__ import annotations

import functools
import gc
import threading
import warnings
from collections.abc import Callable

import torch
from torch import nn

_one_at_a_time = threading.RLock()  # what another thread runs on the stream of captures would be captured too
_a_capture_failed = False  # in this process: before PyTorch 2.12 another one may crash it (pytorch issue 180395)


def can_capture(model: nn.Module, device: torch.device) -> bool:
    """Whether decoding steps can become CUDA graphs."""
    if device.type != "cuda" or _a_capture_failed:
        return False
    if torch.is_autocast_enabled("cuda"):  # its cached casts may be freed between two replays
        return False
    return not any(hasattr(p, "device_mesh") for p in model.parameters())  # sharded ones are gathered anew in each step


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """What all captures on a device run in: cuBLAS keeps 32 MiB of workspace for each stream."""
    return torch.cuda.Stream(device)


class CUDAGraphs:
    """Calls `step()`; with `capture` as CUDA graphs, one for each number of slots.

    The first call with a number of slots runs the step itself, which initialises what a capture must not wait for. The
    second call captures it, and all later ones replay the graph, whatever step they are given. So a step must keep what
    changes between calls in tensors, update them in place, and not wait for the device. If a capture fails, the process
    warns once and captures nothing afterwards.
    """

    def __init__(self, device: torch.device, capture: bool):
        self.device, self.capture = device, capture
        self._warm: set[int] = set()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if capture:
            self._pool = torch.cuda.graph_pool_handle()  # of all its graphs: no step leaves anything in it

    def __call__(self, slots: int, step: Callable[[], None]) -> None:
        if not self.capture or _a_capture_failed:
            step()
            return
        with torch.cuda.device(self.device):
            if slots in self._warm and slots not in self._graphs:
                self._capture(slots, step)
            if slots in self._graphs:
                self._graphs[slots].replay()
            elif slots in self._warm:  # capturing it failed
                step()
            else:
                self._warm.add(slots)
                self._aside(step)  # as the capture will: libraries keep a workspace for each stream

    def _aside(self, run: Callable[[], None]) -> None:
        """Run on the stream of captures, between what the current stream was given before and will be afterwards."""
        stream, current = _stream(self.device), torch.cuda.current_stream()
        with _one_at_a_time:
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                run()
            current.wait_stream(stream)

    def _capture(self, slots: int, step: Callable[[], None]) -> None:
        """Record a step without running it."""
        global _a_capture_failed
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # memory that was freed cannot be reused for a capture

        def capture() -> None:
            # thread_local: a loader's thread may pin memory meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()

        collecting = gc.isenabled()
        gc.disable()  # to destroy another graph during a capture makes it fail (pytorch issue 161037)
        try:
            self._aside(capture)
        except RuntimeError as error:
            warnings.warn(f"Decoding runs without CUDA graphs: capturing a step failed: {error}", stacklevel=4)
            _a_capture_failed = True
        else:
            self._graphs[slots] = graph
        finally:
            if collecting:
                gc.enable()
