"""Retrieval, classification and bits against computation one by one; corrections by hand; two processes as one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from latent_verse.biart.sampling import log_likelihood
from latent_verse.config import ConfigError
from latent_verse.metrics import likelihood
from latent_verse.metrics.likelihood import Scores, corrected, ranks_of_truth, retrieval
from latent_verse.metrics.processes import Ranks
from tests.messages import naming
from tests.tiny_lverse import make_lverse
from tests.two_processes import in_two_processes

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a red circle", "two small blue squares", "a", "red squares " * 20]


@pytest.fixture
def model(tiny_augvae):
    made = make_lverse(tiny_augvae(single_level=4))
    made.batch_size = 3  # chunks of several sizes
    return made


@pytest.fixture
def codes(model):
    return torch.randint(24, (5, 16), generator=torch.Generator().manual_seed(0))


def texts_of(model):
    with pytest.warns(UserWarning, match=naming("text 3", "text_len", 24)):
        return model.encode_texts(TEXTS)


def test_every_image_is_scored_with_every_text(model, codes):
    text_TL = texts_of(model)
    scores = likelihood.score_all(model, codes, text_TL, Ranks())
    for i in range(5):
        for t in range(4):
            for given, matrix in (("image", scores.text_given_image_IT), ("text", scores.image_given_text_IT)):
                one = log_likelihood(model.biart, text_TL[t : t + 1], codes[i : i + 1], given).total_B.item()
                assert matrix[i, t].item() == pytest.approx(one, rel=1e-5)
    lengths = [len(ids) for ids in model.biart.vocab.unpad_text(text_TL)]
    assert scores.tokens_T.tolist() == [*(n + 1 for n in lengths[:3]), 24] and lengths[3] == 24


def test_alone_is_the_models_own_log_p_without_a_reference(model, codes):
    """Computed by the network itself: all tokens of the reference are null."""
    text_TL = texts_of(model)
    scores = likelihood.score_all(model, codes, text_TL, Ranks())
    vocab = model.biart.vocab
    idx, seg = vocab.prompt(vocab.null_reference(1, "image_to_text"), "image_to_text", text_TL[:1, :3])
    with torch.no_grad():
        log_p = F.log_softmax(F.linear(model.biart.features(idx, seg), model.biart.head_weight("text")), -1)[0]
    start = idx.shape[1] - 4
    first_three = sum(log_p[start + n, text_TL[0, n]].item() for n in range(3))
    alone = log_likelihood(model.biart, text_TL[:1], codes[:1], "image", alone=True)
    assert alone.tokens_BT[0, :3].sum().item() == pytest.approx(first_three, rel=1e-4)
    assert scores.text_alone_T[0].item() == pytest.approx(alone.total_B.item(), rel=1e-5)
    assert scores.text_alone_T[0] != scores.text_given_image_IT[0, 0]
    for i in range(5):  # the text in the pair makes no difference
        other = log_likelihood(model.biart, text_TL[1:2], codes[i : i + 1], "text", alone=True).total_B.item()
        assert scores.image_alone_I[i].item() == pytest.approx(other, rel=1e-5)


def test_a_model_that_never_dropped_references_has_no_prior(tiny_augvae, codes):
    model = make_lverse(tiny_augvae(single_level=4), reference_dropout=0.0)
    scores = likelihood.score_all(model, codes, model.encode_texts(TEXTS[:3]), Ranks())
    assert scores.text_alone_T is None and scores.image_alone_I is None
    with pytest.raises(ConfigError, match=naming("prior_weight", 0.5, "--prior pool", "reference_dropout")):
        corrected(scores, "image", 0, 0.5, "null")
    assert corrected(scores, "image", 0, 0.5, "pool").shape == (5, 3)


def test_corrections_by_hand():
    scores = Scores(
        torch.tensor([[-4.0, -9.0], [-6.0, -3.0]]).double(),
        torch.tensor([[-20.0, -22.0], [-30.0, -21.0]]).double(),
        torch.tensor([-5.0, -6.0]).double(),
        torch.tensor([-25.0, -26.0]).double(),
        torch.tensor([2, 3]),
    )
    assert corrected(scores, "image", 0, 0, "null").tolist() == [[-4, -9], [-6, -3]]
    assert corrected(scores, "image", 1, 0, "null").tolist() == [[-2, -3], [-3, -1]]
    assert corrected(scores, "image", 0, 1, "null").tolist() == [[1, -3], [-1, 3]]
    assert corrected(scores, "image", 1, 0.5, "null")[1].tolist() == pytest.approx([(-6 + 2.5) / 2, 0])
    assert corrected(scores, "text", 1, 1, "null").tolist() == [[5, 3], [-4, 5]]  # an image has one length
    pool = corrected(scores, "image", 0, 1, "pool")
    mean = math.log((math.exp(-4) + math.exp(-6)) / 2)  # over the images, for text 0
    assert pool[:, 0].tolist() == pytest.approx([-4 - mean, -6 - mean])
    pool = corrected(scores, "text", 0, 1, "pool")
    mean = math.log((math.exp(-20) + math.exp(-22)) / 2)  # over the texts, for image 0
    assert pool[0].tolist() == pytest.approx([-20 - mean, -22 - mean])


def brute_force(matrix, right) -> list[int]:
    """The place of the first right candidate when each query sorts them, wrong ones first among equals."""
    places = []
    for row, good in zip(matrix.tolist(), right.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], good[j]))
        places.append(1 + next(place for place, j in enumerate(order) if good[j]))
    return places


@pytest.mark.parametrize("levels", [3, 10**6])  # many ties, and none
def test_retrieval_is_that_of_sorting(levels):
    generator = torch.Generator().manual_seed(levels)
    matrix = torch.randint(levels, (12, 36), generator=generator).double()
    owner = torch.arange(36) % 12
    right = owner[None] == torch.arange(12)[:, None]
    matrix += right * levels // 3
    out = retrieval(matrix, owner)
    for direction, places in (
        ("image_to_text", brute_force(matrix, right)),
        ("text_to_image", brute_force(matrix.T, right.T)),
    ):
        assert max(places) > 1
        for k in (1, 5, 10):
            assert out[direction][f"r@{k}"] == pytest.approx(sum(p <= k for p in places) / len(places))
        middle = sorted(places)
        assert out[direction]["median_rank"] == (middle[(len(places) - 1) // 2] + middle[len(places) // 2]) / 2
    assert 0 < out["image_to_text"]["r@5"] < 1 or levels > 3


def test_equal_scores_count_against():
    right = torch.eye(4, dtype=torch.bool)
    assert ranks_of_truth(torch.zeros(4, 4), right).tolist() == [4, 4, 4, 4]
    assert ranks_of_truth(torch.eye(4), right).tolist() == [1, 1, 1, 1]
    last = torch.tensor([[False, False, True]] * 2)
    assert ranks_of_truth(torch.tensor([[0.0, 2, 1], [3, 2, 2]]), last).tolist() == [2, 3]


# ---------------------------------------------------------------------------------------------------------------- bits


def test_bits_are_sums_over_tokens_codes_and_dimensions(model, codes):
    text_BL = texts_of(model)
    found = likelihood.held_out(model, codes[:4], text_BL, Ranks())
    bits = found.bits()
    one = [log_likelihood(model.biart, text_BL[i : i + 1], codes[i : i + 1], "image").total_B.item() for i in range(4)]
    assert bits["text_given_image/bits_per_token"][0] == pytest.approx(
        -sum(one) / math.log(2) / found.tokens_B.sum().item(), rel=1e-5
    )
    one = [log_likelihood(model.biart, text_BL[i : i + 1], codes[i : i + 1], "text").total_B.item() for i in range(4)]
    mean = -sum(one) / 4 / math.log(2)
    assert bits["image_given_text/bits_per_code"][0] == pytest.approx(mean / 16, rel=1e-5)
    assert bits["image_given_text/bits_per_dimension"][0] == pytest.approx(mean / (3 * 16 * 16), rel=1e-5)
    error = torch.tensor(one, dtype=torch.float64).std().item() / math.log(2) / 2 / 16
    assert bits["image_given_text/bits_per_code"][1] == pytest.approx(error, rel=1e-5)
    assert set(bits) == {
        *(f"text_{kind}/bits_per_token" for kind in ("given_image", "alone")),
        *(f"image_{kind}/bits_per_{unit}" for kind in ("given_text", "alone") for unit in ("code", "dimension")),
    }


def test_an_even_guess_takes_the_logarithm_of_the_choices(model, codes):
    with torch.no_grad():
        for parameter in model.biart.parameters():
            parameter.zero_()
    bits = likelihood.held_out(model, codes[:3], model.encode_texts(TEXTS[:3]), Ranks()).bits()
    assert bits["image_given_text/bits_per_code"][0] == pytest.approx(math.log2(24), rel=1e-5)
    assert bits["text_alone/bits_per_token"][0] == pytest.approx(math.log2(model.tokenizer.vocab_size + 1), rel=1e-5)
    assert bits["text_given_image/bits_per_token"][1] == pytest.approx(0, abs=1e-5)


def part(rank: int, model, codes) -> dict[str, torch.Tensor]:
    text_TL = model.encode_texts(TEXTS[:3])
    scores = likelihood.score_all(model, codes, text_TL, Ranks(rank, 2))
    found = likelihood.held_out(model, codes[:3], text_TL, Ranks(rank, 2))
    return {
        "matrix": scores.text_given_image_IT,
        "other": scores.image_given_text_IT,
        "held": found.image_given_text_B,
        "alone": found.text_alone_B,
    }


def test_two_processes_score_as_one(model, codes, tmp_path):
    text_TL = model.encode_texts(TEXTS[:3])
    scores = likelihood.score_all(model, codes, text_TL, Ranks())
    found = likelihood.held_out(model, codes[:3], text_TL, Ranks())
    for two in in_two_processes(tmp_path, part, model, codes):
        assert torch.allclose(two["matrix"], scores.text_given_image_IT, rtol=1e-5)
        assert torch.allclose(two["other"], scores.image_given_text_IT, rtol=1e-5)
        assert torch.allclose(two["held"], found.image_given_text_B, rtol=1e-5)
        assert torch.allclose(two["alone"], found.text_alone_B, rtol=1e-5)
