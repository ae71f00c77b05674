"""Saving what a rerun needs: the run folder, best, last and backups, stopping on a signal, each process's state."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from latent_verse.checkpoints.ckpt_files import MONITOR, CheckpointError, read_ckpt, score_of, step_of
from latent_verse.config import as_plain
from latent_verse.config.program import SIGNALS, Stopped, signal_name
from latent_verse.config.train import TrainBiARTConfig, TrainVAEConfig
from latent_verse.config.yaml_files import to_yaml
from latent_verse.files import FileError, InUse, NotWritten, only_writer, replacing
from latent_verse.training import runs
from latent_verse.training.runs import Run


class Interrupted(Stopped):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved; the message says where."""


def made_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether the batch just trained on ended in an optimiser step; with accumulated gradients only every n-th does."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def in_any_process(is_so: bool, device: torch.device) -> bool:
    """Whether `is_so` in one of the processes. A collective on `device`, which waits for all of them."""
    return bool(sums_over_processes([int(is_so)], device)[0])


def sums_over_processes(numbers: list[float], device: torch.device) -> list[float]:
    """Each number's sum over the processes. A collective on `device`, which waits for all of them."""
    sums = torch.tensor(numbers, dtype=torch.float32, device=device)
    dist.all_reduce(sums)  # Lightning's reduce_boolean_decision has a barrier before it
    return sums.tolist()


@contextmanager
def only_warned() -> Iterator[None]:
    """A file that cannot be written, on a full disk for example, does not end training: a warning says so."""
    try:
        yield
    except FileError as error:
        rank_zero_warn(f"{error} Training continues.")


class RunFolder(pl.Callback):
    """Make the run folder, once all processes have met; from `setup` on, `self.run` is the first process's in all.

    If it vanishes during the run (moved, removed, its disk unmounted), it is made anew, with a warning.

    Raises:
        InUse: another process has made it meanwhile, and runs there.
    """

    def __init__(self, run: Run, config: TrainVAEConfig | TrainBiARTConfig):
        self.run = run
        self.config = config
        self._held = ExitStack()  # locks of those made anew

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.run = trainer.strategy.broadcast(self.run)
        if trainer.is_global_zero:
            self._start()

    def _start(self) -> None:
        runs.start(self.run, as_plain(self.config), to_yaml(self.config))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        if trainer.is_global_zero:
            self._keep()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._keep()

    def _keep(self) -> None:
        """Make the folder anew if its run.json is gone. To look takes microseconds."""
        try:
            os.stat(self.run.folder / "run.json")
            return
        except (FileNotFoundError, NotADirectoryError):
            anew = "It is made anew; what was in it is not copied."
            rank_zero_warn(f"{self.run.folder} was moved, removed or unmounted while the run writes there. {anew}")
        except OSError:  # of a network disk, which may come back
            return
        try:
            if not os.path.lexists(self.run.folder / ".lock"):
                self._held.enter_context(only_writer(self.run.folder, "log_dir"))
            self._start()
        except InUse:
            raise
        except FileError as error:
            rank_zero_warn(f"{error} Training continues.")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._held.close()


class WholeFiles(TorchCheckpointIO):
    """Lightning's reader and writer of checkpoints; but each is written beside its place, whole or not at all.

    An error is kept, not raised: the other processes of the run wait for this one. See `save_state`.
    """

    error: str | None = None  # why the last one was not written

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        self.error = None
        try:
            with replacing(Path(path)) as unfinished, unfinished.open("wb") as file:
                torch.save(checkpoint, file)
        except FileError as error:
            self.error = str(error)


def save_state(trainer: pl.Trainer, file: Path) -> None:
    """Write the whole state of a run, with the optimiser, for an exact resume; called by all processes together.

    Raises:
        NotWritten: in all processes alike.
    """
    trainer.save_checkpoint(file, weights_only=False)
    writer = trainer.strategy.checkpoint_io
    assert isinstance(writer, WholeFiles)
    if error := trainer.strategy.broadcast(writer.error):
        raise NotWritten(error)


