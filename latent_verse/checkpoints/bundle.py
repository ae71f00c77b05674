"""Bundles: AugVAE, BiART and tokenizer in one folder, all that generation needs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.checkpoints.augvae import FORMAT, WEIGHTS, load_augvae, save_augvae
from latent_verse.checkpoints.ckpt_files import CheckpointError, fetch_from_hub, fill, fingerprint, first_line
from latent_verse.config import BiARTConfig, ConfigError, as_plain
from latent_verse.config.settings import expand
from latent_verse.data.text import Tokenizer, TokenizerError, load_tokenizer
from latent_verse.files import replacing, write_json

BUNDLE = "latent_verse/bundle"
BIART_WEIGHTS = "biart.safetensors"
TOKENIZER = "tokenizer/tokenizer_config.json"
BUNDLE_FILES = ("config.json", f"vae/{WEIGHTS}", "vae/config.json", BIART_WEIGHTS, TOKENIZER)


def save_bundle(
    directory: str | os.PathLike, vae: AugVAE, biart: BiART, tokenizer: Tokenizer, info: dict[str, Any]
) -> None:
    """Write config.json, vae/, biart.safetensors and tokenizer/; each appears whole or not at all.

    config.json comes first, with the fingerprints: `load_bundle` refuses a folder whose writing was interrupted.
    `info` is that of `inference.pipeline.LVerse`.

    Raises:
        CheckpointError: the folder holds something other than a bundle.
    """
    from safetensors.torch import save_file

    directory = Path(expand(directory, True, "directory"))
    if directory.exists() and not _may_become_bundle(directory):
        raise CheckpointError(f"{directory} exists and is not a bundle. Name a new or empty folder.")
    directory.mkdir(parents=True, exist_ok=True)
    content = {"format": BUNDLE, "vae": as_plain(vae.config), "biart": as_plain(biart.config), "info": info}
    content["fingerprints"] = fingerprints(vae, biart, tokenizer)
    write_json(directory / "config.json", content)
    save_augvae(vae, directory / "vae")
    with replacing(directory / BIART_WEIGHTS) as unfinished:
        save_file({key: tensor.contiguous() for key, tensor in biart.state_dict().items()}, unfinished)
    with replacing(directory / "tokenizer") as unfinished:
        tokenizer.save(unfinished)


def find_bundle(path: str | os.PathLike) -> Path:
    """The folder of a bundle: the path itself, or the copy of a hub id in Hugging Face's cache.

    Raises:
        CheckpointError: the path is a file, or does not exist and cannot be fetched.
    """
    path = expand(path, "hub", "path")
    folder = Path(path)
    if folder.is_file():
        raise CheckpointError(f"{path} is a file; a bundle is the folder that LVerse.save_pretrained writes.")
    if not folder.exists():
        folder = fetch_from_hub(str(path), ("config.json", "vae/*", BIART_WEIGHTS, "tokenizer/*"))
    return folder


def load_bundle(path: str | os.PathLike) -> tuple[AugVAE, BiART, Tokenizer, dict[str, Any], dict[str, str]]:
    """(AugVAE, BiART, tokenizer, info, fingerprints) of a bundle folder or hub id. Evaluation mode, on the CPU.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged or of another kind; the message names the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = find_bundle(path)
    content = _bundle_config(folder)
    for name in BUNDLE_FILES:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is an incomplete bundle: it holds no {name}. Copy or export it again.")
    with torch.random.fork_rng(devices=[]):  # initial weights are random, and replaced at once
        vae = load_augvae(folder / "vae")
    try:
        tokenizer = load_tokenizer(folder / "tokenizer")
        with torch.device("meta"):  # initialising a large transformer would take a while
            biart = BiART(BiARTConfig(**content["biart"]))
        stored = load_file(folder / BIART_WEIGHTS)
        info, recorded = dict(content["info"]), dict(content["fingerprints"])
    except (KeyError, TypeError, ConfigError, TokenizerError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is a damaged bundle: {first_line(error)}") from error
    biart.to_empty(device="cpu").to(next(iter(stored.values()), torch.empty(0)).dtype)
    fill(biart, stored, folder / BIART_WEIGHTS)
    found = fingerprints(vae, biart, tokenizer)
    changed = [name for name in found if found[name] != recorded.get(name)]
    if changed:
        parts = " and ".join(changed)
        raise CheckpointError(f"{folder} is mixed or damaged: {parts} is not what config.json records. Export again.")
    return vae, biart.eval(), tokenizer, info, recorded


def fingerprints(vae: AugVAE, biart: BiART, tokenizer: Tokenizer) -> dict[str, str]:
    """16 hexadecimal digits for each part of a bundle."""
    return {"vae": fingerprint(vae), "biart": fingerprint(biart), "tokenizer": tokenizer.fingerprint}


def _may_become_bundle(path: Path) -> bool:
    """Whether `save_bundle` may write here: an empty folder, or a bundle, complete or not."""
    if not path.is_dir():
        return False
    if not any(path.iterdir()):
        return True
    try:
        return json.loads((path / "config.json").read_text()).get("format") == BUNDLE
    except (OSError, ValueError, AttributeError):
        return False


def _bundle_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        inside = sorted(str(c.parent) for c in folder.glob("*/config.json") if _may_become_bundle(c.parent))
        hint = f" Did you mean {inside[0]}?" if inside else " LVerse.save_pretrained writes one."
        raise CheckpointError(f"{folder} is no bundle: it holds no config.json.{hint}")
    try:
        content = json.loads(file.read_text())
        found = content.get("format")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {first_line(error)}") from error
    if found != BUNDLE:
        what = "an AugVAE, the first half of a bundle" if found == FORMAT else f"of format {found!r}"
        raise CheckpointError(f"{folder} is {what}, not a bundle ({BUNDLE}) with AugVAE, BiART and tokenizer.")
    return content
