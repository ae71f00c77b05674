"""The codebook against a plain one-hot reference; exactness under autocast; restart and initialisation from data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latent_verse.augvae import quantizer as codebook_module
from latent_verse.augvae.quantizer import Codebook, EMAQuantizer, count, perplexity


def make_book(K=20, D=4, decay=0.9, eps=1e-5, restart_threshold=0.0, seed=0) -> Codebook:
    torch.manual_seed(seed)
    book = Codebook(K, D, decay, eps, restart_threshold)
    book.cluster_size.uniform_(0.5, 2.0)
    book.embed_avg.copy_(book.weight * book.cluster_size[:, None])
    return book


def vectors(n, d=4, seed=1) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


class OneHot:
    """The textbook quantiser: N x K distances and one-hot matrix, moving averages, commitment loss."""

    def __init__(self, book: Codebook, beta: float):
        self.weight, self.size, self.avg = (b.clone() for b in (book.weight, book.cluster_size, book.embed_avg))
        self.decay, self.eps, self.beta = book.decay, book.eps, beta

    def step(self, z_BDHW: torch.Tensor):
        B, D, H, W = z_BDHW.shape
        flat = z_BDHW.permute(0, 2, 3, 1).reshape(-1, D)
        distance = (flat**2).sum(1, keepdim=True) - 2 * flat @ self.weight.t() + (self.weight**2).sum(1)
        indices = distance.argmin(1)
        hot = F.one_hot(indices, len(self.weight)).to(flat.dtype)
        quantised = hot @ self.weight
        loss = self.beta * ((flat - quantised) ** 2).mean()
        self.size = self.decay * self.size + (1 - self.decay) * hot.sum(0)
        self.avg = self.decay * self.avg + (1 - self.decay) * (hot.t() @ flat)
        n = self.size.sum()
        smoothed = (self.size + self.eps) / (n + len(self.size) * self.eps) * n
        self.weight = self.avg / smoothed[:, None]
        return quantised.view(B, H, W, D).permute(0, 3, 1, 2), indices.view(B, H, W), loss


# ----------------------------------------------------------------------------------- the same as the plain formulation


@pytest.mark.parametrize(
    ("decay", "eps", "beta"), [(0.99, 1e-5, 0.25), (0.9, 1e-5, 1.0), (0.5, 0.1, 0.1), (0.0, 1e-3, 2.0)]
)
def test_steps_equal_the_one_hot_formulation(decay, eps, beta):
    book = make_book(decay=decay, eps=eps).double()
    quantizer, plain = EMAQuantizer(book, beta).train(), OneHot(book, beta)
    for seed in range(6):
        z = vectors(2 * 4 * 3 * 5, 1, seed).view(2, 4, 3, 5).double()
        quantised, indices, loss = quantizer(z)
        expected_quantised, expected_indices, expected_loss = plain.step(z)
        assert torch.equal(indices, expected_indices)
        torch.testing.assert_close(quantised, expected_quantised)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(book.cluster_size, plain.size)
        torch.testing.assert_close(book.embed_avg, plain.avg)
        torch.testing.assert_close(book.weight, plain.weight)


def test_counts_and_sums_equal_the_one_hot_products():
    book = make_book(decay=0.0, eps=0.0)  # no memory: cluster_size are the counts, embed_avg the sums
    z, indices = vectors(1000), torch.arange(1000) ** 2 % 20
    book.update(z, indices)
    hot = F.one_hot(indices, 20).float()
    assert torch.equal(book.cluster_size, hot.sum(0))
    torch.testing.assert_close(book.embed_avg, hot.t() @ z)
    assert (book.cluster_size == 0).any()


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 4, 4), (5000,)])
def test_count_is_bincount(shape):
    indices = torch.randint(7, shape, generator=torch.Generator().manual_seed(2))
    expected = torch.bincount(indices.flatten(), minlength=9)
    assert torch.equal(count(indices, 9), expected) and expected.dtype == count(indices, 9).dtype


def test_evaluation_changes_nothing():
    book = make_book()
    before = {k: v.clone() for k, v in book.state_dict().items()}
    EMAQuantizer(book, 0.25).eval()(torch.randn(2, 4, 3, 3))
    assert all(torch.equal(v, before[k]) for k, v in book.state_dict().items())


def test_gradient_passes_straight_through_and_commitment_pulls_to_the_code():
    quantizer = EMAQuantizer(make_book().double(), 0.25).eval()
    z = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    quantised, indices, loss = quantizer(z)
    weights = torch.randn_like(quantised)
    (through,) = torch.autograd.grad((quantised * weights).sum(), z, retain_graph=True)
    torch.testing.assert_close(through, weights)
    (pull,) = torch.autograd.grad(loss, z)
    code = quantizer.lookup(indices).permute(0, 3, 1, 2)
    torch.testing.assert_close(pull, 0.25 * 2 * (z - code).detach() / z.numel())


# ------------------------------------------------------------------------------------------------------ nearest code


@pytest.mark.parametrize("codes", [2**13, 7, 1])
@pytest.mark.parametrize("at_once", [1, 20, 21, 100, 6000, 2**22])
def test_nearest_equals_brute_force_across_slices(monkeypatch, at_once, codes):
    monkeypatch.setattr(codebook_module, "CODES", {"cpu": codes})
    monkeypatch.setattr(codebook_module, "AT_LEAST", at_once)
    monkeypatch.setattr(codebook_module, "AT_MOST", {"cpu": at_once})
    book, z = make_book().double(), vectors(301).double()
    brute = torch.stack([(z - code).square().sum(1) for code in book.weight], dim=1).argmin(1)
    assert torch.equal(book.nearest(z), brute)
    assert torch.equal(book.nearest(z), torch.cdist(z, book.weight).argmin(1))


def test_nearest_of_no_vector():
    assert make_book().nearest(torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize("codes", [2**13, 5, 2])
def test_equally_near_codes_give_the_first(monkeypatch, codes):
    monkeypatch.setattr(codebook_module, "CODES", {"cpu": codes})
    book = make_book()
    book.weight[7] = book.weight[3]
    assert book.nearest(book.weight[7:8]).item() == 3


def test_least_equals_argmin_also_with_ties_infinities_and_nan():
    x = torch.randint(0, 5, (50, 3 * codebook_module.BLOCK)).float()  # every row has ties within and across blocks
    x[0], x[1, 100], x[2, 10:150:70], x[3] = torch.inf, -torch.inf, torch.nan, 7.0
    # PyTorch does not promise the first of equal values, so the reference is NumPy's, which does
    values, indices = torch.empty(50), torch.empty(50, dtype=torch.int64)
    codebook_module.least(x, values, indices)
    np.testing.assert_array_equal(indices.numpy(), x.numpy().argmin(1))
    np.testing.assert_array_equal(values.numpy(), x.numpy().min(1))


@pytest.mark.parametrize("K", [1, 63, 64, 65, 200])
def test_nearest_with_books_that_do_not_fill_their_last_block(K):
    book, z = make_book(K=K), vectors(77)
    assert torch.equal(book.nearest(z), torch.cdist(z, book.weight).argmin(1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_of_the_input_is_kept_and_changes_nothing(memory_format):
    z = vectors(2 * 3 * 5).view(2, 3, 5, 4).permute(0, 3, 1, 2)
    quantised, indices, loss = EMAQuantizer(make_book(), 0.25)(z.clone(memory_format=memory_format))
    assert quantised.is_contiguous(memory_format=memory_format)
    plain, plain_indices, plain_loss = EMAQuantizer(make_book(), 0.25)(z)
    assert torch.equal(quantised, plain) and torch.equal(indices, plain_indices) and torch.equal(loss, plain_loss)


class LargestTensor(TorchDispatchMode):
    """The most elements that any operator's result holds."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if torch.is_tensor(t)]
        self.elements = max([self.elements, *sizes])
        return out


