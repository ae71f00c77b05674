"""Every setting of train_vae.py, eval_vae.py and train_biart.py, once, and the rules across them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Optional, Tuple, TypeVar

from latent_verse.config.datasets import (
    IMAGE_DATASETS,
    PAIR_DATASETS,
    Layout,
    check_effects,
    check_files,
    check_local,
)
from latent_verse.config.models import AugVAEConfig, BiARTConfig, BiARTModelConfig
from latent_verse.config.settings import (
    ConfigError,
    SamplingSettings,
    Settings,
    check_rules,
    require,
    same,
    setting,
    shown,
    training_only,
)

# short names of precision, and Lightning's
PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
PRECISION_NAMES = (*PRECISIONS, *PRECISIONS.values(), "16-true", "bf16-true", "transformer-engine")
CPU_PROCESSES = 16  # that any machine may start
GENERATED = 10**8  # images of a generated dataset
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")


@dataclass(frozen=True)
class ImageDataConfig(Settings):
    """The images, and how they are loaded."""

    train_dir: Optional[str] = setting(
        None, "training images: folder; webdataset: folder, pattern or URL", path="shards"
    )
    val_dir: Optional[str] = setting(
        None, "validation images, in the same form as train_dir; default none", path="shards"
    )
    test_dir: Optional[str] = setting(None, "images for eval_vae.py; default val_dir", path="shards")
    dataset: Optional[str] = setting(
        None, "layout: class folders, any folder, tar shards or generated; default imagefolder", IMAGE_DATASETS
    )
    fake_data: bool = setting(False, "same as --dataset fake: a short smoke test without any images")
    web_dataset: bool = setting(False, "same as --dataset webdataset", hidden=True)
    dataset_size: Optional[int] = setting(
        None, "images per epoch: webdataset (default all), fake (512)", at_least=1, at_most=10**12
    )
    img_size: Optional[int] = setting(None, "the original's second name for resolution; must equal it", hidden=True)
    resize_ratio: float = setting(0.75, "least share of the largest square in a training crop", above=0, at_most=1)
    batch_size: int = setting(8, "images per step and process", at_least=1, at_most=2**16)
    num_workers: Optional[int] = setting(
        None, "loader processes per training process; default by machine", at_least=0, at_most=512
    )
    prefetch_factor: int = setting(2, "batches that each loader process prefetches", at_least=1, at_most=1024)
    shuffle_buffer: int = setting(1000, "size of webdataset's shuffle buffer, in samples", at_least=1, at_most=10**7)
    allow_pipe: bool = setting(False, "webdataset: run the shell command of --train_dir 'pipe:...'; as a flag only")


@dataclass(frozen=True)
class TrainerConfig(Settings):
    """The run: machine, length, logs and checkpoints."""

    name: Optional[str] = setting(None, "run folder in log_dir; default the config file's name (eval_vae: eval-<run>)")
    log_dir: str = setting("results", "folder that holds the run folders", path=True)
    seed: int = setting(42, "seed for weights, data order and augmentation", at_least=0, below=2**32)
    gpus: int = setting(
        1, "number of GPUs on each node, which CUDA_VISIBLE_DEVICES chooses; 0 is the CPU", at_least=0, at_most=128
    )
    nodes: int = setting(1, "number of machines", at_least=1, at_most=2**16)
    gpu_dist: Optional[bool] = setting(None, "the original's flag for several GPUs; follows from gpus", hidden=True)
    accelerator: str = setting("auto", "device type; with cpu, gpus is the number of processes", ACCELERATORS)
    strategy: str = setting("auto", "auto, ddp: a copy of the model per process; fsdp: shards", ("auto", "ddp", "fsdp"))
    precision: str = setting("32", "numeric precision, by short name or Lightning's", PRECISION_NAMES)
    epochs: int = setting(100, "passes over the training data", at_least=1)
    max_steps: int = setting(-1, "stop after this many optimiser steps; -1 means no limit", at_least=-1)
    limit_train_batches: Optional[float] = setting(None, "batches per epoch: count, or fraction below 1", above=0)
    limit_val_batches: Optional[float] = setting(None, "batches per validation: count, or fraction below 1", at_least=0)
    val_percent_check: float = setting(100.0, "limit_val_batches in percent", at_least=0, at_most=100, hidden=True)
    num_sanity_val_steps: int = setting(0, "validation batches to run before training, as a check", at_least=0)
    accumulate_grad_batches: int = setting(1, "batches whose gradients are accumulated for one step", at_least=1)
    gradient_clip_val: Optional[float] = setting(None, "clip gradients to this norm; default no clipping", above=0)
    compile: Optional[bool] = setting(None, "use torch.compile; default on for training on a GPU with Triton")
    deterministic: bool = setting(False, "resume exactly on a GPU too: steps repeat bit for bit, but are slower")
    activation_checkpointing: bool = setting(False, "save memory: recompute norms and activations")
    logger: str = setting("tensorboard", "where metrics are logged", ("tensorboard", "wandb", "csv"))
    log_every_n_steps: int = setting(10, "steps between logged training metrics", at_least=1)
    log_images: bool = setting(False, "log grids of images, also as PNG files in the run folder")
    image_log_steps: int = setting(1000, "steps between logged image grids", at_least=1)
    refresh_rate: int = setting(1, "steps between updates of the progress bar; 0 hides it", at_least=0)
    backup: bool = setting(False, "save the whole state regularly; if interrupted, rerun the command to resume")
    backup_steps: int = setting(1000, "steps between backups", at_least=1)
    backup_dir: Optional[str] = setting(None, "folder for backups of runs; default in the run folder", path=True)
    resume: bool = setting(False, "resume training from ckpt_path; reruns with backup need neither")
    ckpt_path: Optional[str] = setting(None, "checkpoint or run folder to resume, evaluate or export", path="hub")
    debug: bool = setting(False, "100 batches per epoch, backups and grids every 10 steps, anomaly detection")


@dataclass(frozen=True)
class VAEOptimConfig(Settings):
    """Optimiser of AugVAE, and how its codebook starts."""

    learning_rate: float = setting(4.5e-6, "base learning rate; it is multiplied by processes x batch_size", above=0)
    optimizer: str = setting("adamw", "adamw (as released), or muon for convolutions", ("adamw", "muon"))
    lr_decay: bool = setting(False, "the original's schedule: halve the rate when the training loss stops falling")
    lr_cosine: bool = setting(False, "warm up, then decay to zero along a cosine over the whole run")
    warmup_steps: int = setting(0, "linear warm-up steps of lr_cosine", at_least=0)
    weight_decay: float = setting(1e-5, "weight decay of either optimizer", at_least=0)
    betas: Tuple[float, float] = setting((0.9, 0.999), "beta1 and beta2 of AdamW", at_least=0, below=1)
    codebook_init: str = setting("normal", "normal: noise, as released; data: encoder outputs", ("normal", "data"))
    pretrained_path: Optional[str] = setting(None, "AugVAE to start from: checkpoint, folder or hub id", path="hub")
    finetune: bool = setting(False, "train AugVAE-SL at the one level in attn_resolutions, from pretrained_path")


@dataclass(frozen=True)
class VAELossConfig(Settings):
    """Loss of AugVAE: reconstruction + codebook_weight x commitment."""

    loss_type: str = setting("mse", "reconstruction loss", ("mse", "l1", "smooth_l1", "lpips_l1", "lpips_l2"))
    p_loss_weight: float = setting(0.1, "weight of LPIPS, added to l1 in lpips_l1, to mse in lpips_l2", above=0)
    codebook_weight: float = setting(1.0, "weight of the commitment loss, on top of quant_beta", at_least=0)


@dataclass(frozen=True)
class TrainVAEConfig:
    """Every setting of train_vae.py."""

    model: AugVAEConfig = field(default_factory=AugVAEConfig)
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    optim: VAEOptimConfig = field(default_factory=VAEOptimConfig)
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass(frozen=True)
class ReconstructionEvalConfig(Settings):
    """What eval_vae.py measures and writes."""

    eval_images: Optional[int] = setting(None, "number of images to evaluate; default all", at_least=1)
    save_images: int = setting(64, "number of images to write to original_images/ and generated_images/", at_least=0)


@dataclass(frozen=True)
class EvalVAEConfig(TrainVAEConfig):
    """Every setting of eval_vae.py: those of train_vae.py, so that its YAML files serve, and `eval`."""

    eval: ReconstructionEvalConfig = field(default_factory=ReconstructionEvalConfig)


@dataclass(frozen=True)
class FrozenVAEConfig(Settings):
    """The AugVAE whose codes BiART reads and writes. It is not trained."""

    vae_path: Optional[str] = setting(None, "AugVAE: run folder, checkpoint, saved folder or hub id", path="hub")


@dataclass(frozen=True)
class TextConfig(Settings):
    """From captions to ids."""

    tokenizer: str = setting("clip", "CLIP's vocabulary, or a BPE vocabulary trained on the captions", ("clip", "bpe"))
    bpe_vocab_size: int = setting(4096, "largest vocabulary of a bpe tokenizer", at_least=256, at_most=2**20)
    text_len: int = same(BiARTConfig, "text_len")
    text_too_long: str = setting("truncate", "cut captions that are too long, or raise an error", ("truncate", "error"))


@dataclass(frozen=True)
class PairDataConfig(ImageDataConfig):
    """The images with captions, and how they are loaded."""

    train_dir: Optional[str] = same(ImageDataConfig, "train_dir", None, "training pairs, images, tar shards or codes")
    val_dir: Optional[str] = same(ImageDataConfig, "val_dir", None, "validation data; karpathy: default train_dir")
    dataset: Optional[str] = setting(
        None,
        "layout: name.jpg with name.txt, caption files, tar shards, codes or generated; default pairs",
        PAIR_DATASETS,
    )
    train_captions: Optional[str] = setting(
        None, "captions file of coco (default ../annotations/captions_<folder>.json), karpathy or table", path=True
    )
    val_captions: Optional[str] = setting(None, "validation captions; karpathy: default train_captions", path=True)
    world: str = setting("small", "shapes: small (32 px, 1 or 2 objects) or full (64 px, 1 to 3)", ("small", "full"))
    dataset_size: Optional[int] = same(
        ImageDataConfig, "dataset_size", None, "pairs per epoch: shapes (default 10000), fake (512), webdataset (all)"
    )
    val_size: Optional[int] = setting(
        None, "validation pairs for shapes (default 256) or fake (64)", at_least=1, at_most=10**7
    )


@dataclass(frozen=True)
class BiARTOptimConfig(Settings):
    """Optimiser and schedule: a linear warm-up, then a cosine over the whole run."""

    pretrained_path: Optional[str] = same(
        VAEOptimConfig, "pretrained_path", None, "BiART to start from: bundle, run folder, checkpoint or hub id"
    )
    learning_rate: float = same(VAEOptimConfig, "learning_rate", 3e-4, "peak learning rate, used as given")
    optimizer: str = same(VAEOptimConfig, "optimizer", "adamw", "adamw, or muon for the matrices of the blocks")
    muon_learning_rate: Optional[float] = setting(
        None, "peak learning rate of muon, on AdamW's scale (update RMS 0.2 x rate); default learning_rate", above=0
    )
    muon_momentum: float = setting(0.95, "momentum of muon", at_least=0, at_most=0.9999)
    weight_decay: float = same(VAEOptimConfig, "weight_decay", 0.05, "weight decay, of linear layers' weights only")
    betas: Tuple[float, float] = same(VAEOptimConfig, "betas", (0.9, 0.95))
    warmup_steps: int = same(VAEOptimConfig, "warmup_steps", 0, "linear warm-up steps")
    min_lr_ratio: float = setting(0.1, "final learning rate as a share of the peak; 1: constant", at_least=0, at_most=1)
    ema_decay: float = setting(0.0, "EMA decay of the weights to validate and export; 0: no EMA", at_least=0, below=1)


@dataclass(frozen=True)
class BiARTLossConfig(Settings):
    """Cross-entropy of the target plus reference_weight x that of the reference, in both directions."""

    text_to_image_share: float = setting(0.5, "share of each batch trained text-to-image", at_least=0, at_most=1)
    reference_weight: float = setting(0.1, "weight of the loss on the reference tokens", at_least=0)
    reference_dropout: float = setting(0.1, "share of pairs without reference, for guidance", at_least=0, at_most=1)
    word_dropout: float = setting(0.0, "share of words hidden from later words", at_least=0, at_most=0.5)
    code_dropout: float = setting(0.0, "share of codes hidden from later codes", at_least=0, at_most=0.5)
    text_loss_weight: float = setting(1.0, "loss weight of text; for one direction only: text_to_image_share", above=0)
    image_loss_weight: float = setting(1.0, "loss weight of image codes", above=0)
    loss_chunk: Optional[int] = setting(None, "tokens per slice of logits, to save memory; default all", at_least=1)


@dataclass(frozen=True)
class SamplingConfig(SamplingSettings):
    """Samples that are generated and logged during training; they have no effect on training."""

    num_samples: int = setting(8, "validation pairs to generate from, both ways; 0 for none", at_least=0, at_most=4096)
    num_judged: int = setting(
        32, "shapes: scenes whose samples are checked against the truth; 0: none", at_least=0, at_most=10**5
    )
    sample_every_n_epochs: int = setting(1, "epochs between samples; log_images: every image_log_steps too", at_least=1)


@dataclass(frozen=True)
class CodesConfig(Settings):
    """Encoding a dataset once, so that training reads codes (--dataset codes) and runs no AugVAE."""

    extract_codes: Optional[str] = setting(None, "do not train: write train/ and val/ codes to this folder", path=True)
    crops_per_image: int = setting(
        1, "crops per training image: centre, then random ones (resize_ratio)", at_least=1, at_most=1000
    )
    shard_size: int = setting(10000, "images per shard of codes", at_least=1, at_most=10**7)


@dataclass(frozen=True)
class BundleConfig(Settings):
    """The folder that generation needs. Every run writes one at its end, to <run folder>/bundle."""

    export: Optional[str] = setting(None, "do not train: write the bundle of ckpt_path to this folder", path=True)


@dataclass(frozen=True)
class TrainBiARTConfig:
    """Every setting of train_biart.py."""

    model: BiARTModelConfig = field(default_factory=BiARTModelConfig)
    vae: FrozenVAEConfig = field(default_factory=FrozenVAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: PairDataConfig = field(default_factory=PairDataConfig)
    optim: BiARTOptimConfig = field(default_factory=BiARTOptimConfig)
    loss: BiARTLossConfig = field(default_factory=BiARTLossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    codes: CodesConfig = field(default_factory=CodesConfig)
    bundle: BundleConfig = field(default_factory=BundleConfig)


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
