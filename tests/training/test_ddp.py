"""Two gloo processes on the CPU: one codebook, equal gradients, the same result as one process on the joined batch."""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from latent_verse.augvae.model import AugVAE
from latent_verse.augvae.quantizer import Codebook
from latent_verse.biart.model import BiART
from latent_verse.biart.sequence import DIRECTIONS, MODALITIES
from latent_verse.config.train import TrainBiARTConfig, TrainerConfig, TrainVAEConfig
from latent_verse.training.augvae import LitAugVAE
from latent_verse.training.backups import RunFolder, in_any_process
from latent_verse.training.biart import LitBiART
from latent_verse.training.runs import Run
from latent_verse.training.trainer import before_compiling, make_trainer
from tests.biart.tiny_biart import CONFIG
from tests.two_processes import WORLD, in_two_processes

STEPS = 3
slow = pytest.mark.slow
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
    ("single_level", "use_attn"),
    [
        (None, False),
        (4, True),
        *(pytest.param(*case, marks=slow) for case in [(8, False), (4, False), (2, False), (None, True)]),
    ],
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


class Watched(pl.Callback):
    """Notes barriers inside and outside of training batches, and the shares of tokens that a step uses."""

    def __init__(self):
        self.barriers, self.inside, self.shares = {"in a batch": 0, "between batches": 0}, False, []
        barrier = dist.barrier

        def counted(*args, **kwargs):
            self.barriers["in a batch" if self.inside else "between batches"] += 1
            return barrier(*args, **kwargs)

        dist.barrier = counted  # in a process of its own

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.inside = True

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.inside = False


def run_with_lightning(rank: int, folder: str, vae: AugVAE, stage: str) -> dict:
    """Four steps and a validation of a run as the programs make it, as one of two processes of torchrun."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "0", "LOCAL_WORLD_SIZE": str(WORLD), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    watch = Watched()
    t = TrainerConfig(gpus=WORLD, accelerator="cpu", max_steps=4, log_every_n_steps=1, logger="csv", refresh_rate=0)
    torch.manual_seed(rank)
    images, text = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randint(0, CONFIG.text_vocab, (2, CONFIG.text_len))
    if stage == "augvae":
        config = TrainVAEConfig(model=vae.config, trainer=t)
        config = replace(config, optim=replace(config.optim, codebook_init="data"))
        module, batch = LitAugVAE(vae, config), [images]
    else:
        config, batch = TrainBiARTConfig(trainer=t), [torch.randint(0, CONFIG.image_vocab, (2, CONFIG.image_len)), text]
        batch[1][:, 1 + 2 * rank :] = CONFIG.text_vocab + CONFIG.image_vocab  # pads: one rank has fewer words
        module = LitBiART(BiART(CONFIG), vae, config, {})
        share = module.token_share

        def noted(sequences):
            watch.inside = False  # for Lightning's reduction, to compare with
            expected = sequences.counted() / module.trainer.strategy.reduce(sequences.counted(), reduce_op="mean")
            watch.inside = True
            found = share(sequences)
            shares = [found[f"{d}/{m}"].item() for d in DIRECTIONS for m in MODALITIES]
            watch.shares.append(shares == expected.flatten().tolist())
            return found

        module.token_share = noted
    trainer = make_trainer(t, RunFolder(Run(folder, "0"), config), more=[watch])
    loader = torch.utils.data.DataLoader([batch] * 2, batch_size=None)
    trainer.fit(module, loader, loader)
    torch._dynamo.config.optimize_ddp = True
    before_compiling()
    told = [in_any_process(rank == 1, torch.device("cpu")), in_any_process(False, torch.device("cpu"))]
    whole = torch._dynamo.config.optimize_ddp is False
    return {"steps": trainer.global_step, "shares": watch.shares, "told": told, "whole": whole, **watch.barriers}


@pytest.mark.parametrize("stage", [pytest.param("augvae", marks=slow), "biart"])
def test_no_barrier_in_a_training_step(tiny_augvae, tmp_path, stage):
    """And what takes its place gives the same: shares of tokens, a signal that one process had."""
    for found in in_two_processes(tmp_path, run_with_lightning, tmp_path / "run", tiny_augvae(), stage):
        assert found["steps"] == 4 and found["in a batch"] == 0 and found["between batches"] > 0
        assert found["shares"] == [True] * (4 if stage == "biart" else 0)
        assert found["told"] == [True, False]
        assert found["whole"]  # DDP does not cut what is compiled


def test_a_single_process_leaves_the_setting_of_ddp_alone():
    with torch._dynamo.config.patch(optimize_ddp=True):
        before_compiling()
        assert torch._dynamo.config.optimize_ddp is True
