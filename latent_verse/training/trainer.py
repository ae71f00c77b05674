"""Lightning's Trainer from a TrainerConfig: devices, strategy, logger, callbacks. Shared by all scripts."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from latent_verse.augvae.quantizer import world_size
from latent_verse.config import ConfigError
from latent_verse.config.messages import counted, reason, shown
from latent_verse.config.program import is_first_process
from latent_verse.config.train import TrainBiARTConfig, TrainerConfig, TrainVAEConfig
from latent_verse.nn.compilation import why_not_compiled
from latent_verse.progress import duration
from latent_verse.training import runs
from latent_verse.training.backups import Backup, BestAndLast, Interrupted, RunFolder, WholeFiles
from latent_verse.training.changes import AppliedSettings, changes
from latent_verse.training.divergence import Divergence
from latent_verse.training.launcher import PATIENCE, WatchedDDP, WatchedFSDP
from latent_verse.training.logs import CSVLogger, TensorBoardLogger
from latent_verse.training.pace import Pace
from latent_verse.training.process_state import ProcessState
from latent_verse.training.progress_bar import ProgressBar
from latent_verse.training.runs import Run
from latent_verse.training.summaries import row

Training = TypeVar("Training", TrainVAEConfig, TrainBiARTConfig)
say = rank_zero_only(print)  # one process speaks for all


@contextmanager
def as_config_error() -> Iterator[None]:
    """Turn Lightning's refusal of a setting into a ConfigError."""
    try:
        yield
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from error


