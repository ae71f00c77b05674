"""The parts of a run of BiART: the frozen AugVAE, the data and its tokenizer, the transformer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.biart.sequence import Vocabulary
from latent_verse.checkpoints.augvae import load_augvae
from latent_verse.checkpoints.biart import Pretrained, check_vae
from latent_verse.checkpoints.ckpt_files import check_shape, described, fingerprint
from latent_verse.config import AugVAEConfig, ConfigError
from latent_verse.config.train import TrainBiARTConfig
from latent_verse.config.train_rules import check_resolution
from latent_verse.data.codes import TOKENIZER, check_codes
from latent_verse.data.datasets import open_pairs
from latent_verse.data.modules import PairDataModule
from latent_verse.data.pairs import CaptionEncoder, PairData, all_captions
from latent_verse.data.text import BPETokenizer, Tokenizer, TokenizerError
from latent_verse.data.tokenizer_files import load_tokenizer, pack_tokenizer, unpack_tokenizer
from latent_verse.training.next_commands import level_for_biart
from latent_verse.training.trainer import say

# a random AugVAE for --fake_data, which needs no file: 32 px, 8 x 8 codes
FAKE_VAE = AugVAEConfig(
    resolution=32, attn_resolutions=(8,), hidden_dim=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=32,
    codebook_dim=16, num_tokens=64,
)  # fmt: skip


def frozen_vae(config: TrainBiARTConfig, pretrained: Pretrained | None = None) -> tuple[TrainBiARTConfig, AugVAE]:
    """The AugVAE of vae_path, in evaluation mode; if not given, that of `pretrained`, or for fake data a random one.

    The configuration returned with it has no vae_path if a random one stands in for it.

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
        say_levels(vae, path)
    check_resolution("img_size", config.data.img_size, vae.config.resolution, f"the AugVAE {path}")
    if pretrained is not None:
        check_vae(fingerprint(vae), pretrained.vae_fingerprint, pretrained.vae_path, pretrained.where)
    return config, vae


def say_levels(vae: AugVAE, path: str | Path) -> None:
    """Say so if an AugVAE is not the AugVAE-SL that BiART is meant for, and how to make one of it."""
    levels = list(vae.code_levels)
    if len(levels) > 1:
        level = level_for_biart(vae)
        codes = f"{vae.num_codes:,} codes an image (levels {', '.join(map(str, levels))})"
        add = f"--finetune --attn_resolutions {level} --pretrained_path {path} --name NAME"
        say(
            f"vae_path {path} is an AugVAE-ML: BiART learns {codes}, and generate.py --complete is not possible. An "
            f"AugVAE-SL has {level**2:,} and trains faster: train_vae.py makes one with the flags of that run and {add}"
        )


def open_data(
    config: TrainBiARTConfig, vae: AugVAE, start_from: str | Path | None, pretrained: Pretrained | None = None
) -> tuple[PairDataModule, Tokenizer, dict[str, Any]]:
    """The data, its tokenizer, and what checkpoints record about AugVAE and tokenizer (plain types).

    Raises:
        CheckpointError: the file resumed from was trained with another AugVAE.
        DataError: the data cannot be used, or are codes of another AugVAE or tokenizer.
        TokenizerError: see `choose_tokenizer`.
    """
    if start_from:
        then = described(start_from)["vae"]
        check_vae(fingerprint(vae), then["fingerprint"], then["path"], start_from)
    datasets = open_pairs(config.data, vae.config.resolution, config.trainer.seed)
    tokenizer = choose_tokenizer(config, datasets["train"], start_from, pretrained)
    about = {
        "vae": {"path": config.vae.vae_path or (pretrained and pretrained.vae_path), "fingerprint": fingerprint(vae)},
        "tokenizer": pack_tokenizer(tokenizer),
    }
    sizes = {"image_len": vae.num_codes, "codebook_size": vae.config.num_tokens, "text_vocab": tokenizer.vocab_size}
    for split, dataset in datasets.items():
        if config.data.dataset == "codes":
            check_codes(dataset.meta, about["vae"]["fingerprint"], tokenizer.fingerprint, sizes, f"{split}_dir")
    text = config.text
    pad = Vocabulary(tokenizer.vocab_size, vae.config.num_tokens, text.text_len, vae.num_codes).pad
    encode = CaptionEncoder(tokenizer, text.text_len, text.text_too_long, pad)
    return PairDataModule(datasets, config.data, config.trainer.seed, encode), tokenizer, about


def choose_tokenizer(
    config: TrainBiARTConfig,
    dataset: PairData,
    start_from: str | Path | None = None,
    pretrained: Pretrained | None = None,
) -> Tokenizer:
    """The run's tokenizer: from its checkpoint or pretrained model, else from its codes, else CLIP's, else a new one.

    Training one on the captions of `dataset` is deterministic, so that all processes get the same. The run folder is
    not read: without a checkpoint a run starts anew, with the current settings and captions.

    Raises:
        TokenizerError: it cannot be read, or is not the kind that the settings name.
    """
    kind = config.text.tokenizer
    saved = None
    if start_from:
        saved = unpack_tokenizer(described(start_from)["tokenizer"], start_from)
        where = str(start_from)
    elif pretrained is not None:
        saved, where = pretrained.tokenizer, pretrained.where
    elif config.data.dataset == "codes":
        where = dataset.folder / TOKENIZER
        saved = load_tokenizer(where)
    if saved is not None:
        if saved.name != kind:
            raise TokenizerError(f"tokenizer: {kind}, but that of {where} is {saved.name}. Set that.")
        return saved
    if kind == "clip":
        return load_tokenizer("clip")
    try:
        return BPETokenizer.train(all_captions(dataset), config.text.bpe_vocab_size)
    except TokenizerError as error:
        d = config.data
        where = f"train_captions {d.train_captions}" if d.train_captions else f"train_dir {d.train_dir}"
        raise TokenizerError(f"{where}: {error}") from error


def new_biart(
    config: TrainBiARTConfig, vae: AugVAE, tokenizer: Tokenizer, start_from: Path | None, pretrained: Pretrained | None
) -> BiART:
    """A transformer with the vocabulary and lengths of AugVAE and tokenizer, and the weights of `pretrained` or random.

    Raises:
        CheckpointError: start_from is a checkpoint of another shape.
        ConfigError: n_embd is not a multiple of n_head, or top_k exceeds the codebook.
    """
    if config.sampling.top_k is not None and config.sampling.top_k > vae.config.num_tokens:
        raise ConfigError(f"top_k is {config.sampling.top_k}, but the codebook has {vae.config.num_tokens} codes.")
    whole = config.model.resolve(tokenizer.vocab_size, vae.config.num_tokens, config.text.text_len, vae.num_codes)
    if start_from:
        check_shape(described(start_from), whole, start_from)
    model = BiART(whole)
    if pretrained is not None and not start_from:
        model.load_state_dict(pretrained.biart.state_dict())
    return model
