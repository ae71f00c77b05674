"""Configurations as the programs resolve them."""

from __future__ import annotations

from pathlib import Path

from latent_verse.config.cli import parse
from latent_verse.config.train import EvalVAEConfig, ImageDataConfig, TrainerConfig, TrainVAEConfig
from latent_verse.config.train_rules import resolve_data, resolve_eval_vae, resolve_train_vae, resolve_trainer

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(p for p in (ROOT / "configs").glob("*.yaml") if p.name.startswith(("imagenet_augvae", "tiny_augvae")))


def train(*argv: str) -> TrainVAEConfig:
    """As train_vae.py: parsed and checked. Images are given, so that nothing else is wrong."""
    config, given = parse(TrainVAEConfig, ["--train_dir", "somewhere", *argv], "")
    return resolve_train_vae(config, given)


def evaluate(*argv: str) -> EvalVAEConfig:
    config, _ = parse(EvalVAEConfig, ["--ckpt_path", "a.ckpt", "--val_dir", "somewhere", *argv], "")
    return resolve_eval_vae(config)


def trainer(**settings) -> TrainerConfig:
    return resolve_trainer(TrainerConfig(**settings))


def data(resolution=256, **settings) -> ImageDataConfig:
    return resolve_data(ImageDataConfig(**settings), resolution)
