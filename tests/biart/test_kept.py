"""Decoders that are kept between calls: when they serve, when they make room, and that they let go of models."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch

from latent_verse.biart import kept, sampling
from latent_verse.biart import model as network
from latent_verse.biart.cuda_graphs import CUDAGraphs, can_capture
from latent_verse.biart.model import BiART
from latent_verse.biart.sampling import forget_decoders, generate, kept_bytes
from latent_verse.biart.sequence import DIRECTIONS, IMAGE_TO_TEXT, TEXT_TO_IMAGE
from tests.biart.recorded_graphs import CONFIG, CPU, lively, references, same_as_the_first


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