def choose_devices(t: TrainerConfig) -> tuple[str, int]:
    """(Lightning accelerator, processes on this node) for --gpus N; says so if the CPU is used instead of GPUs.

    If an accelerator is named, N is the number of its devices (for cpu: of processes).

    Raises:
        ConfigError: more GPUs are asked for than the machine has.
    """
    started = int(os.environ["LOCAL_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None  # by torchrun
    if t.accelerator not in ("auto", "gpu", "cuda"):
        return t.accelerator, max(1, t.gpus) if started is None else started
    if t.gpus == 0:
        if t.accelerator != "auto":
            raise ConfigError(f"gpus: 0 asks for the CPU, accelerator: {t.accelerator} does not. Drop one of them.")
        return "cpu", started or 1
    present = torch.cuda.device_count()
    if present == 0:
        if t.accelerator != "auto":
            raise ConfigError(f"accelerator: {t.accelerator}, but torch sees no GPU on this machine.")
        rank_zero_info(f"No GPU on this machine: using the CPU in place of {t.gpus} GPU{'s' if t.gpus > 1 else ''}.")
        return "cpu", started or 1
    if t.gpus > present:
        raise ConfigError(f"gpus: {t.gpus}, but torch sees {present} on this machine. Give --gpus {present} or fewer.")
    if started not in (None, t.gpus):
        raise ConfigError(f"gpus: {t.gpus}, but torchrun started {started} processes on this node. Make them equal.")
    return "gpu", t.gpus


def ease_smoke_test(config: Training, given: Mapping[str, str]) -> Training:
    """Without a GPU, a run on fake data uses batch_size 1, and BiART's preset tiny, unless they are given; says so.

    A step of the released model on 8 images would take minutes and tens of GiB on a CPU.
    """
    if not config.data.fake_data or torch.cuda.is_available():
        return config
    shapes = {"preset", "n_layer", "n_head", "n_embd", "pretrained_path"}
    if hasattr(config.model, "preset") and not given.keys() & shapes:
        rank_zero_info(f"Smoke test on a CPU: preset tiny in place of {config.model.preset} (or --preset NAME).")
        config = replace(config, model=replace(config.model, preset="tiny"))
    flagged = given.get("batch_size", "").startswith("--")
    if config.data.batch_size > 1 and not flagged:
        rank_zero_info(f"Smoke test on a CPU: batch_size 1 in place of {config.data.batch_size} (or --batch_size N).")
        config = replace(config, data=replace(config.data, batch_size=1))
    return config


def log_in(t: TrainerConfig) -> None:
    """Log in to Weights & Biases if the run logs there, before data and model are made, which takes minutes.

    On a terminal wandb asks for an API key that it does not find.

    Raises:
        ConfigError: there is no key, the server does not take it, or wandb's own settings are wrong.
    """
    if t.logger != "wandb" or not is_first_process():
        return
    import wandb

    try:
        wandb.setup()
        if os.environ.get("WANDB_MODE") not in ("offline", "dryrun", "disabled"):
            wandb.login()
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        remedy = "Run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to log on this machine only"
        raise ConfigError(f"logger wandb: {reason(error).split('. ')[0].rstrip('.')}. {remedy}.") from error
    except ValueError as error:  # pydantic's, whose first line says little
        said = shown(" ".join(str(error).split()), 200)
        raise ConfigError(f"logger wandb: a WANDB_ variable or wandb's settings are wrong: {said}.") from error


@as_config_error()
def make_trainer(
    t: TrainerConfig, folder: RunFolder, more: Sequence[pl.Callback] = (), first_step: int = 0
) -> pl.Trainer:
    """A Trainer that logs to the run folder, keeps the best and last checkpoints, saves backups and can be interrupted.

    `more` callbacks join those of every run. Its logs continue those that the run has up to `first_step`.
    """
    accelerator, devices = choose_devices(t)
    run = folder.run
    callbacks = [
        folder,
        Divergence(folder),
        *more,
        ProcessState(),
        AppliedSettings(),
        LearningRateMonitor("step"),
        Backup(folder, t.backup_steps if t.backup else None),
        pace := Pace(),
        *([ProgressBar(t.refresh_rate, pace)] if t.refresh_rate else []),
        BestAndLast(folder),
    ]
    quiet_lightning()
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=t.nodes,
        strategy=choose_strategy(t, accelerator, devices),
        precision=t.precision,
        max_epochs=t.epochs,
        max_steps=t.max_steps,
        limit_train_batches=t.limit_train_batches,
        limit_val_batches=t.limit_val_batches,
        num_sanity_val_steps=t.num_sanity_val_steps,
        accumulate_grad_batches=t.accumulate_grad_batches,
        gradient_clip_val=t.gradient_clip_val,
        log_every_n_steps=t.log_every_n_steps,
        enable_progress_bar=bool(t.refresh_rate),
        enable_model_summary=False,
        detect_anomaly=t.debug,
        use_distributed_sampler=False,  # the data module splits over processes itself, without padding
        benchmark=not t.deterministic,  # cuDNN times its convolutions at the first step and takes the fastest
        deterministic=t.deterministic or None,  # False would import the compiler to tell it so
        default_root_dir=run.folder,
        logger=make_logger(t, run, first_step),
        callbacks=callbacks,
        plugins=[WholeFiles()],
    )
    # With max_steps, Lightning would resume from an epoch's end as if within the next one, which has no batches then.
    # tests/training/test_trainer.py pins this private method.
    trainer.fit_loop._iteration_based_training = lambda: False
    return trainer


def announce(t: TrainerConfig, run: Run, start_from: Path | None, idle: list[str]) -> None:
    """Print where a run writes, which flags have no effect (`idle`), and which checkpoint it resumes from."""
    say(row("Run folder", run.folder))
    for line in idle:
        say(f"No effect: {line}.")
    if start_from:
        say(row("Resuming from", start_from))
    elif t.ckpt_path:
        say(f"ckpt_path {t.ckpt_path} is not read without --resume: this run starts anew.")


@as_config_error()
def fit(
    trainer: pl.Trainer,
    t: TrainerConfig,
    run: Run,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    start_from: Path | None = None,
    first_step: int = 0,
) -> None:
    """Train to the end, from the step that `start_from` stores. Prints how long it took, or that it was finished.

    Raises:
        Interrupted: a signal stopped the run, and it has saved; the message says how to resume.
        CheckpointError: training cannot resume from `start_from` with these settings.
    """
    for line in changes(start_from, module.config) if start_from else []:
        say(f"Changed since the checkpoint: {line}")
    with suppress(OSError):  # in a file or pipe it would come with the program's end; what fails now is said then
        sys.stdout.flush()
    failed, since = True, time.perf_counter()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start_from, weights_only=True)
        failed = False
    except Interrupted as stopped:
        failed = False
        again = "rerun the command to resume" if t.backup else "resume with --resume --ckpt_path and that file"
        raise Interrupted(stopped.number, f"{stopped}; {again}.") from None
    finally:
        if t.logger == "wandb":  # Lightning leaves it open, and the next run of this process would join it
            import wandb

            wandb.finish(exit_code=int(failed))
    step, epoch = trainer.global_step, trainer.current_epoch
    if step > first_step:
        say(row("Trained", f"{counted(step - first_step, 'step')} in {duration(time.perf_counter() - since)}"))
    if start_from and step == first_step:
        limit = "max_steps" if 0 <= t.max_steps <= step else "epochs"
        if start_from not in runs.states(run):
            raise ConfigError(f"{start_from} has reached {limit} already: nothing is trained. Raise --{limit}.")
        say(f"{run.folder} was finished already. Raise --{limit} to train longer, or give another --name.")
    elif t.max_steps > 0:
        limit = "epochs" if step < t.max_steps else "max_steps"
        at = f"epoch {epoch} of {t.epochs}, step {step} of {t.max_steps}"
        say(f"Stopped by {limit}: {at}. Raise --{limit} to train longer.")


