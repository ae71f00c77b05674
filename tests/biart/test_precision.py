"""BiART under autocast and in half precision, beside float32."""

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from latent_verse.biart.model import BiART, KVCache, loss_weights
from latent_verse.biart.sequence import DIRECTIONS
from tests.biart.tiny_biart import CONFIG, lively, pairs


def test_bfloat16_weights_run():
    model = lively().bfloat16()
    sequences = model.vocab.pack(*pairs(model), 2)
    loss, _ = model.loss(sequences, loss_weights(0.1))
    reference, _ = model.float().loss(sequences, loss_weights(0.1))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=0.05, atol=0.05)


@contextlib.contextmanager
def what_blocks_pass_on(model):
    """The streams that the blocks get and give, and what they add to them, in order."""
    seen = []
    note = lambda block, args, outputs: seen.extend(t for t in (*args, *outputs) if isinstance(t, torch.Tensor))  # noqa: E731
    hooks = [block.register_forward_hook(note) for block in model.blocks]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("autocast", "expected"),
    [(None, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_the_residual_stream_is_bfloat16_under_an_autocast_to_that_only(autocast, expected):
    """float16 might overflow, at 65,504: it is the type of what a block adds, but not of the stream."""
    model = lively()
    sequences = model.vocab.pack(*pairs(model), 2)
    idx_BT, seg_BT = sequences.idx_BT, sequences.seg_BT
    with torch.no_grad(), torch.autocast("cpu", autocast, enabled=autocast is not None):
        for cached in (False, True):
            with what_blocks_pass_on(model) as seen:
                if cached:
                    cache = KVCache(CONFIG, 4, "cpu", autocast or torch.float32)
                    model.prefill(idx_BT[:, :6], seg_BT[:, :6], cache)
                    model.decode(idx_BT[:, 6:7], seg_BT[:, 6:7], cache, torch.tensor([6]), cache.slots(6))
                else:
                    model.features(idx_BT, seg_BT)
            assert len(seen) == (1 + cached) * (3 + 4)  # the first block gets one tensor, the second two
            assert {t.dtype for t in (seen[0], seen[1], seen[3], seen[5])} == {expected}  # streams
            assert seen[2].dtype == (autocast or torch.float32)
    double = model.double()
    with torch.no_grad():
        assert double.features(idx_BT, seg_BT).dtype == torch.float64


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_float32_numbers_are_those_of_whole_blocks_to_the_bit_gradients_included(dropout):
    """The plain formulation: every block ends with its sum, and norms are nn.LayerNorm."""
    model = lively(dataclasses.replace(CONFIG, n_layer=3, resid_pdrop=dropout, embd_pdrop=dropout)).train()
    sequences = model.vocab.pack(*pairs(model), 2)
    idx_BT, seg_BT = sequences.idx_BT, sequences.seg_BT

    def norm(layer, x_BTC):
        return F.layer_norm(x_BTC, layer.normalized_shape, layer.weight, layer.bias, layer.eps)

    def plain():
        x_BTC = model.tok_emb(idx_BT) + model.seg_emb(seg_BT) + model.pos_emb[0, : idx_BT.shape[1]]
        x_BTC = F.dropout(x_BTC, dropout)
        for block in model.blocks:
            x_BTC = x_BTC + block.attn(norm(block.ln1, x_BTC))
            x_BTC = x_BTC + F.dropout(block.mlp(norm(block.ln2, x_BTC)), dropout)
        return norm(model.ln_f, x_BTC)

    results = []
    for features in (plain, lambda: model.features(idx_BT, seg_BT)):
        torch.manual_seed(3)
        model.zero_grad()
        features_BTC = features()
        features_BTC.square().sin().sum().backward()
        results.append([features_BTC.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_losses_and_gradients_under_autocast_are_close_to_those_in_float32():
    torch.manual_seed(0)
    model = BiART(dataclasses.replace(CONFIG, n_layer=24, n_embd=64))  # deep: each block rounds the stream twice
    sequences = model.vocab.pack(*pairs(model, batch=16), 8)
    losses, gradients = [], []
    for autocast in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = model.loss(sequences, loss_weights(0.1))
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    for name, gradient in gradients[0].items():
        assert gradients[1][name].dtype == torch.float32
        assert F.cosine_similarity(gradients[1][name].flatten(), gradient.flatten(), dim=0) > 0.995, name


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_cached_features_under_autocast_equal_uncached(direction):
    model = lively()
    sequences = model.vocab.pack(*pairs(model), direction)
    idx_BT, seg_BT = sequences.idx_BT, sequences.seg_BT
    with torch.no_grad():
        exact = model.features(idx_BT, seg_BT)
        with torch.autocast("cpu", torch.bfloat16):
            expected = model.features(idx_BT, seg_BT)
            cache = KVCache(CONFIG, len(idx_BT), "cpu", torch.bfloat16)
            features = [model.prefill(idx_BT[:, :6], seg_BT[:, :6], cache)]
            for t in range(6, model.vocab.input_len):
                pos_1 = torch.tensor([t])
                features.append(model.decode(idx_BT[:, t : t + 1], seg_BT[:, t : t + 1], cache, pos_1, cache.slots(t)))
    features_BTC = torch.cat(features, dim=1)
    assert features_BTC.dtype == expected.dtype == torch.bfloat16
    rounding = (expected - exact).abs().mean()
    assert (features_BTC - expected).abs().mean() < 1.5 * rounding < 0.02 * exact.abs().mean() * 1.5
