"""Lightning's progress bar, for terminals only, and seldom enough not to slow training down."""

from __future__ import annotations

import sys
import time

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, updated no more than five times a second in training, and hidden where there is no terminal.

    The metrics it shows are on the device, and reading one waits until the device has finished all its work: after
    every step, a GPU would stand idle until the next one is prepared. The last step of an epoch is always shown.
    """

    EVERY = 0.2  # seconds

    def __init__(self, refresh_rate: int):
        super().__init__(refresh_rate=refresh_rate)
        self._updated = float("-inf")
        if not (sys.stdout.isatty() and sys.stderr.isatty()):
            self.disable()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        now, last = time.monotonic(), trainer.is_last_batch or trainer.global_step == trainer.max_steps
        due = (batch_idx + 1) % self.refresh_rate == 0 and now - self._updated >= self.EVERY
        if last or due:
            self._updated = now
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
