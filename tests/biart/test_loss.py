"""BiART's loss against the full masked softmax, by hand, and for two processes."""

import math

import pytest
import torch
import torch.nn.functional as F

from latent_verse.biart.model import BiART, loss_weights
from latent_verse.biart.sequence import DIRECTIONS, IGNORE, IMAGE_TO_TEXT, TEXT_TO_IMAGE, target_modality
from latent_verse.config import BiARTConfig
from tests.biart.tiny_biart import lively, pairs


def masked_log_softmax(model, sequences):
    """log p by the plain formulation: the full head, -inf outside of the modality that comes next."""
    logits_BTV = model(sequences.idx_BT, sequences.seg_BT)
    mask_BTV = torch.ones_like(logits_BTV, dtype=torch.bool)
    for direction, rows in sequences.parts():
        for modality in ("text", "image"):
            positions = model.vocab.positions(direction, modality)
            ids = model.vocab.class_ids(modality)
            for row in range(rows.start, rows.stop):
                mask_BTV[row, positions] = mask_BTV[row, positions].index_fill(1, ids, False)
    return logits_BTV.masked_fill(mask_BTV, -math.inf).log_softmax(-1)


@pytest.mark.parametrize("chunk", [None, 4])
def test_loss_equals_the_full_masked_softmax_gradients_included(chunk):
    model = lively()
    vocab, weight = model.vocab, 0.3
    sequences = vocab.pack(*pairs(model), 1, reference_dropout=0.5, generator=torch.Generator().manual_seed(5))
    loss, means = model.loss(sequences, loss_weights(weight), chunk)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    log_p_BTV = masked_log_softmax(model, sequences)
    expected = 0.0
    for direction, rows in sequences.parts():
        for modality, class_BT in (("text", sequences.text_BL), ("image", sequences.codes_BN)):
            terms = []
            for row in range(rows.start, rows.stop):
                for i, position in enumerate(range(vocab.input_len)[vocab.positions(direction, modality)]):
                    target = class_BT[row, i]
                    if target != IGNORE:
                        terms.append(-log_p_BTV[row, position, vocab.to_ids(target, modality)])
            mean = torch.stack(terms).mean()
            torch.testing.assert_close(means[f"{direction}/{modality}"], mean.detach())
            share = (rows.stop - rows.start) / len(class_BT)
            expected = expected + share * mean * (1 if modality == target_modality(direction) else weight)
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_loss_by_hand():
    """A head that says the same everywhere: text id 0 three times as likely as each other class, codes all alike."""
    config = BiARTConfig(text_vocab=3, image_vocab=4, text_len=3, image_len=2, n_layer=1, n_head=1, n_embd=2)
    model = BiART(config)
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.tensor([1.0, 0.0]))
        model.head.weight.zero_()
        model.head.weight[0, 0] = math.log(3)
    text_BL, codes_BN = model.vocab.pad_text([[0, 1], [0]]), torch.tensor([[0, 1], [2, 3]])
    # Text classes 0, 1, 2, end: p(0) = 3/6, the others 1/6. Row 0 has the reference 0, 1, end; row 1 the target 0, end.
    loss, means = model.loss(model.vocab.pack(text_BL, codes_BN, 1), loss_weights(0.5))
    assert means["text_to_image/image"].item() == pytest.approx(math.log(4))
    assert means["text_to_image/text"].item() == pytest.approx((math.log(2) + 2 * math.log(6)) / 3)
    assert means["image_to_text/text"].item() == pytest.approx((math.log(2) + math.log(6)) / 2)
    assert means["image_to_text/image"].item() == pytest.approx(math.log(4))
    forth = math.log(4) + 0.5 * (math.log(2) + 2 * math.log(6)) / 3
    back = (math.log(2) + math.log(6)) / 2 + 0.5 * math.log(4)
    assert loss.item() == pytest.approx((forth + back) / 2)


def test_loss_without_references_and_with_all_of_them_dropped():
    model = lively()
    text_BL, codes_BN = pairs(model)
    loss, means = model.loss(model.vocab.pack(text_BL, codes_BN, 2), loss_weights(0))
    assert set(means) == {"text_to_image/image", "image_to_text/text"}
    assert loss.item() == pytest.approx(sum(m.item() for m in means.values()) / 2)
    loss, means = model.loss(model.vocab.pack(text_BL, codes_BN, 2, reference_dropout=1.0), loss_weights(0.5))
    assert loss.isfinite() and means["text_to_image/text"] == 0


