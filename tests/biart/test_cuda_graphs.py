"""CUDA graphs of decoding: on a CPU, a step recorded operator by operator is a graph."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import threading
import warnings

import pytest
import torch

from latent_verse.biart import cuda_graphs, sampling
from latent_verse.biart import model as network
from latent_verse.biart.cuda_graphs import CUDAGraphs, can_capture
from latent_verse.biart.model import BiART
from latent_verse.biart.sampling import forget_decoders, generate
from latent_verse.biart.sequence import DIRECTIONS, TEXT_TO_IMAGE
from latent_verse.nn.compilation import why_not_compiled
from tests.biart.recorded_graphs import CONFIG, CPU, lively, references, same_as_the_first

SETTINGS = [
    {"temperature": 0},
    {"temperature": 0, "guidance": 2.5},
    {"temperature": 0.9},
    {"top_k": 4},
    {"top_p": 0.8, "guidance": 1.5},
]


@pytest.fixture
def by_kernel(monkeypatch):
    """On the CPU, attention's operator is called as on a GPU, with the plain way below it."""
    monkeypatch.setattr(network, "has_kernels", lambda device, dtype, head_dim: True)


# ------------------------------------------------------------------------------------------------- what is sampled


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_graphs_and_kept_decoders_sample_the_same(direction, settings, recorded, monkeypatch):
    model, reference = lively(), references(direction)
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "can_capture", lambda model, device: False)
        patch.setattr(sampling, "CUDAGraphs", CUDAGraphs)
        plain = generate(model, reference, direction, seed=5, bucket=4, **settings)
        assert torch.equal(plain, generate(model, reference, direction, seed=5, **settings))
        other = generate(model, references(direction, seed=2), direction, seed=6, **settings)
    sample = functools.partial(generate, model, direction=direction, bucket=4, **settings)
    assert torch.equal(plain, same_as_the_first(lambda: sample(reference, seed=5)))
    assert torch.equal(other, sample(references(direction, seed=2), seed=6))  # nothing is left of the batch before
    assert recorded.replays > 10


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_one_graph_serves_all_positions_where_attention_has_a_kernel(direction, settings, recorded, request):
    model, reference = lively(), references(direction)
    sample = functools.partial(generate, model, reference, direction, seed=5, **settings)
    plain = sample(bucket=4)
    request.getfixturevalue("by_kernel")
    forget_decoders()
    recorded.captures = 0
    assert torch.equal(plain, same_as_the_first(sample))
    assert recorded.captures == 1


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        ("eager", SETTINGS[-1:]),
        pytest.param("aot_eager", SETTINGS, marks=pytest.mark.slow),
        pytest.param("inductor", SETTINGS, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_compiled_steps_sample_the_same(backend, settings, kernel, direction, monkeypatch, request):
    model, reference = lively(), references(direction)
    plain = [generate(model, reference, direction, seed=5, **each) for each in settings]
    if kernel:
        request.getfixturevalue("by_kernel")
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for expected, each in zip(plain, settings, strict=True):
        assert torch.equal(expected, generate(model, reference, direction, seed=5, compiled=True, **each))
    torch._dynamo.reset()


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_is_compiled_once_for_all_blocks_and_tokens(kernel, monkeypatch, request):
    if kernel:
        request.getfixturevalue("by_kernel")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    model = lively(config=dataclasses.replace(CONFIG, n_layer=4))
    for batch in (1, 1, 2, 3, 4, 5):  # the blocks 10 times, where Dynamo would otherwise give up after 8
        generate(model, references(TEXT_TO_IMAGE, batch), TEXT_TO_IMAGE, seed=1, compiled=True, top_p=0.9)
        assert len(graphs) == 3 * batch  # first block, other blocks and token, for each batch size
    torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.9, "guidance": 2.0}, {"top_p": 0.8}])
