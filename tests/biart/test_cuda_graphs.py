"""CUDA graphs of decoding, and decoders that are kept: on a CPU, a step recorded operator by operator is a graph."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latent_verse.biart import cuda_graphs, kept, sampling
from latent_verse.biart import model as network
from latent_verse.biart.cuda_graphs import CUDAGraphs, can_capture
from latent_verse.biart.kept import Kept
from latent_verse.biart.model import BiART
from latent_verse.biart.sampling import forget_decoders, generate, kept_bytes
from latent_verse.biart.sequence import DIRECTIONS, IMAGE_TO_TEXT, TEXT_TO_IMAGE
from latent_verse.config import BiARTConfig
from latent_verse.nn.compilation import why_not_compiled

CONFIG = BiARTConfig(
    text_vocab=11, image_vocab=9, text_len=7, image_len=12, n_layer=2, n_head=2, n_embd=16
)  # 20 positions: slots of 4, 8, ... 20
SETTINGS = [
    {"temperature": 0},
    {"temperature": 0, "guidance": 2.5},
    {"temperature": 0.9},
    {"top_k": 4},
    {"top_p": 0.8, "guidance": 1.5},
]
CPU = torch.device("cpu")


def lively(seed=0, config=CONFIG) -> BiART:
    torch.manual_seed(seed)
    model = BiART(config).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)  # no near ties
    return model


def references(direction, batch=3, seed=1) -> torch.Tensor:
    length, classes = (CONFIG.text_len, 11) if direction == TEXT_TO_IMAGE else (CONFIG.image_len, 9)
    return torch.randint(classes, (batch, length), generator=torch.Generator().manual_seed(seed))


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
            for old, new in pairs:
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class RecordedGraphs:
    """`CUDAGraphs` with a Recorder in place of each graph; counts captures and replays."""

    captures = replays = 0

    def __init__(self, device, capture):
        self.warm, self.recorders = set(), {}

    def __call__(self, slots, step) -> None:
        if slots in self.recorders:
            self.recorders[slots].replay()
            RecordedGraphs.replays += 1
        elif slots in self.warm:
            with Recorder() as self.recorders[slots]:
                step()
            RecordedGraphs.captures += 1
        else:
            self.warm.add(slots)
            step()


@pytest.fixture
def recorded(monkeypatch):
    """On the CPU, decoders are kept and their steps recorded, as on a GPU."""
    monkeypatch.setattr(sampling, "CUDAGraphs", RecordedGraphs)
    monkeypatch.setattr(sampling, "can_capture", lambda model, device: True)
    monkeypatch.setattr(sampling, "_kept", Kept())
    monkeypatch.setattr(kept, "memory", lambda device: (2**40, 2**40))
    RecordedGraphs.captures = RecordedGraphs.replays = 0
    return RecordedGraphs


@pytest.fixture
def by_kernel(monkeypatch):
    """On the CPU, attention's operator is called as on a GPU, with the plain way below it."""
    monkeypatch.setattr(network, "has_kernels", lambda device, dtype, head_dim: True)


def same_as_the_first(sample) -> torch.Tensor:
    """What sample() gives, three times the same: warming up and capturing, replaying, and once more."""
    first = sample()
    assert torch.equal(sample(), first) and torch.equal(sample(), first)
    return first


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


@pytest.mark.parametrize("kernel", [False, True])
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


# ------------------------------------------------------------------------------------------------------ what is kept


def test_a_second_call_captures_nothing_whatever_its_prefix_and_seed(recorded):
    model = lively()
    sample = functools.partial(generate, model, direction=TEXT_TO_IMAGE, bucket=4)
    sample(references(TEXT_TO_IMAGE), seed=1)
    sample(references(TEXT_TO_IMAGE), seed=1)
    captures = recorded.captures
    assert captures > 0
    for known in (0, 1, 5, 11):
        reference, prefix_BK = references(TEXT_TO_IMAGE, seed=3), torch.randint(9, (3, known))
        sampled = sample(reference, seed=7, prefix_BK=prefix_BK)
        assert recorded.captures == captures
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "can_capture", lambda model, device: False)
            patch.setattr(sampling, "CUDAGraphs", CUDAGraphs)
            assert torch.equal(sampled, sample(reference, seed=7, prefix_BK=prefix_BK))


def test_graphs_never_serve_other_settings_or_models(recorded):
    models, expected = [lively(seed) for seed in range(2)], {}
    cases = [(m, d, t) for m in range(2) for d in DIRECTIONS for t in (0, 0.9)]

    def sample(model, direction, temperature):
        return generate(models[model], references(direction), direction, temperature=temperature, seed=1, bucket=20)

    for case in cases:
        forget_decoders()
        expected[case] = sample(*case)
    for case in [*cases[:4], *cases[2:], *cases]:  # within the bound and beyond it
        assert torch.equal(sample(*case), expected[case])
    assert not torch.equal(expected[cases[0]], expected[cases[4]])


@pytest.mark.parametrize("direction", DIRECTIONS)  # the head of texts is a copy
def test_weights_changed_in_place_are_used_and_replaced_ones_get_another_decoder(direction, recorded):
    model, other = lively(0), lively(1)
    sample = functools.partial(generate, reference=references(direction), direction=direction, seed=1, bucket=20)
    expected = sample(other)
    forget_decoders()
    for _ in range(2):
        sample(model)
    captures = recorded.captures
    model.load_state_dict(other.state_dict())
    assert torch.equal(sample(model), expected) and recorded.captures == captures
    with torch.no_grad():
        for p, q in zip(model.parameters(), lively(2).parameters(), strict=True):
            p.lerp_(q, 1.0)
    assert not torch.equal(sample(model), expected) and recorded.captures == captures
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    for _ in range(2):
        assert torch.equal(sample(model), expected)
    assert recorded.captures == captures + 1 and len(sampling._kept) == 1  # the stale one is gone
    model.bfloat16()
    sample(model)
    assert sampling._kept._kept.popitem()[1][1].cache.k_LBHSD.dtype == torch.bfloat16


