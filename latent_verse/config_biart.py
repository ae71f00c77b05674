"""Every setting of stage 2's runs (train_biart.py), as `config.py` holds those of stage 1, whose parts are used here.

The transformer's shape is in `config.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional, Tuple  # OmegaConf reads these annotations at run time

from latent_verse.config import (
    BiARTModelConfig,
    ConfigError,
    ImageDataConfig,
    TrainerConfig,
    check_betas,
    check_data,
    check_trainer,
    idle_flags,
    limit_fake_data,
    setting,
)

DATASETS = ("pairs", "coco", "karpathy", "table", "webdataset", "codes", "shapes", "fake")


@dataclass
class FrozenVAEConfig:
    """The AugVAE whose codes BiART reads and writes. It is not trained."""

    vae_path: Optional[str] = setting(None, "AugVAE: run folder, checkpoint, folder of save_pretrained or hub id")


@dataclass
class TextConfig:
    """From captions to ids."""

    tokenizer: str = setting("clip", "CLIP's vocabulary, or a BPE trained on the captions", ("clip", "bpe"))
    bpe_vocab_size: int = setting(4096, "most ids that a bpe tokenizer gets; at least 256")
    text_len: int = setting(64, "tokens of a caption; shorter ones are padded")
    text_too_long: str = setting("truncate", "captions of more tokens are cut, or stop the run", ("truncate", "error"))


@dataclass
class PairDataConfig(ImageDataConfig):
    """Pictures with captions, and how they reach the model."""

    train_dir: Optional[str] = setting(
        None, "training pictures: pair folder, image folder of coco and karpathy, tar shards, or folder of codes"
    )
    val_dir: Optional[str] = setting(None, "validation pictures, as train_dir; for karpathy default train_dir")
    test_dir: Optional[str] = setting(None, "pictures that evaluation reads; val_dir where it is not given")
    dataset: Optional[str] = setting(
        None, "layout: name.jpg with name.txt, captions files, tar shards, codes, or generated; default pairs", DATASETS
    )
    train_captions: Optional[str] = setting(
        None, "captions file of coco (default ../annotations/captions_<folder>.json), karpathy, or the table itself"
    )
    val_captions: Optional[str] = setting(None, "as train_captions; for karpathy default train_captions")
    world: str = setting("small", "which world the dataset shapes draws", ("small", "full"))
    dataset_size: Optional[int] = setting(
        None, "training pairs an epoch of shapes (default 10000), fake (512) or webdataset (counted)"
    )
    val_size: Optional[int] = setting(None, "validation pairs of shapes (default 256) or fake (64)")


@dataclass
class BiARTOptimConfig:
    """Optimiser and schedule: a linear warm-up, then a cosine over the whole run."""

    pretrained_path: Optional[str] = setting(
        None, "BiART to start from: bundle, run folder, checkpoint or hub id; shape, tokenizer and AugVAE come with it"
    )
    learning_rate: float = setting(3e-4, "full rate, used as it is given: not scaled by processes or batch_size")
    optimizer: str = setting("adamw", "adamw for everything, or muon for the blocks' matrices", ("adamw", "muon"))
    muon_learning_rate: Optional[float] = setting(
        None, "full rate of muon's matrices, on AdamW's scale (update RMS 0.2 x rate); default learning_rate"
    )
    muon_momentum: float = setting(0.95, "decay of muon's moving average")
    weight_decay: float = setting(0.05, "decay of matrices; biases, norms and embeddings have none")
    betas: Tuple[float, float] = setting((0.9, 0.95), "AdamW's decay rates")
    warmup_steps: int = setting(0, "steps over which the rate rises linearly to the full one")
    min_lr_ratio: float = setting(0.1, "share of the full rate that the cosine ends at; 1 keeps the rate constant")
    ema_decay: float = setting(
        0.0, "average of the weights, for validation, samples and export: its decay; 0 keeps none"
    )


@dataclass
class BiARTLossConfig:
    """Cross-entropy of the target plus reference_weight x that of the reference, in both directions."""

    text_to_image_share: float = setting(0.5, "share of a batch that is learnt text to image, the rest image to text")
    reference_weight: float = setting(0.1, "weight of the loss on the tokens that are given")
    reference_dropout: float = setting(0.1, "share of samples whose reference is hidden, which guidance needs")
    word_dropout: float = setting(
        0.0, "share of a caption's words hidden from the words after them, which are then read off the image"
    )
    code_dropout: float = setting(
        0.0, "share of a picture's codes hidden from the codes after them, which are then read off the text"
    )
    text_loss_weight: float = setting(1.0, "weight of the loss on text tokens")
    image_loss_weight: float = setting(1.0, "weight of the loss on image codes")
    loss_chunk: Optional[int] = setting(None, "compute logits for so many tokens at a time: less memory, more time")


@dataclass
class SamplingConfig:
    """Pictures and captions that training draws for the eye; none of it changes what is learnt."""

    num_samples: int = setting(8, "validation pairs to draw for, in both directions; 0 draws none")
    num_judged: int = setting(32, "validation scenes of shapes for which pictures and captions are judged by the truth")
    sample_every_n_epochs: int = setting(1, "epochs between samples; log_images draws every image_log_steps too")
    temperature: float = setting(1.0, "temperature of pictures, 0 takes the likeliest code; captions are the likeliest")
    top_k: Optional[int] = setting(None, "draw a picture's codes among the k likeliest")
    top_p: Optional[float] = setting(None, "draw a picture's codes among the likeliest that make up this probability")
    guidance: float = setting(1.0, "classifier-free guidance of pictures; 1 is none")


@dataclass
class CodesConfig:
    """Encoding a dataset once, so that training reads codes (--dataset codes) and runs no AugVAE."""

    extract_codes: Optional[str] = setting(
        None, "do not train: write the codes of train_dir and val_dir to this folder's train/ and val/"
    )
    crops_per_image: int = setting(1, "crops of each training picture: the centre, then random ones (resize_ratio)")
    shard_size: int = setting(10000, "pictures in each shard of codes")


@dataclass
class BundleConfig:
    """The folder that generation needs. Every run writes one at its end, to <run folder>/bundle."""

    export: Optional[str] = setting(None, "do not train: write the bundle of ckpt_path to this folder")


@dataclass
class TrainBiARTConfig:
    """Everything train_biart.py can be told."""

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


# -------------------------------------------------------------------------------------------------- rules across fields


def check_train_biart(config: TrainBiARTConfig, given: dict[str, str]) -> None:
    """Refuse a train_biart configuration that could never work, before anything is built or written.

    Args:
        given: where each given setting came from, as `cli.parse` says it.
    """
    check_trainer(config.trainer)
    if config.optim.pretrained_path and config.trainer.resume:
        raise ConfigError("pretrained_path begins a run and resume continues one: give one of them.")
    if config.bundle.export:
        _check_export(config)
        return
    check_pairs(config.data)
    if config.data.fake_data:
        limit_fake_data(config.trainer, {leaf for leaf, source in given.items() if source.startswith("--")})
    elif not (config.vae.vae_path or config.optim.pretrained_path):
        raise ConfigError("vae_path is not given: name the AugVAE of train_vae.py, or try --fake_data.")
    _check_text(config.text)
    _check_optim(config.optim, config.trainer)
    _check_loss(config.loss)
    check_sampling(config.sampling, config.loss.reference_dropout)
    c = config.codes
    for name in ("crops_per_image", "shard_size"):
        if getattr(c, name) < 1:
            raise ConfigError(f"{name} is {getattr(c, name)}; it must be at least 1.")
    if c.extract_codes and config.data.dataset == "codes":
        raise ConfigError("extract_codes reads pictures, but dataset is codes: train on them, or name pictures.")
    if c.crops_per_image > 1 and not c.extract_codes:
        raise ConfigError(f"crops_per_image {c.crops_per_image} has no effect without extract_codes.")
    if c.crops_per_image > 1 and config.data.dataset == "shapes":
        raise ConfigError("crops_per_image cuts objects of shapes in two, which captions still name: leave it at 1.")


def without_effect(config: TrainBiARTConfig, given: dict[str, str]) -> list[str]:
    """Flags that were given but change nothing, each with the reason, as `config.without_effect` names train_vae's."""
    dataset, trained = config.data.dataset, "the tokenizer is not trained: "
    saved = config.trainer.resume or config.optim.pretrained_path
    why = (
        f"{trained}it comes from the checkpoint"
        if config.trainer.resume
        else f"{trained}it comes from pretrained_path"
        if config.optim.pretrained_path
        else f"{trained}it comes with the codes"
        if dataset == "codes"
        else f"{trained}it is {config.text.tokenizer}"
    )
    idle = {
        "bpe_vocab_size": (saved or dataset == "codes" or config.text.tokenizer != "bpe", why),
        "resize_ratio": (dataset in ("codes", "shapes", "fake"), f"dataset {dataset} is not cropped"),
        "world": (dataset != "shapes", "the data is not shapes"),
        "val_size": (dataset not in ("shapes", "fake"), f"dataset {dataset} is validated on all its pairs"),
        "muon_momentum": (config.optim.optimizer != "muon", "optimizer is not muon"),
    }
    return idle_flags(config, given, idle)


