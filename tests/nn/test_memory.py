"""A network that cannot fit is refused before it takes any memory; one that fits never is."""

from __future__ import annotations

import pytest
import torch

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.config import PRESETS, AugVAEConfig, BiARTConfig, ConfigError
from latent_verse.nn import memory
from tests.messages import naming

SHAPES = [
    *((BiART, BiARTConfig(**size)) for size in PRESETS.values()),
    (BiART, BiARTConfig(n_layer=1, n_head=1, n_embd=8, text_vocab=1, image_vocab=1)),
    (AugVAE, AugVAEConfig()),
    (
        AugVAE,
        AugVAEConfig(hidden_dim=32, ch_mult=(1,), resolution=8, attn_resolutions=(8,), z_channels=1, num_tokens=1),
    ),
    (AugVAE, AugVAEConfig(hidden_dim=32, num_tokens=2**20, codebook_dim=8)),
]


@pytest.mark.parametrize(("network", "config"), SHAPES, ids=str)
def test_the_least_weights_are_no_more_than_there_are(network, config):
    with torch.device("meta"):
        built = network(config)
    weights = sum(t.numel() for t in (*built.parameters(), *built.buffers()))
    assert weights / 50 < config.least_weights <= weights


@pytest.mark.parametrize(
    ("network", "config"),
    [
        (BiART, BiARTConfig(n_layer=1024, n_head=1, n_embd=65536)),
        (BiART, BiARTConfig(text_vocab=2**24, n_embd=65536, n_head=1)),
        (AugVAE, AugVAEConfig(num_tokens=2**24, codebook_dim=65536)),
        (AugVAE, AugVAEConfig(hidden_dim=2**14, ch_mult=(1, 2, 1024))),
    ],
    ids=str,
)
def test_a_network_larger_than_the_machine_is_one_line(network, config, monkeypatch):
    monkeypatch.setattr(memory, "machine_bytes", lambda: 2**40)  # whatever machine this is
    with pytest.raises(ConfigError, match=naming(network.__name__, "GiB", "1,024")) as caught:
        network(config)
    assert "\n" not in str(caught.value)


def test_this_machine_has_memory():
    assert 2**28 < memory.machine_bytes() < 2**50
