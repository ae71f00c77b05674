"""--deterministic: training uses no operator that PyTorch then refuses on a GPU, and on a CPU no number changes."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.biart.sampling import generate
from latent_verse.biart.sequence import TEXT_TO_IMAGE
from latent_verse.config.train import (
    BiARTLossConfig,
    BiARTOptimConfig,
    ImageDataConfig,
    TrainBiARTConfig,
    TrainerConfig,
    TrainVAEConfig,
    VAELossConfig,
    VAEOptimConfig,
)
from latent_verse.training.augvae import LitAugVAE
from latent_verse.training.biart import LitBiART
from tests.biart.tiny_biart import CONFIG

# What torch.use_deterministic_algorithms may name as raising an error on CUDA, and the operators that it is about.
RAISING = {
    "torch.nn.AvgPool3d": {"avg_pool3d_backward"},
    "torch.nn.AdaptiveAvgPool2d": {"_adaptive_avg_pool2d_backward"},
    "torch.nn.AdaptiveAvgPool3d": {"_adaptive_avg_pool3d_backward"},
    "torch.nn.MaxPool3d": {"max_pool3d_with_indices_backward"},
    "torch.nn.AdaptiveMaxPool2d": {"adaptive_max_pool2d_backward"},
    "torch.nn.FractionalMaxPool2d": {"fractional_max_pool2d_backward"},
    "torch.nn.FractionalMaxPool3d": {"fractional_max_pool3d_backward"},
    **{f"torch.nn.MaxUnpool{n}d": {f"max_unpool{max(n, 2)}d"} for n in (1, 2, 3)},
    "torch.nn.functional.interpolate": {
        *(f"upsample_{mode}_backward" for mode in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")),
        *(f"_upsample_{mode}_aa_backward" for mode in ("bilinear2d", "bicubic2d")),
    },
    **{f"torch.nn.ReflectionPad{n}d": {f"reflection_pad{n}d_backward"} for n in (1, 2, 3)},
    **{f"torch.nn.ReplicationPad{n}d": {f"replication_pad{n}d_backward"} for n in (1, 2, 3)},
    "torch.nn.NLLLoss": {"nll_loss2d_forward"},  # of images; that of rows sums nothing twice
    "torch.nn.CTCLoss": {"_ctc_loss_backward", "_cudnn_ctc_loss"},
    "torch.nn.EmbeddingBag": {"_embedding_bag"},
    "torch.Tensor.put_": {"put_", "put"},
    "torch.histc": {"histc"},
    "torch.bincount": {"bincount"},
    "torch.kthvalue": {"kthvalue"},
    "torch.median": {"median", "nanmedian"},
    "torch.cumsum": set(),  # which has had a fixed order since PyTorch 2.6, though the documentation said so later
    "torch.nn.functional.grid_sample": {"grid_sampler_2d_backward", "grid_sampler_3d_backward"},
    "torch.Tensor.scatter_reduce": {"scatter_reduce", "scatter_reduce_"},
    "torch.Tensor.resize_": set(),  # of quantized tensors
}


def refused() -> set[str]:
    """The operators that this PyTorch refuses on CUDA, by its documentation."""
    listed = torch.use_deterministic_algorithms.__doc__.split("normally-nondeterministic operations will throw")[
        1
    ].split("In addition")[0]
    names = set(re.findall(r":(?:class|func):`([\w.]+)`", listed)) - {"RuntimeError"}
    assert len(names) > 15 and names <= RAISING.keys(), names - RAISING.keys()
    return set().union(*(RAISING[name] for name in names))


class Operators(TorchDispatchMode):
    """The names of all operators that run inside, of backward passes as well."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def fit(module: pl.LightningModule, batch: list[torch.Tensor], deterministic: bool) -> dict[str, torch.Tensor]:
    """The weights after two steps and a validation."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps")
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, deterministic=deterministic, **dict.fromkeys(quiet, False))
    loader = torch.utils.data.DataLoader([batch] * 2, batch_size=None)
    try:
        torch.manual_seed(0)
        trainer.fit(module, loader, loader)
    finally:
        torch.use_deterministic_algorithms(False)
    return {name: value.clone() for name, value in module.state_dict().items()}


def augvae(tiny_config, **loss) -> tuple[LitAugVAE, list[torch.Tensor]]:
    model = tiny_config(restart_threshold=0.1, use_attn=True)
    config = TrainVAEConfig(model=model, data=ImageDataConfig(fake_data=True), loss=VAELossConfig(**loss))
    config = replace(config, optim=VAEOptimConfig(codebook_init="data", optimizer="muon", lr_decay=True))
    torch.manual_seed(0)
    return LitAugVAE(AugVAE(model), config), [torch.rand(3, 3, 16, 16) * 2 - 1]


def biart() -> tuple[LitBiART, list[torch.Tensor]]:
    config = TrainBiARTConfig(
        loss=BiARTLossConfig(word_dropout=0.2, code_dropout=0.2, reference_dropout=0.5),
        optim=BiARTOptimConfig(optimizer="muon", ema_decay=0.9),
        trainer=TrainerConfig(activation_checkpointing=True),
    )
    torch.manual_seed(0)
    model = BiART(replace(CONFIG, pos_by_modality=True, embd_pdrop=0.1, resid_pdrop=0.1, attn_pdrop=0.1))
    codes = torch.randint(0, CONFIG.image_vocab, (4, CONFIG.image_len))
    return LitBiART(model, torch.nn.Identity(), config, {}), [codes, model.vocab.pad_text([[1, 2], [3], [], [4] * 5])]


@pytest.mark.filterwarnings("ignore:LPIPS values mean nothing")
def test_augvae_needs_no_operator_that_is_refused_on_a_gpu(tiny_config):
    module, batch = augvae(tiny_config, loss_type="lpips_l1")
    with Operators() as seen:
        fit(module, batch, deterministic=True)
    assert {"convolution_backward", "native_group_norm_backward", "index_add_", "max_pool2d_with_indices"} <= seen.names
    assert not seen.names & refused()


def test_biart_needs_no_operator_that_is_refused_on_a_gpu():
    module, batch = biart()
    with Operators() as seen:
        fit(module, batch, deterministic=True)
        module.eval()  # as for the samples of a run
        generate(module.network, batch[1], TEXT_TO_IMAGE, seed=0, top_k=9, top_p=0.9, guidance=2.0)
    assert {"nll_loss_backward", "embedding_dense_backward", "native_layer_norm_backward"} <= seen.names
    assert not seen.names & refused()


def test_on_a_cpu_it_changes_no_number(tiny_config):
    for make in (lambda: augvae(tiny_config), biart):
        plain, same = (fit(*make(), deterministic=deterministic) for deterministic in (False, True))
        assert plain.keys() == same.keys()
        assert all(torch.equal(plain[name], same[name]) for name in plain)
