"""Which checkpoint a rerun resumes from, and whether all that it restores is whole. No Lightning.

PyTorch and Lightning restore what a file holds as it is: a fused AdamW whose averages have other shapes than its
parameters would read and write beyond them. So all of it is compared here first with what the run would have saved.
"""

from __future__ import annotations

import math
import os
import random
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.checkpoints.augvae import augvae_skeleton
from latent_verse.checkpoints.bundle import biart_skeleton
from latent_verse.checkpoints.checks import check_fits, check_tensor, settings_from
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
from latent_verse.config.settings import is_count as is_whole_number
from latent_verse.config.settings import is_number
from latent_verse.config.train import BiARTOptimConfig, VAEOptimConfig
from latent_verse.training.optimizer import make_optimizer
from latent_verse.training.runs import Run, states

AVERAGES = {True: {"momentum"}, False: {"exp_avg", "exp_avg_sq"}}  # of a parameter of Muon, or else of AdamW
# AdamW's other algorithms, which these runs do not use: a file that turned one on would change what is computed
UNUSED = ("amsgrad", "maximize", "capturable", "differentiable")


def starting_point(
    run: Run,
    ckpt_path: str | None,
    kind: Kind,
    model: AugVAEConfig | BiARTConfig | None = None,
    optim: VAEOptimConfig | BiARTOptimConfig | None = None,
) -> Path | None:
    """The checkpoint that training resumes from, None to start anew.

    Args:
        run: its own checkpoints are tried from the newest on; a damaged one is skipped with a warning.
        ckpt_path: the checkpoint or run folder of --resume, or None. The run's own is preferred if it is as far.
        kind, model, optim: what is trained, its shape, and how; None is not compared with the checkpoint's.

    Raises:
        CheckpointError: training cannot resume from ckpt_path, or from any of the run's own checkpoints.
    """

    def resumable(file: Path) -> tuple[Path, int]:
        content = check_resumable(file, kind, model)
        check_state(content, file, kind, optim)
        return file, content["global_step"]

    given, skipped = None, {}
    if ckpt_path is not None and not os.path.isdir(ckpt_path):
        read_named(Path(ckpt_path))
        given = resumable(Path(ckpt_path))
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
        return given and given[0]
    return own[0]


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
    _check_schedules(content, file)
    _check_settings(own, file)
    _check_progress(content, file)
    _check_callbacks(content, file)
    _check_processes(content, model, file)
    version, scaler = content.get("pytorch-lightning_version"), content.get("MixedPrecision", {})
    if not isinstance(version, str) or not re.fullmatch(r"\d+(\.\w+)+", version):
        raise _damaged(file, "it does not say which Lightning wrote it")
    if not isinstance(scaler, dict) or not all(map(is_number, scaler.values())):
        raise _damaged(file, "the scale of its gradients (MixedPrecision) is no number")


def _check_optimizer(
    content: Mapping[str, Any], model: AugVAE | BiART, file: Path, optim: VAEOptimConfig | BiARTOptimConfig | None
) -> None:
    """Each parameter's state, by its number in the groups or its name, has the parameter's shape and is finite."""
    stored = _one(content["optimizer_states"], "optimizer_states", file)
    groups, states_of = stored.get("param_groups"), stored.get("state")
    if not isinstance(groups, list) or not groups or not all(isinstance(group, dict) for group in groups):
        raise _damaged(file, "its optimiser has no parameter groups")
    if not isinstance(states_of, dict):
        raise _damaged(file, "its optimiser has no state")
    name = "muon" if groups[0].get("muon") is True else "adamw"
    if optim is not None and optim.optimizer != name:  # of two, one has a group of parameters more
        remedy = f"Give --optimizer {name}, or start from its weights alone: --pretrained_path."
        raise CheckpointError(f"{file} holds the state of the optimizer {name}, not of {optim.optimizer}. {remedy}")
    wanted = make_optimizer(model, name, 1e-3, 1e-3, 0.0).param_groups
    lengths = [_length(group.get("params")) for group in groups]
    if lengths != [len(group["params"]) for group in wanted]:
        raise _damaged(file, f"its optimiser has groups of {lengths} parameters, not of those of its network")
    seen = set()
    for group, fresh in zip(groups, wanted, strict=True):
        is_muon = _check_group(group, fresh, file)
        for key, parameter in zip(group["params"], fresh["params"], strict=True):
            if not isinstance(key, (int, str)) or key in seen:
                raise _damaged(file, "its optimiser lists a parameter twice, or by no number")
            seen.add(key)
            if (found := states_of.get(key)) is not None:
                _check_moments(found, parameter, AVERAGES[is_muon], f"optimizer_states: {key}", file)
    if unknown := [key for key in states_of if key not in seen]:
        raise _damaged(file, f"its optimiser has a state of {len(unknown)} parameters that it does not list")
    if content.get("global_step") and not states_of:
        raise _damaged(file, "its optimiser's averages are missing")