@pytest.mark.parametrize("chunk", [None, 4])
def test_weighted_loss_equals_a_forward_pass_for_each_direction_gradients_included(chunk):
    """The plain formulation: split the batch, weigh the reference against the target, then the modalities."""
    model = lively()
    vocab, own, reference_weight = model.vocab, {"text": 4.0, "image": 0.5}, 0.3
    sequences = vocab.pack(*pairs(model), 1)
    loss, means = model.loss(sequences, loss_weights(reference_weight, **own), chunk)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    expected = 0.0
    for direction, rows in sequences.parts():
        features_BTC = model.features(sequences.idx_BT[rows], sequences.seg_BT[rows])
        classes = {"text": sequences.text_BL[rows], "image": sequences.codes_BN[rows]}
        for modality, class_BT in classes.items():
            logits_BTV = model.modality_logits(features_BTC[:, vocab.positions(direction, modality)], modality)
            mean = F.cross_entropy(logits_BTV.flatten(0, 1), class_BT.flatten(), ignore_index=IGNORE)
            torch.testing.assert_close(means[f"{direction}/{modality}"], mean.detach())
            weight = own[modality] * (1 if modality == target_modality(direction) else reference_weight)
            expected = expected + (rows.stop - rows.start) / len(sequences.idx_BT) * weight * mean
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_batch_is_read_once_and_heads_without_weight_are_left_out(monkeypatch):
    model, passes = lively(), []
    features = model.features
    monkeypatch.setattr(model, "features", lambda *args: passes.append(len(args[0])) or features(*args))
    sequences = model.vocab.pack(*pairs(model), 1)
    weights = loss_weights(0.5, text=2.0) | {"text_to_image/text": 0}
    _, means = model.loss(sequences, weights)
    assert passes == [4] and set(means) == set(weights) - {"text_to_image/text"}
    with pytest.raises(KeyError, match="image_to_text"):
        model.loss(sequences, {f"text_to_image/{modality}": 1.0 for modality in ("text", "image")})


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_losses_of_two_processes_average_to_that_of_the_joined_batch(direction):
    model = lively()
    text_BL = model.vocab.pad_text([[1], [2, 3, 4, 5, 6], [], [7, 8]])
    codes_BN = pairs(model)[1]
    halves, joined = (
        [model.vocab.pack(text_BL[rows], codes_BN[rows], direction) for rows in parts]
        for parts in ((slice(0, 1), slice(1, 4)), (slice(0, 4),))
    )
    counted = [half.counted() for half in halves]
    at = DIRECTIONS.index(direction)
    assert [c[at].tolist() for c in counted] == [[2, 7], [5 + 1 + 3, 3 * 7]]  # a text that is not full has an end
    assert all(c[1 - at].tolist() == [0, 0] for c in counted)
    average = sum(counted) / 2
    shares = [dict(zip((f"{direction}/text", f"{direction}/image"), (c / average)[at], strict=True)) for c in counted]
    losses = [
        model.loss(half, loss_weights(0.5), token_share=share)[0] for half, share in zip(halves, shares, strict=True)
    ]
    expected = model.loss(joined[0], loss_weights(0.5))[0]
    torch.testing.assert_close(sum(losses) / 2, expected)
    assert abs(sum(model.loss(half, loss_weights(0.5))[0] for half in halves) / 2 - expected) > 1e-3


def test_cross_entropy_is_float32_under_autocast():
    model = lively()
    sequences = model.vocab.pack(*pairs(model), IMAGE_TO_TEXT)
    with torch.autocast("cpu", torch.bfloat16):
        features = model.features(sequences.idx_BT, sequences.seg_BT)
        logits = model.modality_logits(features, "text")
        here = features[:, model.vocab.positions(IMAGE_TO_TEXT, "text")]
        losses = model.token_losses(here, sequences.text_BL, model.head_weight("text"))
        expected = F.cross_entropy(
            logits[:, model.vocab.positions(IMAGE_TO_TEXT, "text")].float().transpose(1, 2),
            sequences.text_BL,
            ignore_index=IGNORE,
            reduction="none",
        )
    assert logits.dtype == torch.bfloat16 and losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-2)


def test_text_to_image_alone_and_the_other_way_alone():
    model = lively()
    text_BL, codes_BN = pairs(model)
    forth, _ = model.loss(model.vocab.pack(text_BL[:2], codes_BN[:2], TEXT_TO_IMAGE), loss_weights(0.5))
    back, _ = model.loss(model.vocab.pack(text_BL[2:], codes_BN[2:], IMAGE_TO_TEXT), loss_weights(0.5))
    both, _ = model.loss(model.vocab.pack(text_BL, codes_BN, 2), loss_weights(0.5))
    torch.testing.assert_close(both, (forth + back) / 2)