def test_few_decoders_are_kept_and_the_least_recently_used_goes_first(recorded):
    model = lively()

    def captures(batch: int) -> int:
        before = recorded.captures
        generate(model, references(TEXT_TO_IMAGE, batch), TEXT_TO_IMAGE, seed=1, bucket=20)
        return recorded.captures - before

    assert [captures(batch) for batch in (1, 2, 3, 4)] == [1] * kept.MOST
    assert captures(1) == 0
    assert captures(5) == 1 and len(sampling._kept) == kept.MOST
    assert captures(1) == 0 and captures(2) == 1


def test_a_decoder_makes_room_for_another_if_memory_is_short(recorded, monkeypatch):
    model = lively()
    for batch in (1, 2, 3):
        generate(model, references(TEXT_TO_IMAGE, batch), TEXT_TO_IMAGE, seed=1)
    row = network.KVCache.row_bytes(CONFIG, torch.float32)
    assert kept_bytes(CPU) == 6 * row
    assert row == 2 * CONFIG.n_layer * 20 * CONFIG.n_embd * 4
    # half as much again as a cache takes is for reading the prompt
    monkeypatch.setattr(kept, "memory", lambda device: (9 * row - kept_bytes(device), 2**40))
    generate(model, references(TEXT_TO_IMAGE, 4), TEXT_TO_IMAGE, seed=1)
    assert kept_bytes(CPU) == (3 + 4) * row  # 1 and 2 had to go
    monkeypatch.setattr(kept, "memory", lambda device: (2**40, 20 * row))  # of which a quarter may be kept
    generate(model, references(TEXT_TO_IMAGE, 2), TEXT_TO_IMAGE, seed=1)
    assert kept_bytes(CPU) == 2 * row
    generate(model, references(TEXT_TO_IMAGE, 6), TEXT_TO_IMAGE, seed=1)
    assert kept_bytes(CPU) == 0


def test_running_out_of_memory_frees_what_is_kept_and_tries_again(recorded, monkeypatch):
    model, prefill, failures = lively(), BiART.prefill, []
    reference = references(TEXT_TO_IMAGE)
    expected = generate(model, reference, TEXT_TO_IMAGE, seed=1)

    def fails_beside_others(self, *args):
        if len(sampling._kept):
            failures.append(1)
            raise torch.OutOfMemoryError
        return prefill(self, *args)

    monkeypatch.setattr(BiART, "prefill", fails_beside_others)
    generate(model, references(TEXT_TO_IMAGE, 2), TEXT_TO_IMAGE)
    assert torch.equal(generate(model, reference, TEXT_TO_IMAGE, seed=1), expected)
    assert len(failures) == 2
    monkeypatch.setattr(BiART, "prefill", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            generate(model, reference, TEXT_TO_IMAGE)


def test_models_are_copied_and_saved_without_their_decoders_and_freed_with_them(recorded):
    model = lively()
    before = pickle.dumps(model)
    sample = functools.partial(generate, reference=references(IMAGE_TO_TEXT), direction=IMAGE_TO_TEXT, seed=1)
    expected = same_as_the_first(functools.partial(sample, model))
    assert len(sampling._kept) == 1
    assert pickle.dumps(model) == before
    twin = copy.deepcopy(model)
    assert twin.state_dict().keys() == model.state_dict().keys() == BiART(CONFIG).state_dict().keys()
    assert torch.equal(sample(twin), expected)
    assert len(sampling._kept) == 2
    cache = weakref.ref(next(iter(sampling._kept._kept.values()))[1].cache.k_LBHSD)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and cache() is None and len(sampling._kept) == 1


def test_a_compiled_decoder_lets_its_model_go(recorded, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = lively()
    generate(model, references(TEXT_TO_IMAGE), TEXT_TO_IMAGE, compiled=True)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and not len(sampling._kept)
    torch._dynamo.reset()


def test_a_decoder_in_use_is_not_given_to_another_call(recorded):
    model, reference = lively(), references(TEXT_TO_IMAGE)
    sample = functools.partial(generate, model, reference, TEXT_TO_IMAGE, bucket=20)
    expected = same_as_the_first(lambda: sample(seed=1))
    other = sample(seed=2)
    inside = []
    again = sample(seed=1, progress=lambda step, total: step == 6 and inside.append(sample(seed=2)))
    assert torch.equal(again, expected) and torch.equal(inside[0], other)
    assert len(sampling._kept) == 1


def test_decoders_made_in_inference_mode_serve_outside_of_it(recorded):
    model, reference = lively(), references(IMAGE_TO_TEXT)
    with torch.inference_mode():
        expected = generate(model, reference, IMAGE_TO_TEXT, seed=1)
    assert torch.equal(expected, same_as_the_first(lambda: generate(model, reference, IMAGE_TO_TEXT, seed=1)))


def test_what_fails_is_not_kept_and_nothing_is_on_a_cpu(recorded, monkeypatch):
    model = lively()
    with torch.no_grad():
        model.ln_f.weight[0] = float("nan")
    with pytest.raises(sampling.NotFinite):
        generate(model, references(TEXT_TO_IMAGE), TEXT_TO_IMAGE)
    assert not len(sampling._kept)
    monkeypatch.setattr(sampling, "can_capture", can_capture)
    generate(lively(), references(TEXT_TO_IMAGE), TEXT_TO_IMAGE)
    assert not len(sampling._kept)


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
