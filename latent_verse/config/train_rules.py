"""What the settings of training mean together: other names replaced, contradictions and what has no effect named."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import TypeVar

from latent_verse.config.datasets import IMAGE_DATASETS, PAIR_DATASETS, Layout, check_effects, check_files, check_local
from latent_verse.config.messages import ConfigError, shown
from latent_verse.config.models import AugVAEConfig
from latent_verse.config.settings import check_rules, require, training_only
from latent_verse.config.train import (
    PRECISIONS,
    EvalVAEConfig,
    ImageDataConfig,
    PairDataConfig,
    TrainBiARTConfig,
    TrainerConfig,
    TrainVAEConfig,
)

CPU_PROCESSES = 16  # that any machine may start
GENERATED = 10**8  # images of a generated dataset


Data = TypeVar("Data", bound=ImageDataConfig)

NEEDS = {
    "resume": "ckpt_path",
    "export": "ckpt_path",
    "finetune": "pretrained_path",
    "warmup_steps": "lr_cosine",  # of train_vae: train_biart has no lr_cosine, and always warms up
    "muon_learning_rate": "optimizer=muon",
    "guidance": "reference_dropout",
    "crops_per_image": "extract_codes",
}
EXCLUDES = {
    "val_percent_check": "limit_val_batches",
    "lr_decay": "lr_cosine",
    "export": "extract_codes",
    "extract_codes": "dataset=codes",
}


def resolve_trainer(t: TrainerConfig, optimizer: str = "adamw") -> TrainerConfig:
    """Replace the original's names, short names and `debug` by the settings that they stand for.

    The saved configuration then has one name for each thing, and can be read again.

    Raises:
        ConfigError: settings that contradict each other.
    """
    check_rules([t], NEEDS, EXCLUDES)
    if t.max_steps == 0:
        raise ConfigError("max_steps is 0; give at least 1, or -1 for no limit.")
    if t.gpu_dist is False and t.gpus * t.nodes > 1:
        raise ConfigError(f"gpu_dist: false contradicts gpus {t.gpus} on {t.nodes} node(s). Drop it, or set gpus: 1.")
    if optimizer == "muon" and t.strategy == "fsdp":
        raise ConfigError("optimizer: muon needs whole matrices, which strategy: fsdp shards. Use ddp, or adamw.")
    check_processes(t.gpus, t.accelerator)
    limit_train = batch_limit("limit_train_batches", t.limit_train_batches)
    limit_val = batch_limit("limit_val_batches", t.limit_val_batches)
    if t.val_percent_check < 100:
        limit_val = t.val_percent_check / 100
    if t.debug:
        limit_train, limit_val = (100 if limit is None else limit for limit in (limit_train, limit_val))
    return replace(
        t,
        strategy="ddp" if t.gpu_dist and t.strategy == "auto" else t.strategy,
        precision=PRECISIONS.get(t.precision, t.precision),
        val_percent_check=100.0,
        limit_train_batches=limit_train,
        limit_val_batches=limit_val,
        backup_steps=min(t.backup_steps, 10) if t.debug else t.backup_steps,
        image_log_steps=min(t.image_log_steps, 10) if t.debug else t.image_log_steps,
    )


def check_processes(gpus: int, accelerator: str) -> None:
    """Refuse more processes on the CPU than it has any use for: each takes the memory of a whole run.

    Raises:
        ConfigError: naming both numbers.
    """
    most = max(CPU_PROCESSES, os.cpu_count() or 1)
    if accelerator == "cpu" and gpus > most:
        raise ConfigError(f"gpus: {gpus} processes with accelerator: cpu, but {most} are the most on this machine.")


def batch_limit(name: str, value: float | None) -> float | int | None:
    """A count (1 or more) as int, a share (below 1) as float: what Lightning tells apart by type."""
    if value is None or value < 1:
        return value
    if value != int(value):
        raise ConfigError(f"{name} is {value}; give a count of batches (1, 2, ...) or a share between 0 and 1.")
    return int(value)


def resolve_data(d: Data, resolution: int | None, default: str = "imagefolder") -> Data:
    """Replace the original's names for the layout of the data by `dataset`, which is `default` where none is given.

    A `resolution` of None is not known yet: a checkpoint decides it.

    Raises:
        ConfigError: settings that contradict each other.
    """
    if d.web_dataset and not d.fake_data and d.dataset not in (None, "webdataset"):
        raise ConfigError(f"dataset: {d.dataset} contradicts web_dataset: true. Give one of them.")
    if resolution is not None and d.img_size not in (None, resolution):
        raise ConfigError(f"img_size {d.img_size} contradicts resolution {resolution}; they must be equal: give one.")
    # fake_data goes first: the smoke test of any recipe
    dataset = "fake" if d.fake_data else "webdataset" if d.web_dataset else d.dataset or default
    if PAIR_DATASETS.get(dataset, Layout(("dir",))).generated and (d.dataset_size or 0) > GENERATED:
        raise ConfigError(f"dataset_size is {d.dataset_size}; of dataset {dataset} it must be at most {GENERATED}.")
    check_local(d, dataset, "train_dir", "val_dir", "test_dir")
    return replace(d, dataset=dataset, fake_data=dataset == "fake", web_dataset=dataset == "webdataset")


def check_pipes(d: ImageDataConfig, given: Mapping[str, str]) -> None:
    """Refuse shell commands as sources of data unless flags give them, and allow them: a file may be someone else's.

    Raises:
        ConfigError: naming the setting, and the flag or file that it was given by.
    """
    folders = {name: getattr(d, name) or "" for name in ("train_dir", "val_dir", "test_dir")}
    pipes = [name for name, folder in folders.items() if folder.strip().startswith("pipe:")]
    if pipes and not d.allow_pipe:
        command = shown(folders[pipes[0]], 200)
        raise ConfigError(f"{pipes[0]}: {command} is a shell command, which runs only with --allow_pipe.")
    for name in [*pipes, *(["allow_pipe"] if d.allow_pipe else [])]:
        place = given.get(name, "elsewhere")
        if not place.startswith("--"):
            raise ConfigError(
                f"{name}: shell commands are allowed on the command line only, not in {place}. Give --{name} there."
            )


def limit_fake_data(t: TrainerConfig, given: Mapping[str, str]) -> TrainerConfig:
    """Bound a run on generated images to a few batches and keep no backups, unless flags ask otherwise.

    A recipe's own length and backups (YAML) are meant for images: a second smoke test would find the first finished.
    """
    flags = {leaf for leaf, source in given.items() if source.startswith("--")}
    t = replace(t, backup=t.backup and "backup" in flags)
    if flags & {"epochs", "max_steps", "limit_train_batches", "limit_val_batches", "val_percent_check", "debug"}:
        return t
    return replace(t, epochs=1, limit_train_batches=2, limit_val_batches=1)


def resolve_train_vae(config: TrainVAEConfig, given: Mapping[str, str]) -> TrainVAEConfig:
    """The configuration of a run of train_vae, as far as it is known before a checkpoint or the machine is examined.

    Raises:
        ConfigError: a configuration that could never work, before anything is built or written.
    """
    o = config.optim
    check_rules([o], NEEDS, EXCLUDES)
    t = resolve_trainer(config.trainer, o.optimizer)
    data = resolve_data(config.data, None if o.pretrained_path else config.model.resolution)
    check_pipes(data, given)
    if data.fake_data:
        t = limit_fake_data(t, given)
    check_files(IMAGE_DATASETS, data, "train")
    for name in ("in_channels", "out_channels"):
        if getattr(config.model, name) != 3:
            raise ConfigError(f"{name} is {getattr(config.model, name)}, but images are read as RGB: it must be 3.")
    levels = list(config.model.attn_resolutions)
    if o.finetune and len(levels) != 1:
        raise ConfigError(f"finetune keeps one level, but attn_resolutions is {levels}. Give that one, such as 32.")
    if o.pretrained_path:  # the checkpoint decides the shape, and its codebook has begun already
        o = replace(o, codebook_init="normal")
    else:
        config.model.validate()
    return replace(config, data=data, optim=o, trainer=t)


def resolve_eval_vae(config: EvalVAEConfig, given: Mapping[str, str] | None = None) -> EvalVAEConfig:
    """The configuration of eval_vae; `with_evaluated_shape` adds the model section, which the checkpoint decides.

    Raises:
        ConfigError: a configuration that could never work.
    """
    t, d = resolve_trainer(config.trainer), resolve_data(config.data, None)
    check_pipes(d, given or {})
    require([t], "ckpt_path", hint="Name the checkpoint, folder or hub id of the AugVAE.")
    if not d.fake_data:
        require([d], "test_dir", "val_dir", hint="Name a folder of images, or try --fake_data.")
    return replace(config, data=d, trainer=t)


def with_pretrained_shape(config: TrainVAEConfig, pretrained: AugVAEConfig, given: Collection[str]) -> TrainVAEConfig:
    """The configuration of a run that starts from a pretrained AugVAE: its shape, and the given training settings.

    Raises:
        ConfigError: settings that were `given` contradict the pretrained model (defaults yield), or it lacks the level.
    """
    o, there = config.optim, f"pretrained_path {config.optim.pretrained_path}"
    if o.finetune and pretrained.single_level is not None:
        single = pretrained.single_level
        raise ConfigError(f"{there} is an AugVAE-SL (level {single}); finetune needs an AugVAE-ML. Leave finetune out.")
    free = training_only(AugVAEConfig)
    fixed = {f.name for f in fields(AugVAEConfig)} - free - {"double_z"}
    if o.finetune:
        fixed -= {"attn_resolutions", "single_level"}
    contradictions = [
        f"{name}: {getattr(config.model, name)} in the settings, {getattr(pretrained, name)} in the checkpoint"
        for name in sorted(fixed & set(given))
        if getattr(config.model, name) != getattr(pretrained, name)
    ]
    if contradictions:
        raise ConfigError(f"{there} has another shape. Drop these settings:\n  " + "\n  ".join(contradictions))
    check_resolution("img_size", config.data.img_size, pretrained.resolution, there)
    model = replace(pretrained, **{name: getattr(config.model, name) for name in free & set(given)})
    if o.finetune:  # the recipe names the level to keep, and can be run again
        (level,) = config.model.attn_resolutions
        if level not in pretrained.attn_resolutions:
            raise ConfigError(f"attn_resolutions: {there} has levels {list(pretrained.attn_resolutions)}, not {level}.")
        model = replace(model, attn_resolutions=(level,))
    return replace(config, model=model)


def with_evaluated_shape(config: EvalVAEConfig, model: AugVAEConfig, given: Collection[str]) -> EvalVAEConfig:
    """The configuration of an evaluation, with the shape of the model taken from the checkpoint.

    Other model settings of a YAML file that serves training too have no effect.

    Raises:
        ConfigError: resolution or img_size was given and is another.
    """
    there = f"ckpt_path {config.trainer.ckpt_path}"
    if "resolution" in given:
        check_resolution("resolution", config.model.resolution, model.resolution, there)
    check_resolution("img_size", config.data.img_size, model.resolution, there)
    return replace(config, model=model)


def check_resolution(name: str, value: int | None, resolution: int, there: str) -> None:
    """Refuse `value` of the setting `name` if the model that `there` names takes images of another resolution.

    Raises:
        ConfigError: naming the setting, both resolutions and the model.
    """
    if value not in (None, resolution):
        raise ConfigError(f"{name}: {value}, but {there} takes images of {resolution} px. Drop it.")


def idle_flags_vae(config: TrainVAEConfig, given: Mapping[str, str], uses_lpips: bool) -> list[str]:
    """Flags that were given but have no effect, each with the reason."""
    idle = {
        "p_loss_weight": (not uses_lpips, f"loss_type {config.loss.loss_type} has no LPIPS"),
        "resize_ratio": (config.data.fake_data, "the data is fake"),
        "codebook_init": (bool(config.optim.pretrained_path), "the codebook comes from pretrained_path"),
    }
    return idle_flags(config, given, idle)


def idle_flags(
    config: TrainVAEConfig | TrainBiARTConfig, given: Mapping[str, str], more: dict[str, tuple[bool, str]]
) -> list[str]:
    """Flags given without effect, as `flag: reason`: those of all training, and `more`, {flag: (idle?, reason)}."""
    t = config.trainer
    idle = {
        "backup_steps": (not t.backup, "backup is off"),
        "backup_dir": (not t.backup, "backup is off"),
        "image_log_steps": (not t.log_images, "log_images is off"),
        "deterministic": (t.gpus == 0 or t.accelerator == "cpu", "a CPU's steps repeat bit for bit anyway"),
        **more,
        "shuffle_buffer": (not config.data.web_dataset, "the data is not webdataset"),
        "strategy": (t.gpus * t.nodes <= 1 and t.strategy != "fsdp", "one process trains"),
    }
    return [f"{n}: {why}" for n, (off, why) in idle.items() if off and given.get(n, "").startswith("--")]


def resolve_train_biart(config: TrainBiARTConfig, given: Mapping[str, str]) -> TrainBiARTConfig:
    """As `resolve_train_vae`, for train_biart."""
    o, c = config.optim, config.codes
    t = resolve_trainer(config.trainer, o.optimizer)
    if o.pretrained_path and t.resume:
        raise ConfigError("pretrained_path starts a new run, and resume does not: give one of them.")
    check_rules([config.bundle, t], NEEDS)
    check_rules([config.bundle, c], {}, EXCLUDES)  # what extraction itself needs does not matter to an export
    if config.bundle.export:
        return replace(config, trainer=t)
    data = resolve_pairs(config.data)
    check_pipes(data, given)
    check_rules([o, c, data, config.loss, config.sampling], NEEDS, EXCLUDES)
    if data.fake_data:
        t = limit_fake_data(t, given)
    else:
        hint = "Name the AugVAE of train_vae.py with vae_path. For a smoke test try --fake_data."
        require([config.vae, o], "vae_path", "pretrained_path", hint=hint)
    if c.crops_per_image > 1 and data.dataset == "shapes":
        raise ConfigError("random crops would cut off shapes that the captions name: leave crops_per_image at 1.")
    return replace(config, data=data, trainer=t)


def idle_flags_biart(config: TrainBiARTConfig, given: Mapping[str, str]) -> list[str]:
    """As `idle_flags_vae`, for train_biart."""
    dataset, tokenizer = config.data.dataset or "pairs", config.text.tokenizer
    layout = PAIR_DATASETS[dataset]
    ready = config.trainer.resume or config.optim.pretrained_path or dataset == "codes"
    source = "it comes from the checkpoint, pretrained_path or codes" if ready else f"it is {tokenizer}"
    idle = {
        "bpe_vocab_size": (bool(ready) or tokenizer != "bpe", f"the tokenizer is not trained: {source}"),
        "resize_ratio": (not layout.has_effect("resize_ratio"), f"dataset {dataset} is not cropped"),
        "world": (not layout.has_effect("world"), "the data is not shapes"),
        "val_size": (not layout.has_effect("size"), f"dataset {dataset} is validated on all its pairs"),
        "muon_momentum": (config.optim.optimizer != "muon", "optimizer is not muon"),
    }
    return idle_flags(config, given, idle)


def resolve_pairs(d: PairDataConfig) -> PairDataConfig:
    """As `resolve_data`, for images with captions."""
    d = resolve_data(d, d.img_size, default="pairs")
    check_files(PAIR_DATASETS, d, "train")
    if not PAIR_DATASETS[d.dataset or "pairs"].generated:  # these make a smoke test of any recipe
        for split in ("train", "val"):
            check_effects(PAIR_DATASETS, d, split, ["captions"])
    return d