class BestAndLast(Checkpoint):
    """After every epoch, keep the weights of the lowest val/total_loss so far, and the last ones.

    A checkpoint's own entry "latent_verse" records the loss of its weights, {"score": {"val/total_loss": 0.1}}, or None
    where there was no validation. So nothing depends on where the folder is, or on what it was named. The folder may
    hold more than one of a kind, of an earlier version, or copied: once a new one is there, the others are deleted.

    Raises:
        NotWritten: the last attempt of the run to write one of them failed. Before, a failure is a warning.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.lowest = math.inf  # loss of the best file; known to the first process
        self.score: dict[str, float] | None = None  # of the weights that are being saved
        self.saved_at = 0  # step
        self.unsaved: dict[str, str] = {}  # kind: why

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.lowest = min(map(_loss_of, self.folder.run.checkpoints.glob("best-*.ckpt")), default=math.inf)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self.saved_at:
            return
        self.saved_at = trainer.global_step
        loss = trainer.callback_metrics.get(MONITOR)
        loss = math.nan if loss is None else float(loss)
        self.score = {MONITOR: loss} if math.isfinite(loss) else None
        if trainer.strategy.broadcast(self.score is not None and loss < self.lowest) and self._save(trainer, "best"):
            self.lowest = loss
        self._save(trainer, "last")
        self.score = None  # of a backup's weights, none is known

    def _save(self, trainer: pl.Trainer, kind: str) -> bool:
        folder = self.folder.run.checkpoints
        file = folder / f"{kind}-epoch={trainer.current_epoch}-step={trainer.global_step}.ckpt"
        self.unsaved.pop(kind, None)
        try:
            save_state(trainer, file)
        except NotWritten as error:
            self.unsaved[kind] = str(error)
            rank_zero_warn(f"The {kind} checkpoint is not saved: {error} Training continues.")
            return False
        if trainer.is_global_zero:
            for other in folder.glob(f"{kind}-*.ckpt"):
                if other != file:
                    with suppress(OSError):  # the next save tries again; other processes wait for this one
                        other.unlink()
        return True

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint.setdefault("latent_verse", {})["score"] = self.score

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for kind, error in self.unsaved.items():
            raise NotWritten(f"The run ended at step {trainer.global_step}, but its {kind} checkpoint is lost: {error}")


def _loss_of(file: Path) -> float:
    """The validation loss that a best checkpoint records; infinite if it cannot be read or records none."""
    try:
        score = score_of(read_ckpt(file))
    except CheckpointError:
        score = None
    return math.inf if score is None else score


ASK_SECONDS = 2.0  # between two questions of processes whether one of them was told to stop; each waits for the GPU

MOST_STEPS = 100  # and at the latest after so many steps, should they become slower


class Backup(pl.Callback):
    """Save the whole state every `every` steps (None: never), and when the run has to stop; the two newest are kept.

    After SIGTERM, SIGHUP or Ctrl-C, training finishes the current step and saves; a second Ctrl-C stops at once.
    Several processes have to leave after the same step. They ask each other every ASK_SECONDS, whatever a step takes.
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
        self._interrupted: Interrupted | None = None
        self.signal: int = signal.SIGTERM  # the last one; in other processes than the one that got it, SIGTERM
        self._handlers: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}  # before these
        self._pid, self._validating = os.getpid(), False
        self._ask_at = self._asked_at = 0  # steps: the next question and the last one
        self._asked = 0.0  # time of the last one

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
            raise Stopped(number, f"stopped at once by a second {signal_name(number)}: nothing more was saved")
        self.told_to_stop, self.signal = True, number
        when = "after the validation" if self._validating else "after this step"
        rank_zero_info(f"{signal_name(number)}: saving {when} (Ctrl-C again stops at once)")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        if trainer.is_last_batch or trainer.global_step == trainer.max_steps or not made_step(trainer, batch_idx):
            return
        stop = self.told_to_stop
        if trainer.world_size > 1:
            stop = trainer.global_step >= self._ask_at and self._ask(trainer)
        if stop:
            try:
                found = f"saved {self.save(trainer)}"
            except NotWritten as error:
                found = f"{error} {self._newest()}"
            self._interrupted = Interrupted(self.signal, f"{self._by} at step {trainer.global_step}; {found}")
            return
        if self.every and trainer.global_step % self.every == 0:
            with only_warned():
                self.save(trainer)

    def _ask(self, trainer: pl.Trainer) -> bool:
        """Whether a process was told to stop; and all agree on the step at which they ask again."""
        now, step = time.monotonic(), trainer.global_step
        seconds = (now - self._asked) / max(1, step - self._asked_at) if self._asked else ASK_SECONDS  # of a step
        stop, seconds = sums_over_processes([int(self.told_to_stop), seconds], trainer.strategy.root_device)
        self._asked, self._asked_at = now, step
        self._ask_at = step + max(1, min(MOST_STEPS, int(ASK_SECONDS * trainer.world_size / seconds)))
        return stop > 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch, batch_idx) -> None:
        if self._interrupted is not None:  # not sooner: Lightning logs the step only after on_train_batch_end
            raise self._interrupted

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stop = self.told_to_stop
        if trainer.world_size > 1:
            stop = in_any_process(stop, trainer.strategy.root_device)
        if stop:
            raise Interrupted(self.signal, f"{self._by} at step {trainer.global_step}; {self._newest()}")

    def _newest(self) -> str:
        saved = runs.states(self.folder.run)
        return f"the newest state is {saved[0]}" if saved else "there is no state to resume from"

    @property
    def _by(self) -> str:
        return f"stopped by {signal_name(self.signal)}"

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validating = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validating = False

    def save(self, trainer: pl.Trainer) -> Path:
        """Write a backup, by all processes together. Returns its path.

        Raises:
            NotWritten: the disk is full, for example.
        """
        file = self.folder.run.backups() / f"step={trainer.global_step}.ckpt"
        try:
            save_state(trainer, file)
        except NotWritten as error:
            raise NotWritten(f"There is no backup of step {trainer.global_step}: {error}") from error
        if trainer.is_global_zero:
            # two, in case the newest is damaged; of later steps are those that this run could not resume from
            steps = {old: step_of(old) or 0 for old in file.parent.glob("step=*.ckpt")}
            kept = sorted((old for old in steps if steps[old] <= trainer.global_step), key=lambda old: steps[old])[-2:]
            for old in steps.keys() - set(kept):
                with suppress(OSError):
                    old.unlink()
        return file

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
