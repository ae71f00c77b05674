"""What train_biart.py does, part by part: the frozen AugVAE, the tokenizer, the transformer, codes, bundles."""

from __future__ import annotations

import tempfile
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
from latent_verse.config_biart import TrainBiARTConfig
from latent_verse.data.codes import TOKENIZER, check_codes, extract, work_of
from latent_verse.data.pair_module import PairDataModule
from latent_verse.data.pairs import all_captions, open_pairs, source_of, work_of_shards
from latent_verse.pipeline import LVerse
from latent_verse.text import BPETokenizer, Tokenizer, TokenizerError, load_tokenizer
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


def frozen_vae(config: TrainBiARTConfig) -> AugVAE:
    """The AugVAE of vae_path, in evaluation mode; for fake data a random one, where that does not exist.

    Raises:
        CheckpointError: vae_path cannot be loaded.
        ConfigError: img_size is not what it takes.
    """
    path = config.vae.vae_path
    if config.data.fake_data and (path is None or not Path(path).exists()):
        if path is not None:
            say(f"vae_path {path} does not exist: a random AugVAE of 32 px stands in for this smoke test.")
            config.vae.vae_path = config.data.img_size = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.trainer.seed)
            return AugVAE(FAKE_VAE).eval()
    vae = load_augvae(path)
    if config.data.img_size not in (None, vae.config.resolution):
        raise ConfigError(
            f"img_size: {config.data.img_size}, but {path} takes pictures of {vae.config.resolution} px. Leave it out."
        )
    return vae


def open_data(
    config: TrainBiARTConfig, vae: AugVAE, start_from: str | Path | None
) -> tuple[PairDataModule, Tokenizer, dict[str, Any]]:
    """The data, ready to be loaded, its tokenizer, and what checkpoints say of AugVAE and tokenizer (plain types).

    Args:
        start_from: the checkpoint that the run continues from, as `checkpoint.starting_point` found it.

    Raises:
        CheckpointError: that was trained with another AugVAE.
        DataError: the data cannot be used, or are codes of another AugVAE or tokenizer.
        TokenizerError: see `choose_tokenizer`.
    """
    if start_from:
        _check_vae(fingerprint(vae), read_ckpt(start_from)["latent_verse"]["vae"], start_from)
    data = PairDataModule(config.data, vae.config.resolution, config.trainer.seed)
    data.setup("fit")
    tokenizer = choose_tokenizer(config, data, start_from)
    about = {
        "vae": {"path": config.vae.vae_path, "fingerprint": fingerprint(vae)},
        "tokenizer": pack_tokenizer(tokenizer),
    }
    for split in ("train", "val"):
        meta = getattr(data.dataset(split), "meta", None)
        if meta:
            check_codes(meta, about["vae"]["fingerprint"], tokenizer.fingerprint, f"{split}_dir")
    data.tokenize_with(tokenizer, config.text.text_len, config.text.text_too_long)
    return data, tokenizer, about


def _check_vae(found: str, trained_with: dict[str, Any], file) -> None:
    if found != trained_with["fingerprint"]:
        raise CheckpointError(
            f"vae_path is the AugVAE {found}, but {file} was trained with {trained_with['fingerprint']} "
            f"({trained_with['path'] or 'a random one, for fake data'}). Give that one as vae_path."
        )


# ----------------------------------------------------------------------------------------------------------- tokenizer


def choose_tokenizer(config: TrainBiARTConfig, data: PairDataModule, start_from=None) -> Tokenizer:
    """The tokenizer of the run: of what it continues from, else of its codes, else CLIP's, else trained on captions.

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
    return BPETokenizer.train(all_captions(dataset), config.text.bpe_vocab_size)


def pack_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer as plain types, for checkpoints: its name, fingerprint and files."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files = {file.name: file.read_text(encoding="utf-8") for file in Path(folder).iterdir()}
    return {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint, "files": files}


def unpack_tokenizer(packed: dict[str, Any]) -> Tokenizer:
    """Undo `pack_tokenizer`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in packed["files"].items():
            (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
        return load_tokenizer(folder)


# ---------------------------------------------------------------------------------------------------------- the models


def new_biart(
    config: TrainBiARTConfig, vae: AugVAE, tokenizer: Tokenizer, start_from: str | Path | None = None
) -> BiART:
    """A transformer whose vocabulary and lengths are those of AugVAE and tokenizer.

    Args:
        start_from: the checkpoint that the run continues from.

    Raises:
        CheckpointError: that is of a transformer of another shape.
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
    return BiART(whole)


def summary(config: TrainBiARTConfig, model: BiART, tokenizer: Tokenizer) -> str:
    """A line on what is trained."""
    return (
        f"BiART: {model.num_parameters() / 1e6:.1f} M parameters; {model.vocab.text_len} tokens of {tokenizer.name} "
        f"({tokenizer.vocab_size} ids), {model.vocab.image_len} codes of {model.vocab.image_vocab}; "
        f"learning rate {config.optim.learning_rate:g}"
    )


# --------------------------------------------------------------------------------------------------------------- codes


def extract_codes(config: TrainBiARTConfig, vae: AugVAE, accelerator: str) -> int:
    """Write the codes of train_dir and val_dir to <extract_codes>/train and /val; 0 when done.

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
    tokenizer, flags = choose_tokenizer(config, data), f"--tokenizer {config.text.tokenizer}"
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
        vae: AugVAE, where it is at hand; else that of `vae_path`, else that of the path in the checkpoint.

    Raises:
        CheckpointError: a file is absent, damaged or of another kind, or AugVAE is not the one it was trained with.
    """
    file = find_checkpoint(Path(ckpt_path))
    content = read_ckpt(file)
    about = content.get("latent_verse", {})
    if about.get("kind") != "biart":
        raise CheckpointError(f"{file} is not a checkpoint of train_biart.py; only those can be exported.")
    if vae is None:
        path = vae_path or about["vae"]["path"]
        if path is None:
            raise CheckpointError(f"{file} is a smoke test with a random AugVAE, which is not kept: nothing to export.")
        vae = load_augvae(path)
    _check_vae(fingerprint(vae), about["vae"], file)
    model = BiART(BiARTConfig(**about["model"]))
    prefix = "ema." if about["run"]["optim"]["ema_decay"] else "model."
    weights = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
    model.load_state_dict(weights)
    run = about["run"]
    info = {"reference_dropout": run["loss"]["reference_dropout"], "text_too_long": run["text"]["text_too_long"]}
    LVerse(vae.cpu(), model.eval(), unpack_tokenizer(about["tokenizer"]), info).save_pretrained(folder)
    return file
