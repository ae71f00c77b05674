"""Reading and writing an AugVAE: this project's and released .ckpt files, and folders of safetensors."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latent_verse.augvae.model import AugVAE
from latent_verse.checkpoints.checks import (
    check_finite,
    check_fits,
    crc32,
    json_object,
    read_safetensors,
    settings_from,
    skeleton,
)
from latent_verse.checkpoints.ckpt_files import CheckpointError, find_checkpoint, read_named
from latent_verse.checkpoints.hub import PushToHub, fetch_from_hub, model_card
from latent_verse.checkpoints.model_folders import ABOUT, check_about, write_about, writing
from latent_verse.checkpoints.shipped import located
from latent_verse.config import AugVAEConfig, as_plain
from latent_verse.config.messages import shown
from latent_verse.config.train import TrainVAEConfig
from latent_verse.config.train_rules import with_pretrained_shape

FORMAT = "latent_verse/augvae"
WEIGHTS = "model.safetensors"
SETTINGS = ("config",)  # of what its config.json holds
PART = "vae"  # the folder of a bundle that is a saved AugVAE


def load_augvae(path: str | os.PathLike) -> AugVAE:
    """An AugVAE, -ML or -SL, from any file that can hold one; in evaluation mode, on the CPU.

    Args:
        path: this project's or a released .ckpt, a run folder (its best checkpoint), a folder with config.json and
            model.safetensors, a bundle (its AugVAE), or a hub id of such a folder.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or does not fit.
        ConfigError: as `config.settings.expand`.
    """
    path = located(path)
    local = find_checkpoint(path)
    if os.path.isfile(local) and local.name == WEIGHTS:
        local = local.parent
    if not os.path.isdir(local) and (os.path.exists(local) or local.suffix == ".ckpt"):  # if missing: others are named
        return _augvae_from_ckpt(local)
    if not os.path.isdir(local):
        wanted = "a .ckpt file, a run folder, a folder of save_pretrained, a bundle"
        local = fetch_from_hub(str(path), (ABOUT, WEIGHTS, f"{PART}/*"), wanted)
    return _augvae_from_folder(local)


def load_for_training(config: TrainVAEConfig, given: Collection[str]) -> tuple[TrainVAEConfig, AugVAE]:
    """The AugVAE a run of train_vae begins with: new, from pretrained weights, or single-level from a multi-level one.

    In training mode. The configuration returned with it has its shape.

    Raises:
        CheckpointError, ConfigError: as `load_augvae` and `with_pretrained_shape`.
    """
    if config.optim.pretrained_path is None:
        return config, AugVAE(config.model)
    pretrained = load_augvae(config.optim.pretrained_path)
    config = with_pretrained_shape(config, pretrained.config, given)
    model = AugVAE(dataclasses.replace(config.model, attn_resolutions=pretrained.config.attn_resolutions))
    model.load_state_dict(pretrained.state_dict())
    if config.optim.finetune:
        (level,) = config.model.attn_resolutions
        model = model.to_single_level(level)
    return config, model.train()


def save_augvae(model: AugVAE, directory: str | os.PathLike) -> None:
    """Write `config.json` and `model.safetensors` to a folder, both or neither; shared tensors only once.

    Raises:
        CheckpointError: it would replace files that are not of a saved AugVAE, or a weight is not finite.
        FileError: the folder cannot be written.
        ConfigError: as `config.settings.expand`.
    """
    check_finite(model, directory)
    with writing(directory, FORMAT, [WEIGHTS], alone=False) as unfinished:
        write_augvae(model, unfinished[ABOUT], unfinished[WEIGHTS])


def write_augvae(model: AugVAE, about: Path, weights: Path) -> None:
    """Write the two files of a saved AugVAE."""
    from safetensors.torch import save_model

    save_model(model, str(weights))
    content = {"format": FORMAT, "config": as_plain(model.config), "crc32": crc32(weights)}
    write_about(about, content, SETTINGS)


def augvae_card(model: AugVAE, name: str) -> str:
    """The model card of a saved AugVAE that is `name` on the hub."""
    use = f'from latent_verse import AugVAE\n\nvae = AugVAE.from_pretrained("{name}")\ncodes = vae.codes(images)'
    return model_card(name, [describe_augvae(model)], use, ["augvae", "vq-vae"])


def describe_augvae(model: AugVAE) -> str:
    """One line: its parameters, images and codes."""
    c, side = model.config, model.config.resolution
    weights = sum(p.numel() for p in model.parameters())
    levels = ", ".join(f"{level} x {level}" for level in model.code_levels)
    return f"AugVAE: {weights:,} parameters, images of {side} x {side} px, {levels} codes of {c.num_tokens:,}"


AugVAE.from_pretrained = staticmethod(load_augvae)
AugVAE.push_to_hub, AugVAE.model_card = PushToHub.push_to_hub, augvae_card
AugVAE.save_pretrained = save_augvae


def _augvae_from_folder(directory: Path) -> AugVAE:
    about, weights = directory / ABOUT, directory / WEIGHTS
    content = json_object(about) if os.path.isfile(about) else {}
    if isinstance(content.get(PART), dict) and os.path.isdir(directory / PART):
        return _augvae_from_folder(directory / PART)
    for file in (about, weights):
        if not os.path.isfile(file):
            raise CheckpointError(f"{directory} holds no {file.name}; AugVAE.save_pretrained writes both files.")
    if content.get("format") != FORMAT:
        found = content.get("format")
        raise CheckpointError(f"{about} has format {shown(found)}, not {FORMAT!r}.")
    if "config" not in content:
        raise CheckpointError(f"{about} is damaged: it lacks the model's settings, config.")
    model = _build(content["config"], read_safetensors(weights), about, weights, once=True)
    if content.get("crc32") not in (None, crc32(weights)):  # earlier versions recorded none
        remedy = "Copy or export it again; if its weights were changed on purpose, remove crc32 there."
        raise CheckpointError(f"{weights} is damaged: its checksum is not what {about} records. {remedy}")
    check_about(about, content, SETTINGS)
    return model


def _augvae_from_ckpt(file: Path) -> AugVAE:
    content = read_named(file)
    own, stored = content.get("latent_verse"), content["state_dict"]
    if own is not None:
        if own.get("kind") != "augvae":
            raise CheckpointError(f"{file} is a checkpoint of {own.get('kind')}, not of an AugVAE.")
        settings = own.get("model") or {}
        state = {k.removeprefix("model."): v for k, v in stored.items() if k.startswith("model.")}
    elif content.get("hyper_parameters") is not None and any(k.startswith("quantizers.") for k in stored):
        state = {k: v for k, v in stored.items() if not k.startswith("loss.")}  # frozen LPIPS
        settings = _released_settings(content["hyper_parameters"], state, file)
    else:
        raise CheckpointError(f"{file} is a checkpoint, but neither this project's nor a released AugVAE.")
    return _build(settings, state, file, file)


def _build(settings: object, state: dict[str, torch.Tensor], about: Path, weights: Path, once: bool = False) -> AugVAE:
    """An AugVAE of the settings in the file `about` and the `state` in the file `weights`, in evaluation mode.

    Args:
        once: tensors that the levels share are in `state` once, under one of their names, as safetensors demand.
    """
    config = settings_from(AugVAEConfig, settings, about)
    planned = augvae_skeleton(config, state, about)
    if once:
        shared = {key: name for key, names in _shared_keys(planned).items() for name in names if name in state}
        state = state | {key: state[name] for key, name in shared.items()}
    check_fits(planned, state, weights)
    model = AugVAE(config)
    model.load_state_dict(state)
    return model.eval()


def augvae_skeleton(config: AugVAEConfig, state: dict[str, torch.Tensor], file: str | os.PathLike) -> AugVAE:
    """An AugVAE without memory; see `checks.skeleton`."""
    blocks = (len(config.ch_mult) + len(config.attn_resolutions)) * config.num_res_blocks
    try:
        return skeleton(AugVAE, config, blocks, state, file)
    except CheckpointError:
        if config.quantizer == "ema":
            raise
        return AugVAE(config)  # another quantiser may compute with the numbers in tensors when it is made


def _released_settings(hyper_parameters: dict[str, Any], state: dict[str, torch.Tensor], file: Path) -> dict[str, Any]:
    """The settings of a released file. Levels are counted in the weights: -SL files kept -ML's settings."""
    args = hyper_parameters.get("args", hyper_parameters)
    values = args if isinstance(args, dict) else vars(args) if isinstance(args, argparse.Namespace) else {}
    values = {f.name: values[f.name] for f in dataclasses.fields(AugVAEConfig) if f.name in values}
    missing = {"resolution", "ch_mult"} - values.keys()
    if missing:
        raise CheckpointError(f"{file}: its hyper_parameters lack {', '.join(sorted(missing))}.")
    of_file = settings_from(AugVAEConfig, values, file)
    first = of_file.resolution // 2 ** (len(of_file.ch_mult) - 1)

    def count(prefix: str) -> int:
        return len({k.split(".")[1] for k in state if k.startswith(prefix)})

    levels = [first // 2**i for i in range(count("pre_quants."))]
    single = levels[min(count("encoders."), len(levels)) - 1] if levels and count("connectors.") else None
    return {**values, "attn_resolutions": levels, "single_level": single}


def _shared_keys(model: nn.Module) -> dict[str, list[str]]:
    """For each key of a tensor that has several: all keys of that tensor."""
    by_tensor: dict[int, list[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        by_tensor.setdefault(id(tensor), []).append(key)
    return {key: keys for keys in by_tensor.values() if len(keys) > 1 for key in keys}
