"""Batches: how large they are on a GPU, that samples do not depend on them, and what happens if memory runs out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from latent_verse.biart.sequence import IMAGE_TO_TEXT, TEXT_TO_IMAGE
from latent_verse.config import BiARTConfig, SamplingSettings
from latent_verse.inference import batching
from latent_verse.inference.batching import BATCH_BYTES, COMPILED_FROM, FREE_SHARE, LARGEST_BATCH, Sampler, batch_bytes
from tests.biart.tiny_biart import CONFIG, lively

pytestmark = pytest.mark.usefixtures("one_thread")
GPU = torch.device("cuda", 0)
SAMPLING = SamplingSettings(temperature=0.9)


@pytest.fixture
def model():
    return lively()


def references(model, direction, rows):
    generator = torch.Generator().manual_seed(0)
    shape = (rows, CONFIG.text_len) if direction == TEXT_TO_IMAGE else (rows, CONFIG.image_len)
    return torch.randint(11, shape, generator=generator)


def gpu_memory(monkeypatch, free=0, reserved=0, allocated=0):
    """A GPU with so many bytes free, and so many that PyTorch's allocator holds and has given away."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)


@pytest.fixture
def called(monkeypatch, model):
    """The arguments of each call of `generate`, `beam_search` and `log_likelihood`, which compute on the CPU."""
    calls = []

    def watch(name):
        original = getattr(batching, name)

        def call(biart, *arguments, compiled=False, **options):
            calls.append({"rows": len(arguments[0]), "compiled": compiled, **options})
            return original(model, *arguments, **options)

        monkeypatch.setattr(batching, name, call)

    for name in ("generate", "beam_search", "log_likelihood"):
        watch(name)
    return calls


def on_gpu(model, config=None, dtype=None):
    """`model` as if it were on a GPU; `called` computes."""
    weight = torch.empty(0, dtype=dtype or model.head.weight.dtype)
    config = config or model.config
    return SimpleNamespace(device=GPU, config=config, vocab=model.vocab, head=SimpleNamespace(weight=weight))


# ------------------------------------------------------------------------------------------------------------ how large


def test_a_gpu_gives_a_share_of_what_is_free_and_what_the_allocator_holds_unused(monkeypatch):
    gpu_memory(monkeypatch, free=60 * 2**30, reserved=15 * 2**30, allocated=5 * 2**30)
    assert batch_bytes(GPU) == int(FREE_SHARE * 70 * 2**30)
    assert batch_bytes(torch.device("cpu")) == batch_bytes(torch.device("mps")) == BATCH_BYTES


@pytest.mark.parametrize(
    ("free", "rows"),
    [(0, 1), (10, 8), (12, 8), (19.9, 8), (20, 16), (1000, LARGEST_BATCH)],  # in units of a row, FREE_SHARE aside
)
def test_rows_are_a_power_of_two_on_a_gpu(monkeypatch, model, free, rows):
    """What is free varies from call to call; a decoder is kept for one number of rows."""
    each = 10 * 2**20
    gpu_memory(monkeypatch, free=int(free * each))
    assert Sampler(on_gpu(model), True).rows_at_a_time(each) == rows
    assert Sampler(on_gpu(model), True, batch_size=7).rows_at_a_time(each) == 7
    assert Sampler(model, True).rows_at_a_time(BATCH_BYTES // 20) == 20


def test_a_large_model_samples_256_images_at_a_time_on_80_gb(monkeypatch, model):
    gpu_memory(monkeypatch, free=75 * 10**9)
    config = BiARTConfig(n_layer=24, n_head=16, n_embd=1024)
    vocab = SimpleNamespace(input_len=config.text_len + config.image_len + 1)
    for dtype, guided, rows in ((torch.bfloat16, 2, 256), (torch.float32, 1, 256), (torch.float32, 2, 128)):
        biart = on_gpu(model, config, dtype)
        biart.vocab = vocab
        sampler = Sampler(biart, True)
        each = sampler._cache_bytes(config.text_len, guided)
        assert each > guided * 2 * 24 * 1088 * 1024 * dtype.itemsize
        assert sampler.rows_at_a_time(each) == rows


def test_what_a_kept_decoder_holds_is_free_to_sampling_alone(monkeypatch, model, called):
    """Or the next call would have smaller batches, for which no decoder is kept. Nothing else drops decoders."""
    each = Sampler(model, True)._cache_bytes(CONFIG.text_len, 1)
    gpu_memory(monkeypatch, free=int(2 * each / FREE_SHARE) + 1)
    monkeypatch.setattr(batching, "kept_bytes", lambda device: int(2 * each / FREE_SHARE) + 1)
    sampler = Sampler(on_gpu(model), True)
    sampler.sample(references(model, TEXT_TO_IMAGE, 8), TEXT_TO_IMAGE, 1, SAMPLING, seed=0)
    assert [call["rows"] for call in called] == [4, 4]
    assert sampler.rows_at_a_time(each) == 2


# ---------------------------------------------------------------------------------------------------- samples and sizes


@pytest.mark.parametrize("direction", [TEXT_TO_IMAGE, IMAGE_TO_TEXT])
@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 10), (3, [3, 3, 3, 1]), (4, [4, 4, 2]), (6, [5, 5])])
def test_batches_are_few_and_nearly_equal_and_samples_are_the_same(model, called, direction, batch_size, sizes):
    reference_RT = references(model, direction, 5)
    expected = Sampler(model, True).sample(reference_RT, direction, 2, SAMPLING, seed=3)
    assert called.pop()["rows"] == 10 and not called
    sampled = Sampler(model, True, batch_size).sample(reference_RT, direction, 2, SAMPLING, seed=3)
    assert torch.equal(sampled, expected)
    assert [call["rows"] for call in called] == sizes


