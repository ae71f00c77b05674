#!/usr/bin/env python3
"""Train AugVAE-ML and -SL of the released size for a few hundred steps in fp32 and bf16; check that the loss falls.

Prints images/s and peak memory of each, on real images (--train_dir, any folder) or fake ones. The GPU check:

    python benchmarks/train_augvae.py --train_dir images --json benchmarks/results/train_augvae_h200.json

On a CPU, give a small shape: --config configs/tiny_augvae_ml.yaml --steps 20 --batch_size 4.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytorch_lightning as pl
import torch

from latent_verse.augvae.model import AugVAE
from latent_verse.config.cli import parse
from latent_verse.config.train import PRECISIONS, TrainVAEConfig
from latent_verse.config.train_rules import resolve_train_vae
from latent_verse.data.datasets import open_images
from latent_verse.data.modules import ImageDataModule
from latent_verse.training.augvae import LitAugVAE

WARM_UP = 10  # steps before the clock starts


class Watch(pl.Callback):
    """Losses of all steps, and the time after the warm-up."""

    def __init__(self):
        self.losses: list[torch.Tensor] = []
        self.begin = self.end = 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach().float())
        if trainer.global_step in (WARM_UP, trainer.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.begin, self.end = (time.perf_counter(), 0.0) if not self.begin else (self.begin, time.perf_counter())


def measure(config: TrainVAEConfig, single_level: int | None, precision: str, steps: int) -> dict:
    """Train once; images/s, peak memory in MiB (CUDA) and the mean loss of the first and last tenth."""
    pl.seed_everything(config.trainer.seed, verbose=False)
    model = AugVAE(config.model)
    model = model.to_single_level(single_level) if single_level else model
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            precision=PRECISIONS.get(precision, precision),
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
            default_root_dir=folder,
            benchmark=True,
            callbacks=[watch],
        )
        data = ImageDataModule(open_images(config.data, config.model.resolution), config.data)
        trainer.fit(LitAugVAE(model, config), datamodule=data)
    losses = torch.stack(watch.losses).cpu()
    tenth = max(1, steps // 10)
    return {
        "model": f"SL-{single_level}" if single_level else "ML",
        "precision": precision,
        "images_per_second": (steps - WARM_UP) * config.data.batch_size / (watch.end - watch.begin),
        "peak_memory_mib": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None,
        "first_loss": losses[:tenth].mean().item(),
        "last_loss": losses[-tenth:].mean().item(),
        "finite": bool(losses.isfinite().all()),
    }


def main(argv: list[str] | None = None) -> int:
    """Run all, print a table; 1 if a loss is not finite or has not fallen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/imagenet_augvae_ml.yaml")
    parser.add_argument("--train_dir", help="any folder of images; default fake ones")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--precisions", nargs="+", default=["32", "bf16"])
    parser.add_argument("--json", type=Path)
    args, more = parser.parse_known_args(argv)
    data = ["--dataset", "flat", "--train_dir", args.train_dir] if args.train_dir else ["--fake_data"]
    flags = ["--config", args.config, "--loss_type", "mse", "--learning_rate", "2.5e-5", *data, *more]
    config, given = parse(TrainVAEConfig, flags, "")
    config = resolve_train_vae(config, given)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rows = []
    for single, precision in itertools.product((None, config.model.attn_resolutions[1]), args.precisions):
        row = measure(config, single, precision, args.steps)
        rows.append(row)
        memory = "" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f} MiB"
        fell = f"loss {row['first_loss']:.4f} -> {row['last_loss']:.4f}"
        print(f"{row['model']:<6} {precision:<6} {row['images_per_second']:8.1f} images/s  {memory:>10}  {fell}")
    if args.json:
        about = {
            "device": device,
            "torch": torch.__version__,
            "batch_size": config.data.batch_size,
            "steps": args.steps,
        }
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    good = all(r["finite"] and r["last_loss"] < r["first_loss"] and math.isfinite(r["last_loss"]) for r in rows)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
