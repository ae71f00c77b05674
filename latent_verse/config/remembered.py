"""What an evaluation takes from the run that made its model where nothing is given: how the data lies, and where."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from latent_verse.config.cli import parse
from latent_verse.config.datasets import EVAL_DATASETS, PAIR_DATASETS
from latent_verse.config.evaluate import EvalBiARTConfig
from latent_verse.config.messages import ConfigError
from latent_verse.config.program import is_first_process
from latent_verse.config.train import EvalVAEConfig, TrainBiARTConfig, TrainVAEConfig

LAYOUT = ("dataset", "fake_data", "web_dataset")  # the settings that say how data lies
PLACES = ("val_dir", "test_dir", "test_captions")  # and where


def with_layout_of_vae_run(config: EvalVAEConfig, given: Mapping[str, str]) -> tuple[EvalVAEConfig, dict[str, str]]:
    """The settings of eval_vae and where they came from, with what the AugVAE was trained with and none of them names.

    This is the dataset, and val_dir where no images are named.
    """
    d, (file, run) = config.data, _data_of(config.trainer.ckpt_path, TrainVAEConfig)
    if run is None or run.dataset in (None, "fake") or (given.keys() & {*LAYOUT} and d.dataset != run.dataset):
        return config, dict(given)
    if not given.keys() & {*PLACES}:
        return _taken(config, given, file, {"dataset": run.dataset, "val_dir": run.val_dir})
    if run.dataset == "webdataset" and os.path.isdir(d.test_dir or d.val_dir or ""):  # of images, as likely as of tars
        return config, dict(given)
    return _taken(config, given, file, {"dataset": run.dataset})


def with_data_of_biart_run(config: EvalBiARTConfig, given: Mapping[str, str]) -> tuple[EvalBiARTConfig, dict[str, str]]:
    """The settings of eval_biart and where they came from; without any of data, with the validation data of the run.

    Data that has no validation split of its own, as Karpathy's, has a test split, which is evaluated.
    """
    file, run = _data_of(config.judged.model, TrainBiARTConfig)
    if run is None or run.dataset == "fake" or run.dataset not in EVAL_DATASETS or given.keys() & {*LAYOUT, *PLACES}:
        return config, dict(given)
    folder, captions = run.val_dir, run.val_captions
    if PAIR_DATASETS[run.dataset].all_splits:
        folder, captions = folder or run.train_dir, captions or run.train_captions
    world = {"world": run.world} if run.dataset == "shapes" and "world" not in given else {}
    return _taken(config, given, file, {"dataset": run.dataset, "test_dir": folder, "test_captions": captions, **world})


def _data_of(model: str | None, settings: type) -> tuple[str, Any]:
    """The file of settings of the run in whose folder a model lies, and its section `data`; None if there is none."""
    place = Path(model or "")
    for folder in (place, *place.parents[:2]) if model else ():  # a run folder; its checkpoints/x.ckpt, or its bundle
        file = folder / "config.yaml"
        if file.is_file() and (folder / "run.json").is_file():
            try:
                return str(file), parse(settings, ["--config", str(file)], "")[0].data
            except ConfigError:  # of another program, or version
                break
    return "", None


def _taken(
    config: Any, given: Mapping[str, str], file: str, values: Mapping[str, str | None]
) -> tuple[Any, dict[str, str]]:
    new = {name: value for name, value in values.items() if value and getattr(config.data, name) != value}
    if not new or any(value.startswith("pipe:") for value in new.values()):
        return config, dict(given)
    if is_first_process():
        print(f"From {file}: {', '.join(f'{name} {value}' for name, value in new.items())}")
    return replace(config, data=replace(config.data, **new)), {**given, **dict.fromkeys(new, file)}
