"""Two gloo processes on the CPU: one codebook, equal gradients, the same result as one process on the joined batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from latent_verse.augvae.model import AugVAE
from latent_verse.augvae.quantizer import Codebook
from tests.two_processes import in_two_processes

STEPS = 3
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


def batch(step: int) -> torch.Tensor:
    """The joined batch of a step: four images, of which each process gets two."""
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64) * 2 - 1


def train(module: nn.Module, model: AugVAE, images) -> dict[str, torch.Tensor]:
    """Some SGD steps; returns the state and the last gradients. SGD: AdamW would blow up rounding of tiny gradients."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(STEPS):
        x = images(step)
        optimizer.zero_grad()
        reconstruction, embed_loss, _ = module(x)
        ((reconstruction - x).square().mean() + embed_loss).backward()
        optimizer.step()
    gradients = {f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {k: v.clone() for k, v in model.state_dict().items()} | gradients


def train_part(rank: int, model: AugVAE) -> dict[str, torch.Tensor]:
    # strict: DDP stops at the second step where a parameter had no gradient
    module = DistributedDataParallel(model, find_unused_parameters=False, broadcast_buffers=False)
    return train(module, model, lambda step: batch(step)[rank * 2 : rank * 2 + 2])


@pytest.mark.parametrize(
    ("single_level", "use_attn"), [(None, False), (8, False), (4, False), (2, False), (None, True), (4, True)]
)
def test_two_processes_equal_one_on_the_joined_batch(tiny_augvae, tmp_path, single_level, use_attn):
    model = tiny_augvae(single_level=single_level, use_attn=use_attn).double().train()
    before = model.quantizer.embedding.weight.clone()
    first, second = in_two_processes(tmp_path, train_part, copy.deepcopy(model))
    joined = train(model, model, batch)
    assert first.keys() == second.keys() == joined.keys()
    for name in joined:
        assert torch.equal(first[name], second[name]), f"{name} differs between the processes"
        torch.testing.assert_close(first[name], joined[name], rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.allclose(model.quantizer.embedding.weight, before, rtol=1e-2)


def uneven_codebook(rank: int, threshold: float, initialise: bool) -> dict[str, torch.Tensor]:
    """The processes' random states and vectors differ."""
    torch.manual_seed(0)
    book = Codebook(40, 4, 0.5, 1e-5, threshold)
    torch.manual_seed(100 + rank)
    if initialise:
        book.initialise(torch.randn(64, 4) + 10 * rank)
    states = {"initial": book.weight.clone()}
    for _ in range(STEPS):
        z = torch.randn(64, 4) + 10 * rank
        book.update(z, book.nearest(z))
    return states | {k: v.clone() for k, v in book.state_dict().items()}


@pytest.mark.parametrize("initialise", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_initialisation_and_restart_are_the_same_on_both(tmp_path, threshold, initialise):
    first, second = in_two_processes(tmp_path, uneven_codebook, threshold, initialise)
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs between the processes"
    # both processes' vectors (means 0 and 10) are sampled from
    if initialise:
        assert 0 < (first["initial"].mean(1) > 5).sum() < 40
    if initialise or threshold:
        assert 0 < (first["weight"].mean(1) > 5).sum() < 40


def initialise_model(rank: int, model: AugVAE) -> dict[str, torch.Tensor]:
    torch.manual_seed(rank)
    model.initialise_codebook(batch(0)[rank * 2 : rank * 2 + 2])
    return {k: v.clone() for k, v in model.quantizer.embedding.state_dict().items()}


def test_initialising_a_model_gives_one_codebook(tiny_augvae, tmp_path):
    model = tiny_augvae().double()
    first, second = in_two_processes(tmp_path, initialise_model, model)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert not torch.equal(first["weight"], model.quantizer.embedding.weight)
