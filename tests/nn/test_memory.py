"""A network that cannot fit is refused before it takes any memory; one that fits never is."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
        (AugVAE, AugVAEConfig(hidden_dim=2**13, ch_mult=(1,), resolution=2**14, attn_resolutions=(2**14,))),
    ],
    ids=str,
)
def test_a_network_larger_than_the_machine_is_one_line(network, config, monkeypatch):
    monkeypatch.setattr(memory, "machine_bytes", lambda: 2**40)  # whatever machine this is
    with pytest.raises(ConfigError, match=naming(network.__name__, "GiB", "1,024")) as caught:
        network(config)
    assert "\n" not in str(caught.value)


def most_alive(run) -> int:
    """The numbers in all tensors that were made by `run` and were alive together, on the meta device."""
    alive: dict[int, int] = {}
    most = 0

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            out = func(*args, **(kwargs or {}))
            for tensor in (t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)):
                storage = tensor.untyped_storage()
                if storage._cdata not in alive:
                    alive[storage._cdata] = storage.nbytes() // 4
                    weakref.finalize(storage, alive.pop, storage._cdata, None)
            most = max(most, sum(alive.values()))
            return out

    with Counted(), torch.no_grad(), torch.device("meta"):
        run()
    return most


@pytest.mark.parametrize(
    "shape", [{}, {"ch_mult": (4, 2)}, {"ch_mult": (1, 1, 8), "hidden_dim": 64}, {"norm": "pixel"}]
)
def test_the_least_features_are_no_more_than_there_are(shape):
    shape = {"hidden_dim": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "resolution": 64, "z_channels": 8} | shape
    level = shape["resolution"] // 2 ** (len(shape["ch_mult"]) - 1)
    with torch.device("meta"):
        model = AugVAE(AugVAEConfig(**shape, attn_resolutions=(level,), num_tokens=8, codebook_dim=8)).eval()
        x_BCHW = torch.empty(1, 3, 64, 64)
    assert model.config.least_features <= most_alive(lambda: model.features(x_BCHW)) < 4 * model.config.least_features


def test_feature_maps_may_be_in_a_larger_gpu(monkeypatch):
    monkeypatch.setattr(memory, "machine_bytes", lambda: 2**20)
    monkeypatch.setattr(memory, "_gpu_bytes", lambda: 2**30)
    memory.check_memory("maps", 2**28, "resolution", on_gpu=True)
    for numbers, on_gpu in ((2**28 + 1, True), (2**28, False)):
        with pytest.raises(ConfigError, match=naming("maps", "resolution", "GiB")):
            memory.check_memory("maps", numbers, "resolution", on_gpu)


def test_this_machine_has_memory():
    assert 2**28 < memory.machine_bytes() < 2**50
