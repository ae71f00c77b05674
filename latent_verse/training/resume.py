"""Which checkpoint a rerun resumes from, and whether all that it restores is whole.

PyTorch and Lightning restore what a file holds as it is: a fused AdamW whose averages have other shapes than its
parameters would read and write beyond them. So all of it is first compared with the form of what a new run would save.
"""

from __future__ import annotations

import math
import os
import random
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.loops import _FitLoop
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.checkpoints.augvae import augvae_skeleton
from latent_verse.checkpoints.bundle import biart_skeleton
from latent_verse.checkpoints.checks import check_fits, check_tensor, number_in, settings_from
from latent_verse.checkpoints.ckpt_files import (
    CheckpointError,
    Kind,
    check_resumable,
    checkpoints_in,
    first_usable,
    in_order,
    read_named,
)
from latent_verse.config import AugVAEConfig, BiARTConfig
from latent_verse.config.messages import shown
from latent_verse.config.settings import is_count, is_number
from latent_verse.config.train import BiARTOptimConfig, VAEOptimConfig
from latent_verse.training.optimizer import make_optimizer
from latent_verse.training.process_state import set_random_state
from latent_verse.training.runs import Run, states

AVERAGES = {True: {"momentum"}, False: {"exp_avg", "exp_avg_sq"}}  # of a parameter of Muon, or else of AdamW
# AdamW's other algorithms, which these runs do not use: a file that turned one on would change what is computed
UNUSED = ("amsgrad", "maximize", "capturable", "differentiable")
OTHER_SETTINGS = {"fused": True, "foreach": True, "initial_lr": 0.0}  # of a group; which of them depends on the device
EARLIER = {"verbose": False}  # schedules of earlier versions of PyTorch have it
# names that Lightning's loops need, at any depth; of the others its versions have some more or less
COUNTED = {
    "epoch_progress",
    "epoch_loop.batch_progress",
    "epoch_loop.val_loop.batch_progress",
    "epoch_loop.automatic_optimization.optim_progress",
    *("optimizer", "step", "total", "current", "ready", "completed", "is_last_batch"),
    *("epoch", "samples", "slots"),  # of TrainLoader
}
PLACE_IN_DATA = {"epoch": 0, "samples": 0, "slots": 0}  # of TrainLoader
CHECKPOINTS: dict[str, Any] = dict.fromkeys(("best_model_score", "current_score"), 0.0)
CHECKPOINTS |= dict.fromkeys(("dirpath", "best_model_path", "kth_best_model_path", "last_model_path"), "")
CHECKPOINTS |= {"kth_value": math.inf}  # of ModelCheckpoint
# of fp16's GradScaler, whose own state is empty on a machine without a GPU
SCALER = {"scale": 1.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
ANY = object()  # a form that everything has
# what a form asks for, in words
EXPECTED = {dict: "a dict", list: "a list", tuple: "a list", Tensor: "a tensor", str: "a text", bool: "a bool"}
EXPECTED |= {int: "a count", float: "a number", type(None): "None"}


def starting_point(
    run: Run,
    ckpt_path: str | None,
    kind: Kind,
    model: AugVAEConfig | BiARTConfig | None = None,
    optim: VAEOptimConfig | BiARTOptimConfig | None = None,
) -> tuple[Path | None, int]:
    """The checkpoint that training resumes from, and the step that it stores; (None, 0) to start anew.

    Args:
        run: its own checkpoints are tried from the newest on; a damaged one is skipped with a warning.
        ckpt_path: the checkpoint or run folder of --resume, or None. The run's own is preferred if it is as far.
        kind, model, optim: what is trained, its shape, and how; None is not compared with the checkpoint's.

    Raises:
        CheckpointError: training cannot resume from ckpt_path, or from any of the run's own checkpoints.
    """

    def resumable(file: Path, content: dict[str, Any] | None = None) -> tuple[Path, int]:
        content = check_resumable(file, kind, model, content)
        check_state(content, file, kind, optim)
        return file, content["global_step"]

    given, skipped = None, {}
    if ckpt_path is not None and not os.path.isdir(ckpt_path):
        given = resumable(Path(ckpt_path), read_named(Path(ckpt_path)))
    elif ckpt_path is not None:
        place, damaged = Path(ckpt_path), {}
        files = [f for d in (place / "checkpoints", place / "backups", place) for f in checkpoints_in(d)]
        if not files:
            remedy = "To start from the weights of a bundle or AugVAE, give it as --pretrained_path."
            raise CheckpointError(f"ckpt_path: the folder {place} holds no .ckpt to resume from. {remedy}")
        given = first_usable(in_order(files, damaged), resumable, damaged)
        if given is None:
            raise next(iter(damaged.values()))
    own = first_usable(in_order(states(run), skipped), resumable, skipped)
    if own is None and skipped:
        if given is None:
            raise next(iter(skipped.values()))
        for reason in skipped.values():
            warnings.warn(f"{reason} Taking {given[0]} in its place.", stacklevel=2)
    if own is None or (given is not None and given[1] > own[1]):
        return given or (None, 0)
    return own


def check_state(
    content: Mapping[str, Any], file: Path, kind: Kind, optim: VAEOptimConfig | BiARTOptimConfig | None = None
) -> None:
    """Check all that resuming from a checkpoint of `kind` restores, against the network of the shape that it declares.

    Args:
        content: of `file`, from `check_resumable`.
        optim: the run's, whose optimiser and averaged weights the checkpoint's have to be; None is not compared.

    Raises:
        CheckpointError: a part is missing, of another shape or kind, or not finite.
    """
    own, state = content["latent_verse"], content["state_dict"]
    networks = {
        name: {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}
        for name in ("model.", "ema.")
    }
    model: AugVAE | BiART
    if kind == "augvae":
        model = augvae_skeleton(settings_from(AugVAEConfig, own.get("model"), file), state, file)
    else:
        model = biart_skeleton(settings_from(BiARTConfig, own.get("model"), file), state, file)
        vae = own.get("vae")
        if not isinstance(vae, dict) or not isinstance(vae.get("fingerprint"), str) or "path" not in vae:
            raise _damaged(file, "it does not say which AugVAE it was trained with")
        if "tokenizer" not in own:
            raise _damaged(file, "it holds no tokenizer")
    check_fits(model, networks["model."], file)
    if networks["ema."]:
        check_fits(model, networks["ema."], file)
    others = [key for key in state if not key.startswith(("model.", "ema."))]
    if others or (kind == "augvae" and networks["ema."]):
        raise CheckpointError(f"{file} holds weights that training of {kind} does not have: {(others or ['ema.'])[0]}.")
    if isinstance(optim, BiARTOptimConfig) and bool(optim.ema_decay) != bool(networks["ema."]):
        holds = "averaged weights" if networks["ema."] else "no averaged weights"
        raise CheckpointError(f"{file} holds {holds}, but ema_decay is {optim.ema_decay}. Give the run's own value.")
    _check_optimizer(content, model, file, optim)
    _check_schedules(content, len(content["optimizer_states"][0]["param_groups"]), file)
    _check_settings(own, file)
    _check_progress(content, file)
    _check_callbacks(content, file)
    _check_processes(content, model, file)
    version = content.get("pytorch-lightning_version")
    if not isinstance(version, str) or not re.fullmatch(r"\d+(\.\w+)+", version):
        raise _damaged(file, "it does not say which Lightning wrote it")
    if "MixedPrecision" in content:
        check_form(content["MixedPrecision"], SCALER, file, "MixedPrecision")


def _check_optimizer(
    content: Mapping[str, Any], model: AugVAE | BiART, file: Path, optim: VAEOptimConfig | BiARTOptimConfig | None
) -> None:
    """Each parameter's state, by its number in the groups or its name, has the parameter's shape and is finite."""
    check_form(content["optimizer_states"], [{"state": ANY, "param_groups": ANY}], file, "optimizer_states")
    states_of, groups = (content["optimizer_states"][0][name] for name in ("state", "param_groups"))
    if not isinstance(states_of, dict) or not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise _damaged(file, "its optimiser has no groups of parameters, or no state")
    name = "muon" if groups and groups[0].get("muon") is True else "adamw"
    if optim is not None and optim.optimizer != name:  # of two, one has a group of parameters more
        remedy = f"Give --optimizer {name}, or start from its weights alone: --pretrained_path."
        raise CheckpointError(f"{file} holds the state of the optimizer {name}, not of {optim.optimizer}. {remedy}")
    wanted = make_optimizer(model, name, 1e-3, 1e-3, 0.0).param_groups
    lengths = [len(group["params"]) if isinstance(group.get("params"), list) else None for group in groups]
    if lengths != [len(group["params"]) for group in wanted]:
        raise _damaged(file, f"its optimiser has groups of {lengths} parameters, not of those of its network")
    seen = set()
    for group, fresh in zip(groups, wanted, strict=True):
        is_muon = fresh.get("muon", False)
        form = {key: value for key, value in fresh.items() if key != "params"} | OTHER_SETTINGS
        needed = {"lr", "weight_decay", *(("momentum",) if is_muon else ("eps", "betas"))}
        check_form({key: group[key] for key in form if group.get(key) is not None}, form, file, "its optimiser", needed)
        if wrong := [key for key in UNUSED if group.get(key)] + ["muon"] * (group.get("muon", False) is not is_muon):
            raise _damaged(file, f"{wrong[0]} of its optimiser is not what these runs use")
        for key, parameter in zip(group["params"], fresh["params"], strict=True):
            if not isinstance(key, (int, str)) or key in seen:
                raise _damaged(file, "its optimiser lists a parameter twice, or by neither number nor name")
            seen.add(key)
            if (found := states_of.get(key)) is not None:
                _check_moments(found, parameter, AVERAGES[is_muon], f"optimizer_states: {key}", file)
    if unknown := [key for key in states_of if key not in seen]:
        raise _damaged(file, f"its optimiser has a state of {len(unknown)} parameters that it does not list")
    if content.get("global_step") and not states_of:
        raise _damaged(file, "its optimiser's averages are missing")


def _check_moments(found: object, parameter: Tensor, averages: set[str], name: str, file: Path) -> None:
    """Check the averages of one parameter, and the steps they are over."""
    if not isinstance(found, dict) or found.keys() - {"step"} != averages:
        raise _damaged(file, f"{name} does not have the averages {', '.join(sorted(averages))}")
    for part in averages:
        check_tensor(moment := found[part], file, f"{name}, {part}")
        if moment.shape != parameter.shape or not moment.is_floating_point():
            shape = tuple(parameter.shape)
            raise _damaged(file, f"{name}, {part} is {moment.dtype} {tuple(moment.shape)}, not float {shape}")
        if part == "exp_avg_sq" and moment.numel() and moment.min() < 0:
            raise _damaged(file, f"{name}: a mean square is negative")
    if "exp_avg" in averages or "step" in found:
        check_form(found.get("step"), 0.0, file, f"{name}, step")


def _check_schedules(content: Mapping[str, Any], groups: int, file: Path) -> None:
    """Schedules take over every name in their state, a method's too: only those that they save."""
    optimizer = torch.optim.AdamW([{"params": [torch.zeros(1)]} for _ in range(groups)])
    form = LambdaLR(optimizer, lambda step: 1.0).state_dict() | EARLIER
    schedules = content.get("lr_schedulers")
    check_form(schedules, [form] * _length(schedules), file, "lr_schedulers", {"last_epoch", "base_lrs", "_last_lr"})
    if (plateau := content["latent_verse"].get("plateau")) is not None:
        check_form(plateau, ReduceLROnPlateau(optimizer, min_lr=0.0).state_dict() | EARLIER, file, "lr_decay", set())


def _check_settings(own: Mapping[str, Any], file: Path) -> None:
    """The settings of the run that wrote it are sections; those of earlier versions recorded none."""
    settings = own.get("run", {})
    if not isinstance(settings, dict) or not all(isinstance(section, dict) for section in settings.values()):
        raise _damaged(file, "its run's settings are not sections")
    if own.get("plateau"):  # its rate follows from that of the settings
        values = (settings.get("optim", {}).get("learning_rate"), settings.get("data", {}).get("batch_size"))
        if not all(is_number(value) and value > 0 for value in values):
            raise _damaged(file, "its run's settings lack learning_rate or batch_size")


def _check_progress(content: Mapping[str, Any], file: Path) -> None:
    """Lightning's loops count what those of a new run do; the optimiser's steps among them are the step."""
    loops = content.get("loops")
    found = loops.get("fit_loop") if isinstance(loops, dict) else None
    if not isinstance(found, dict):
        raise _damaged(file, "it does not say how far training was (loops)")
    form = _FitLoop(None).state_dict()
    if isinstance(data := found.get("state_dict"), dict) and "combined_loader" in data:
        form["state_dict"] = {"combined_loader": [PLACE_IN_DATA] * _length(data["combined_loader"])}
    check_form(_known(found, form), form, file, "loops", COUNTED)
    steps = found["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    if steps != content.get("global_step"):
        raise _damaged(file, f"its global_step is {content.get('global_step')}, but its optimiser made {steps} steps")


def _known(found: object, form: object) -> object:
    """`found` without the names that `form` lacks, at any depth of dicts."""
    if isinstance(found, dict) and isinstance(form, dict):
        return {name: _known(found[name], each) for name, each in form.items() if name in found}
    return found


def _check_callbacks(content: Mapping[str, Any], file: Path) -> None:
    """Callbacks have a dict each. Earlier versions saved with ModelCheckpoint, which notes None for what it lacks."""
    callbacks = content.get("callbacks") or {}
    for name, state in callbacks.items():
        if not isinstance(name, str) or not isinstance(state, dict):
            raise _damaged(file, "its callbacks do not have a dict each")
        if name.startswith("ModelCheckpoint"):
            scores = dict.fromkeys(models if isinstance(models := state.get("best_k_models"), dict) else (), 0.0)
            form = CHECKPOINTS | {"best_k_models": scores}
            check_form({key: state[key] for key in form if state.get(key) is not None}, form, file, "callbacks", set())


def _check_processes(content: Mapping[str, Any], model: AugVAE | BiART, file: Path) -> None:
    """The states of random number generators are tried on others; the module's parts have its shapes."""
    processes = content.get("process_states")
    if processes is None:
        return
    module = {}
    if isinstance(model, AugVAE):
        counts = torch.zeros(len(model.levels), model.config.num_tokens, dtype=torch.int64)
        module = {"epoch_loss": torch.zeros(2), "train_counts": counts}
    check_form(processes, [{"rng": ANY, "module": ANY}] * _length(processes), file, "process_states")
    for state in processes:
        if state["module"] is not None and state["module"] != {}:
            check_form(state["module"], module, file, "process_states")
        try:
            set_random_state(state["rng"], random.Random(), np.random.RandomState(), torch.Generator())
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            raise _damaged(file, "its random number generators cannot be restored (process_states)") from error
        cuda = state["rng"].get("cuda", torch.ByteTensor())
        if not isinstance(cuda, Tensor) or cuda.dtype != torch.uint8:
            raise _damaged(file, "its GPU's random number generator cannot be restored (process_states)")


def check_form(found: object, form: object, file: Path, where: str, needed: Collection[str] | None = None) -> None:
    """Check that what a file holds has the form of what a run would have saved.

    Args:
        form: a dict of names, a list, a tensor (its shape, and whether it is of whole numbers), text, a bool, a count,
            or a number that is not negative; an infinite one may be any but NaN. ANY is not looked at.
        needed: of a dict's names, at any depth, those that have to be there; by default all.

    Raises:
        CheckpointError: a part is missing, not known, or of another kind.
    """
    if form is ANY or found is form:
        return
    if isinstance(form, dict) and isinstance(found, dict):
        if unknown := found.keys() - form.keys():
            raise _damaged(file, f"{where} has an unknown part, {shown(min(unknown, key=str))}")
        if missing := (form.keys() if needed is None else form.keys() & set(needed)) - found.keys():
            raise _damaged(file, f"{where} lacks {min(missing)}")
        for name, value in found.items():
            check_form(value, form[name], file, f"{where}: {name}", needed)
    elif isinstance(form, (list, tuple)) and isinstance(found, (list, tuple)):
        if len(found) != len(form):
            raise _damaged(file, f"{where} has {len(found)} items, not {len(form)}")
        for value, each in zip(found, form, strict=True):
            check_form(value, each, file, where, needed)
    elif isinstance(form, Tensor) and isinstance(found, Tensor):
        check_tensor(found, file, where)
        if found.shape != form.shape or found.is_floating_point() != form.is_floating_point():
            raise _damaged(file, f"{where} has shape {tuple(found.shape)}, not {tuple(form.shape)}")
    elif not _is_like(found, form):
        is_plain = found is None or isinstance(found, (bool, int, float, str))
        what = shown(found) if is_plain else f"a {type(found).__name__}"
        raise _damaged(file, f"{where} is {what}, where {EXPECTED[type(form)]} is expected")


def _is_like(found: object, form: object) -> bool:
    """Whether a single value could stand where `form` stands."""
    if isinstance(form, (bool, str)):
        return isinstance(found, type(form))
    found = number_in(found)
    if isinstance(form, int):
        return is_count(found)
    if isinstance(form, float) and math.isinf(form):
        return isinstance(found, (int, float)) and not math.isnan(found)
    return isinstance(form, float) and is_number(found) and found >= 0


def _length(listed: object) -> int:
    return len(listed) if isinstance(listed, (list, tuple)) else 0


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged, training cannot resume from it: {what}.")
