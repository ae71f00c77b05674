"""Sampling, beam search and scores against the plain formulation: the whole sequence again for every token."""

import itertools
import math

import pytest
import torch

from latent_verse.biart.model import KVCache
from latent_verse.biart.sampling import (
    NotFinite,
    beam_search,
    check_settings,
    choose,
    generate,
    guide,
    log_likelihood,
    uniforms,
)
from latent_verse.biart.sequence import DIRECTIONS, IMAGE_TO_TEXT, TEXT_TO_IMAGE, target_modality
from latent_verse.config import BiARTConfig
from tests.biart.tiny_biart import CONFIG, lively
from tests.messages import naming


def references(model, direction, batch=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    vocab = model.vocab
    if direction == TEXT_TO_IMAGE:
        lengths = torch.randint(1, vocab.text_len + 1, (batch,), generator=generator).tolist()
        return vocab.pad_text([torch.randint(vocab.text_vocab, (n,), generator=generator).tolist() for n in lengths])
    return torch.randint(vocab.image_vocab, (batch, vocab.image_len), generator=generator)


@torch.no_grad()
def next_logits(model, reference, direction, target_BK):
    """The plain formulation: full logits over the joint vocabulary, cut to the modality."""
    idx_BT, seg_BT = model.vocab.prompt(reference, direction, target_BK)
    return model(idx_BT, seg_BT)[:, -1, model.vocab.class_ids(target_modality(direction))]


def plain_greedy(model, reference, direction, guidance=1.0):
    vocab, modality = model.vocab, target_modality(direction)
    rows = []
    for row in range(len(reference)):
        one, target = reference[row : row + 1], []
        null = vocab.null_reference(1, direction)
        while len(target) < vocab.length(modality):
            known = torch.tensor([target], dtype=torch.long)
            logits = next_logits(model, one, direction, known)
            if guidance != 1:
                without = next_logits(model, null, direction, known)
                logits = without + guidance * (logits - without)
            best = int(logits.argmax())
            if modality == "text" and best == vocab.text_vocab:
                break
            target.append(best)
        rows.append(target)
    return vocab.pad_text(rows) if modality == "text" else torch.tensor(rows)


@pytest.mark.parametrize("bucket", [1, 4])
@pytest.mark.parametrize("guidance", [1.0, 2.5, 0.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_greedy_is_identical_to_the_plain_loop(direction, guidance, bucket):
    for seed in range(3):
        model = lively(seed=seed)
        reference = references(model, direction)
        sampled = generate(model, reference, direction, temperature=0, guidance=guidance, bucket=bucket)
        assert torch.equal(sampled, plain_greedy(model, reference, direction, guidance))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"guidance": 2.0}, {"top_k": 4}, {"top_p": 0.8}])
def test_first_token_frequencies_are_the_softmaxs(direction, settings):
    config = BiARTConfig(text_vocab=9, image_vocab=7, text_len=2, image_len=2, n_layer=1, n_head=1, n_embd=16)
    model = lively(config)
    reference = references(model, direction, batch=1)
    logits = next_logits(model, reference, direction, torch.zeros(1, 0, dtype=torch.long))
    if "guidance" in settings:
        null = model.vocab.null_reference(1, direction)
        without = next_logits(model, null, direction, torch.zeros(1, 0, dtype=torch.long))
        logits = without + 2.0 * (logits - without)
    p = (logits / settings.get("temperature", 1.0)).softmax(-1)[0]
    if "top_k" in settings:
        p[p.argsort(descending=True)[4:]] = 0
    if "top_p" in settings:
        order = p.argsort(descending=True)
        p[order[int((p[order].cumsum(0) < 0.8).sum()) + 1 :]] = 0
    p = p / p.sum()
    n = 20_000
    sampled = generate(model, reference.expand(n, -1), direction, seed=0, **settings)[:, 0]
    if target_modality(direction) == "text":
        sampled = torch.where(sampled == model.vocab.pad, model.vocab.text_vocab, sampled)
    counts = torch.bincount(sampled, minlength=len(p)).double()
    assert (counts[p == 0] == 0).all()
    assert (counts / n - p).abs().max() < 0.02
    kept = p > 0
    chi2 = ((counts - n * p)[kept] ** 2 / (n * p[kept])).sum().item()
    degrees = int(kept.sum()) - 1
    assert chi2 < degrees + 5 * math.sqrt(2 * degrees)


