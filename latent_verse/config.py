"""Every setting of L-Verse, once: typed dataclasses with defaults, help and validation.

Each field's metadata holds its one-line help and, where there is a fixed set, its choices; `latent_verse.cli` makes
flags and YAML keys from them. Leaf names are unique over the whole tree of a script, so that a leaf is also a flag.
This file imports nothing but the standard library: the models can use it without YAML or argparse being loaded.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any, Optional, Tuple  # OmegaConf reads these annotations at run time


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another. The message says what to do."""


def setting(default, help: str, choices: tuple | None = None):
    """A dataclass field with its one-line help and, where there is a fixed set, its allowed values."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# ------------------------------------------------------------------------------------------------------------ AugVAE


@dataclass(frozen=True)
class AugVAEConfig:
    """Shape of AugVAE, multi-level (-ML) or, with `single_level`, its one-level fine-tune (-SL); paper section 3.1."""

    in_channels: int = setting(3, "channels of the input picture")
    out_channels: int = setting(3, "channels of the reconstruction")
    hidden_dim: int = setting(128, "width of the first convolution; a multiple of 32 with norm group")
    ch_mult: Tuple[int, ...] = setting((1, 2, 4), "width multipliers of the outer encoder and decoder, one a stage")
    num_res_blocks: int = setting(2, "residual blocks a stage")
    resolution: int = setting(256, "side of the picture in pixels")
    attn_resolutions: Tuple[int, ...] = setting((64, 32, 16, 8), "sides of the code grids (levels), largest first")
    norm: str = setting(
        "group",
        "group: GroupNorm(32), as released; pixel: each position by itself, so that codes do not depend on far pixels",
        ("group", "pixel"),
    )
    use_attn: bool = setting(False, "self-attention at the levels and in the middle of each network")
    dropout: float = setting(0.0, "dropout in the residual blocks")
    double_z: bool = setting(False, "original's flag for KL models; only false can work with a codebook")
    z_channels: int = setting(256, "channels of the feature maps between the networks")
    codebook_dim: int = setting(256, "length of a code vector")
    num_tokens: int = setting(8192, "codes in the codebook")
    quant_beta: float = setting(0.25, "weight of the commitment loss")
    quant_ema_decay: float = setting(0.99, "decay of the codebook's moving averages")
    quant_ema_eps: float = setting(1e-5, "Laplace smoothing of the cluster sizes")
    restart_threshold: float = setting(
        0.0, "restart codes whose average use a batch falls below this, from encoder outputs; 0 never does (release)"
    )
    single_level: Optional[int] = setting(None, "keep only this level's codes (AugVAE-SL); null keeps all (AugVAE-ML)")

    def __post_init__(self):
        for name in ("ch_mult", "attn_resolutions"):  # lists from YAML become hashable
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def validate(self) -> None:
        """Refuse a shape that cannot be built. Called by AugVAE, not on creation: a -SL recipe names only its level.

        Raises:
            ConfigError: naming the key, its value and the remedy.
        """
        self.check_values()
        if self.norm == "group" and self.hidden_dim % 32:
            raise ConfigError(f"hidden_dim {self.hidden_dim} is not a multiple of 32, the group count of GroupNorm.")
        first = self.resolution / 2 ** (len(self.ch_mult) - 1)
        levels = self.attn_resolutions
        if not levels or levels[0] != first:
            raise ConfigError(
                f"ch_mult {list(self.ch_mult)} halves resolution {self.resolution} {len(self.ch_mult) - 1} times, to "
                f"{first:g}, but attn_resolutions {list(levels)} begins with {levels[0] if levels else 'nothing'}. "
                f"Make the first level {first:g}, or change ch_mult or resolution."
            )
        for above, level in itertools.pairwise(levels):
            if level * 2 != above:
                raise ConfigError(
                    f"attn_resolutions {list(levels)}: each level must be half the one before; {level} follows {above}."
                )
        if self.single_level is not None and self.single_level not in levels:
            raise ConfigError(f"single_level {self.single_level} is not one of the levels {list(levels)}.")

    def check_values(self) -> None:
        """The part of `validate` that looks at each setting by itself: all there is to check of a -SL recipe.

        Raises:
            ConfigError: as `validate`.
        """
        if self.double_z:
            raise ConfigError("double_z: true cannot work: a codebook has no variance to encode. Set double_z: false.")
        at_least_one = (
            "in_channels out_channels hidden_dim num_res_blocks resolution z_channels codebook_dim num_tokens"
        )
        for name in at_least_one.split():
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.norm not in ("group", "pixel"):
            raise ConfigError(f"norm is {self.norm!r}; it must be group or pixel.")
        if any(m < 1 for m in self.ch_mult) or not self.ch_mult:
            raise ConfigError(f"ch_mult is {list(self.ch_mult)}; it needs one multiplier >= 1 a stage.")
        for name, low, high in (
            ("dropout", 0, 1),
            ("quant_beta", 0, float("inf")),
            ("quant_ema_decay", 0, 1),
            ("quant_ema_eps", 0, 1),
            ("restart_threshold", 0, float("inf")),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie between {low} and {high}.")


# ------------------------------------------------------------------------------------------------------------- BiART


@dataclass(frozen=True)
class BiARTVariant:
    """What may differ between two transformers of one size. A run's settings and the transformer's own both have it."""

    pos_by_modality: bool = setting(
        False, "count positions within the text and within the image, so that a place means the same in both directions"
    )
    embd_pdrop: float = setting(0.0, "dropout after the embeddings")
    resid_pdrop: float = setting(0.0, "dropout on each residual branch")
    attn_pdrop: float = setting(0.0, "dropout on the attention weights")


@dataclass(frozen=True)
class BiARTConfig(BiARTVariant):
    """The joint transformer (paper section 3.2). Vocabulary and lengths follow from the tokenizer and the AugVAE."""

    text_vocab: int = setting(49408, "text ids the tokenizer can produce")
    image_vocab: int = setting(8192, "codes in the AugVAE's codebook")
    text_len: int = setting(64, "tokens of a caption; shorter ones are padded")
    image_len: int = setting(1024, "codes of one image")
    n_layer: int = setting(12, "transformer blocks")
    n_head: int = setting(12, "attention heads")
    n_embd: int = setting(768, "width of the residual stream, a multiple of n_head")

    def __post_init__(self):
        for name in ("text_vocab", "image_vocab", "text_len", "image_len", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.n_embd % self.n_head:
            raise ConfigError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}.")


# Sizes by name, layers x channels. They are our choice: no source we could read gives the depth and width of the
# paper's BiART.
PRESETS = {
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 192},  # minutes on a CPU
    "12x768": {"n_layer": 12, "n_head": 12, "n_embd": 768},  # GPT-2 small
    "24x1024": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # GPT-2 medium
}


def _instead_of_preset(name: str) -> Any:
    """The setting `name` of BiARTConfig for a run that takes its size from a preset: null keeps the preset's."""
    (of_model,) = (f for f in dataclasses.fields(BiARTConfig) if f.name == name)
    return field(
        default=None, metadata={**of_model.metadata, "help": f"{of_model.metadata['help']}; default the preset's"}
    )


