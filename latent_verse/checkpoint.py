"""The only reader of .ckpt files, this project's and released ones; and AugVAE's folders of safetensors.

Files are read with `weights_only=True`: nothing in them can run code. The one class allowed beyond tensors and plain
types is argparse.Namespace, which released files hold their settings in.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latent_verse.augvae.model import AugVAE
from latent_verse.config import AugVAEConfig, ConfigError, UserError, as_plain
from latent_verse.config.train import TrainVAEConfig, with_pretrained_shape
from latent_verse.runs import newest

FORMAT = "latent_verse/augvae"
WEIGHTS = "model.safetensors"
# settings of the model section that change how it trains, not which weights it has; the second line is BiART's
TRAINING_ONLY = frozenset(
    {"dropout", "quant_beta", "quant_ema_decay", "quant_ema_eps", "restart_threshold"}
    | {"embd_pdrop", "resid_pdrop", "attn_pdrop"}
)


class CheckpointError(UserError):
    """A checkpoint is absent, damaged, of another kind, or does not fit. The message names the file and the remedy."""


# -------------------------------------------------------------------------------------------------------------- AugVAE


def load_augvae(path: str | os.PathLike) -> AugVAE:
    """An AugVAE, -ML or -SL told apart by content, from any file it can be in. Evaluation mode, on the CPU.

    Args:
        path: this project's or a released .ckpt, a run folder (its best checkpoint), a folder with config.json and
            model.safetensors, or a hub id.

    Raises:
        CheckpointError: see the class.
    """
    local = find_checkpoint(Path(path))
    if local.is_file() and local.name == WEIGHTS:
        local = local.parent
    if local.is_file() or (local.suffix == ".ckpt" and not local.is_dir()):  # an absent one: the error names others
        return _augvae_from_ckpt(local)
    if not local.is_dir():
        local = fetch_from_hub(str(path))
    return _augvae_from_folder(local)


def load_for_training(config: TrainVAEConfig, given: Collection[str]) -> tuple[TrainVAEConfig, AugVAE]:
    """The AugVAE a run of train_vae begins with: new, from pretrained weights, or single-level from a multi-level one.

    Args:
        given: settings that were given: those that contradict the pretrained model's shape are refused, defaults yield.

    Returns:
        The run's configuration, with the shape that the checkpoint gave it, and the model in training mode.

    Raises:
        CheckpointError: see the class.
        ConfigError: the settings contradict the pretrained model, or it has no such level.
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
    """Write `config.json` and `model.safetensors`; each file appears whole or not at all."""
    from safetensors.torch import save_model

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {"format": FORMAT, "config": as_plain(model.config)}
    for name, write in (
        (WEIGHTS, lambda p: save_model(model, str(p))),
        ("config.json", lambda p: p.write_text(json.dumps(config, indent=2) + "\n")),
    ):
        unfinished = directory / f".{name}.tmp"
        write(unfinished)
        os.replace(unfinished, directory / name)