def test_whole_sequences_follow_the_models_distribution():
    """Not the first token alone: the frequency of every possible image of two codes is its likelihood."""
    config = BiARTConfig(text_vocab=3, image_vocab=4, text_len=2, image_len=2, n_layer=1, n_head=1, n_embd=16)
    model = lively(config)
    text_BL, n = model.vocab.pad_text([[1]]), 20_000
    every = torch.tensor(list(itertools.product(range(4), repeat=2)))
    p = log_likelihood(model, text_BL.expand(16, -1), every, given="text").total_B.exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    sampled = generate(model, text_BL.expand(n, -1), TEXT_TO_IMAGE, seed=1)
    counts = torch.bincount(sampled[:, 0] * 4 + sampled[:, 1], minlength=16)
    assert (counts / n - p).abs().max() < 0.015


def test_top_k_and_top_p_stay_within_their_sets():
    torch.manual_seed(0)
    logits_BV = torch.randn(1, 50).expand(5000, -1) * 2
    p = logits_BV[0].softmax(-1)
    order = p.argsort(descending=True)
    u_B = torch.rand(5000)
    u_B[:2] = torch.tensor([0.0, 1 - 2**-24])  # the least and the largest that rand gives
    for k in (1, 5, 50):
        sampled = choose(logits_BV, u_B, 1.0, top_k=k)
        assert set(sampled.tolist()) <= set(order[:k].tolist())
        assert k > 5 or len(set(sampled.tolist())) == k
    for top_p in (1e-6, 0.3, 0.9, 1.0):
        nucleus = order[: int((p[order].cumsum(0) < top_p).sum()) + 1]
        sampled = choose(logits_BV, u_B, 1.0, top_p=top_p)
        assert set(sampled.tolist()) <= set(nucleus.tolist())
    # Both: top_p is of what top_k left.
    kept = (p[order[:5]] / p[order[:5]].sum()).cumsum(0)
    both = order[: int((kept < 0.6).sum()) + 1]
    assert set(choose(logits_BV, u_B, 1.0, top_k=5, top_p=0.6).tolist()) == set(both.tolist())


def test_impossible_classes_are_never_sampled_and_tiny_temperatures_are_greedy():
    logits_BV = torch.full((1000, 8), -math.inf)
    logits_BV[:, 3:5] = 0
    u_B = torch.linspace(0, 1 - 2**-24, 1000)
    for settings in ({}, {"top_k": 8}, {"top_p": 1.0}):
        assert set(choose(logits_BV, u_B, 1.0, **settings).tolist()) == {3, 4}
    logits_BV = torch.randn(1000, 8)
    assert torch.equal(choose(logits_BV, u_B, 1e-30), logits_BV.argmax(-1))
    assert choose(logits_BV.bfloat16(), u_B, 1.0).max() < 8


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_sample_depends_on_its_seed_and_not_on_its_batch(direction):
    model = lively()
    reference = references(model, direction, batch=6)
    settings = {"top_k": 9, "guidance": 1.5, "temperature": 0.9}
    together = generate(model, reference, direction, seed=40, **settings)
    assert torch.equal(together, generate(model, reference, direction, seed=40, **settings))
    for i in range(6):
        alone = generate(model, reference[i : i + 1], direction, seed=40 + i, **settings)
        assert torch.equal(alone[0], together[i])
    backwards = generate(model, reference.flip(0), direction, seed=[45, 44, 43, 42, 41, 40], **settings)
    assert torch.equal(backwards.flip(0), together)
    same = reference[:1].expand(6, -1)
    assert len({tuple(r) for r in generate(model, same, direction, seed=40).tolist()}) > 1
    torch.manual_seed(0)
    unseeded = [generate(model, reference, direction) for _ in range(2)]
    assert not torch.equal(*unseeded)
    with pytest.raises(ValueError, match=naming("2 seeds", "6 samples")):
        generate(model, reference, direction, seed=[1, 2])


