"""Activation checkpointing: the same gradients, less kept, and no product made twice, eager and compiled."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from benchmarks.biart import sequences_of
from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART, loss_weights
from latent_verse.config import BiARTConfig
from latent_verse.config.train import TrainBiARTConfig, TrainerConfig, TrainVAEConfig, VAELossConfig
from latent_verse.nn.activation_checkpointing import ActivationCheckpointing, checkpoint_activations
from latent_verse.training.augvae import LitAugVAE
from latent_verse.training.biart import LitBiART
from tests.fake_cuda import Kept

BIART = {"text_vocab": 20, "image_vocab": 12, "text_len": 3, "image_len": 8, "n_layer": 2, "n_head": 2, "n_embd": 32}
NETWORKS = pytest.mark.parametrize("kind", ["augvae", "augvae-pixel-dropout", "biart"])


@pytest.fixture
def make(tiny_config):
    """Makes a network in training mode, always with the same weights, and a function that computes its loss.

    `again`: with activation checkpointing.
    """

    def make_(kind: str, again: bool):
        model, loss = bare(kind)
        if again:
            checkpoint_activations(model)
        return model, loss

    def bare(kind: str):
        torch.manual_seed(0)
        if kind == "biart":
            model = BiART(BiARTConfig(**BIART, resid_pdrop=0.1)).train()
            sequences = sequences_of(model, 4, "cpu")
            return model, lambda: model.loss(sequences, loss_weights(0.1))[0]
        changes = {"norm": "pixel", "dropout": 0.3} if kind.endswith("dropout") else {"use_attn": True}
        model = AugVAE(tiny_config(**changes)).train()
        x_BCHW = torch.rand(2, 3, 16, 16) * 2 - 1

        def loss():
            reconstruction, embed_loss, _ = model(x_BCHW)
            return (reconstruction - x_BCHW).square().mean() + embed_loss

        return model, loss

    return make_


def blocks(model: nn.Module) -> list[nn.Module]:
    """What training compiles."""
    return list(model.blocks) if isinstance(model, BiART) else [*model.encoders, *model.decoders]


@NETWORKS
def test_loss_and_gradients_are_the_same(make, kind):
    results = []
    for again in (False, True):
        model, loss = make(kind, again)
        torch.manual_seed(1)  # of dropout
        value = loss()
        value.backward()
        results.append([value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@NETWORKS
def test_less_is_kept(make, kind):
    kept = []
    for again in (False, True):
        model, loss = make(kind, again)
        with Kept(model) as count:
            loss()
        kept.append(count.bytes)
    assert kept[1] < 0.75 * kept[0]


@pytest.mark.slow
@NETWORKS
def test_compiled_training_makes_no_product_twice(make, kind):
    counts = []
    for again in (False, True):
        model, loss = make(kind, again)
        made: Counter[str] = Counter()

        def count(graph, inputs, made=made):
            for node in graph.graph.nodes:
                name = str(node.target).removeprefix("aten.").removesuffix(".default")
                if node.op == "call_function" and name in ("mm", "addmm", "bmm", "convolution", "convolution_backward"):
                    made[name] += 1
            return graph

        backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
        torch._dynamo.reset()
        for block in blocks(model):
            block.compile(backend=backend, dynamic=False)
        loss().backward()
        products = Counter(made)
        with Kept(model) as kept:
            loss()
        counts.append((products, kept.bytes))
    (plain, held), (again, held_again) = counts
    assert plain == again and sum(plain.values()) > 10
    assert held_again < held


def test_nothing_is_recomputed_without_gradients(make, monkeypatch):
    _, loss = make("augvae", again=True)
    monkeypatch.setattr("latent_verse.nn.activation_checkpointing.checkpoint", None)
    with torch.no_grad():
        loss()


@pytest.mark.parametrize("asked", [False, True])
def test_the_setting_reaches_the_networks(tiny_config, asked):
    t = TrainerConfig(activation_checkpointing=asked, compile=False)
    vae = AugVAE(tiny_config())
    modules = [
        LitAugVAE(vae, TrainVAEConfig(model=vae.config, loss=VAELossConfig(loss_type="mse"), trainer=t)),
        LitBiART(BiART(BiARTConfig(**BIART)), AugVAE(tiny_config()), TrainBiARTConfig(trainer=t), {}),
    ]
    for module in modules:
        module.configure_model()
        parts = [m for m in module.model.modules() if isinstance(m, ActivationCheckpointing)]
        assert parts and all(m.activation_checkpointing is asked for m in parts)
