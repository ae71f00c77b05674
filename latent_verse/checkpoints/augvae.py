"""Reading and writing an AugVAE: this project's and released .ckpt files, and folders of safetensors."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latent_verse.augvae.model import AugVAE
from latent_verse.checkpoints.ckpt_files import CheckpointError, fetch_from_hub, fill, find_checkpoint, read_ckpt
from latent_verse.config import AugVAEConfig, ConfigError, as_plain
from latent_verse.config.settings import expand
from latent_verse.config.train import TrainVAEConfig, with_pretrained_shape
from latent_verse.files import replacing, write_json

FORMAT = "latent_verse/augvae"
WEIGHTS = "model.safetensors"


def load_augvae(path: str | os.PathLike) -> AugVAE:
    """An AugVAE, -ML or -SL, from any file that can hold one; in evaluation mode, on the CPU.

    Args:
        path: this project's or a released .ckpt, a run folder (its best checkpoint), a folder with config.json and
            model.safetensors, or a hub id.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or does not fit.
    """
    path = expand(path, "hub", "path")
    local = find_checkpoint(Path(path))
    if local.is_file() and local.name == WEIGHTS:
        local = local.parent
    if local.is_file() or (local.suffix == ".ckpt" and not local.is_dir()):  # if missing: the error names others
        return _augvae_from_ckpt(local)
    if not local.is_dir():
        local = fetch_from_hub(str(path), ("config.json", WEIGHTS))
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
    """Write `config.json` and `model.safetensors` to a folder, each whole or not at all; shared tensors only once."""
    from safetensors.torch import save_model

    directory = Path(expand(directory, True, "directory"))
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / WEIGHTS) as unfinished:
        save_model(model, str(unfinished))
    write_json(directory / "config.json", {"format": FORMAT, "config": as_plain(model.config)})


AugVAE.from_pretrained = staticmethod(load_augvae)
AugVAE.save_pretrained = save_augvae


def _augvae_from_folder(directory: Path) -> AugVAE:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in ("config.json", WEIGHTS):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} holds no {name}; AugVAE.save_pretrained writes both files.")
    try:
        content = json.loads((directory / "config.json").read_text())
        if content.get("format") != FORMAT:
            raise CheckpointError(f"{directory}/config.json has format {content.get('format')!r}, not {FORMAT!r}.")
        model = AugVAE(_config(content["config"], directory / "config.json"))
        stored = load_file(directory / WEIGHTS)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{directory} is damaged: {error}") from error
    shared = _shared_keys(model)
    state = {key: stored[name] for key, names in shared.items() for name in names if name in stored}
    state.update({key: value for key, value in stored.items() if key not in shared})
    fill(model, state, directory / WEIGHTS)
    return model.eval()


def _augvae_from_ckpt(file: Path) -> AugVAE:
    content = read_ckpt(file)
    own = content.get("latent_verse")
    if own is not None:
        if own.get("kind") != "augvae":
            raise CheckpointError(f"{file} is a checkpoint of {own.get('kind')}, not of an AugVAE.")
        model = AugVAE(_config(own.get("model") or {}, file))
        state = {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
    elif "hyper_parameters" in content and any(k.startswith("quantizers.") for k in content["state_dict"]):
        state = {k: v for k, v in content["state_dict"].items() if not k.startswith("loss.")}  # frozen LPIPS
        model = AugVAE(_released_config(content["hyper_parameters"], state, file))
    else:
        raise CheckpointError(f"{file} is a checkpoint, but neither this project's nor a released AugVAE.")
    fill(model, state, file)
    return model.eval()


def _released_config(hyper_parameters: dict[str, Any], state: dict[str, torch.Tensor], file: Path) -> AugVAEConfig:
    """The configuration of a released file. Levels are counted in the weights: -SL files kept -ML's settings."""
    args = hyper_parameters.get("args", hyper_parameters)
    args = args if isinstance(args, dict) else vars(args)
    values = {f.name: args[f.name] for f in dataclasses.fields(AugVAEConfig) if f.name in args}
    missing = {"resolution", "ch_mult"} - values.keys()
    if missing:
        raise CheckpointError(f"{file}: its hyper_parameters lack {', '.join(sorted(missing))}.")
    first = values["resolution"] // 2 ** (len(values["ch_mult"]) - 1)

    def count(prefix: str) -> int:
        return len({k.split(".")[1] for k in state if k.startswith(prefix)})

    levels = [first // 2**i for i in range(count("pre_quants."))]
    single = levels[count("encoders.") - 1] if count("connectors.") else None
    return _config({**values, "attn_resolutions": levels, "single_level": single}, file)


def _config(values: dict[str, Any], file: Path) -> AugVAEConfig:
    try:
        config = AugVAEConfig(**values)
        config.validate()
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{file}: its settings are not of an AugVAE this version can build: {error}") from error
    return config


def _shared_keys(model: nn.Module) -> dict[str, list[str]]:
    """For each key of a tensor that has several: all keys of that tensor."""
    by_tensor: dict[int, list[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        by_tensor.setdefault(id(tensor), []).append(key)
    return {key: keys for keys in by_tensor.values() if len(keys) > 1 for key in keys}