def test_sampling_leaves_the_global_generator_alone_when_seeded():
    model = lively()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    generate(model, references(model, TEXT_TO_IMAGE), TEXT_TO_IMAGE, seed=0)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(uniforms([3, 4], 6)[1], uniforms([4], 6)[0])


def test_guidance_one_is_no_guidance_and_costs_nothing(monkeypatch):
    model = lively()
    reference = references(model, TEXT_TO_IMAGE)
    rows = []
    prefill = model.prefill
    monkeypatch.setattr(model, "prefill", lambda idx, *a: rows.append(len(idx)) or prefill(idx, *a))
    plain = generate(model, reference, TEXT_TO_IMAGE, seed=3)
    assert torch.equal(generate(model, reference, TEXT_TO_IMAGE, seed=3, guidance=1.0), plain)
    assert not torch.equal(generate(model, reference, TEXT_TO_IMAGE, seed=3, guidance=6.0), plain)
    assert rows == [4, 4, 8]
    logits = torch.randn(6, 5)
    torch.testing.assert_close(guide(logits, 3.0), logits[3:] + 3 * (logits[:3] - logits[3:]))
    torch.testing.assert_close(guide(logits, 1.0), logits[:3])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_completion_keeps_its_prefix_and_samples_the_rest_as_if_it_had_sampled_it(direction, guidance):
    model = lively()
    reference = references(model, direction)
    whole = generate(model, reference, direction, seed=9, guidance=guidance)
    total = whole.shape[1]
    known = 3 if direction == TEXT_TO_IMAGE else int((whole != model.vocab.pad).sum(1).min())
    again = generate(model, reference, direction, seed=9, guidance=guidance, prefix_BK=whole[:, :known])
    assert torch.equal(again, whole)
    if direction == TEXT_TO_IMAGE:
        other = torch.randint(model.vocab.image_vocab, (4, 5))
        assert torch.equal(generate(model, reference, direction, seed=9, prefix_BK=other)[:, :5], other)
        full = torch.randint(model.vocab.image_vocab, (4, total))
        assert torch.equal(generate(model, reference, direction, prefix_BK=full), full)


def test_null_references_sample_without_a_text():
    model = lively()
    null = model.vocab.null_reference(4, TEXT_TO_IMAGE)
    sampled = generate(model, null, TEXT_TO_IMAGE, seed=0)
    assert sampled.shape == (4, 7) and sampled.max() < 13
    reference = references(model, TEXT_TO_IMAGE)
    assert torch.equal(sampled, generate(model, reference, TEXT_TO_IMAGE, seed=0, guidance=0.0))


def test_text_stops_at_its_end():
    model = lively()
    reference = references(model, IMAGE_TO_TEXT, batch=64)
    steps = []
    text_BL = generate(
        model, reference, IMAGE_TO_TEXT, seed=0, progress=lambda step, total: steps.append((step, total))
    )
    model.vocab.check_text(text_BL)  # text ids, then pads only
    assert (text_BL == model.vocab.pad).any() and (text_BL != model.vocab.pad).any()
    assert steps[-1] == (5, 5)
    with torch.no_grad():  # a model that always ends at once stops after one step
        model.head.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.head.weight[model.vocab.pad] = 10
    steps.clear()
    text_BL = generate(model, reference, IMAGE_TO_TEXT, temperature=0, progress=lambda *s: steps.append(s))
    assert (text_BL == model.vocab.pad).all() and steps == [(1, 5)]


@pytest.mark.parametrize("given", ["text", "image"])
def test_log_likelihood_is_the_sum_of_the_full_masked_log_softmax(given):
    model = lively()
    vocab = model.vocab
    text_BL, codes_BN = references(model, TEXT_TO_IMAGE), references(model, IMAGE_TO_TEXT)
    direction, reference, target = (
        (TEXT_TO_IMAGE, text_BL, codes_BN) if given == "text" else (IMAGE_TO_TEXT, codes_BN, text_BL)
    )
    total_B, tokens_BT = log_likelihood(model, text_BL, codes_BN, given)
    for row in range(4):
        expected = []
        for i, token in enumerate(target[row].tolist()):
            known = target[row : row + 1, :i]
            log_p = next_logits(model, reference[row : row + 1], direction, known).log_softmax(-1)[0]
            expected.append(float(log_p[vocab.text_vocab if token == vocab.pad else token]))
            if token == vocab.pad:
                break
        assert total_B[row].item() == pytest.approx(sum(expected), abs=1e-4)
        expected += [0.0] * (tokens_BT.shape[1] - len(expected))
        torch.testing.assert_close(tokens_BT[row], torch.tensor(expected), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=naming("given", "both", "text", "image")):
        log_likelihood(model, text_BL, codes_BN, "both")