def _check_group(group: dict[str, Any], fresh: dict[str, Any], file: Path) -> bool:
    """Check the settings of a parameter group. Returns whether it is Muon's."""
    is_muon = fresh.get("muon", False)
    needs = ("lr", "weight_decay", "momentum") if is_muon else ("lr", "weight_decay", "eps", "betas")
    for name in needs:
        value = group.get(name)
        numbers = value if name == "betas" and isinstance(value, (list, tuple)) and len(value) == 2 else [value]
        if len(numbers) != (2 if name == "betas" else 1) or not all(is_number(v) and v >= 0 for v in numbers):
            raise _damaged(file, f"{name} of its optimiser is missing or no number")
    for name, value in group.items():
        if (name in UNUSED and value) or (name == "muon" and value is not is_muon):
            raise _damaged(file, f"{name} of its optimiser is not what these runs use")
        if name in ("fused", "foreach") and value not in (None, True, False):
            raise _damaged(file, f"{name} of its optimiser is neither true nor false")
        if name == "initial_lr" and not is_number(value):
            raise _damaged(file, f"{name} of its optimiser is no number")
    return is_muon


def _check_moments(found: object, parameter: Tensor, averages: set[str], name: str, file: Path) -> None:
    """Check the averages of one parameter, and the steps they are over."""
    if not isinstance(found, dict) or found.keys() - {"step"} != averages:
        raise _damaged(file, f"{name} does not have the averages {', '.join(sorted(averages))}")
    for part in averages:
        moment = found[part]
        check_tensor(moment, file, f"{name}, {part}")
        if moment.shape != parameter.shape or not moment.is_floating_point():
            shape = tuple(parameter.shape)
            raise _damaged(file, f"{name}, {part} is {moment.dtype} {tuple(moment.shape)}, not float {shape}")
    if "exp_avg_sq" in found and found["exp_avg_sq"].numel() and found["exp_avg_sq"].min() < 0:
        raise _damaged(file, f"{name}: a mean square is negative")
    if "exp_avg" in averages or "step" in found:
        step = found.get("step")
        value = step.item() if isinstance(step, Tensor) and step.numel() == 1 and step.device.type == "cpu" else step
        if not is_number(value) or value < 0:
            raise _damaged(file, f"{name}: its step is no count")


def _check_schedules(content: Mapping[str, Any], file: Path) -> None:
    """Schedules take over every name in their state, a method's too: only numbers under the names that they save."""
    schedules, plateau = content.get("lr_schedulers"), content["latent_verse"].get("plateau")
    if not isinstance(schedules, list) or not all(isinstance(state, dict) for state in schedules):
        raise _damaged(file, "its lr_schedulers are missing or no list of schedules")
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    known = vars(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)).keys() - {"optimizer"}
    groups = len(content["optimizer_states"][0]["param_groups"])
    for state in schedules:
        rates = [state.get("base_lrs"), state.get("_last_lr")]
        if not is_whole_number(state.get("last_epoch")) or any(_length(rate) != groups for rate in rates):
            raise _damaged(file, "its learning rate's schedule is incomplete")
        _check_numbers(state, known | {"verbose"}, "lr_schedulers", file)
    if plateau is None:
        return
    if not isinstance(plateau, dict):
        raise _damaged(file, "the state of lr_decay is no schedule")
    known = vars(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)).keys() - {"optimizer"}
    _check_numbers(plateau, known | {"verbose"}, "lr_decay", file, infinite=("best", "mode_worse"))


def _check_settings(own: Mapping[str, Any], file: Path) -> None:
    """The settings of the run that wrote it are sections; those of earlier versions recorded none."""
    settings = own.get("run", {})
    if not isinstance(settings, dict) or not all(isinstance(section, dict) for section in settings.values()):
        raise _damaged(file, "its run's settings are no sections")
    if own.get("plateau"):  # its rate follows from that of the settings
        values = (settings.get("optim", {}).get("learning_rate"), settings.get("data", {}).get("batch_size"))
        if not all(is_number(value) and value > 0 for value in values):
            raise _damaged(file, "its run's settings lack learning_rate or batch_size")


def _check_numbers(
    state: dict[str, Any], known: set[str], what: str, file: Path, infinite: tuple[str, ...] = ()
) -> None:
    for name, value in state.items():
        if name not in known:
            raise _damaged(file, f"{what} has an unknown part")
        texts = isinstance(value, str) and name in ("mode", "threshold_mode")
        endless = isinstance(value, float) and name in infinite and not math.isnan(value)
        items = value if isinstance(value, (list, tuple)) else [value]
        if not (texts or endless or all(v is None or isinstance(v, bool) or is_number(v) for v in items)):
            raise _damaged(file, f"{what}: {name} is no number")


