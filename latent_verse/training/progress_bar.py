"""What a run says while it trains: a bar on a terminal, and elsewhere a plain line from time to time."""

from __future__ import annotations

import math
import sys
import time
from contextlib import suppress

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar as LightningsBar

from latent_verse.progress import (
    LINE_EVERY,
    LastLine,
    as_fits,
    duration,
    on_terminal,
    progress_bar,
    rate,
    terminal_columns,
)
from latent_verse.training.backups import made_step
from latent_verse.training.pace import Pace, Place, place, steps_per_epoch


class ProgressBar(LightningsBar):
    """Shows how far training, validation or a test is, in the first process; says a line at the end of every epoch.

    The loss it shows is on the device, and reading it waits until the device has finished all its work: after every
    step, a GPU would stand idle until the next one is prepared. So a bar is drawn at most five times a second, and
    where there is no terminal, a line is printed every LINE_EVERY seconds. The last step of an epoch is always shown.
    """

    EVERY = 0.2  # seconds
    ENOUGH = 10  # steps, or ENOUGH_SECONDS of them, from which a run's time is estimated
    ENOUGH_SECONDS = 20.0

    def __init__(self, refresh_rate: int, pace: Pace | None = None):
        super().__init__()
        self.refresh_rate = refresh_rate
        self.pace = pace or Pace()
        self.has_bar = on_terminal()
        self._enabled = True
        self._bar: LastLine | None = None
        self._shown = float("-inf")  # time
        self._estimated = False
        self._place: Place | None = None
        self._test = progress_bar(what="", shown=False)

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        """Lightning does so in all processes but the first."""
        self._enabled = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._enabled and self.has_bar:  # before loader processes are forked, whose messages appear above it too
            self._bar = LastLine()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._shown = float("-inf") if self.has_bar else time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch, batch_idx) -> None:
        if self._place is None or batch_idx == 0:  # a run may have resumed in the middle of an epoch
            self._place = place(trainer, batch_idx)
            self._draw(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        if not self._enabled or not made_step(trainer, batch_idx):
            return
        self._place = at = place(trainer, batch_idx + 1)
        self._estimate(trainer, at)
        now, last = time.monotonic(), at.epoch_step == at.epoch_steps
        if self.has_bar:
            if last or (at.epoch_step % self.refresh_rate == 0 and now - self._shown >= self.EVERY):
                self._shown = now
                self._draw(trainer, pl_module)
        elif now - self._shown >= LINE_EVERY and not last:  # `last` is followed by the epoch's line
            self._shown = now
            self._say(trainer, pl_module, at)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._enabled and self._place is not None:
            self._shown = time.monotonic()
            self._say(trainer, pl_module, self._place, ended=True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw_validation(trainer, 0)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        self._draw_validation(trainer, batch_idx + 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batches = sum(trainer.num_test_batches)
        total = None if math.isinf(batches) else batches
        self._test = progress_bar(what="evaluating", total=total, unit="batch", shown=self._enabled and not self._bar)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        self._test.update()
        self._draw_batches("evaluating", batch_idx + 1, sum(trainer.num_test_batches))

    def _close(self) -> None:
        self._test.close()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        at = self._place
        if at is None or self._bar is None:  # reading a loss for nothing would wait for the device
            return
        loss = [fact.removeprefix("train ") for fact in self._losses(trainer, "train")]
        facts = self._ends(at) + loss + self._speed(pl_module)
        self._bar.show(f"Epoch {at.epoch}/{at.epochs}", at.epoch_step, at.epoch_steps, facts)

    def _draw_validation(self, trainer: pl.Trainer, done: int) -> None:
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        epoch = f"Epoch {self._place.epoch}/{self._place.epochs}, " if self._place else ""
        self._draw_batches(f"{epoch}validation", done, sum(batches))

    def _draw_batches(self, title: str, done: int, total: float) -> None:
        now = time.monotonic()
        if self._bar is not None and (done == 0 or now - self._shown >= self.EVERY):
            self._shown = now
            self._bar.show(title, done, done if math.isinf(total) else int(total))  # of streams, how many is not known

    def _say(self, trainer: pl.Trainer, pl_module: pl.LightningModule, at: Place, ended: bool = False) -> None:
        losses = self._losses(trainer, *(("train", "val") if ended else ("train",)))
        facts = losses + self._ends(at, ended) + self._speed(pl_module)
        beginning = f"Epoch {at.epoch}/{at.epochs}, step {at.step}/{at.steps}: "
        self._print(as_fits(beginning, facts, terminal_columns() if self.has_bar else sys.maxsize))

    def _losses(self, trainer: pl.Trainer, *stages: str) -> list[str]:
        found = {stage: trainer.callback_metrics.get(f"{stage}/total_loss") for stage in stages}
        return [f"{stage} loss {float(loss):#.4g}" for stage, loss in found.items() if loss is not None]

    def _speed(self, pl_module: pl.LightningModule) -> list[str]:
        steps, amount = self.pace.step_seconds, self.pace.per_second
        return [f"{rate(1 / steps)} steps/s", f"{rate(amount)} {pl_module.unit}/s"] if steps and amount else []

    def _ends(self, at: Place, ended: bool = False) -> list[str]:
        left = self.pace.left(at, ended)
        return [f"run ends in {duration(math.ceil(left))}"] if left is not None and at.step < at.steps else []

    def _estimate(self, trainer: pl.Trainer, at: Place) -> None:
        """Say once what an epoch and the rest of the run will take, as soon as enough steps have been timed."""
        each, timed = self.pace.step_seconds, len(self.pace.timed)
        if self._estimated or at.step >= at.steps or not each:
            return
        if timed < self.ENOUGH and timed * each < self.ENOUGH_SECONDS:
            return
        self._estimated = True
        epoch = f"{duration(each * steps_per_epoch(trainer))} an epoch, " if at.epochs > 1 else ""
        left = duration(self.pace.left(at) or 0)
        apart = "; validation comes on top" if sum(trainer.num_val_batches) and not self.pace.breaks else ""
        self._print(f"About {epoch}{left} to the end of the run ({duration(each)} a step{apart})")

    def _print(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a full disk or closed pipe is reported at the end, and ends no training
            print(text, flush=True)