@pytest.mark.parametrize("bucket", [1, 4])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_beam_search_with_enough_beams_finds_the_best_caption(seed, length_penalty, bucket):
    config = BiARTConfig(text_vocab=3, image_vocab=5, text_len=3, image_len=4, n_layer=1, n_head=2, n_embd=16)
    model = lively(config, seed)
    codes_BN = references(model, IMAGE_TO_TEXT, batch=3)
    every = [c for n in range(4) for c in itertools.product(range(3), repeat=n)]
    text_ML = model.vocab.pad_text(every)
    length_M = torch.tensor([min(len(c) + 1, 3) for c in every])
    best_BL, score_B = beam_search(model, codes_BN, 27, length_penalty, bucket)
    for row in range(3):
        total_M = log_likelihood(model, text_ML, codes_BN[row].expand(len(every), -1), "image").total_B
        score_M = total_M / length_M**length_penalty
        assert torch.equal(best_BL[row], text_ML[score_M.argmax()])
        assert score_B[row].item() == pytest.approx(score_M.max().item(), abs=1e-5)


def plain_beams(model, codes_1N, beam_size, length_penalty):
    """(score, tokens) of the best caption: every beam's whole sequence again for every token."""
    L = model.vocab.text_len
    open_beams, ended = [(0.0, [])], []
    for step in range(L):
        known = torch.tensor([tokens for _, tokens in open_beams], dtype=torch.long).view(len(open_beams), step)
        logits_WV = next_logits(model, codes_1N.expand(len(open_beams), -1), IMAGE_TO_TEXT, known)
        grown = []
        for (total, tokens), log_p_V in zip(open_beams, logits_WV.log_softmax(-1).tolist(), strict=True):
            *log_p, end = log_p_V
            ended.append(((total + end) / (step + 1) ** length_penalty, tokens))
            grown += [(total + value, [*tokens, token]) for token, value in enumerate(log_p)]
        open_beams = sorted(grown, reverse=True)[:beam_size]
    return max([*ended, *((total / L**length_penalty, tokens) for total, tokens in open_beams)])


@pytest.mark.parametrize("bucket", [1, 4])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beam_search_is_the_search_that_reads_whole_sequences_again(length_penalty, bucket):
    model = lively()
    with torch.no_grad():  # captions must not all end at once
        model.head.weight[model.vocab.pad] -= 8 * model.ln_f.bias
    codes_BN = references(model, IMAGE_TO_TEXT, batch=6)
    text_BL, score_B = beam_search(model, codes_BN, 3, length_penalty, bucket)
    lengths = set()
    for row in range(6):
        score, tokens = plain_beams(model, codes_BN[row : row + 1], 3, length_penalty)
        assert model.vocab.unpad_text(text_BL[row : row + 1]) == [tokens]
        assert score_B[row].item() == pytest.approx(score, abs=1e-4)
        lengths.add(len(tokens))
    assert len(lengths) > 1 and max(lengths) > 2


def test_beam_search_leaves_the_prompt_in_its_cache_alone(monkeypatch):
    """Beams share their image's keys and values, so it would go unnoticed if each step copied them."""
    model, reorder, moved = lively(), KVCache.reorder, []
    with torch.no_grad():
        model.head.weight[model.vocab.pad] = -100 * model.ln_f.bias  # no caption ends
    prompt = model.vocab.prompt(references(model, IMAGE_TO_TEXT), IMAGE_TO_TEXT)[0].shape[1]

    def watched(cache, rows_B, slots):
        both = [t[..., :prompt, :] for t in (cache.k_LBHSD, cache.v_LBHSD)]
        real = [t.clone() for t in both]
        marks = [t.normal_().clone() for t in both]
        reorder(cache, rows_B, slots)
        assert all(torch.equal(t, mark) for t, mark in zip(both, marks, strict=True))
        for t, values in zip(both, real, strict=True):
            t.copy_(values)
        moved.append((slots.start, slots.stop))

    monkeypatch.setattr(KVCache, "reorder", watched)
    beam_search(model, references(model, IMAGE_TO_TEXT), 3)
    assert moved == [(prompt, prompt + step) for step in range(model.vocab.text_len - 1)]