@dataclass(frozen=True)
class BiARTModelConfig(BiARTVariant):
    """What a run says of the transformer's shape; the rest of it follows from tokenizer and AugVAE."""

    preset: str = setting("12x768", "depth and width, layers x channels; n_* change single ones", tuple(PRESETS))
    n_layer: Optional[int] = _instead_of_preset("n_layer")
    n_head: Optional[int] = _instead_of_preset("n_head")
    n_embd: Optional[int] = _instead_of_preset("n_embd")

    def resolve(self, text_vocab: int, image_vocab: int, text_len: int, image_len: int) -> BiARTConfig:
        """The transformer's whole shape.

        Raises:
            ConfigError: n_embd is not a multiple of n_head, or a number is below 1.
        """
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "preset"}
        size = {name: preset if own[name] is None else own[name] for name, preset in PRESETS[self.preset].items()}
        return BiARTConfig(
            text_vocab=text_vocab, image_vocab=image_vocab, text_len=text_len, image_len=image_len, **{**own, **size}
        )


# ----------------------------------------------------------------------------------------------- runs: shared sections


@dataclass
class ImageDataConfig:
    """Pictures, and how they reach the model."""

    train_dir: Optional[str] = setting(None, "training pictures: a folder; for webdataset a folder, pattern or URL")
    val_dir: Optional[str] = setting(None, "validation pictures, as train_dir")
    test_dir: Optional[str] = setting(None, "pictures that evaluation reads; val_dir where it is not given")
    dataset: Optional[str] = setting(
        None,
        "layout: class folders, any folder, tar shards, or generated; default imagefolder",
        ("imagefolder", "flat", "webdataset", "fake"),
    )
    fake_data: bool = setting(False, "original's name for --dataset fake: a bounded smoke test without pictures")
    web_dataset: bool = setting(False, "original's name for --dataset webdataset")
    dataset_size: Optional[int] = setting(None, "samples an epoch of webdataset or fake; counted where not given")
    img_size: Optional[int] = setting(None, "original's second name of resolution; must equal it")
    resize_ratio: float = setting(0.75, "smallest share of a picture's area that a training crop takes, up to 1")
    batch_size: int = setting(8, "pictures a step and process")
    num_workers: Optional[int] = setting(
        None, "loader processes for each training process; default what the machine has"
    )
    prefetch_factor: int = setting(2, "batches each loader process keeps ready")
    shuffle_buffer: int = setting(1000, "samples that webdataset's shuffle draws from")


