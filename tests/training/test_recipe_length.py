"""The tiny recipes take as many steps from few images as from many, and their schedule ends with the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from latent_verse.augvae.model import AugVAE
from latent_verse.config.cli import parse
from latent_verse.config.train import ImageDataConfig, TrainBiARTConfig, TrainVAEConfig
from latent_verse.config.train_rules import resolve_train_biart, resolve_train_vae
from latent_verse.data.datasets import open_images
from latent_verse.data.modules import ImageDataModule
from latent_verse.training.augvae import LitAugVAE
from latent_verse.training.backups import RunFolder
from latent_verse.training.runs import Run
from latent_verse.training.trainer import make_trainer

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = {"tiny_augvae_ml": 300, "tiny_augvae_sl": 300, "tiny_biart": 1000}


class Steps(LitAugVAE):
    """Takes steps that compute nothing, and notes the learning rate of each."""

    def on_train_start(self):
        self.rates = []

    def training_step(self, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return {"loss": 0 * next(self.model.parameters()).sum()}

    def on_train_epoch_end(self):
        pass


def read(name):
    """A shipped recipe, as its command reads it."""
    kind, resolve = (
        (TrainBiARTConfig, resolve_train_biart) if name == "tiny_biart" else (TrainVAEConfig, resolve_train_vae)
    )
    return resolve(*parse(kind, ["--config", str(CONFIGS / f"{name}.yaml")], ""))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 400 images; its folder `few` has 40 of them."""
    root = tmp_path_factory.mktemp("images")
    (root / "few").mkdir()
    for i in range(400):
        Image.new("RGB", (4, 4), (i % 256, i // 2, 0)).save(root / ("few" if i < 40 else "") / f"{i}.png")
    return root


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("images", [40, 400])
def test_a_tiny_recipe_takes_the_same_steps_from_few_images_and_from_many(name, images, folder):
    config = read(name)
    place = str(folder / "few") if images == 40 else str(folder)
    sizes = {name: getattr(config.data, name) for name in ("dataset_size", "batch_size")}
    data = ImageDataConfig(dataset="flat", train_dir=place, num_workers=0, **sizes)
    loader = ImageDataModule(open_images(data, 4), data).train_dataloader()
    assert len(loader) * config.trainer.epochs == STEPS[name]
    assert config.trainer.max_steps == -1 and config.trainer.limit_train_batches is None
    seen = {tuple(x.flatten().tolist()) for batch in loader for x in batch[0]}
    assert len(seen) == images  # an epoch of it shows all


def test_a_run_on_40_images_takes_these_steps_and_its_rate_ends_at_zero(folder, tmp_path):
    config = read("tiny_augvae_ml")
    data = replace(config.data, dataset="flat", train_dir=str(folder / "few"), val_dir=None, num_workers=0)
    shape = {"hidden_dim": 32, "ch_mult": (1,), "resolution": 4, "attn_resolutions": (4,), "num_tokens": 8}
    config = replace(config, data=data, model=replace(config.model, **shape))
    config = replace(config, trainer=replace(config.trainer, backup=False, log_images=False, gpus=0, refresh_rate=0))
    module = Steps(AugVAE(config.model), config)
    t = replace(config.trainer, logger="csv")
    trainer = make_trainer(t, RunFolder(Run(tmp_path / "run", "0"), config))
    trainer.fit(module, datamodule=ImageDataModule(open_images(data, 4), data))
    assert trainer.global_step == len(module.rates) == STEPS["tiny_augvae_ml"]
    peak = config.optim.learning_rate * config.data.batch_size
    assert max(module.rates) == pytest.approx(peak)
    assert module.rates.index(max(module.rates)) == config.optim.warmup_steps
    assert 0 <= module.rates[-1] < 1e-3 * peak
    assert torch.tensor(module.rates[config.optim.warmup_steps :]).diff().le(0).all()
