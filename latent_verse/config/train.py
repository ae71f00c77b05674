"""Every setting of train_vae.py, eval_vae.py and train_biart.py, once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional, Tuple

from latent_verse.config.datasets import (
    IMAGE_DATASETS,
    PAIR_DATASETS,
)
from latent_verse.config.models import AugVAEConfig, BiARTConfig, BiARTModelConfig
from latent_verse.config.settings import SamplingSettings, Settings, same, setting

# short names of precision, and Lightning's
PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}
PRECISION_NAMES = (*PRECISIONS, *PRECISIONS.values(), "16-true", "bf16-true", "transformer-engine")
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
        None,
        "images per epoch, default all; of fewer images each comes several times; fake: 512",
        at_least=1,
        at_most=10**12,
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
    refresh_rate: int = setting(1, "steps between updates of the progress bar; 0: neither a bar nor lines", at_least=0)
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
    pretrained_path: Optional[str] = setting(None, "AugVAE to start from: checkpoint, folder, bundle or id", path="hub")
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
    """Every setting of eval_vae.py: those of train_vae.py, so that its YAML files serve, and `eval`.

    Three sections have no effect, and are left out of --help: the checkpoint decides the model, and nothing is trained.
    """

    model: AugVAEConfig = field(default_factory=AugVAEConfig, metadata={"hidden": True})
    optim: VAEOptimConfig = field(default_factory=VAEOptimConfig, metadata={"hidden": True})
    loss: VAELossConfig = field(default_factory=VAELossConfig, metadata={"hidden": True})
    eval: ReconstructionEvalConfig = field(default_factory=ReconstructionEvalConfig)


@dataclass(frozen=True)
class FrozenVAEConfig(Settings):
    """The AugVAE whose codes BiART reads and writes. It is not trained."""

    vae_path: Optional[str] = setting(None, "AugVAE: run folder, checkpoint, saved folder, bundle, hub id", path="hub")


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
        ImageDataConfig, "dataset_size", None, "pairs per epoch, default all, as for images; shapes: 10000, fake: 512"
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