def _check_progress(content: Mapping[str, Any], file: Path) -> None:
    """Lightning's loops count in a tree of whole numbers; the optimiser's steps among them are the step."""
    loops = content.get("loops")
    fit = loops.get("fit_loop") if isinstance(loops, dict) else None
    if not isinstance(fit, dict):
        raise _damaged(file, "it does not say how far training was (loops)")
    _check_counts(fit, file)
    loaders = fit.get("state_dict", {})
    for loader in loaders.get("combined_loader", []) if isinstance(loaders, dict) else [None]:
        if not isinstance(loader, dict) or not {"epoch", "samples", "slots"} <= loader.keys():
            raise _damaged(file, "its loops do not say where the data were")
    for name in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
        for part in ("total", "current"):
            counts = fit.get(name, {}).get(part) if isinstance(fit.get(name, {}), dict) else None
            if not isinstance(counts, dict) or not {"ready", "started", "processed", "completed"} <= counts.keys():
                raise _damaged(file, f"its loops lack {name}")
    if not isinstance(fit["epoch_loop.batch_progress"].get("is_last_batch"), bool):
        raise _damaged(file, "its loops do not say whether the epoch was over")
    try:
        steps = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    except (KeyError, TypeError):
        raise _damaged(file, "its loops lack the optimiser's steps") from None
    if steps != content.get("global_step"):
        raise _damaged(file, f"its global_step is {content.get('global_step')}, but its optimiser made {steps} steps")


def _check_counts(tree: dict[str, Any], file: Path) -> None:
    waiting: list[object] = [tree]
    seen = set()  # a list may hold another a thousand times, and that one another
    while waiting:
        item = waiting.pop()
        if isinstance(item, (dict, list)):
            if id(item) not in seen:
                waiting.extend(item.values() if isinstance(item, dict) else item)
            seen.add(id(item))
        elif not (item is None or isinstance(item, bool) or is_whole_number(item)):
            raise _damaged(file, f"its loops hold a {type(item).__name__} where a count is expected")


def _check_callbacks(content: Mapping[str, Any], file: Path) -> None:
    """Callbacks have a dict each; ModelCheckpoint's scores are numbers, or None before the first validation."""
    callbacks = content.get("callbacks") or {}
    for name, state in callbacks.items():
        if not isinstance(name, str) or not isinstance(state, dict):
            raise _damaged(file, "its callbacks' states are no dicts by their names")
        if not name.startswith("ModelCheckpoint"):
            continue
        models = state.get("best_k_models", {})
        if not isinstance(models, dict) or not all(isinstance(path, str) for path in models):
            raise _damaged(file, "callbacks: best_k_models is no dict of paths")
        scores = {part: state.get(part) for part in ("best_model_score", "current_score", "kth_value")}
        for part, score in [*scores.items(), *(("best_k_models", score) for score in models.values())]:
            number = score.item() if isinstance(score, Tensor) and score.numel() == 1 else score
            endless = part == "kth_value" and number in (math.inf, -math.inf)  # as long as there is none
            if number is not None and not endless and not is_number(number):
                raise _damaged(file, f"callbacks: {part} is no finite number")
        for part in ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path"):
            if not isinstance(state.get(part), (str, type(None))):
                raise _damaged(file, f"callbacks: {part} is no path")


def _check_processes(content: Mapping[str, Any], model: AugVAE | BiART, file: Path) -> None:
    """The states of random number generators are tried on others; the module's parts have its shapes."""
    processes = content.get("process_states")
    if processes is None:
        return
    if not isinstance(processes, list) or not all(isinstance(state, dict) for state in processes):
        raise _damaged(file, "its process_states are no list of states")
    for state in processes:
        rng, module = state.get("rng"), state.get("module")
        try:
            version, internal, gauss = rng["python"]
            random.Random().setstate((version, tuple(internal), gauss))
            name, keys, *rest = rng["numpy"]
            np.random.RandomState().set_state((name, np.array(keys, dtype=np.uint32), *rest))
            torch.Generator().set_state(rng["torch"].cpu())
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            raise _damaged(file, "its random number generators cannot be restored (process_states)") from error
        if "cuda" in rng and not (isinstance(rng["cuda"], Tensor) and rng["cuda"].dtype == torch.uint8):
            raise _damaged(file, "its GPU's random number generator cannot be restored (process_states)")
        if not isinstance(module, (dict, type(None))):
            raise _damaged(file, "process_states: module is no dict")
        if module and isinstance(model, AugVAE):
            counts = (len(model.levels), model.config.num_tokens)
            for part, shape, floating in (("epoch_loss", (2,), True), ("train_counts", counts, False)):
                check_tensor(module.get(part), file, f"process_states: {part}")
                if module[part].shape != shape or module[part].is_floating_point() != floating:
                    raise _damaged(file, f"process_states: {part} has shape {tuple(module[part].shape)}, not {shape}")


def _one(listed: object, name: str, file: Path) -> dict[str, Any]:
    if not isinstance(listed, list) or len(listed) != 1 or not isinstance(listed[0], dict):
        raise _damaged(file, f"its {name} are no list of one")
    return listed[0]


def _length(listed: object) -> int | None:
    return len(listed) if isinstance(listed, (list, tuple)) else None


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged, training cannot resume from it: {what}.")