def compiles(config: TrainVAEConfig | TrainBiARTConfig) -> bool:
    """Whether to compile the networks: as `compile` says, by default on a GPU; if the machine cannot, says why.

    By default not for a smoke test, which is short, nor with fsdp or anomaly detection, where it has not been tried.
    """
    t = config.trainer
    on_gpu = t.accelerator in ("auto", "gpu", "cuda") and 0 < t.gpus <= torch.cuda.device_count()
    by_default = on_gpu and not (config.data.fake_data or t.strategy == "fsdp" or t.debug)
    if not (by_default if t.compile is None else t.compile):
        return False
    lacking = why_not_compiled(torch.device("cuda" if on_gpu else "mps" if t.accelerator == "mps" else "cpu"))
    if lacking:
        say(f"Networks are not compiled: {lacking}.")
    return not lacking


def before_compiling() -> None:
    """Call this before networks are compiled, once the processes of a run have met.

    DDP's part of Dynamo cuts each compiled network after every 25 MB of weights, so that gradients are exchanged while
    the rest of its backward pass runs. Several networks or blocks are compiled here, one by one, and are exchanged one
    by one anyway; more cuts would only prevent fusions.
    """
    if world_size() > 1:
        torch._dynamo.config.optimize_ddp = False


def uncompiled(compiled: bool) -> AbstractContextManager:
    """A context for validation: compiling again for its smaller last batch would take longer than it saves."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def untuned(wanted: bool = True) -> Iterator[None]:
    """Turn cuDNN's tuning off, if `wanted`, for batches whose size differs from training's.

    `benchmark` lets cuDNN time many ways to compute each convolution of a new shape, which takes longer than it saves
    where few batches have that shape. Batches of training's size find what was timed in training.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before and not wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def choose_strategy(t: TrainerConfig, accelerator: str, devices: int) -> str | Strategy:
    """auto and ddp: a copy on each process; fsdp: parameters, gradients and optimiser sharded over all processes."""
    processes = devices * t.nodes
    backend = "gloo" if accelerator == "cpu" else None
    if t.strategy == "fsdp":
        sizes = {"data_parallel_size": processes, "tensor_parallel_size": 1}
        more = {"process_group_backend": backend, "timeout": PATIENCE}
        return WatchedFSDP(save_distributed_checkpoint=False, **more, **sizes)
    if processes == 1:
        return "auto"
    # The codebook's buffers are kept equal by all-reduced statistics: broadcasting them each step would be waste.
    known = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    no_sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch renamed it
    more = {"process_group_backend": backend, "timeout": PATIENCE, no_sync: False}
    return WatchedDDP(gradient_as_bucket_view=True, **more)


def make_logger(t: TrainerConfig, run: Run, first_step: int = 0) -> Logger:
    """TensorBoard, Weights & Biases (which reads WANDB_MODE) or CSV, into the run folder.

    CSV and TensorBoard have each step once: what an interrupted run had logged of `first_step` (which counts from 0)
    and later is removed from the file, or hidden. Weights & Biases shows both.
    """
    if t.logger == "tensorboard":
        return TensorBoardLogger(run.folder, name="", version="logs", purge_step=first_step)
    if t.logger == "csv":
        return CSVLogger(run.folder / "logs", first_step)
    return WandbLogger(run.folder.name, run.folder, project="l-verse", id=run.id, resume="allow")


def run_name(config: Training, given: Mapping[str, str], kind: str) -> str:
    """The run's name: --name, else the config file's, with the prefix fake- for fake data."""
    files = [Path(source).stem for source in given.values() if not source.startswith("--")]
    stem = next(iter(files), kind)
    return config.trainer.name or (f"fake-{stem}" if config.data.fake_data else stem)


def quiet_lightning() -> None:
    """Hide advertisements, internals, and warnings about what the user asked for, of Lightning and PyTorch."""
    for message in (
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*The number of training batches.*",
        ".*Total length of `list` across ranks is zero.*",
        ".*ModelParallelStrategy.*experimental.*",
        ".*callbacks used to create the checkpoint need to be provided.*",  # earlier versions had others
        ".*all_gather_into_tensor. is deprecated.*",  # Lightning and PyTorch themselves call it
        ".*It is recommended to use .*sync_dist=True.*",  # the modules log values that are summed already
    ):
        warnings.filterwarnings("ignore", message)
    said = ("💡 Tip", "GPU available:", "TPU available:", "`Trainer.fit` stopped:", "Restoring states", "Restored all")
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(said))
    # `recompute` hands the compiler a context_fn, and what it computes again does nothing in place
    wrapping = logging.getLogger("torch._higher_order_ops.wrap")
    wrapping.addFilter(lambda record: "context_fn is passed" not in record.getMessage())
