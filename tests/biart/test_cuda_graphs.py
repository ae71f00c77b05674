"""CUDA graphs of decoding: on a CPU, a step recorded operator by operator and run again on the same memory."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latent_verse.biart import sampling
from latent_verse.biart.cuda_graphs import CUDAGraphs, can_capture
from latent_verse.biart.model import BiART
from latent_verse.biart.sampling import generate
from latent_verse.biart.sequence import DIRECTIONS, TEXT_TO_IMAGE
from latent_verse.config import BiARTConfig

CONFIG = BiARTConfig(
    text_vocab=11, image_vocab=9, text_len=7, image_len=12, n_layer=2, n_head=2, n_embd=16
)  # 20 positions: slots of 4, 8, ... 20


class Recorder(TorchDispatchMode):
    """Keeps every operator with its arguments and results, and refuses those that a CUDA graph cannot hold."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a step waits for the device"
        assert "nonzero" not in str(func) and "masked_select" not in str(func), f"{func}: its size depends on data"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Run the same operators on the same memory."""
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            pairs = zip(out, again, strict=True) if isinstance(out, (tuple, list)) else [(out, again)]
            for kept, new in pairs:
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class RecordedGraphs:
    """`CUDAGraphs` with a Recorder in place of each graph; counts how often they were replayed."""

    replays = 0

    def __init__(self, step, capture):
        self.step, self.warm, self.recorders = step, set(), {}

    def __call__(self, slots: int) -> None:
        if slots in self.recorders:
            self.recorders[slots].replay()
            RecordedGraphs.replays += 1
        elif slots in self.warm:
            with Recorder() as self.recorders[slots]:
                self.step(slots)
        else:
            self.warm.add(slots)
            self.step(slots)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 0, "guidance": 2.5},
        {"temperature": 0.9},
        {"top_k": 4},
        {"top_p": 0.8, "guidance": 1.5},
    ],
)
def test_a_replayed_step_samples_the_same(direction, settings, monkeypatch):
    torch.manual_seed(0)
    model = BiART(CONFIG).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)  # no near ties
    image = direction == TEXT_TO_IMAGE
    reference = torch.randint(0, 9, (3, CONFIG.text_len if image else CONFIG.image_len))
    plain = generate(model, reference, direction, seed=5, bucket=4, **settings)
    assert torch.equal(plain, generate(model, reference, direction, seed=5, bucket=1, **settings))
    monkeypatch.setattr(sampling, "CUDAGraphs", RecordedGraphs)
    RecordedGraphs.replays = 0
    assert torch.equal(plain, generate(model, reference, direction, seed=5, bucket=4, **settings))
    assert RecordedGraphs.replays > (1 if image else -1)  # a text may end early


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.9, "guidance": 2.0}, {"top_p": 0.8}])
def test_cuda_graphs_sample_what_the_same_kernels_sample_one_by_one(direction, settings, monkeypatch):
    torch.manual_seed(0)
    model = BiART(CONFIG).cuda().eval()
    image = direction == TEXT_TO_IMAGE
    reference = torch.randint(0, 9, (3, CONFIG.text_len if image else CONFIG.image_len))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a capture that fails
        graphed = generate(model, reference, direction, seed=5, bucket=8, **settings)
    monkeypatch.setattr(sampling, "can_capture", lambda model, device: False)
    assert torch.equal(graphed, generate(model, reference, direction, seed=5, bucket=8, **settings))


def test_nothing_is_captured_on_a_cpu():
    model = BiART(CONFIG)
    assert not can_capture(model, torch.device("cpu"))
    calls = []
    run_step = CUDAGraphs(calls.append, capture=False)
    for slots in (4, 4, 8):
        run_step(slots)
    assert calls == [4, 4, 8]


def test_autocast_and_sharded_parameters_are_not_captured(monkeypatch):
    model, cuda = BiART(CONFIG), torch.device("cuda")
    assert can_capture(model, cuda)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    assert not can_capture(model, cuda)
    monkeypatch.undo()
    model.head.weight.device_mesh = object()  # what a DTensor has
    assert not can_capture(model, cuda)


def test_decoding_continues_without_graphs_if_a_capture_fails(monkeypatch):
    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def capture_begin(self, **settings):
            raise RuntimeError("operation not permitted")

    for name, value in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: 0,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    calls = []
    run_step = CUDAGraphs(calls.append, capture=True)
    run_step(4)
    with pytest.warns(UserWarning, match="not permitted"):
        run_step(4)
    run_step(4)
    run_step(8)
    assert calls == [4, 4, 4, 8]
