"""What an earlier BiART hands on: weights, tokenizer and AugVAE, out of a bundle, run folder or checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import PRESETS, BiART
from latent_verse.bundle import find_bundle, load_bundle
from latent_verse.checkpoint import CheckpointError, fill, find_checkpoint, load_augvae, read_ckpt
from latent_verse.config import BiARTConfig, ConfigError
from latent_verse.config.train import TrainBiARTConfig
from latent_verse.text import Tokenizer, TokenizerError, unpack_tokenizer


@dataclass(frozen=True)
class Pretrained:
    """A trained BiART and what it was trained with.

    Attributes:
        where: the checkpoint or bundle.
        biart: evaluation mode, float32, on the CPU; the averaged weights, where the run kept them.
        vae_fingerprint, vae_path: of its AugVAE: which, and where that lies or lay; None is a smoke test's random one.
        info: see `pipeline.LVerse`.
        bundled: the AugVAE of a bundle.
    """

    where: Path
    biart: BiART
    tokenizer: Tokenizer
    vae_fingerprint: str
    vae_path: str | None
    info: dict[str, Any]
    bundled: AugVAE | None = None

    def augvae(self) -> AugVAE:
        """Its AugVAE: of the bundle, of where it lay, or of the bundle that its run has written since.

        Raises:
            CheckpointError: it is at none of these places, or damaged.
        """
        if self.bundled is not None:
            return self.bundled
        beside = self.where.absolute().parents[1] / "bundle" / "vae"
        if beside.is_dir() and not (self.vae_path and Path(self.vae_path).exists()):
            return load_augvae(beside)
        remedy = "Name it with --vae_path, or give the bundle that its run has written."
        if self.vae_path is None:
            raise CheckpointError(f"{self.where} is a smoke test's, with a random AugVAE that is not kept. {remedy}")
        try:
            return load_augvae(self.vae_path)
        except CheckpointError as error:
            raise CheckpointError(f"{self.where} was trained with an AugVAE that is gone: {error} {remedy}") from error


def load_pretrained(path: str | os.PathLike) -> Pretrained:
    """BiART and what belongs to it.

    Args:
        path: bundle, run folder of train_biart.py (its best checkpoint), checkpoint, or hub id of a bundle.

    Raises:
        CheckpointError: absent, damaged or of another kind; the file is named.
    """
    file = find_checkpoint(Path(path))
    if file.is_file() or file.suffix == ".ckpt":
        return load_checkpoint(file)
    folder = find_bundle(path)
    vae, biart, tokenizer, info, prints = load_bundle(folder)
    return Pretrained(folder, biart.float(), tokenizer, prints["vae"], str(folder / "vae"), info, vae)


def load_checkpoint(file: Path) -> Pretrained:
    """The same of a checkpoint of train_biart.py.

    Raises:
        CheckpointError: absent, damaged or of another kind.
    """
    content = read_ckpt(file)
    about = content.get("latent_verse", {})
    if about.get("kind") != "biart":
        raise CheckpointError(f"{file} is not a checkpoint of train_biart.py.")
    try:
        biart, run, vae = BiART(BiARTConfig(**about["model"])), about["run"], about["vae"]
        prefix = "ema." if run["optim"]["ema_decay"] else "model."
        info = {"reference_dropout": run["loss"]["reference_dropout"], "text_too_long": run["text"]["text_too_long"]}
        tokenizer, print_, path = unpack_tokenizer(about["tokenizer"]), vae["fingerprint"], vae["path"]
    except (KeyError, TypeError, ConfigError, TokenizerError) as error:
        raise CheckpointError(f"{file} does not say what this version needs to read it: {error}") from error
    fill(biart, {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}, file)
    return Pretrained(file, biart.eval(), tokenizer, print_, path, info)


def take_over(config: TrainBiARTConfig, given: Mapping[str, str]) -> tuple[TrainBiARTConfig, Pretrained | None]:
    """What pretrained_path names, None without it, and the run's configuration with its shape and tokenizer. Its AugVAE
    is the run's, where no flag names another place of it.

    Args:
        given: settings that were given: those that contradict its shape or tokenizer are refused, defaults yield.

    Raises:
        CheckpointError: see `load_pretrained`.
        ConfigError: the settings contradict it.
    """
    path = config.optim.pretrained_path
    if path is None:
        return config, None
    pretrained = load_pretrained(path)
    m, t = config.model, config.text
    there = pretrained.biart.config
    shape = {name: getattr(there, name) for name in (*PRESETS[m.preset], "pos_by_modality")}
    text = {"text_len": there.text_len, "tokenizer": pretrained.tokenizer.name}
    asked = {k: (v, f" (preset {m.preset})") for k, v in PRESETS[m.preset].items() if "preset" in given}
    for name in (*shape, *text):
        value = getattr(m if name in shape else t, name)
        if name in given and value is not None:
            asked[name] = (value, "")
    found = shape | text
    differ = [
        f"{name}: {value} in the settings{by}, {found[name]} there"
        for name, (value, by) in sorted(asked.items())
        if value != found[name]
    ]
    if differ:
        raise ConfigError(f"pretrained_path {path} is another BiART:\n  " + "\n  ".join(differ))
    vae = config.vae if given.get("vae_path", "").startswith("--") else replace(config.vae, vae_path=None)
    return replace(config, model=replace(m, **shape), text=replace(t, **text), vae=vae), pretrained
