"""What an earlier BiART hands on: weights, tokenizer and AugVAE, out of a bundle, run folder or checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latent_verse.biart.model import PRESETS, BiART
from latent_verse.bundle import find_bundle, load_bundle
from latent_verse.checkpoint import CheckpointError, fill, find_checkpoint, read_ckpt
from latent_verse.config import BiARTConfig, ConfigError
from latent_verse.config_biart import TrainBiARTConfig
from latent_verse.text import Tokenizer, unpack_tokenizer


@dataclass(frozen=True)
class Pretrained:
    """A trained BiART and what it was trained with."""

    where: Path  # the checkpoint or bundle
    biart: BiART  # evaluation mode, on the CPU; averaged weights, where the run kept them
    tokenizer: Tokenizer
    vae: str  # AugVAE's fingerprint
    vae_path: str | None  # where that lies or lay; None is a random one, for fake data
    info: dict[str, Any]  # see `pipeline.LVerse.info`


def load_pretrained(path: str | os.PathLike) -> Pretrained:
    """BiART and what belongs to it.

    Args:
        path: bundle, run folder of train_biart.py (its best checkpoint), checkpoint, or hub id of a bundle.

    Raises:
        CheckpointError: absent, damaged or of another kind; the file is named.
    """
    file = find_checkpoint(Path(path))
    if file.suffix == ".ckpt":
        return load_checkpoint(file)
    folder = find_bundle(path)
    _, biart, tokenizer, info, prints = load_bundle(folder)
    return Pretrained(folder, biart.float(), tokenizer, prints["vae"], str(folder / "vae"), info)


def load_checkpoint(file: Path) -> Pretrained:
    """The same of a checkpoint of train_biart.py.

    Raises:
        CheckpointError: absent, damaged or of another kind.
    """
    content = read_ckpt(file)
    about = content.get("latent_verse", {})
    if about.get("kind") != "biart":
        raise CheckpointError(f"{file} is not a checkpoint of train_biart.py.")
    biart, run = BiART(BiARTConfig(**about["model"])), about["run"]
    prefix = "ema." if run["optim"]["ema_decay"] else "model."
    fill(biart, {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}, file)
    info = {"reference_dropout": run["loss"]["reference_dropout"], "text_too_long": run["text"]["text_too_long"]}
    vae, tokenizer = about["vae"], unpack_tokenizer(about["tokenizer"])
    return Pretrained(file, biart.eval(), tokenizer, vae["fingerprint"], vae["path"], info)


def take_over(config: TrainBiARTConfig, given: dict[str, str]) -> Pretrained | None:
    """What pretrained_path names, None without it. Its shape, tokenizer and AugVAE become the run's settings.

    Args:
        given: settings that were given: those that contradict it are refused, defaults yield.

    Raises:
        CheckpointError: see `load_pretrained`.
        ConfigError: the settings contradict it.
    """
    path = config.optim.pretrained_path
    if path is None:
        return None
    pretrained = load_pretrained(path)
    m, t = config.model, config.text
    there = pretrained.biart.config
    shape = {name: getattr(there, name) for name in (*PRESETS[m.preset], "pos_by_modality")}
    asked = PRESETS[m.preset] if "preset" in given else {}
    asked = asked | {name: getattr(m, name) for name in shape if name in given and getattr(m, name) is not None}
    asked |= {name: getattr(t, name) for name in ("text_len", "tokenizer") if name in given}
    found = shape | {"text_len": there.text_len, "tokenizer": pretrained.tokenizer.name}
    differ = [f"{k}: {asked[k]} in the settings, {found[k]} there" for k in sorted(asked) if asked[k] != found[k]]
    if differ:
        raise ConfigError(f"pretrained_path {path} is another BiART:\n  " + "\n  ".join(differ))
    for name, value in shape.items():
        setattr(m, name, value)
    t.text_len, t.tokenizer = found["text_len"], found["tokenizer"]
    config.vae.vae_path = config.vae.vae_path or pretrained.vae_path
    return pretrained
