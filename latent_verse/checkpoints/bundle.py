"""Bundles: AugVAE, BiART and tokenizer in one folder, all that generation needs."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.checkpoints.augvae import FORMAT, PART, WEIGHTS, describe_augvae, load_augvae, write_augvae
from latent_verse.checkpoints.checks import (
    check_finite,
    check_fits,
    json_object,
    read_safetensors,
    settings_from,
    skeleton,
)
from latent_verse.checkpoints.ckpt_files import CheckpointError, fingerprint
from latent_verse.checkpoints.hub import fetch_from_hub, model_card
from latent_verse.checkpoints.model_folders import ABOUT, check_about, kind_of, write_about, writing
from latent_verse.checkpoints.shipped import located
from latent_verse.config import AugVAEConfig, BiARTConfig, ConfigError, UserError, as_plain
from latent_verse.config.messages import shown
from latent_verse.config.settings import check, is_number
from latent_verse.config.train import BiARTLossConfig
from latent_verse.data.text import TOO_LONG, Tokenizer
from latent_verse.data.tokenizer_files import load_tokenizer

log = logging.getLogger(__name__)

BUNDLE = "latent_verse/bundle"
BIART_WEIGHTS = "biart.safetensors"
VAE_WEIGHTS, VAE_ABOUT = f"{PART}/{WEIGHTS}", f"{PART}/{ABOUT}"
TOKENIZER = "tokenizer/tokenizer_config.json"
BUNDLE_FILES = (ABOUT, VAE_WEIGHTS, VAE_ABOUT, BIART_WEIGHTS, TOKENIZER)
SETTINGS = ("vae", "biart", "info")  # of what config.json holds


def save_bundle(
    directory: str | os.PathLike, vae: AugVAE, biart: BiART, tokenizer: Tokenizer, info: dict[str, Any]
) -> None:
    """Write config.json, vae/, biart.safetensors and tokenizer/: all or nothing. Other files of a bundle stay.

    `info` is that of `inference.pipeline.LVerse`.

    Raises:
        CheckpointError: the folder holds something other than a bundle, or a weight is not finite.
        FileError: it cannot be written; a bundle that was there is still whole.
        ConfigError: JSON cannot hold `info`, or as `config.settings.expand`.
    """
    from safetensors.torch import save_file

    for part in (vae, biart):
        check_finite(part, directory)
    texts = {f"tokenizer/{name}": text for name, text in tokenizer.files().items()}
    names = [VAE_WEIGHTS, VAE_ABOUT, BIART_WEIGHTS, *texts]
    content = {"format": BUNDLE, "vae": as_plain(vae.config), "biart": as_plain(biart.config), "info": info}
    content["fingerprints"] = fingerprints(vae, biart, tokenizer)
    with writing(directory, BUNDLE, names, alone=True) as unfinished:
        write_about(unfinished[ABOUT], content, SETTINGS)
        write_augvae(vae, unfinished[VAE_ABOUT], unfinished[VAE_WEIGHTS])
        save_file({key: tensor.contiguous() for key, tensor in biart.state_dict().items()}, unfinished[BIART_WEIGHTS])
        for name, text in texts.items():
            unfinished[name].write_bytes(text.encode())


def find_bundle(path: str | os.PathLike) -> Path:
    """The folder of a bundle: the path itself, `bundle` in that of a run, or a hub id's copy in Hugging Face's cache.

    Raises:
        CheckpointError: the path is a file, or does not exist and cannot be fetched.
        ConfigError: as `config.settings.expand`.
    """
    path = located(path)  # a shipped model's, for its name
    folder = Path(path)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise CheckpointError(f"{path} is a file; a bundle is the folder that LVerse.save_pretrained writes.")
    if not os.path.exists(folder):
        wanted = "a bundle (the folder that train_biart.py and LVerse.save_pretrained write)"
        folder = fetch_from_hub(str(path), (ABOUT, f"{PART}/*", BIART_WEIGHTS, "tokenizer/*"), wanted)
    if not os.path.isfile(folder / ABOUT) and kind_of(folder / "bundle") == BUNDLE:
        log.warning("%s is the folder of a run: its bundle, %s, is used.", folder, folder / "bundle")
        folder /= "bundle"
    return folder


def load_bundle(path: str | os.PathLike) -> tuple[AugVAE, BiART, Tokenizer, dict[str, Any], dict[str, str]]:
    """(AugVAE, BiART, tokenizer, info, fingerprints) of a bundle folder or hub id. Evaluation mode, on the CPU.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged or of another kind; the message names the file.
        ConfigError: as `config.settings.expand`.
    """
    folder = find_bundle(path)
    file = folder / ABOUT
    content = _bundle_config(folder)
    for name in BUNDLE_FILES:
        if not os.path.isfile(folder / name):
            raise CheckpointError(f"{folder} is an incomplete bundle: it holds no {name}. Copy or export it again.")
    for name in ("biart", "info", "fingerprints"):
        if not isinstance(content.get(name), dict):
            raise CheckpointError(f"{folder} is a damaged bundle: in {file}, {name} is not an object.")
    info, recorded = content["info"], content["fingerprints"]
    check_info(info, file)
    with torch.random.fork_rng(devices=[]):  # initial weights are random, and replaced at once
        vae = load_augvae(folder / PART)
    try:
        tokenizer = load_tokenizer(folder / "tokenizer")
    except UserError as error:
        raise CheckpointError(f"{folder} is a damaged bundle: {error}") from error
    weights = folder / BIART_WEIGHTS
    biart = build_biart(content["biart"], read_safetensors(weights), file, weights)
    found = fingerprints(vae, biart, tokenizer)
    changed = [name for name in found if found[name] != recorded.get(name)]
    if changed:
        parts = " and ".join(changed)
        raise CheckpointError(f"{folder} is mixed or damaged: {parts} is not what config.json records. Export again.")
    check_about(file, content, SETTINGS)
    there, here = as_plain(settings_from(AugVAEConfig, content.get("vae"), file)), as_plain(vae.config)
    if other := [f"{name}: {there[name]} and {here[name]}" for name in there if there[name] != here[name]]:
        what = f"{folder} is mixed or damaged: {ABOUT} and {VAE_ABOUT} have different settings"
        raise CheckpointError(f"{what}:\n  " + "\n  ".join(other))
    return vae, biart, tokenizer, info, recorded


def build_biart(settings: object, state: dict[str, torch.Tensor], about: Path, weights: Path) -> BiART:
    """A BiART of the settings in the file `about` and the `state` in the file `weights`, in evaluation mode.

    Its weights are of the type that they are stored in.

    Raises:
        CheckpointError: they do not belong together, or are damaged.
    """
    config = settings_from(BiARTConfig, settings, about)
    biart = biart_skeleton(config, state, about)  # initialising a large one would take a while
    check_fits(biart, state, weights)
    kinds = {tensor.dtype for tensor in state.values()}
    if len(kinds) > 1:
        raise CheckpointError(f"{weights} is damaged: its weights are of several types, {', '.join(map(str, kinds))}.")
    biart.to_empty(device="cpu").to(kinds.pop())
    biart.load_state_dict(state)
    return biart.eval()


def biart_skeleton(config: BiARTConfig, state: dict[str, torch.Tensor], file: str | os.PathLike) -> BiART:
    """A BiART without memory; see `checks.skeleton`."""
    return skeleton(BiART, config, config.n_layer, state, file)


def check_info(info: dict[str, Any], file: Path) -> None:
    """Check what `file` says of how a BiART was trained: see `inference.pipeline.LVerse`.

    Raises:
        CheckpointError: a value is of the wrong kind, or out of its range.
    """
    dropout, too_long = info.get("reference_dropout", 0.0), info.get("text_too_long", TOO_LONG[0])
    if not (is_number(dropout) and 0 <= dropout <= 1):
        raise CheckpointError(f"{file} is damaged: its reference_dropout is not a probability.")
    if too_long not in TOO_LONG:
        raise CheckpointError(f"{file} is damaged: its text_too_long is not one of {', '.join(TOO_LONG)}.")


def fingerprints(vae: AugVAE, biart: BiART, tokenizer: Tokenizer) -> dict[str, str]:
    """16 hexadecimal digits for each part of a bundle."""
    return {"vae": fingerprint(vae), "biart": fingerprint(biart), "tokenizer": tokenizer.fingerprint}


def check_parts(vae: AugVAE, biart: BiART, tokenizer: Tokenizer, info: object) -> None:
    """Check that the parts of a bundle fit each other, and what is said of how they were trained.

    Raises:
        ConfigError: they do not.
    """
    if not isinstance(info, dict):
        raise ConfigError(f"info is {shown(info)}; give a dict.")
    check(BiARTLossConfig, "info", reference_dropout=info.get("reference_dropout", 0))
    v, b = vae.config, biart.config
    for what, mine, theirs, value in (
        ("image_vocab", b.image_vocab, "AugVAE's codebook (num_tokens)", v.num_tokens),
        ("image_len", b.image_len, f"AugVAE's number of codes per image (levels {vae.code_levels})", vae.num_codes),
        ("text_vocab", b.text_vocab, "tokenizer's vocabulary", tokenizer.vocab_size),
    ):
        if mine != value:
            raise ConfigError(
                f"{what} of BiART is {mine}, but the {theirs} is {value}: they were not trained together. "
                "Use the AugVAE and the tokenizer that BiART was trained with."
            )
    if (v.in_channels, v.out_channels) != (3, 3):
        raise ConfigError(f"AugVAE has {v.in_channels} channels in and {v.out_channels} out; images have 3.")


def describe_bundle(vae: AugVAE, biart: BiART, tokenizer: Tokenizer) -> list[str]:
    """A line for each part: its parameters, and what it takes and gives."""
    c, dtype = biart.config, str(biart.head.weight.dtype).removeprefix("torch.")
    size = f"BiART: {biart.num_parameters():,} parameters ({c.n_layer} layers, width {c.n_embd}, {dtype})"
    words = f"tokenizer: {tokenizer.name}, vocabulary of {tokenizer.vocab_size:,}"
    return [describe_augvae(vae), f"{size}, texts of up to {c.text_len} tokens", words]


def bundle_card(vae: AugVAE, biart: BiART, tokenizer: Tokenizer, name: str) -> str:
    """The model card of a bundle that is `name` on the hub."""
    use = f"""from latent_verse import LVerse

model = LVerse.from_pretrained("{name}")
[[image]] = model.text_to_image(["a text in the style of its captions"])
[[caption]] = model.image_to_text([image])"""
    return model_card(
        name, describe_bundle(vae, biart, tokenizer), use, ["text-to-image", "image-to-text"], "text-to-image"
    )


def _bundle_config(folder: Path) -> dict[str, Any]:
    file = folder / ABOUT
    if not os.path.isfile(file):
        inside = sorted(str(c.parent) for c in folder.glob(f"*/{ABOUT}") if kind_of(c.parent) == BUNDLE)
        hint = f" Did you mean {inside[0]}?" if inside else " LVerse.save_pretrained writes one."
        raise CheckpointError(f"{folder} is not a bundle: it holds no config.json.{hint}")
    content = json_object(file)
    found = content.get("format")
    if found != BUNDLE:
        what = "an AugVAE, the first half of a bundle" if found == FORMAT else f"of format {shown(found)}"
        raise CheckpointError(f"{folder} is {what}, not a bundle ({BUNDLE}) with AugVAE, BiART and tokenizer.")
    return content
