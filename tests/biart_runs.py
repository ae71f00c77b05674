"""Short runs of train_biart.py, and what they log."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path

from latent_verse.training.biart import LitBiART

TINY = shlex.split(
    "--n_layer 1 --n_head 2 --n_embd 16 --tokenizer bpe --bpe_vocab_size 300 --text_len 8 --batch_size 4 "
    "--num_workers 0 --gpus 0 --logger csv --log_every_n_steps 1 --refresh_rate 0 --num_samples 2"
)


def logged(run: Path) -> dict[str, list[float]]:
    """Every metric of a run's metrics.csv, in order."""
    with open(run / "logs" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]}


def record_losses(monkeypatch) -> list[float]:
    """Collect the training losses of the runs that follow."""
    losses = []
    step = LitBiART.training_step

    def recorded(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(LitBiART, "training_step", recorded)
    return losses
