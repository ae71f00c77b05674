"""What train_biart.py does, part by part: the frozen AugVAE, the tokenizer, the transformer, codes, bundles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import PRESETS, BiART
from latent_verse.checkpoint import (
    CheckpointError,
    check_resumable,
    find_checkpoint,
    fingerprint,
    load_augvae,
    read_ckpt,
)
from latent_verse.config import AugVAEConfig, BiARTConfig, ConfigError
from latent_verse.config.train import TrainBiARTConfig
from latent_verse.data.codes import TOKENIZER, check_codes, extract, work_of
from latent_verse.data.pair_module import PairDataModule
from latent_verse.data.pairs import all_captions, open_pairs, source_of, work_of_shards
from latent_verse.pipeline import LVerse
from latent_verse.pretrained import Pretrained, load_checkpoint
from latent_verse.text import BPETokenizer, Tokenizer, TokenizerError, load_tokenizer, pack_tokenizer, unpack_tokenizer
from latent_verse.trainer import say

# a random AugVAE for --fake_data, which needs no file: 32 px, 8 x 8 codes
FAKE_VAE = AugVAEConfig(
    hidden_dim=32,
    ch_mult=(1, 1, 1),
    num_res_blocks=1,
    resolution=32,
    attn_resolutions=(8,),
    z_channels=32,
    codebook_dim=16,
    num_tokens=64,
)


def frozen_vae(config: TrainBiARTConfig, pretrained: Pretrained | None = None) -> tuple[TrainBiARTConfig, AugVAE]:
    """The AugVAE of vae_path, in evaluation mode; without that `pretrained`'s, or for fake data a random one.

    The configuration comes back without a vae_path that a random one stands in for.

    Args:
        pretrained: the BiART to start from, which has to have been trained with it.

    Raises:
        CheckpointError: vae_path cannot be loaded, or is not what `pretrained` was trained with.
        ConfigError: img_size is not what it takes.
    """
    path = config.vae.vae_path
    if pretrained is not None and path is None:
        vae, path = pretrained.augvae(), pretrained.where
    elif config.data.fake_data and (path is None or not Path(path).exists()):
        if path is not None:
            say(f"vae_path {path} does not exist: a random AugVAE of 32 px stands in for this smoke test.")
            config = replace(config, vae=replace(config.vae, vae_path=None), data=replace(config.data, img_size=None))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.trainer.seed)
            vae = AugVAE(FAKE_VAE).eval()
    else:
        vae = load_augvae(path)
    if config.data.img_size not in (None, vae.config.resolution):
        raise ConfigError(
            f"img_size: {config.data.img_size}, but {path} takes images of {vae.config.resolution} px. Leave it out."
        )
    if pretrained is not None:
        _check_vae(fingerprint(vae), pretrained.vae_fingerprint, pretrained.vae_path, pretrained.where)
    return config, vae


def open_data(
    config: TrainBiARTConfig, vae: AugVAE, start_from: str | Path | None, pretrained: Pretrained | None = None
) -> tuple[PairDataModule, Tokenizer, dict[str, Any]]:
    """The data, ready to be loaded, its tokenizer, and what checkpoints say of AugVAE and tokenizer (plain types).

    Args:
        start_from: the checkpoint that the run continues from, as `checkpoint.starting_point` found it.
        pretrained: the BiART that it began with.

    Raises:
        CheckpointError: start_from was trained with another AugVAE.
        DataError: the data cannot be used, or are codes of another AugVAE or tokenizer.
        TokenizerError: see `choose_tokenizer`.
    """
    if start_from:
        then = read_ckpt(start_from)["latent_verse"]["vae"]
        _check_vae(fingerprint(vae), then["fingerprint"], then["path"], start_from)
    data = PairDataModule(config.data, vae.config.resolution, config.trainer.seed)
    data.setup("fit")
    tokenizer = choose_tokenizer(config, data, start_from, pretrained)
    about = {
        "vae": {"path": config.vae.vae_path or (pretrained and pretrained.vae_path), "fingerprint": fingerprint(vae)},
        "tokenizer": pack_tokenizer(tokenizer),
    }
    for split in ("train", "val"):
        meta = getattr(data.dataset(split), "meta", None)
        if meta:
            check_codes(meta, about["vae"]["fingerprint"], tokenizer.fingerprint, f"{split}_dir")
    data.tokenize_with(tokenizer, config.text.text_len, config.text.text_too_long)
    return data, tokenizer, about


def _check_vae(found: str, then: str, path: str | None, file) -> None:
    if found != then:
        raise CheckpointError(
            f"vae_path is the AugVAE {found}, but {file} was trained with {then} "
            f"({path or 'a random one, for fake data'}). Give that one as vae_path."
        )


# ----------------------------------------------------------------------------------------------------------- tokenizer


def choose_tokenizer(config: TrainBiARTConfig, data: PairDataModule, start_from=None, pretrained=None) -> Tokenizer:
    """The tokenizer of the run: of what it continues or starts from, else of its codes, else CLIP's, else a new one.

    Every process decides the same: training it is deterministic. What lies in the run folder is not read: without a
    checkpoint a run begins anew, with the settings and captions of now.

    Raises:
        TokenizerError: it cannot be read, or is not the kind that the settings name.
    """
    kind, dataset = config.text.tokenizer, data.dataset("train")
    saved = None
    if start_from:
        saved = unpack_tokenizer(read_ckpt(start_from)["latent_verse"]["tokenizer"])
        where = str(start_from)
    elif pretrained is not None:
        saved, where = pretrained.tokenizer, pretrained.where
    elif config.data.dataset == "codes":
        where = dataset.folder / TOKENIZER
        saved = load_tokenizer(where)
    if saved is not None:
        if saved.name != kind:
            raise TokenizerError(
                f"tokenizer: {kind}, but that of {where} is {saved.name}. Set tokenizer: {saved.name}."
            )
        return saved
    if kind == "clip":
        return load_tokenizer("clip")
    try:
        return BPETokenizer.train(all_captions(dataset), config.text.bpe_vocab_size)
    except TokenizerError as error:
        d = config.data
        where = f"train_captions {d.train_captions}" if d.train_captions else f"train_dir {d.train_dir}"
        raise TokenizerError(f"{where}: {error}") from error


# ---------------------------------------------------------------------------------------------------------- the models


def new_biart(
    config: TrainBiARTConfig,
    vae: AugVAE,
    tokenizer: Tokenizer,
    start_from: str | Path | None = None,
    pretrained: Pretrained | None = None,
) -> BiART:
    """A transformer whose vocabulary and lengths are those of AugVAE and tokenizer.

    Args:
        start_from: the checkpoint that the run continues from.
        pretrained: the BiART whose weights it begins with, where it does not continue; random ones without it.

    Raises:
        CheckpointError: start_from is of a transformer of another shape.
        ConfigError: its width is no multiple of its heads, top_k exceeds the codebook.
    """
    m = config.model
    shape = {name: value if getattr(m, name) is None else getattr(m, name) for name, value in PRESETS[m.preset].items()}
    if config.sampling.top_k is not None and config.sampling.top_k > vae.config.num_tokens:
        raise ConfigError(f"top_k is {config.sampling.top_k}, but the codebook has {vae.config.num_tokens} codes.")
    whole = BiARTConfig(
        text_vocab=tokenizer.vocab_size,
        image_vocab=vae.config.num_tokens,
        text_len=config.text.text_len,
        image_len=vae.num_codes,
        pos_by_modality=m.pos_by_modality,
        embd_pdrop=m.embd_pdrop,
        resid_pdrop=m.resid_pdrop,
        attn_pdrop=m.attn_pdrop,
        **shape,
    )
    if start_from:
        check_resumable(start_from, "biart", whole)
    model = BiART(whole)
    if pretrained is not None and not start_from:
        model.load_state_dict(pretrained.biart.state_dict())
    return model


def summary(config: TrainBiARTConfig, model: BiART, tokenizer: Tokenizer) -> str:
    """A line on what is trained."""
    return (
        f"BiART: {model.num_parameters() / 1e6:.1f} M parameters; {model.vocab.text_len} tokens of {tokenizer.name} "
        f"({tokenizer.vocab_size} ids), {model.vocab.image_len} codes of {model.vocab.image_vocab}; "
        f"learning rate {config.optim.learning_rate:g}"
    )


# --------------------------------------------------------------------------------------------------------------- codes


def extract_codes(config: TrainBiARTConfig, vae: AugVAE, accelerator: str, pretrained: Pretrained | None = None) -> int:
    """Write the codes of train_dir and val_dir to <extract_codes>/train and /val; 0 when done.

    Args:
        pretrained: the BiART that is to be trained on them, whose tokenizer they then have.

    Raises:
        DataError: see `data.codes.extract`.
    """
    d, c, t = config.data, config.codes, config.trainer
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    vae.to(device)
    resolution = vae.config.resolution
    webdataset = d.dataset == "webdataset"
    splits = [split for split in ("train", "val") if source_of(d, split)]
    data = PairDataModule(d, resolution, t.seed)
    data.setup("fit")
    tokenizer, flags = choose_tokenizer(config, data, pretrained=pretrained), f"--tokenizer {config.text.tokenizer}"
    for split in splits:
        crops = c.crops_per_image if split == "train" else 1
        plan = {
            "format": "latent_verse/codes",
            "vae": fingerprint(vae),
            "codebook_size": vae.config.num_tokens,
            "image_len": vae.num_codes,
            "resolution": resolution,
            "tokenizer": tokenizer.fingerprint,
            "text_vocab": tokenizer.vocab_size,
            "source": str(source_of(d, split)),
            "dataset": d.dataset,
            "crops_per_image": crops,
            "resize_ratio": d.resize_ratio if crops > 1 else None,
            "shard_size": None if webdataset else c.shard_size,
            "seed": t.seed,
        }
        if webdataset:
            work, total = work_of_shards(data.dataset(split), resolution, crops, d.resize_ratio, t.seed), None
        else:
            dataset = open_pairs(d, split, resolution, t.seed, augment=False)
            work, total = work_of(dataset, crops, c.shard_size), len(dataset)
            plan["pictures"] = total
            if d.dataset == "shapes":
                world = dataset.world
                plan["shapes"] = {"world": world.name, "fingerprint": world.fingerprint}
                plan["shapes"] |= {"split": dataset.split, "seed": t.seed}
        folder = Path(c.extract_codes) / split
        meta = extract(
            work,
            folder,
            lambda x: vae.codes(x.to(device)),
            tokenizer,
            plan,
            batch_size=d.batch_size,
            threads=data._workers(),
            total=total,
            progress=bool(t.refresh_rate),
        )
        flags += f" --{split}_dir {folder}"
        print(
            f"{folder}: {meta['pairs']} pairs, {meta['captions']} captions, {meta['skipped']} unreadable pictures; "
            f"AugVAE {meta['vae']}, tokenizer {tokenizer.name} {meta['tokenizer']}"
        )
    print(f"Train on them with --dataset codes {flags}")
    return 0


# ------------------------------------------------------------------------------------------------------------- bundles


def export_by_command(config: TrainBiARTConfig) -> int:
    """--export FOLDER --ckpt_path FILE: see `export_bundle`; 0 when done."""
    file = export_bundle(config.trainer.ckpt_path, config.bundle.export, config.vae.vae_path)
    print(f"Bundle of {file}: {config.bundle.export}")
    return 0


def export_bundle(
    ckpt_path: str | Path, folder: str | Path, vae_path: str | None = None, vae: AugVAE | None = None
) -> Path:
    """Make a bundle of a checkpoint or run folder (its best one). Returns the checkpoint's path.

    Args:
        vae: AugVAE, where it is at hand; else that of `vae_path`, else that of `Pretrained.augvae`.

    Raises:
        CheckpointError: a file is absent, damaged or of another kind, or AugVAE is not the one it was trained with.
    """
    trained = load_checkpoint(find_checkpoint(Path(ckpt_path)))
    if vae is None:
        vae = load_augvae(vae_path) if vae_path else trained.augvae()
    _check_vae(fingerprint(vae), trained.vae_fingerprint, trained.vae_path, trained.where)
    LVerse(vae.cpu(), trained.biart, trained.tokenizer, trained.info).save_pretrained(folder)
    return trained.where