def check_pairs(d: PairDataConfig) -> None:
    """Resolve the layout's names and defaults, and refuse what is missing or contradicts."""
    if d.dataset is None and not (d.fake_data or d.web_dataset):
        d.dataset = "pairs"
    check_data(d, d.img_size)
    if d.val_size is not None and d.val_size < 1:
        raise ConfigError(f"val_size is {d.val_size}; it must be at least 1.")
    if d.dataset in ("shapes", "fake"):
        return
    captions = {"karpathy": "dataset_coco.json", "table": "the .csv, .tsv or .jsonl with image paths and captions"}
    if d.dataset in captions and not d.train_captions:
        raise ConfigError(f"train_captions is not given; dataset {d.dataset} needs it: {captions[d.dataset]}.")
    if d.dataset != "table" and not d.train_dir:
        raise ConfigError("train_dir is not given: name the training pictures, or try --fake_data or --dataset shapes.")
    if d.dataset not in ("coco", "karpathy", "table"):
        for name in ("train_captions", "val_captions"):
            if getattr(d, name):
                raise ConfigError(f"{name} has no effect with dataset {d.dataset}: choose coco, karpathy or table.")


def check_sampling(s: SamplingConfig, reference_dropout: float) -> None:
    """Refuse sampling settings out of range, and guidance that the training cannot serve."""
    for name in ("num_samples", "num_judged"):
        if getattr(s, name) < 0:
            raise ConfigError(f"{name} is {getattr(s, name)}; it must be at least 0.")
    if s.sample_every_n_epochs < 1:
        raise ConfigError("sample_every_n_epochs must be at least 1; num_samples: 0 and num_judged: 0 draw nothing.")
    if s.temperature < 0:
        raise ConfigError(f"temperature is {s.temperature}; it must be 0 (the likeliest) or above.")
    if s.top_k is not None and s.top_k < 1:
        raise ConfigError(f"top_k is {s.top_k}; it must be at least 1.")
    if s.top_p is not None and not 0 < s.top_p <= 1:
        raise ConfigError(f"top_p is {s.top_p}; it must lie above 0 and not above 1.")
    if s.temperature == 0 and (s.top_k or s.top_p):
        raise ConfigError("temperature 0 draws the likeliest: top_k and top_p have no effect. Raise temperature.")
    if s.guidance < 0:
        raise ConfigError(f"guidance is {s.guidance}; it must be at least 0, and 1 is none.")
    if s.guidance != 1 and not reference_dropout:
        raise ConfigError(f"guidance {s.guidance} needs reference_dropout above 0 in training; 0.1 is usual.")