def _augvae_from_folder(directory: Path) -> AugVAE:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in ("config.json", WEIGHTS):
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{directory} holds no {name}; AugVAE.save_pretrained writes config.json and {WEIGHTS}."
            )
    try:
        content = json.loads((directory / "config.json").read_text())
        if content.get("format") != FORMAT:
            raise CheckpointError(f"{directory}/config.json has format {content.get('format')!r}, not {FORMAT!r}.")
        model = AugVAE(_config(content["config"], directory / "config.json"))
        stored = load_file(directory / WEIGHTS)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{directory} is damaged: {error}") from error
    # shared tensors are stored once
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
    args = vars(args) if isinstance(args, argparse.Namespace) else dict(args)
    known = {f.name for f in dataclasses.fields(AugVAEConfig)} - {
        "attn_resolutions",
        "single_level",
        "restart_threshold",
    }
    values = {name: args[name] for name in known if name in args}
    missing = {"resolution", "ch_mult"} - values.keys()
    if missing:
        raise CheckpointError(f"{file}: its hyper_parameters lack {', '.join(sorted(missing))}.")
    first = values["resolution"] // 2 ** (len(values["ch_mult"]) - 1)

    def count(prefix):
        return len({k.split(".")[1] for k in state if k.startswith(prefix)})

    levels = [first // 2**i for i in range(count("pre_quants."))]
    single = levels[count("encoders.") - 1] if count("connectors.") else None
    return _config({**values, "attn_resolutions": levels, "single_level": single}, file)


def _config(values: dict[str, Any], file: Path) -> AugVAEConfig:
    try:
        config = AugVAEConfig(**values)
        config.validate()
    except (TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{file}: its settings do not describe an AugVAE this version can build: {error}"
        ) from error
    return config


# ------------------------------------------------------------------------------------------------------------ any file


def read_ckpt(file: str | os.PathLike) -> dict[str, Any]:
    """A Lightning checkpoint's content, on the CPU, memory-mapped.

    Raises:
        CheckpointError: absent, truncated, not a checkpoint, or in need of code to be run.
    """
    file = Path(file)
    if not file.is_file():
        near = sorted(p.name for p in file.parent.glob("*.ckpt")) if file.parent.is_dir() else []
        raise CheckpointError(
            f"checkpoint {file} does not exist.{' That folder holds: ' + ', '.join(near) if near else ''}"
        )
    if file.suffix == ".safetensors":  # some versions of PyTorch read it, others take it for a pickle of code
        raise CheckpointError(f"{file} holds weights alone: it is no Lightning checkpoint, whose name ends in .ckpt.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except PermissionError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except Exception as error:  # pickle, zipfile and torch raise kinds of their own for a damaged file
        refused = re.search(r"GLOBAL ([\w.]+)|global ([\w.]+)|class ([\w.]+)", str(error))
        if "Unsupported" in str(error) or refused:
            name = next(filter(None, refused.groups())) if refused else "something that is no plain data"
            raise CheckpointError(
                f"{file} is refused: it names {name}, and reading that would run code. "
                "Only tensors, plain types and argparse.Namespace are read."
            ) from error
        raise CheckpointError(f"{file} is no whole checkpoint; was it cut off? ({first_line(error)})") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{file} holds no state_dict: it is no Lightning checkpoint.")
    return content


def find_checkpoint(path: Path) -> Path:
    """The best checkpoint of a run folder, or its newest where none is best; any other path as it is."""
    for folder in (path / "checkpoints", path):
        files = list(folder.glob("*.ckpt")) if folder.is_dir() else []
        chosen = newest(files, "best-") or newest(files)
        if chosen:
            return chosen
    return path


def starting_point(states: list[Path], ckpt_path: str | None, kind: str, model=None) -> Path | None:
    """The checkpoint that training continues from, None to begin anew.

    Args:
        states: the run's own checkpoints, newest first (runs.states); a damaged one yields to the one before, with a
            warning.
        ckpt_path: of --resume; a run folder stands for its newest. The run's own go first where further on.
        model: configuration of the model to be trained, which the checkpoint's must equal in shape.

    Raises:
        CheckpointError: ckpt_path cannot be continued from, or none of the run's own checkpoints can.
    """
    given, given_step = None, -1
    if ckpt_path is not None:
        place = Path(ckpt_path)
        folders = [place / "backups", place / "checkpoints", place]
        given = newest(f for d in folders for f in d.glob("*.ckpt")) if place.is_dir() else place
        if given is None:
            raise CheckpointError(
                f"ckpt_path: the folder {place} holds no .ckpt to continue from. To start from the weights of a bundle "
                "or of save_pretrained, give it as --pretrained_path."
            )
        given_step = check_resumable(given, kind, model)
    problem = None
    for own in states:
        try:
            step = check_resumable(own, kind, model)
        except CheckpointError as error:
            problem = error
            warnings.warn(f"{error} Trying the checkpoint before it.", stacklevel=2)
            continue
        return own if step >= given_step else given
    if problem and given is None:
        raise problem
    return given


def check_resumable(file: str | os.PathLike, kind: str, model=None) -> int:
    """Refuse a file that training of `kind` cannot continue from. Returns its step.

    Raises:
        CheckpointError: damaged, of another kind or shape, or without the optimiser's state.
    """
    content = read_ckpt(file)
    own = content.get("latent_verse") or {}
    found = own.get("kind")
    if found != kind or "optimizer_states" not in content:
        what = f"a checkpoint of {found}" if found else "not one of this project's training checkpoints"
        remedy = {
            "augvae": "To start from its weights alone, give it as --pretrained_path.",
            "biart": "Give a checkpoint or run folder of train_biart.py; an AugVAE goes to --vae_path, a bundle to "
            "--pretrained_path.",
        }[kind]
        raise CheckpointError(f"{file} is {what}; training of {kind} cannot resume from it. {remedy}")
    if model is not None:
        wanted, there = as_plain(model), own.get("model", {})
        shape = wanted.keys() - TRAINING_ONLY
        there = {k: there.get(k, getattr(type(model), k, None)) for k in shape}  # the default, where it is older
        differ = [f"{k}: {there[k]} there, {wanted[k]} now" for k in sorted(shape) if there[k] != wanted[k]]
        if differ:
            raise CheckpointError(f"{file} is of a model with other settings:\n  " + "\n  ".join(differ))
    return int(content.get("global_step", 0))


def fill(model: nn.Module, state: dict[str, torch.Tensor], file: Path) -> None:
    """Load `state` into `model`; keys and shapes must be the same.

    Raises:
        CheckpointError: listing what is missing, unknown or of another shape.
    """
    wanted = model.state_dict()
    problems = [f"missing {k}" for k in wanted if k not in state]
    problems += [f"unknown {k}" for k in state if k not in wanted]
    problems += [
        f"{k} has shape {tuple(state[k].shape)}, not {tuple(wanted[k].shape)}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"{file} does not fit the model:\n  " + "\n  ".join(problems[:20]) + more)
    model.load_state_dict(state)


def _shared_keys(model: nn.Module) -> dict[str, list[str]]:
    """Every key whose tensor other keys share -> all keys of that tensor."""
    by_tensor: dict[int, list[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        by_tensor.setdefault(id(tensor), []).append(key)
    return {key: keys for keys in by_tensor.values() if len(keys) > 1 for key in keys}


def fetch_from_hub(name: str, files: tuple[str, ...] = ("config.json", WEIGHTS)) -> Path:
    """Fetch config and weights of a hub id into Hugging Face's cache.

    Raises:
        CheckpointError: not a path here, and not to be fetched.
    """
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith((".ckpt", ".safetensors")):
        raise CheckpointError(f"{name} does not exist; give a .ckpt file, a folder of save_pretrained, or a hub id.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # huggingface_hub and its HTTP client raise kinds of their own
        raise CheckpointError(
            f"{name} is no file or folder here, and could not be fetched from the hub: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of a model's weights, their names, types and shapes: the same wherever the model lies.

    Settings are left out, or a version of this program with one more setting would not know its own models.
    """
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