def test_no_tensor_of_n_times_k_is_made(monkeypatch):
    monkeypatch.setattr(codebook_module, "AT_MOST", {"cpu": 2**14})
    N, K = 2048, 1024
    quantizer = EMAQuantizer(make_book(K=K, restart_threshold=0.1), 0.25).train()
    with LargestTensor() as largest:
        quantizer(vectors(N).view(2, 32, 32, 4).permute(0, 3, 1, 2))
    assert 2**13 < largest.elements <= 2**14
    assert largest.elements < N * K / 100


# ---------------------------------------------------------------------------------------------------------- precision


def test_bf16_autocast_changes_neither_codes_nor_statistics():
    # close codes, so that bfloat16 distances would choose others
    book = make_book(K=512, D=16)
    book.weight.mul_(0.05).add_(1.0)
    z = 1 + 0.05 * vectors(4 * 8 * 8, 16).view(4, 8, 8, 16).permute(0, 3, 1, 2)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 16)
    low = book.weight.square().sum(1) - 2 * (flat.bfloat16() @ book.weight.bfloat16().t()).float()
    assert (low.argmin(1) != book.nearest(flat)).any()
    results = []
    for enabled in (False, True):
        quantizer = EMAQuantizer(make_book(K=512, D=16), 0.25).train()
        quantizer.embedding.weight.copy_(book.weight)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            quantised, indices, loss = quantizer(z)
        assert quantised.dtype == loss.dtype == torch.float32
        results.append((quantised, indices, loss, *quantizer.embedding.state_dict().values()))
    for plain, autocast in zip(*results, strict=True):
        assert torch.equal(plain, autocast)


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_no_setting_of_products_changes_codes(precision):
    before = torch.backends.mkldnn.matmul.fp32_precision
    book, z = make_book(K=512, D=256), vectors(512, 256)
    plain = book.nearest(z)
    try:
        torch.backends.mkldnn.matmul.fp32_precision = precision  # as torch.set_float32_matmul_precision("medium")
        assert torch.equal(book.nearest(z), plain)
        assert torch.backends.mkldnn.matmul.fp32_precision == precision
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_stays_finite_over_many_updates(dtype):
    torch.manual_seed(0)
    quantizer = EMAQuantizer(Codebook(64, 8, 0.99, 1e-5, 0.0), 0.25).to(dtype).train()  # fresh: cluster sizes of zero
    for seed in range(300):
        quantised, _, loss = quantizer(vectors(64, 8, seed % 7).view(1, 8, 8, 8).to(dtype))
        assert quantised.dtype == dtype
        assert quantised.isfinite().all()
        assert loss.isfinite()
    for name, value in quantizer.embedding.state_dict().items():
        assert value.dtype == torch.float32
        assert value.isfinite().all(), name


