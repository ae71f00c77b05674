"""Settings that differ from those of the checkpoint that training resumes from: applied, refused, or without effect.

Without this module, Lightning would restore the optimiser with its old rate and betas, whatever the settings say. What
happens to each setting is listed in docs/settings.md.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.optim.lr_scheduler import LambdaLR

from latent_verse.checkpoints.ckpt_files import CheckpointError, described
from latent_verse.config import as_plain, training_only
from latent_verse.config.messages import differences
from latent_verse.config.train import TrainBiARTConfig, TrainVAEConfig
from latent_verse.data.modules import TrainLoader
from latent_verse.training import runs

NO_EFFECT = {
    "codebook_init": "the codebook comes from the checkpoint",
    "bpe_vocab_size": "the tokenizer comes from the checkpoint",
    "pretrained_path": "the weights come from the checkpoint",
    "finetune": "the weights come from the checkpoint",
}
REFUSED = ("optimizer", "tokenizer", "text_len")  # and the model's shape; vae_path may move, but not change
LENGTH_AND_PROCESSES = ("epochs", "max_steps", "gpus", "nodes")  # they decide the rate too


def at_resume(section: str, leaf: str, config: TrainVAEConfig | TrainBiARTConfig) -> str:
    """What a changed setting of this section does: "refused", "no effect", "applied" or "applied by reruns".

    "applied": with --resume; a rerun of a run with --backup has to be given the same. "applied by reruns": by both.
    """
    if leaf in NO_EFFECT:
        return "no effect"
    if leaf in REFUSED or (section == "model" and leaf not in training_only(type(config.model))):
        return "refused"
    decides = (section in runs.COMPUTES and leaf not in runs.MACHINE_ONLY) or leaf in runs.TRAINER_COMPUTES
    return "applied" if decides else "applied by reruns"


def changes(file: Path, config: TrainVAEConfig | TrainBiARTConfig) -> list[str]:
    """One line for each setting that decides what is computed and differs from the checkpoint's, with its effect.

    Raises:
        CheckpointError: the optimiser is another, or ema_decay is off where the checkpoint's is on, or the reverse.
    """
    then, lines = described(file).get("run", {}), []
    for section, now in as_plain(config).items():
        old = {leaf: value for leaf, value in then.get(section, {}).items() if leaf in now}  # others are older
        for leaf in old:
            changed = differences({leaf: old[leaf]}, {leaf: now[leaf]})
            effect = at_resume(section, leaf, config)
            switched = leaf == "ema_decay" and bool(old[leaf]) != bool(now[leaf])
            if changed and (leaf == "optimizer" or switched):
                raise CheckpointError(
                    f"{leaf}: {now[leaf]}, but {file} was trained with {leaf}: {old[leaf]} and holds no state for it. "
                    f"Give --{leaf} {old[leaf]}, or start anew from its weights with --pretrained_path."
                )
            if changed and (effect in ("applied", "no effect") or leaf in LENGTH_AND_PROCESSES):
                reason = f" (no effect: {NO_EFFECT[leaf]})" if effect == "no effect" else ""
                lines += [f"{line}{reason}" for line in changed]
    return lines


class AppliedSettings(pl.Callback):
    """Apply the settings to the optimiser, schedule and position in the epoch that a checkpoint restored.

    With unchanged settings, every number stays as it was restored.
    """

    def __init__(self) -> None:
        self._groups: list[dict[str, Any]] = []  # what the settings say of each parameter group
        self._rate_then: float | None = None  # of lr_decay, before it was halved

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning has made the optimiser, and restores it after this."""
        groups = trainer.optimizers[0].param_groups
        self._groups = [copy.deepcopy({k: v for k, v in group.items() if k != "params"}) for group in groups]

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        loop = checkpoint["loops"]["fit_loop"]
        if not loop["epoch_loop.batch_progress"]["is_last_batch"]:  # max_steps cut the epoch short: it is not over
            for counts in loop["epoch_progress"].values():
                counts["processed"] = min(counts["processed"], counts["ready"] - 1)
        about = checkpoint.get("latent_verse", {})
        if about.get("plateau"):
            processes, run = len(checkpoint.get("process_states", [0])), about["run"]
            self._rate_then = run["optim"]["learning_rate"] * processes * run["data"]["batch_size"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is None:
            return
        for group, wanted in zip(trainer.optimizers[0].param_groups, self._groups, strict=True):
            rate, restored = wanted["lr"], group["lr"]
            group.update(wanted)
            if self._rate_then is not None and getattr(pl_module, "plateau", None) is not None:
                group["lr"] = restored if rate == self._rate_then else rate * restored / self._rate_then
        for config in trainer.lr_scheduler_configs:
            follow(config.scheduler, self._groups, trainer.global_step)
        stay_in_place(trainer)


def follow(schedule: LambdaLR, groups: list[dict[str, Any]], step: int) -> None:
    """Set a schedule, and its optimiser's learning rates, to what a run with these settings has at this step."""
    schedule.base_lrs = [group["initial_lr"] for group in groups]
    schedule.last_epoch = step
    rates = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, base, factor in rates:
        group["lr"] = base * factor(step)


def stay_in_place(trainer: pl.Trainer) -> None:
    """Count the epoch's batches so far anew, if batch_size, the number of processes or the data has changed."""
    loader, counts = trainer.train_dataloader, trainer.fit_loop.epoch_loop.batch_progress.current
    if isinstance(loader, TrainLoader) and loader.epoch == trainer.current_epoch and loader.done != counts.ready:
        behind = counts.ready - counts.completed  # a backup is written before its batch counts as completed
        counts.ready = counts.started = counts.processed = loader.done
        counts.completed = loader.done - behind