def _check_export(config: TrainBiARTConfig) -> None:
    if not config.trainer.ckpt_path:
        raise ConfigError("export needs ckpt_path: the checkpoint or run folder of train_biart.py to make a bundle of.")
    if config.codes.extract_codes:
        raise ConfigError("export and extract_codes are two tasks; give one of them.")


def _check_text(t: TextConfig) -> None:
    if t.text_len < 1:
        raise ConfigError(f"text_len is {t.text_len}; it must be at least 1.")
    if t.bpe_vocab_size < 256:
        raise ConfigError(f"bpe_vocab_size is {t.bpe_vocab_size}; it must be at least 256, one id for every byte.")


def _check_optim(o: BiARTOptimConfig, t: TrainerConfig) -> None:
    for name in ("learning_rate", "muon_learning_rate"):
        if getattr(o, name) is not None and getattr(o, name) <= 0:
            raise ConfigError(f"{name} is {getattr(o, name)}; it must be above 0.")
    if o.muon_learning_rate is not None and o.optimizer != "muon":
        raise ConfigError("muon_learning_rate has no effect without optimizer: muon.")
    if o.optimizer == "muon" and t.strategy == "fsdp":
        raise ConfigError("optimizer: muon needs whole matrices, and strategy: fsdp cuts them. Use adamw or ddp.")
    if o.warmup_steps < 0:
        raise ConfigError(f"warmup_steps is {o.warmup_steps}; it must be at least 0.")
    for name, low, high in (("weight_decay", 0, float("inf")), ("min_lr_ratio", 0, 1), ("muon_momentum", 0, 0.9999)):
        if not low <= getattr(o, name) <= high:
            raise ConfigError(f"{name} is {getattr(o, name)}; it must lie between {low} and {high}.")
    check_betas(o.betas)
    if not 0 <= o.ema_decay < 1:
        raise ConfigError(f"ema_decay is {o.ema_decay}; it must be at least 0 and below 1.")


def _check_loss(c: BiARTLossConfig) -> None:
    for name in ("text_to_image_share", "reference_dropout"):
        if not 0 <= getattr(c, name) <= 1:
            raise ConfigError(f"{name} is {getattr(c, name)}; it is a share, 0 to 1.")
    for name in ("word_dropout", "code_dropout"):
        if not 0 <= getattr(c, name) <= 0.5:
            raise ConfigError(f"{name} is {getattr(c, name)}; it must lie between 0 and 0.5.")
    if c.reference_weight < 0:
        raise ConfigError(f"reference_weight is {c.reference_weight}; it must be at least 0.")
    for name in ("text_loss_weight", "image_loss_weight"):
        if getattr(c, name) <= 0:
            raise ConfigError(
                f"{name} is {getattr(c, name)}; it must be above 0. To learn one direction only, set "
                "text_to_image_share to 1 or 0."
            )
    if c.loss_chunk is not None and c.loss_chunk < 1:
        raise ConfigError(f"loss_chunk is {c.loss_chunk}; it must be at least 1.")