# ------------------------------------------------------------------------------------------------------------ restart


def test_restart_moves_dead_codes_onto_input_vectors():
    book, z = make_book(K=20, decay=0.9, restart_threshold=0.5), vectors(64)
    dead = torch.tensor([2, 3, 11, 19])
    book.cluster_size[dead] = 0.01
    book.embed_avg[dead] = 0.01 * book.weight[dead]
    plain = make_book(K=20, decay=0.9)
    plain.load_state_dict(book.state_dict())
    indices = torch.tensor([0, 1, *range(4, 11), *range(12, 19)]).repeat(4)
    plain.update(z, indices)
    book.update(z, indices)
    assert (plain.cluster_size < 0.5).nonzero().flatten().tolist() == dead.tolist()
    alive = plain.cluster_size >= 0.5
    for name, value in book.state_dict().items():
        assert torch.equal(value[alive], plain.state_dict()[name][alive]), name
    # each sits on a vector of the batch, and on different ones
    on = (book.weight[dead][:, None] == z).all(2)
    assert on.any(1).all()
    assert len({row.nonzero()[0].item() for row in on}) == 4
    assert (book.cluster_size[dead] >= 0.5).all()
    torch.testing.assert_close(book.embed_avg[dead], book.weight[dead] * book.cluster_size[dead, None])


def test_a_restarted_code_stays_where_it_is_at_the_next_update():
    book, z = make_book(K=8, decay=0.99, eps=0.0, restart_threshold=0.1), vectors(64)
    book.cluster_size[5], book.embed_avg[5] = 0.0, 0.0
    book.update(z, torch.zeros(64, dtype=torch.int64))
    placed = book.weight[5].clone()
    book.update(z, torch.zeros(64, dtype=torch.int64))
    torch.testing.assert_close(book.weight[5], placed)


def test_restart_with_more_dead_codes_than_vectors():
    book, z = make_book(K=20, decay=0.0, restart_threshold=0.5), vectors(6)
    book.update(z, torch.zeros(6, dtype=torch.int64))  # nineteen codes die, six vectors can replace six of them
    on_input = (book.weight[:, None] == z).all(2).any(1)
    assert on_input.sum() == 6
    assert not on_input[0]
    for name, value in book.state_dict().items():
        assert value[on_input].isfinite().all(), name


def test_a_threshold_of_zero_never_restarts():
    book, z = make_book(K=20, decay=0.0, restart_threshold=0.0), vectors(64)
    book.update(z, torch.zeros(64, dtype=torch.int64))
    assert (book.cluster_size[1:] == 0).all()
    assert not (book.weight[:, None] == z).all(2).any()


# ----------------------------------------------------------------------------------------------------- initialisation


def test_initialise_takes_different_vectors_where_there_are_enough():
    book, z = make_book(K=20), vectors(64)
    book.initialise(z)
    on = (book.weight[:, None] == z).all(2)
    assert on.any(1).all()
    assert len({row.nonzero()[0].item() for row in on}) == 20
    assert (book.cluster_size == 1).all()
    assert torch.equal(book.embed_avg, book.weight)


def test_initialise_repeats_vectors_where_there_are_too_few():
    book, z = make_book(K=20), vectors(6)
    book.initialise(z)
    on = (book.weight[:, None] == z).all(2)
    assert on.any(1).all()
    assert sorted(on.sum(0).tolist()) == [3, 3, 3, 3, 4, 4]


def test_initialise_writes_in_place():
    book = make_book()
    places = {k: v.data_ptr() for k, v in book.state_dict().items()}
    book.initialise(vectors(6))
    book.update(vectors(6), torch.arange(6))
    assert {k: v.data_ptr() for k, v in book.state_dict().items()} == places


def test_is_fresh_until_the_first_update_or_initialisation():
    for change in (lambda b: b.initialise(vectors(6)), lambda b: b.update(vectors(6), torch.arange(6))):
        book = Codebook(20, 4, 0.9, 1e-5, 0.0)
        assert book.is_fresh
        change(book)
        assert not book.is_fresh


# --------------------------------------------------------------------------------------------------------- perplexity


def test_perplexity():
    counts = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0], [1, 2, 3, 4]])
    entropy = -sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4))
    expected = torch.tensor([4.0, 1.0, 2.0, math.exp(entropy)], dtype=torch.float64)
    torch.testing.assert_close(perplexity(counts), expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(perplexity(counts[3]), expected[3], rtol=1e-8, atol=0)
    # the original's eps: a single code in use gives just under 1
    assert perplexity(counts[1]).item() == pytest.approx(0.9999999999, rel=1e-15)