@pytest.mark.parametrize("batch_size", [1, 3, 4, 6, 7])
def test_on_a_gpu_all_batches_have_the_same_rows_and_samples_are_the_same(model, called, batch_size):
    """So that one decoder serves them all. A prefix and guidance besides."""
    reference_RT, prefix_RK = references(model, TEXT_TO_IMAGE, 5), references(model, IMAGE_TO_TEXT, 5)[:, :3]
    settings = (TEXT_TO_IMAGE, 2, SamplingSettings(guidance=1.5, top_k=5), 3, 0, prefix_RK)
    expected = Sampler(model, True).sample(reference_RT, *settings)
    called.clear()
    assert torch.equal(Sampler(on_gpu(model), True, batch_size).sample(reference_RT, *settings), expected)
    assert len({call["rows"] for call in called}) == 1
    assert len(called) == -(-10 // batch_size) and sum(call["rows"] for call in called) < 10 + len(called)


# ------------------------------------------------------------------------------------------------------------ no memory


def short_of_memory(monkeypatch, name, most):
    """Calls of batching.`name` with more than `most` rows run out of memory; returns the numbers of rows asked for."""
    asked, original = [], getattr(batching, name)

    def call(biart, first, *arguments, **options):
        asked.append(len(first))
        if len(first) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(biart, first, *arguments, **options)

    monkeypatch.setattr(batching, name, call)
    return asked


@pytest.mark.parametrize("gpu", [False, True])
def test_where_memory_runs_out_batches_are_halved_and_samples_stay_the_same(monkeypatch, model, called, gpu):
    reference_RT = references(model, TEXT_TO_IMAGE, 11)
    expected = Sampler(model, True).sample(reference_RT, TEXT_TO_IMAGE, 1, SAMPLING, seed=3)
    sampler = Sampler(on_gpu(model) if gpu else model, True, batch_size=11)
    asked = short_of_memory(monkeypatch, "generate", 3)
    assert torch.equal(sampler.sample(reference_RT, TEXT_TO_IMAGE, 1, SAMPLING, seed=3), expected)
    assert asked == [11, 6, 3, 3, 3, 3 if gpu else 2]


def test_beams_and_scores_go_on_with_smaller_batches_too(monkeypatch, model):
    text_BL, codes_BN = references(model, TEXT_TO_IMAGE, 5), references(model, IMAGE_TO_TEXT, 5)
    sampler = Sampler(model, True)
    captions_BL, log_p_B = sampler.beam_search(codes_BN, 3), sampler.log_p(text_BL, codes_BN, "image")
    asked = short_of_memory(monkeypatch, "beam_search", 2), short_of_memory(monkeypatch, "log_likelihood", 2)
    assert torch.equal(sampler.beam_search(codes_BN, 3), captions_BL)
    torch.testing.assert_close(sampler.log_p(text_BL, codes_BN, "image"), log_p_B)
    assert asked == ([5, 3, 2, 2, 1], [5, 3, 2, 2, 1])


def test_a_single_row_without_memory_is_an_error(monkeypatch, model):
    asked = short_of_memory(monkeypatch, "generate", 0)
    with pytest.raises(torch.OutOfMemoryError):
        Sampler(model, True).sample(references(model, TEXT_TO_IMAGE, 5), TEXT_TO_IMAGE, 1, SAMPLING, seed=0)
    assert asked == [5, 3, 2, 1]


# ------------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("lacks", ["", "there is no compiler gcc"])
def test_a_gpu_compiles_its_step_for_calls_that_take_many(monkeypatch, model, called, lacks):
    gpu_memory(monkeypatch, free=2**40)
    monkeypatch.setattr(batching, "why_not_compiled", lambda device: lacks)
    monkeypatch.setattr(batching, "LARGEST_BATCH", 2)
    reference_RT = references(model, TEXT_TO_IMAGE, 5)
    steps = 3 * CONFIG.image_len  # of three batches
    for least, expected in ((steps, not lacks), (steps + 1, False), (COMPILED_FROM, False)):
        monkeypatch.setattr(batching, "COMPILED_FROM", least)
        Sampler(on_gpu(model), True).sample(reference_RT, TEXT_TO_IMAGE, 1, SAMPLING, seed=0)
        assert {call["compiled"] for call in called} == {expected}
        called.clear()
    monkeypatch.setattr(batching, "COMPILED_FROM", 1)
    Sampler(model, True).sample(reference_RT, TEXT_TO_IMAGE, 1, SAMPLING, seed=0)
    assert {call["compiled"] for call in called} == {False}  # a CPU