@dataclass
class TrainerConfig:
    """The run: machine, length, logs and checkpoints."""

    name: Optional[str] = setting(None, "name of the run's folder in log_dir; default the config file's name")
    log_dir: str = setting("results", "folder that holds the run folders")
    seed: int = setting(42, "seed of weights, data order and augmentation")
    gpus: int = setting(1, "GPUs on each node; 0 is the CPU")
    nodes: int = setting(1, "machines that train together")
    gpu_dist: Optional[bool] = setting(None, "original's flag for training on several GPUs; follows from gpus")
    accelerator: str = setting(
        "auto",
        "auto, cpu (gpus is then the number of processes), gpu, or another of Lightning's",
        ("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    )
    strategy: str = setting(
        "auto", "auto and ddp copy the model to each process, fsdp shards it", ("auto", "ddp", "fsdp")
    )
    precision: str = setting("32", "32, 16, bf16, or one of Lightning's names such as bf16-mixed, 16-true")
    epochs: int = setting(100, "passes over the training data")
    max_steps: int = setting(-1, "stop after this many optimiser steps; -1 is no limit")
    limit_train_batches: Optional[float] = setting(None, "batches of a training epoch: a count, or a share below 1")
    limit_val_batches: Optional[float] = setting(None, "batches of a validation: a count, or a share below 1")
    val_percent_check: float = setting(100.0, "original's name: percentage of the validation data to use, 0 to 100")
    num_sanity_val_steps: int = setting(0, "validation batches tried before training")
    accumulate_grad_batches: int = setting(1, "batches whose gradients are added up for one step")
    gradient_clip_val: Optional[float] = setting(None, "largest norm of the gradient")
    compile: Optional[bool] = setting(
        None, "compile the networks (torch.compile): slow first step, faster ones after; default on a GPU with Triton"
    )
    activation_checkpointing: bool = setting(
        False, "for larger batches: outputs of norms and activation functions are computed again in the backward pass"
    )
    logger: str = setting("tensorboard", "where figures go", ("tensorboard", "wandb", "csv"))
    log_every_n_steps: int = setting(10, "steps between logged training figures")
    log_images: bool = setting(False, "log grids of pictures, also as PNG files in the run folder")
    image_log_steps: int = setting(1000, "steps between logged grids")
    refresh_rate: int = setting(1, "steps between updates of the progress bar, at most five a second; 0 hides it")
    backup: bool = setting(False, "save the whole state regularly; the same command then continues where it was")
    backup_steps: int = setting(1000, "steps between backups")
    backup_dir: Optional[str] = setting(None, "folder for backups, a sub-folder a run; default inside the run folder")
    resume: bool = setting(False, "continue from ckpt_path")
    ckpt_path: Optional[str] = setting(None, "checkpoint to resume from or to evaluate")
    debug: bool = setting(False, "short run: 100 batches an epoch, backups and grids every 10 steps, anomaly detection")


# ------------------------------------------------------------------------------------------------------ runs: AugVAE


@dataclass
class VAEOptimConfig:
    """Optimiser of AugVAE, and how its codebook starts."""

    learning_rate: float = setting(4.5e-6, "base rate; the rate used is this x processes x batch_size")
    optimizer: str = setting(
        "adamw", "adamw (release), or muon for the convolutions: learns faster in short runs", ("adamw", "muon")
    )
    lr_decay: bool = setting(False, "original's schedule: halve the rate when the training loss stops falling")
    lr_cosine: bool = setting(False, "warm up, then fall to zero along a cosine over the whole run")
    warmup_steps: int = setting(0, "steps over which lr_cosine rises linearly to the full rate")
    weight_decay: float = setting(1e-5, "AdamW's weight decay")
    betas: Tuple[float, float] = setting((0.9, 0.999), "AdamW's decay rates")
    codebook_init: str = setting(
        "normal", "codes start as normal noise (release) or as encoder outputs of the first batch", ("normal", "data")
    )
    pretrained_path: Optional[str] = setting(None, "AugVAE to start from: checkpoint, folder or hub id")
    finetune: bool = setting(False, "train AugVAE-SL at the one level in attn_resolutions, from pretrained_path")


@dataclass
class VAELossConfig:
    """Loss of AugVAE: reconstruction + codebook_weight x commitment."""

    loss_type: str = setting(
        "mse",
        "reconstruction loss; lpips_* add p_loss_weight x LPIPS",
        ("mse", "l1", "smooth_l1", "lpips_l1", "lpips_l2"),
    )
    p_loss_weight: float = setting(0.1, "weight of LPIPS in lpips_l1 and lpips_l2")
    codebook_weight: float = setting(1.0, "weight of the commitment loss (quant_beta is inside it)")


@dataclass
class TrainVAEConfig:
    """Everything train_vae.py can be told."""

    model: AugVAEConfig = field(default_factory=AugVAEConfig)
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    optim: VAEOptimConfig = field(default_factory=VAEOptimConfig)
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass
class ReconstructionEvalConfig:
    """What eval_vae.py measures and writes."""

    eval_images: Optional[int] = setting(None, "pictures to evaluate; default all")
    save_images: int = setting(64, "pictures written to original_images/ and generated_images/")


@dataclass
class EvalVAEConfig(TrainVAEConfig):
    """Everything eval_vae.py can be told: train_vae.py's settings, so that its YAML files serve, and `eval`."""

    eval: ReconstructionEvalConfig = field(default_factory=ReconstructionEvalConfig)


# -------------------------------------------------------------------------------------------------- rules across fields

LIGHTNING_PRECISIONS = ["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "transformer-engine"]
PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}


def check_trainer(t: TrainerConfig) -> None:
    """Refuse trainer settings that are out of range or contradict each other; put the original's names into ours."""
    positive = ("nodes", "epochs", "accumulate_grad_batches", "log_every_n_steps", "image_log_steps", "backup_steps")
    for name in positive:
        if getattr(t, name) < 1:
            raise ConfigError(f"{name} is {getattr(t, name)}; it must be at least 1.")
    for name in ("gpus", "num_sanity_val_steps", "refresh_rate"):
        if getattr(t, name) < 0:
            raise ConfigError(f"{name} is {getattr(t, name)}; it must be at least 0.")
    if t.max_steps < 1 and t.max_steps != -1:
        raise ConfigError(f"max_steps is {t.max_steps}; give at least 1, or -1 for no limit.")
    if not 0 <= t.val_percent_check <= 100:
        raise ConfigError(f"val_percent_check is {t.val_percent_check}; it is a percentage, 0 to 100.")
    if t.val_percent_check < 100 and t.limit_val_batches is not None:
        raise ConfigError("val_percent_check and limit_val_batches both limit validation; give one of them.")
    if t.gpu_dist is False and t.gpus * t.nodes > 1:
        raise ConfigError(f"gpu_dist: false contradicts gpus {t.gpus} on {t.nodes} node(s). Drop it, or set gpus: 1.")
    if t.gpu_dist and t.strategy == "auto":
        t.strategy = "ddp"
    if t.resume and not t.ckpt_path:
        raise ConfigError(
            "resume needs ckpt_path: the checkpoint to continue from (a rerun with --backup needs neither)."
        )
    t.precision = PRECISIONS.get(t.precision, t.precision)
    if t.precision not in LIGHTNING_PRECISIONS:
        raise ConfigError(
            f"precision: {t.precision} is not one of 32, 16, bf16, 64, {', '.join(LIGHTNING_PRECISIONS)}."
        )
    if t.gradient_clip_val is not None and not t.gradient_clip_val > 0:
        raise ConfigError(f"gradient_clip_val is {t.gradient_clip_val}; it must be above 0, or left out.")
    if not 0 <= t.seed < 2**32:
        raise ConfigError(f"seed is {t.seed}; it must lie between 0 and 2^32 - 1.")
    t.limit_train_batches = batch_limit("limit_train_batches", t.limit_train_batches)
    if t.limit_train_batches == 0:
        raise ConfigError("limit_train_batches is 0: nothing would be trained. eval_vae.py evaluates without training.")
    t.limit_val_batches = batch_limit("limit_val_batches", t.limit_val_batches)
    if t.val_percent_check < 100:  # from here on under one name, so that the saved file can be read again
        t.limit_val_batches, t.val_percent_check = t.val_percent_check / 100, 100.0
    if t.debug:
        t.limit_train_batches = 100 if t.limit_train_batches is None else t.limit_train_batches
        t.limit_val_batches = 100 if t.limit_val_batches is None else t.limit_val_batches
        t.backup_steps = min(t.backup_steps, 10)
        t.image_log_steps = min(t.image_log_steps, 10)


def batch_limit(name: str, value: float | None) -> float | int | None:
    """A count (1 or more) as int, a share (below 1) as float: what Lightning tells apart by type."""
    if value is None or 0 <= value < 1:
        return value
    if value < 0 or value != int(value):
        raise ConfigError(f"{name} is {value}; give a count of batches (1, 2, ...) or a share between 0 and 1.")
    return int(value)


def check_betas(betas: Tuple[float, ...]) -> None:
    """Refuse what AdamW would. Raises ConfigError. OmegaConf before 2.4 takes a list of another length."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"betas is {list(betas)}; give two numbers, each at least 0 and below 1.")


def check_data(d: ImageDataConfig, resolution: int | None) -> None:
    """Resolve the original's names for the layout and refuse contradictions.

    Args:
        resolution: of the model, None where a checkpoint decides it.
    """
    named = {layout for flag, layout in ((d.fake_data, "fake"), (d.web_dataset, "webdataset")) if flag}
    if d.fake_data:
        named.discard("webdataset")  # the original's smoke test of a WebDataset recipe
    if d.dataset and d.dataset not in (named or {d.dataset}):
        if not d.fake_data:
            raise ConfigError(f"dataset: {d.dataset} contradicts web_dataset: true. Give one of them.")
        named = {"fake"}
    d.dataset = named.pop() if named else d.dataset or "imagefolder"
    d.fake_data, d.web_dataset = d.dataset == "fake", d.dataset == "webdataset"
    if resolution is not None and d.img_size not in (None, resolution):
        raise ConfigError(f"img_size {d.img_size} contradicts resolution {resolution}; they must be equal: give one.")
    if not 0 < d.resize_ratio <= 1:
        raise ConfigError(f"resize_ratio is {d.resize_ratio}; it must lie above 0 and not above 1.")
    for name in ("batch_size", "prefetch_factor", "shuffle_buffer", "dataset_size"):
        if getattr(d, name) is not None and getattr(d, name) < 1:
            raise ConfigError(f"{name} is {getattr(d, name)}; it must be at least 1.")
    if d.num_workers is not None and d.num_workers < 0:
        raise ConfigError(f"num_workers is {d.num_workers}; it must be at least 0.")


FAKE_LIMITS = {"epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1}


def limit_fake_data(t: TrainerConfig, flags: set[str]) -> None:
    """Bound a run on generated pictures to a few batches and keep no backups, unless flags ask otherwise.

    A recipe's own length and backups (YAML) are meant for pictures: a second smoke test would find the first finished.
    """
    if "backup" not in flags:
        t.backup = False
    if flags & {"epochs", "max_steps", "limit_train_batches", "limit_val_batches", "val_percent_check", "debug"}:
        return
    for name, value in FAKE_LIMITS.items():
        setattr(t, name, value)


def check_train_vae(config: TrainVAEConfig, given: dict[str, str]) -> None:
    """Refuse a train_vae configuration that could never work, before anything is built or written.

    Args:
        given: settings that were given, and where: {leaf: "--leaf" or "file.yaml"}, as `cli.parse` returns.
    """
    check_trainer(config.trainer)
    check_data(config.data, None if config.optim.pretrained_path else config.model.resolution)
    if config.data.fake_data:
        limit_fake_data(config.trainer, {leaf for leaf, source in given.items() if source.startswith("--")})
    elif not config.data.train_dir:
        raise ConfigError("train_dir is not given: name a folder of pictures, or try --fake_data.")
    o = config.optim
    for name, value in (("learning_rate", o.learning_rate), ("p_loss_weight", config.loss.p_loss_weight)):
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} is {value}; it must be above 0.")
    for name, value in (
        ("weight_decay", o.weight_decay),
        ("codebook_weight", config.loss.codebook_weight),
        ("warmup_steps", o.warmup_steps),
    ):
        if not value >= 0:
            raise ConfigError(f"{name} is {value}; it must be at least 0.")
    check_betas(o.betas)
    for name in ("in_channels", "out_channels"):
        if getattr(config.model, name) != 3:
            raise ConfigError(f"{name} is {getattr(config.model, name)}, but pictures are read as RGB: it must be 3.")
    if o.pretrained_path and o.codebook_init == "data":
        o.codebook_init = "normal"  # a recipe's way to begin; pretrained weights have begun already
    if o.lr_decay and o.lr_cosine:
        raise ConfigError("lr_decay and lr_cosine are two schedules; give one of them.")
    if o.warmup_steps and not o.lr_cosine:
        raise ConfigError(f"warmup_steps {o.warmup_steps} has no effect without lr_cosine: true.")
    if o.finetune and not o.pretrained_path:
        raise ConfigError("finetune trains AugVAE-SL from an AugVAE-ML: name its checkpoint with pretrained_path.")
    if o.finetune and len(config.model.attn_resolutions) != 1:
        raise ConfigError(
            f"finetune keeps one level, but attn_resolutions is {list(config.model.attn_resolutions)}. "
            "Give the level to keep, for instance attn_resolutions: [32]."
        )
    if o.optimizer == "muon" and config.trainer.strategy == "fsdp":
        raise ConfigError("optimizer: muon needs whole kernels, which strategy: fsdp shards. Use ddp, or adamw.")
    if o.pretrained_path:  # the checkpoint decides the shape
        config.model.check_values()
    else:
        config.model.validate()


def check_eval_vae(config: EvalVAEConfig) -> None:
    """Refuse an eval_vae configuration that could never work. The model section is the checkpoint's own."""
    check_trainer(config.trainer)
    if not config.trainer.ckpt_path:
        raise ConfigError("ckpt_path is not given: name the checkpoint, folder or hub id of the AugVAE to evaluate.")
    check_data(config.data, None)
    d = config.data
    if not (d.fake_data or d.test_dir or d.val_dir):
        raise ConfigError("Neither test_dir nor val_dir is given: name a folder of pictures, or try --fake_data.")
    for name in ("eval_images", "save_images"):
        value = getattr(config.eval, name)
        if value is not None and value < (1 if name == "eval_images" else 0):
            raise ConfigError(f"{name} is {value}; it must be a count of pictures.")


def without_effect(config: TrainVAEConfig, given: dict[str, str]) -> list[str]:
    """Flags that were given but change nothing, each with the reason: a script says so in one line each."""
    lpips = config.loss.loss_type.startswith("lpips")
    idle = {
        "p_loss_weight": (not lpips, f"loss_type {config.loss.loss_type} has no LPIPS"),
        "resize_ratio": (config.data.fake_data, "the data is fake"),
        "codebook_init": (bool(config.optim.pretrained_path), "the codebook comes from pretrained_path"),
    }
    return idle_flags(config, given, idle)


def idle_flags(config, given: dict[str, str], more: dict[str, tuple[bool, str]]) -> list[str]:
    """Flags given without effect, as `flag: reason`: those of every training, and `more`, {flag: (idle?, reason)}."""
    t = config.trainer
    idle = {
        "backup_steps": (not t.backup, "backup is off"),
        "backup_dir": (not t.backup, "backup is off"),
        "image_log_steps": (not t.log_images, "log_images is off"),
        **more,
        "shuffle_buffer": (not config.data.web_dataset, "the data is not webdataset"),
        "strategy": (t.gpus * t.nodes <= 1 and t.strategy != "fsdp", "one process trains"),
    }
    return [f"{n}: {why}" for n, (off, why) in idle.items() if off and given.get(n, "").startswith("--")]


def as_plain(config) -> dict:
    """Any of these dataclasses as plain dicts, lists and scalars: what checkpoints and YAML files hold."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))
