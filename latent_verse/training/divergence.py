"""Stopping a run whose numbers are no longer finite, before any of them is saved."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from latent_verse.checkpoints.checks import is_finite
from latent_verse.config import UserError
from latent_verse.config.train import TrainVAEConfig
from latent_verse.files import FileError
from latent_verse.training import runs
from latent_verse.training.backups import Backup, RunFolder, made_step
from latent_verse.training.process_state import random_state, set_random_state

WHAT = ("the loss is", "gradients are", "weights are", "the optimizer's state is")  # in the order of a step
LOSS, GRADIENTS, WEIGHTS, OPTIMIZER = range(len(WHAT))
NEVER = 2**62  # later than any step; with a step added it is still an int64


class Diverged(UserError):
    """Training came to numbers that are not finite. The message names the step, what it was, remedies, and the state.

    Nothing that is not finite has been saved.
    """

    exit_code = 1


@dataclass
class StepStart:
    """What a step changes before its loss is known. Weights and the optimiser's state it changes afterwards."""

    loops: dict[str, Any]  # Lightning's counters, and how far the data has come
    random: dict[str, Any]
    process: dict[str, Any]  # the module's process_state
    buffers: list[Tensor]  # among them the codebook, which learns in the forward pass


class Divergence(pl.Callback):
    """Stop at the step whose loss or gradients are not finite, and refuse to save what is not. For both stages.

    A CPU looks at every loss and at all gradients. Reading a value would make the program wait for a GPU: there the
    step of the first loss that is not finite is noted on the device, and read where the program waits anyway: every
    log_every_n_steps, at the end of an epoch and before anything is saved. Gradients that are not finite become weights
    that are not, and then a loss. fp16's scaled gradients may overflow, and its scaler leaves such steps out.

    The state before the step is saved as a backup if the run has saved nothing yet; on a GPU it is gone by then.

    Raises:
        Diverged: in every process, after the same step.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self._first = torch.tensor(NEVER)  # 4 x step + place in WHAT, of what was not finite first
        self._last_validation = 0.0
        self._nothing_saved = False  # by this run
        self._start: StepStart | None = None  # of this step, until something is saved
        self._saving_start = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        device = trainer.strategy.root_device
        self._first = self._first.to(device)
        self._at_once = device.type == "cpu"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._nothing_saved = self._last_saved(trainer) is None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._note(LOSS, trainer.global_step + 1, loss.detach().isfinite())
        if self._at_once and trainer.world_size == 1:  # others first exchange gradients: one alone may not leave
            self._stop_if_noted(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer) -> None:
        if not self._at_once:
            return
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._note(GRADIENTS, trainer.global_step + 1, all(map(is_finite, gradients)))
        self._stop_if_noted(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        if not made_step(trainer, batch_idx):
            return
        step = trainer.global_step
        if not self._at_once:
            if trainer.is_last_batch or step == trainer.max_steps or step % trainer.log_every_n_steps == 0:
                self._stop_if_noted(trainer, pl_module)
        elif self._nothing_saved and self._last_saved(trainer) is None:  # a look at the disk: saving may fail
            state = copy.deepcopy(getattr(pl_module, "process_state", dict)())
            buffers = [buffer.clone() for buffer in pl_module.buffers()]
            self._start = StepStart(trainer.fit_loop.state_dict(), random_state(), state, buffers)
        else:
            self._nothing_saved, self._start = False, None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self._note(WEIGHTS, trainer.global_step, all(map(is_finite, tensors_in(checkpoint["state_dict"]))))
        self._note(OPTIMIZER, trainer.global_step, all(map(is_finite, tensors_in(checkpoint.get("optimizer_states")))))
        self._stop_if_noted(trainer, pl_module)
        if self._saving_start and self._start is not None:
            checkpoint["loops"]["fit_loop"] = self._start.loops

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get("val/total_loss")
        if value is None or trainer.sanity_checking:
            return
        self._last_validation = value.item()
        if not math.isfinite(self._last_validation):
            rank_zero_warn(
                f"val/total_loss is {self._last_validation} after step {trainer.global_step}, though training's loss "
                "is finite: this state is not the best. Look at the images in val_dir, or train with --precision 32."
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not math.isfinite(self._last_validation) and not list(self.folder.run.checkpoints.glob("best-*.ckpt")):
            raise Diverged(
                f"no validation of the run had a finite loss: after step {trainer.global_step} val/total_loss is "
                f"{self._last_validation}. Look at the images in val_dir, or train again with a lower --learning_rate "
                "or --precision 32."
            )

    def _note(self, place: int, step: int, fine: Tensor | bool) -> None:
        """Remember a value that is not `fine`, that is finite, if none was noted before. On a GPU nothing waits."""
        self._first = torch.minimum(self._first, fine * torch.full_like(self._first, NEVER) + (4 * step + place))

    def _stop_if_noted(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop if a process has noted something. A collective, which waits for the device."""
        first = self._first
        if trainer.world_size > 1:
            first = first.clone()
            dist.all_reduce(first, dist.ReduceOp.MIN)
        if int(first) < NEVER:
            step, place = divmod(int(first), 4)
            raise Diverged(self._message(trainer, step, place, self._last_finite(trainer, pl_module, place)))

    def _last_saved(self, trainer: pl.Trainer) -> Path | str | None:
        """The newest state of the run, or what it resumed from; the same in every process."""
        saved = runs.states(self.folder.run)
        return saved[0] if saved else trainer.ckpt_path

    def _last_finite(self, trainer: pl.Trainer, pl_module: pl.LightningModule, place: int) -> Path | str | None:
        """The newest state on the disk, which is finite as all that is saved; the one before this step if none was."""
        saved = trainer.strategy.broadcast(self._last_saved(trainer))
        start, self._start = self._start, None
        if saved is not None or start is None or place not in (LOSS, GRADIENTS):
            return saved
        self._first.fill_(NEVER)
        with torch.no_grad():
            for buffer, old in zip(pl_module.buffers(), start.buffers, strict=True):
                buffer.copy_(old)
        set_random_state(start.random)
        if start.process:
            pl_module.load_process_state(start.process)
        self._start, self._saving_start = start, True
        (backup,) = (callback for callback in trainer.callbacks if isinstance(callback, Backup))
        try:
            return backup.save(trainer)
        except (Diverged, FileError):  # it was not finite either, or cannot be written: what to say first is this step
            return None

    def _message(self, trainer: pl.Trainer, step: int, place: int, saved: Path | str | None) -> str:
        config = self.folder.config
        warm_up = "--lr_cosine with --warmup_steps" if isinstance(config, TrainVAEConfig) else "more --warmup_steps"
        precision = "--precision bf16 or 32" if "16-" in config.trainer.precision[:3] else "--precision 32"
        remedies = [f"a lower --learning_rate (it is {config.optim.learning_rate:g})", warm_up]
        remedies += ["--gradient_clip_val 1"] if config.trainer.gradient_clip_val is None else []
        remedies += [precision] if config.trainer.precision[:2] in ("16", "bf") else []
        state = (
            f"Resume from the last finite state with --resume --ckpt_path {saved}"
            if saved
            else "Nothing was saved before it"
        )
        when = "after" if place > GRADIENTS else "at"
        tries = ", ".join(remedies)
        return f"training diverged: {when} step {step} {WHAT[place]} not finite. {state}. Try {tries}, or fix bad data."


def tensors_in(content: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for item in content.values() if isinstance(content, dict) else content:
            yield from tensors_in(item)
