"""Runs of a tiny BiART by the Trainer of the programs, on batches in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from latent_verse.biart.model import BiART
from latent_verse.checkpoints.ckpt_files import read_ckpt
from latent_verse.config.train import TrainBiARTConfig, TrainerConfig
from latent_verse.training.backups import Backup, RunFolder
from latent_verse.training.biart import LitBiART
from latent_verse.training.runs import Run
from latent_verse.training.trainer import make_trainer
from tests.biart.tiny_biart import CONFIG

ROWS = 2  # of each batch
TOKENS = ROWS * (CONFIG.text_len + CONFIG.image_len + 1)  # that the network reads of it


class Batches(torch.utils.data.DataLoader):
    """A loader that resumes where it was."""

    def __init__(self, batches: list):
        super().__init__(batches, batch_size=None)
        self.done = 0

    def __iter__(self):
        for number in range(self.done % len(self.dataset), len(self.dataset)):
            self.done = number + 1
            yield self.dataset[number]

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class StopAt(Backup):
    """Saves and stops after this step, as at a signal."""

    def __init__(self, folder: RunFolder, step: int):
        super().__init__(folder, None)
        self.step = step

    def on_train_batch_end(self, trainer, module, *rest) -> None:
        self.told_to_stop = trainer.global_step == self.step
        super().on_train_batch_end(trainer, module, *rest)


def run(place: Path, steps: int, start_from: Path | None = None, stop_at: int = 0, more=(), val: int = 2, **settings):
    """Train for epochs of so many batches, and validate on `val`; returns the Trainer.

    Raises:
        Interrupted: after the step `stop_at`, whose state is in <place>/backups.
    """
    torch.manual_seed(0)
    t = TrainerConfig(gpus=0, logger="csv", num_sanity_val_steps=0, **settings)
    config = replace(TrainBiARTConfig(trainer=t), loss=replace(TrainBiARTConfig().loss, reference_dropout=0.0))
    module = LitBiART(BiART(CONFIG), torch.nn.Identity(), config, {})
    draw = torch.Generator().manual_seed(0)
    batches = [
        [
            torch.randint(0, CONFIG.image_vocab, (ROWS, CONFIG.image_len), generator=draw),
            torch.randint(0, 5, (ROWS, CONFIG.text_len), generator=draw),
        ]
        for _ in range(steps + val)
    ]
    folder = RunFolder(Run(place, "0"), config)
    more = [*more, *([StopAt(folder, stop_at)] if stop_at else [])]
    trainer = make_trainer(t, folder, more, read_ckpt(start_from)["global_step"] if start_from else 0)
    loaders = Batches(batches[:steps]), torch.utils.data.DataLoader(batches[steps:], batch_size=None) if val else None
    trainer.fit(module, *loaders, ckpt_path=start_from, weights_only=True)
    return trainer
