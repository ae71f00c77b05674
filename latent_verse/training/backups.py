"""Saving what a rerun needs: the run's folder, backups, stopping on a signal, and the state of each process."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from latent_verse.checkpoints.ckpt_files import step_of
from latent_verse.config import as_plain
from latent_verse.config.cli import to_yaml
from latent_verse.config.program import SIGNALS, Stopped
from latent_verse.config.train import TrainBiARTConfig, TrainVAEConfig
from latent_verse.files import replacing, unfinished_at
from latent_verse.training import runs
from latent_verse.training.runs import Run


class Interrupted(Stopped):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved; the message says where."""


def made_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether this batch, just trained on, completed an optimiser step: with accumulated gradients not each does."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def in_any_process(is_so: bool, device: torch.device) -> bool:
    """Whether `is_so` in one of the processes. A collective on `device`, which waits for all of them."""
    number = torch.full((), int(is_so), device=device)
    dist.all_reduce(number)  # Lightning's reduce_boolean_decision has a barrier before it
    return bool(number)


class RunFolder(pl.Callback):
    """Make the run folder, once all processes have met; from `setup` on, `self.run` is the first process's in all."""

    def __init__(self, run: Run, config: TrainVAEConfig | TrainBiARTConfig):
        self.run = run
        self.config = config

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.run = dataclasses.replace(self.run, id=trainer.strategy.broadcast(self.run.id))
        if trainer.is_global_zero:
            runs.start(self.run, as_plain(self.config), to_yaml(self.config))


class Backup(pl.Callback):
    """Save the whole state every `every` steps (None: never), and when the run has to stop; the two newest are kept.

    After SIGTERM, SIGHUP or Ctrl-C, training finishes the current step and saves; a second Ctrl-C stops at once.
    Nothing is saved at the last step of an epoch or run, where a resumed run would miss the validation: `last` follows
    soon.

    Raises:
        Interrupted: training was asked to stop, and has saved.
        Stopped: it was asked twice.
    """

    def __init__(self, folder: RunFolder, every: int | None):
        self.folder = folder
        self.every = every
        self.told_to_stop = False
        self.signal: int = signal.SIGTERM  # the last one; in other processes than the one that got it, SIGTERM
        self._handlers: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}  # before these
        self._pid, self._validating = os.getpid(), False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.told_to_stop |= trainer.received_sigterm
        # Before every step, Lightning's processes would wait for their GPUs to tell each other of a SIGTERM; here they
        # ask less often (on_train_batch_end). tests/training/test_trainer.py pins this private method.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                    self._handlers[number] = signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a data loader's process, which inherits this handler
            return
        if self.told_to_stop and number == signal.SIGINT:
            raise Stopped(number, f"stopped at once by a second {signal.Signals(number).name}: nothing more was saved")
        self.told_to_stop, self.signal = True, number
        when = "after the validation" if self._validating else "after this step"
        rank_zero_info(f"{signal.Signals(number).name}: saving {when} (Ctrl-C again stops at once)")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        stop = self.told_to_stop
        if trainer.world_size > 1:  # all processes must leave after the same step; asking costs, so not at every one
            ask = trainer.global_step % trainer.log_every_n_steps == 0
            stop = ask and in_any_process(stop, trainer.strategy.root_device)
        if trainer.is_last_batch or trainer.global_step == trainer.max_steps or not made_step(trainer, batch_idx):
            return
        if stop:
            saved = self.save(trainer)
            raise Interrupted(self.signal, f"{self._by} at step {trainer.global_step}; saved {saved}")
        if self.every and trainer.global_step % self.every == 0:
            self.save(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stop = self.told_to_stop
        if trainer.world_size > 1:
            stop = in_any_process(stop, trainer.strategy.root_device)
        if stop:
            saved = runs.states(self.folder.run)
            found = f"saved {saved[0]}" if saved else "there was nothing to save yet"
            raise Interrupted(self.signal, f"{self._by} at step {trainer.global_step}; {found}")

    @property
    def _by(self) -> str:
        return f"stopped by {signal.Signals(self.signal).name}"

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validating = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validating = False

    def save(self, trainer: pl.Trainer) -> Path:
        """Write a backup; called by all processes together. Returns its path."""
        place = self.folder.run.backups()
        file = place / f"step={trainer.global_step}.ckpt"
        if trainer.is_global_zero:
            place.mkdir(parents=True, exist_ok=True)
        # the first process writes the file; the others only help to gather what it holds
        with replacing(file) if trainer.is_global_zero else nullcontext(file) as unfinished:
            trainer.save_checkpoint(unfinished, weights_only=False)  # with the optimiser, for an exact resume
        if trainer.is_global_zero:
            for old in sorted(place.glob("step=*.ckpt"), key=step_of)[:-2]:  # two, in case the newest is damaged
                old.unlink()
            for leftover in place.glob(unfinished_at(place / "step=*.ckpt").name):  # of a process killed while it saved
                leftover.unlink()
        trainer.strategy.barrier()
        return file

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


class ProcessState(pl.Callback):
    """Save and restore what differs between processes: random number generators, and the module's `process_state`.

    Lightning saves rank 0's only: a resumed run would have other dropout masks and restart other codes.
    """

    def __init__(self) -> None:
        self.loaded: list[dict[str, Any]] | None = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        state = {"rng": random_state(), "module": getattr(pl_module, "process_state", dict)()}
        states: list[dict[str, Any] | None] = [state]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            dist.all_gather_object(states, state)
        checkpoint["process_states"] = states

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self.loaded = checkpoint.get("process_states")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.loaded is None:
            return
        if len(self.loaded) != trainer.world_size:
            rank_zero_warn(
                f"{len(self.loaded)} processes saved the checkpoint, {trainer.world_size} resume from it: weights and "
                "step are the same, data order and random numbers are not."
            )
        else:
            state = self.loaded[trainer.global_rank]
            set_random_state(state["rng"])
            if state["module"]:
                pl_module.load_process_state(state["module"])
        self.loaded = None


def random_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy, torch and this process's GPU, as plain types and tensors."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
