"""How fast training is and when it will end; and the norm of its gradients."""

from __future__ import annotations

import math
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from latent_verse.config.messages import counted
from latent_verse.training.backups import made_step
from latent_verse.training.logs import is_logged
from latent_verse.training.summaries import row


@dataclass(frozen=True)
class Place:
    """Where a run is. Epochs count from 1; steps are those of the optimiser that are done."""

    epoch: int
    epochs: int
    epoch_step: int
    epoch_steps: int
    step: int
    steps: int


def steps_per_epoch(trainer: pl.Trainer) -> int:
    """Of the optimiser, whatever max_steps says."""
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


def place(trainer: pl.Trainer, batches: int) -> Place:
    """Where a run is after so many batches of this epoch. What it has resumed from does not matter."""
    per_epoch = steps_per_epoch(trainer)
    done, epoch = math.ceil(batches / trainer.accumulate_grad_batches), trainer.current_epoch
    left = (trainer.max_epochs - epoch) * per_epoch - done
    if trainer.max_steps >= 0:
        left = min(left, trainer.max_steps - trainer.global_step)
    epochs = epoch + math.ceil((done + left) / per_epoch)
    step = trainer.global_step
    return Place(epoch + 1, epochs, done, min(per_epoch, done + left), step, step + left)


class Pace(pl.Callback):
    """Measures training, logs images or tokens a second and the norm of the gradients, and estimates the time left.

    The time of a step is that from the end of the one before, with the wait for its data. What lies between epochs,
    such as validation and saving, is measured apart. Clocks alone are read: nothing waits for a GPU that would not wait
    anyway, as Divergence does before this at the steps that are logged. Nothing is saved.

    The module has `unit`, "images" or "tokens", and `amount(batch)`, how many of them a batch holds.

    Attributes:
        timed: seconds and amounts of the last steps; the first WARM_UP are left out, which compile, tune and allocate.
        breaks: seconds between two epochs.
    """

    WARM_UP = 2
    WINDOW = 200

    def __init__(self) -> None:
        self.timed: deque[tuple[float, int]] = deque(maxlen=self.WINDOW)
        self.breaks: deque[float] = deque(maxlen=self.WINDOW)
        self._since: float | None = None  # end of the last step; None before the first one of an epoch
        self._ended: float | None = None  # end of the last epoch
        self._steps = self._amount = 0  # of this session; of this step
        self._logged = (0.0, 0)  # seconds and amount since they were logged

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx) -> None:
        if self._steps == self._amount == 0 and trainer.is_global_zero:
            self._say_length(trainer, place(trainer, batch_idx))
        if self._since is None:  # the first one of an epoch, or of a session
            self._since = time.perf_counter()
            if self._ended is not None:
                self.breaks.append(self._since - self._ended)

    def _say_length(self, trainer: pl.Trainer, at: Place) -> None:
        done = f", {at.step:,} of them done" if at.step else ""
        each = steps_per_epoch(trainer)
        length = f"{each:,} an epoch, {counted(at.epochs, 'epoch')}, {at.steps:,} in all"
        length = f"{length if at.steps >= each else f'{at.steps:,} of the {each:,} of an epoch'}{done}"
        with suppress(OSError, ValueError):  # what cannot be printed is reported at the end
            print(row("Steps", length), flush=True)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer) -> None:
        if is_logged(trainer):
            pl_module.log("train/grad_norm", gradient_norm(optimizer))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        self._amount += pl_module.amount(batch) * trainer.world_size
        if not made_step(trainer, batch_idx):
            return
        now, amount, self._amount = time.perf_counter(), self._amount, 0
        assert self._since is not None  # on_train_batch_start
        step = now - self._since, amount
        self._since, self._ended = (None, now) if trainer.is_last_batch else (now, None)
        self._steps += 1
        if self._steps > self.WARM_UP:
            self.timed.append(step)
        seconds, amount = self._logged = self._logged[0] + step[0], self._logged[1] + step[1]
        if is_logged(trainer, made=True) and seconds > 0:
            pl_module.log(f"train/{pl_module.unit}_per_second", amount / seconds)
            self._logged = (0.0, 0)

    @property
    def step_seconds(self) -> float | None:
        """What a step takes now; None before one was timed."""
        return sum(seconds for seconds, _ in self.timed) / len(self.timed) if self.timed else None

    @property
    def per_second(self) -> float | None:
        """Images or tokens; None before a step was timed."""
        seconds = sum(seconds for seconds, _ in self.timed)
        return sum(amount for _, amount in self.timed) / seconds if seconds else None

    def left(self, at: Place, ended: bool = False) -> float | None:
        """Seconds to the end of the run, as far as measured: of steps, and of what follows epochs once one has `ended`.

        Args:
            ended: this epoch's break is over too.
        """
        if not self.step_seconds:
            return None
        breaks = sum(self.breaks) / len(self.breaks) if self.breaks else 0.0
        return (at.steps - at.step) * self.step_seconds + (at.epochs - at.epoch + (not ended)) * breaks


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The 2-norm of all gradients together, () on their device; of sharded ones over all processes."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
