"""Loading a trained BiART, with its tokenizer and AugVAE, from a bundle, run folder or checkpoint."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.checkpoints.augvae import load_augvae
from latent_verse.checkpoints.bundle import build_biart, check_info, find_bundle, load_bundle, save_bundle
from latent_verse.checkpoints.ckpt_files import CheckpointError, find_checkpoint, fingerprint, read_named
from latent_verse.config import PRESETS, ConfigError, UserError, training_only
from latent_verse.config.models import BiARTModelConfig
from latent_verse.config.train import TrainBiARTConfig
from latent_verse.data.text import Tokenizer, unpack_tokenizer


@dataclass(frozen=True)
class Pretrained:
    """A trained BiART and what it was trained with."""

    where: Path  # the checkpoint or bundle
    biart: BiART  # in evaluation mode, float32, on the CPU; with the averaged weights if the run kept them
    tokenizer: Tokenizer
    vae_fingerprint: str
    vae_path: str | None  # where its AugVAE was when BiART was trained; None for a smoke test's random one
    info: dict[str, Any]  # see `inference.pipeline.LVerse`
    bundled: AugVAE | None = None  # the AugVAE of a bundle, None for a checkpoint

    def augvae(self) -> AugVAE:
        """Its AugVAE: from the bundle, from `vae_path`, or from the bundle that its run has written since.

        Raises:
            CheckpointError: it is in none of these places, or damaged.
        """
        if self.bundled is not None:
            return self.bundled
        remedy = "Name it with --vae_path, or give the bundle that its run has written."
        places = [place for place in self._augvae_places() if os.path.exists(place)]
        for place in places if len(places) > 1 else ():  # of several, the first that is the one it was trained with
            with contextlib.suppress(CheckpointError):
                if fingerprint(vae := load_augvae(place)) == self.vae_fingerprint:
                    return vae
        if not places and self.vae_path is None:
            raise CheckpointError(f"{self.where} is from a smoke test, whose random AugVAE is not kept. {remedy}")
        try:
            return load_augvae(places[0] if places else str(self.vae_path))
        except CheckpointError as error:
            raise CheckpointError(f"The AugVAE that {self.where} was trained with is gone: {error} {remedy}") from error

    def _augvae_places(self) -> list[Path]:
        """Where its AugVAE may be, also after folders of runs were moved together."""
        run = self.where.absolute().parent.parent
        if self.vae_path is None:
            return [run / "bundle" / "vae"]
        path = Path(self.vae_path)
        ends = [Path(*path.parts[i:]) for i in range(len(path.parts)) if path.parts[i] not in (path.anchor, "..")]
        return [path, run / "bundle" / "vae", *(run.parent / end for end in ends)]


def load_pretrained(path: str | os.PathLike) -> Pretrained:
    """A trained BiART from a bundle, its hub id, a checkpoint, or a run folder of train_biart.py (its best checkpoint).

    Raises:
        CheckpointError: the file is missing, damaged or of another kind; the message names it.
        ConfigError: as `config.settings.expand`.
    """
    file = find_checkpoint(path)
    if not os.path.isdir(file) and (os.path.exists(file) or file.suffix == ".ckpt"):
        return load_checkpoint(file)
    folder = find_bundle(path)
    vae, biart, tokenizer, info, prints = load_bundle(folder)
    return Pretrained(folder, biart.float(), tokenizer, prints["vae"], str(folder / "vae"), info, vae)


def load_checkpoint(file: Path) -> Pretrained:
    """As `load_pretrained`, from a checkpoint of train_biart.py."""
    content = read_named(file)
    about = content.get("latent_verse") or {}
    if about.get("kind") != "biart":
        raise CheckpointError(f"{file} is not a checkpoint of train_biart.py.")
    try:
        settings, run, vae = about["model"], about["run"], about["vae"]
        prefix = "ema." if run["optim"]["ema_decay"] else "model."
        info = {"reference_dropout": run["loss"]["reference_dropout"], "text_too_long": run["text"]["text_too_long"]}
        tokenizer, print_, path = unpack_tokenizer(about["tokenizer"], file), vae["fingerprint"], vae["path"]
    except (KeyError, TypeError, UserError) as error:
        raise CheckpointError(f"{file} does not say what this version needs to read it: {error}") from error
    if not isinstance(print_, str) or not isinstance(path, (str, type(None))):
        raise CheckpointError(f"{file} is damaged: it does not say which AugVAE it was trained with.")
    check_info(info, file)
    state = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
    return Pretrained(file, build_biart(settings, state, file, file).float(), tokenizer, print_, path, info)


def take_over(config: TrainBiARTConfig, given: Mapping[str, str]) -> tuple[TrainBiARTConfig, Pretrained | None]:
    """The configuration with the shape and tokenizer of pretrained_path, if that is given, and the pretrained BiART.

    Its AugVAE becomes the run's, unless the flag --vae_path says where else that AugVAE is.

    Raises:
        CheckpointError: see `load_pretrained`.
        ConfigError: settings that were `given` contradict it; defaults yield.
    """
    path = config.optim.pretrained_path
    if path is None:
        return config, None
    pretrained = load_pretrained(path)
    m, t = config.model, config.text
    there = pretrained.biart.config
    names = {f.name for f in fields(m)} - {"preset"} - training_only(BiARTModelConfig)
    shape = {name: getattr(there, name) for name in names}
    text = replace(t, text_len=there.text_len, tokenizer=pretrained.tokenizer.name)
    found = shape | {"text_len": text.text_len, "tokenizer": text.tokenizer}
    asked = {k: (v, f" (preset {m.preset})") for k, v in PRESETS[m.preset].items() if "preset" in given}
    given_values = {name: getattr(m if name in shape else t, name) for name in found if name in given}
    asked |= {name: (value, "") for name, value in given_values.items() if value is not None}
    differ = [
        f"{name}: {value} in the settings{by}, {found[name]} there"
        for name, (value, by) in sorted(asked.items())
        if value != found[name]
    ]
    if differ:
        raise ConfigError(f"pretrained_path {path} is another BiART:\n  " + "\n  ".join(differ))
    vae = config.vae if given.get("vae_path", "").startswith("--") else replace(config.vae, vae_path=None)
    return replace(config, model=replace(m, **shape), text=text, vae=vae), pretrained


def check_vae(found: str, then: str, path: str | None, file: str | os.PathLike) -> None:
    """Check that the AugVAE of fingerprint `found` is the one that BiART in `file` was trained with: `then`, of `path`.

    Raises:
        CheckpointError: it is another one.
    """
    if found != then:
        there = f"{then} ({path or 'a random one, for fake data'})"
        raise CheckpointError(f"vae_path is the AugVAE {found}, but {file} was trained with {there}. Give that one.")


def export_bundle(
    ckpt_path: str | Path, folder: str | Path, vae_path: str | None = None, vae: AugVAE | None = None
) -> Path:
    """Make a bundle of a checkpoint or run folder (its best one). Returns the checkpoint's path.

    AugVAE is `vae`, else that of `vae_path`, else `Pretrained.augvae`.

    Raises:
        CheckpointError: a file is absent, damaged or of another kind, or AugVAE is not the one it was trained with.
        ConfigError: as `config.settings.expand`.
    """
    trained = load_checkpoint(find_checkpoint(ckpt_path))
    if vae is None:
        vae = load_augvae(vae_path) if vae_path else trained.augvae()
    check_vae(fingerprint(vae), trained.vae_fingerprint, trained.vae_path, trained.where)
    save_bundle(folder, vae.cpu(), trained.biart, trained.tokenizer, trained.info)
    return trained.where