@pytest.mark.parametrize("way", ["plain", "kernel", "compiled"])
def test_cuda_graphs_sample_what_the_same_kernels_sample_one_by_one(direction, settings, way, monkeypatch):
    model = lively(config=dataclasses.replace(CONFIG, n_embd=32)).cuda()  # heads of 16, which the kernel serves
    if way == "plain":
        monkeypatch.setattr(network, "has_kernels", lambda device, dtype, head_dim: False)
    elif why_not_compiled(model.device):
        pytest.skip(why_not_compiled(model.device))
    settings = {**settings, "compiled": way == "compiled", "bucket": 8 if way == "plain" else None}
    sample = functools.partial(generate, model, references(direction), direction, seed=5, **settings)
    captured, capture = [], CUDAGraphs._capture
    monkeypatch.setattr(CUDAGraphs, "_capture", lambda graphs, *a: captured.append(a) or capture(graphs, *a))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CUDA graphs")  # a capture that fails
        graphed = same_as_the_first(sample)
    assert len(captured) == (2 if way == "plain" else 1)
    monkeypatch.setattr(sampling, "can_capture", lambda model, device: False)
    assert torch.equal(graphed, sample())
    forget_decoders()


# ---------------------------------------------------------------------------------------------------------- capturing


def test_nothing_is_captured_on_a_cpu():
    assert not can_capture(BiART(CONFIG), CPU)
    calls = []
    run = CUDAGraphs(CPU, capture=False)
    for slots in (4, 4, 8):
        run(slots, lambda slots=slots: calls.append(slots))
    assert calls == [4, 4, 8]


def test_autocast_and_sharded_parameters_are_not_captured(monkeypatch):
    model, cuda = BiART(CONFIG), torch.device("cuda")
    assert can_capture(model, cuda)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    assert not can_capture(model, cuda)
    monkeypatch.undo()
    model.head.weight.device_mesh = object()  # what a DTensor has
    assert not can_capture(model, cuda)


@pytest.fixture
def driverless(monkeypatch):
    """`torch.cuda` as far as capturing calls it; returns what was called. `begin` may be replaced."""
    calls = []

    class Stream:
        def __init__(self, device=None):
            calls.append("stream")

        def wait_stream(self, other):
            pass

    class Graph:
        def capture_begin(self, **settings):
            calls.append("begin")

        def capture_end(self):
            calls.append("end")

        def replay(self):
            calls.append("replay")

    for name, value in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: 0,
        "current_stream": lambda: Stream.__new__(Stream),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "empty_cache": lambda: calls.append("empty_cache"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda_graphs, "_a_capture_failed", False)
    cuda_graphs._stream.cache_clear()
    yield calls
    cuda_graphs._stream.cache_clear()


def test_all_decoders_capture_on_one_stream_with_emptied_memory(driverless):
    for _ in range(2):
        run = CUDAGraphs(torch.device("cuda", 0), capture=True)
        for _ in range(4):
            run(4, lambda: driverless.append("step"))
    once = ["step", "empty_cache", "begin", "step", "end", "replay", "replay", "replay"]
    assert driverless == ["stream", *once, *once]


@pytest.mark.parametrize("collecting", [True, False])
def test_nothing_is_collected_during_a_capture(collecting, driverless):
    """A graph that the collector destroys then would make the capture fail."""
    run, seen = CUDAGraphs(torch.device("cuda", 0), capture=True), []
    was = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        for _ in range(2):
            run(4, lambda: seen.append(gc.isenabled()))
        assert seen == [collecting, False] and gc.isenabled() is collecting
    finally:
        (gc.enable if was else gc.disable)()


def test_no_thread_computes_on_the_stream_of_another_ones_capture(driverless):
    runs, order = [CUDAGraphs(torch.device("cuda", 0), capture=True) for _ in range(2)], []

    def capture():
        order.append("capture begins")
        other.start()
        other.join(timeout=0.3)
        order.append("capture ends")

    runs[0](4, lambda: None)
    other = threading.Thread(target=lambda: runs[1](4, lambda: order.append("the other")))
    runs[0](4, capture)
    other.join()
    assert order == ["capture begins", "capture ends", "the other"]


def test_decoding_continues_without_graphs_and_without_another_try_if_a_capture_fails(driverless, monkeypatch):
    def refuse(self, **settings):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", refuse)
    model, cuda = BiART(CONFIG), torch.device("cuda", 0)
    calls = []
    run, another = (CUDAGraphs(cuda, can_capture(model, cuda)) for _ in range(2))

    def step(run, slots):
        run(slots, lambda: calls.append(slots))

    step(run, 4)
    step(another, 8)
    with pytest.warns(UserWarning, match="not permitted"):
        step(run, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(run, 4)
        step(run, 8)
        for _ in range(2):
            step(another, 8)
    assert calls == [4, 8, 4, 4, 8, 8, 8]
    assert not can_capture(model, cuda)