def test_one_beam_scores_like_greedy_and_more_beams_never_score_worse_than_their_caption():
    model = lively()
    codes_BN = references(model, IMAGE_TO_TEXT, batch=8)
    for beam_size in (2, 6):
        text_BL, score_B = beam_search(model, codes_BN, beam_size)
        torch.testing.assert_close(score_B, log_likelihood(model, text_BL, codes_BN, "image").total_B)
    greedy_BL = generate(model, codes_BN, IMAGE_TO_TEXT, temperature=0)
    greedy_B = log_likelihood(model, greedy_BL, codes_BN, "image").total_B
    _, one_B = beam_search(model, codes_BN, 1)
    assert (one_B >= greedy_B - 1e-5).all()
    alone_BL, _ = beam_search(model, codes_BN[2:3], 6)
    assert torch.equal(alone_BL[0], text_BL[2])
    with pytest.raises(ValueError, match=naming("beam_size", 0)):
        beam_search(model, codes_BN, 0)
    with pytest.raises(ValueError, match=naming("length_penalty", -1)):
        beam_search(model, codes_BN, 2, -1)


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"temperature": math.nan}, []),  # any that SamplingSettings refuses
        ({"top_k": 14}, [[1, 13]]),
        ({"guidance": 2.0, "reference_dropout_trained": False}, ["reference_dropout"]),
    ],
)
def test_senseless_settings_are_refused(settings, facts):
    model = lively()
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=naming(name, value, *facts)):
        generate(model, references(model, TEXT_TO_IMAGE), TEXT_TO_IMAGE, **settings)


def test_settings_at_their_limits_are_accepted():
    check_settings(0, None, None, 1.0, 13, null_trained=False)
    check_settings(1.0, 13, 1.0, 1.0, 13, null_trained=False)
    check_settings(5.0, 1, 1e-9, 0.0, 13, null_trained=True)


def test_logits_that_are_not_finite_are_reported():
    model = lively()
    with torch.no_grad():
        model.ln_f.weight[0] = math.nan
    with pytest.raises(NotFinite):
        generate(model, references(model, TEXT_TO_IMAGE), TEXT_TO_IMAGE)
    with pytest.raises(NotFinite):
        beam_search(model, references(model, IMAGE_TO_TEXT), 2)
    with pytest.raises(NotFinite):
        log_likelihood(model, references(model, TEXT_TO_IMAGE), references(model, IMAGE_TO_TEXT), "text")


def test_dropout_is_off_while_sampling_and_the_mode_is_restored():
    config = BiARTConfig(**{**vars(CONFIG), "embd_pdrop": 0.5, "resid_pdrop": 0.5, "attn_pdrop": 0.5})
    model = lively(config)
    reference = references(model, TEXT_TO_IMAGE)
    expected = generate(model, reference, TEXT_TO_IMAGE, temperature=0)
    model.train()
    assert torch.equal(generate(model, reference, TEXT_TO_IMAGE, temperature=0), expected)
    assert model.training and model.blocks[0].attn.training


def test_bfloat16_weights_and_autocast_sample():
    model = lively()
    reference = references(model, TEXT_TO_IMAGE)
    with torch.autocast("cpu", torch.bfloat16):
        sampled = generate(model, reference, TEXT_TO_IMAGE, seed=0, guidance=2.0)
    assert sampled.shape == (4, 7) and sampled.max() < 13
    model = model.bfloat16()
    assert generate(model, reference, TEXT_TO_IMAGE, seed=0, top_p=0.9).max() < 13
    text_BL, _ = beam_search(model, references(model, IMAGE_TO_TEXT), 3)
    model.vocab.check_text(text_BL)


def test_an_empty_batch_gives_an_empty_result():
    model = lively()
    assert generate(model, references(model, TEXT_TO_IMAGE)[:0], TEXT_TO_IMAGE).shape == (0, 7)
