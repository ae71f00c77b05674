"""The commands that follow a finished run, with the user's own paths: to be typed as they are."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from latent_verse.augvae.model import AugVAE
from latent_verse.config import as_plain, printable
from latent_verse.config.cli import RECIPES
from latent_verse.config.datasets import EVAL_DATASETS, PAIR_DATASETS, setting_of
from latent_verse.config.train import TrainBiARTConfig, TrainVAEConfig
from latent_verse.data.pairs import PairData, PairShards, all_captions

Given = Mapping[str, str]  # where each setting was given: {leaf: "--flag" or "file.yaml"}
# flags that are a run's own: the next one has others
OWN = ("name", "pretrained_path", "finetune", "attn_resolutions", "codebook_init", "resume", "ckpt_path")
PLACE = ("log_dir", "gpus", "nodes", "accelerator", "precision")  # flags that the commands after training share with it
CODES_PER_SIDE = 32
ANY_CAPTION = "a red circle"


def after_augvae(config: TrainVAEConfig, given: Given, model: AugVAE, run: Path, prog: str | None) -> list[str]:
    """Evaluation of an AugVAE; the fine-tune of an AugVAE-ML to one level, or BiART on an AugVAE-SL."""
    d, flags = config.data, _values(config)
    evaluate = [*_script("eval-vae", prog), *_flags({"ckpt_path": str(run)})]
    layout = {"dataset": d.dataset} if d.dataset != "imagefolder" else {}
    pipes = {"allow_pipe": True} if d.allow_pipe else {}
    evaluate += _flags({"fake_data": True} if d.fake_data else {**layout, "test_dir": d.val_dir, **pipes})
    shared = {name: flags[name] for name in PLACE if _typed(given, name)}
    evaluate += _flags(shared)
    if len(model.code_levels) > 1:
        follow = [*_script("train-vae", prog), *_fine_tune(config, given, model, run)]
    else:
        recipe = _sibling(given, "_augvae_sl", "_biart")
        follow = [*_script("train-biart", prog), *_flags({"config": recipe, "vae_path": str(run)})]
        data = {"train_dir": d.train_dir, "val_dir": d.val_dir}
        data |= {"dataset": "webdataset"} if d.web_dataset else {"dataset": "pairs"} if recipe else {}
        follow += _flags({"fake_data": True} if d.fake_data else {**data, **pipes})
        follow += _flags(shared)
    return [*([shlex.join(evaluate)] if d.fake_data or d.val_dir else []), shlex.join(follow)]


def captions_needed(config: TrainVAEConfig, model: AugVAE) -> str:
    """What has to be done before BiART can read the folder of an AugVAE-SL's images: "" if it holds captions."""
    d = config.data
    if d.fake_data or d.web_dataset or len(model.code_levels) > 1:
        return ""
    beside = next((names for _, _, names in os.walk(d.train_dir or "") if names), [])
    if any(name.endswith(".txt") for name in beside):
        return ""
    return f"captions for BiART, 1.txt beside 1.jpg, in {printable(d.train_dir or '')}"


def after_codes(config: TrainBiARTConfig, given: Given, folders: Mapping[str, Path], prog: str | None) -> str:
    """The same command on the codes that it has written: {split: folder}."""
    of_images = {f.name for section in (config.data, config.codes) for f in dataclasses.fields(section)}
    of_images -= {"batch_size", "num_workers"}
    values = _values(config)
    kept = {leaf: values[leaf] for leaf in given if _typed(given, leaf) and leaf not in of_images}
    codes = {"tokenizer": config.text.tokenizer, "dataset": "codes"}
    codes |= {f"{split}_dir": str(folder) for split, folder in folders.items()}
    return shlex.join([*_script("train-biart", prog), *_flags({"config": _file(given), **kept, **codes})])


def after_biart(
    config: TrainBiARTConfig, given: Given, datasets: Mapping[str, PairData], run: Path, prog: str | None
) -> list[str]:
    """An image for a caption of the data; evaluation, where eval_biart.py can read the data."""
    bundle, values = str(run / "bundle"), _values(config)
    caption = a_caption(datasets.get("val", datasets["train"]))
    on_cpu = {"gpus": 0} if _typed(given, "gpus") and config.trainer.gpus == 0 else {}
    generate = [*_script("generate", prog), *_flags({"model": bundle, "text": caption, **on_cpu})]
    commands = [shlex.join(generate)]
    data = _test_data(config, datasets.get("val"))
    if data:
        shared = {name: values[name] for name in ("log_dir", "gpus") if _typed(given, name)}
        commands += [shlex.join([*_script("eval-biart", prog), *_flags({"model": bundle, **data, **shared})])]
    return commands


def level_for_biart(model: AugVAE) -> int:
    """The one level of an AugVAE-ML that BiART should read: the largest of at most 32 x 32 codes, as in the paper."""
    return max((level for level in model.code_levels if level <= CODES_PER_SIDE), default=min(model.code_levels))


def a_caption(dataset: PairData) -> str:
    """One caption of the data, to generate for; any other if the data would have to be fetched for it."""
    if isinstance(dataset, PairShards) and dataset.remote:
        return ANY_CAPTION
    text = textwrap.shorten(next(all_captions(dataset), ""), 100, placeholder="")
    return text if text and text == printable(text) and not text.startswith("-") else ANY_CAPTION


def _fine_tune(config: TrainVAEConfig, given: Given, model: AugVAE, run: Path) -> list[str]:
    """The flags that make an AugVAE-SL of a run: the sibling of its recipe, or else its own settings again."""
    values = _values(config)
    typed = {leaf: values[leaf] for leaf in given if _typed(given, leaf) and leaf not in OWN}
    shape = {f.name for f in dataclasses.fields(config.model)}
    recipe = None if shape & typed.keys() else _sibling(given, "_augvae_ml", "_augvae_sl")
    if recipe:
        return _flags({"config": recipe, "pretrained_path": str(run), **typed})
    level = level_for_biart(model)
    one = {"finetune": True, "attn_resolutions": level, "pretrained_path": str(run), "name": f"{run.name}-sl"}
    return _flags({"config": _file(given), **one, **typed})


def _test_data(config: TrainBiARTConfig, val: PairData | None) -> dict[str, Any]:
    """The settings of eval_biart.py for the validation data; none where it cannot read them."""
    d = config.data
    name, meta = d.dataset or "pairs", getattr(val, "meta", {})
    if name == "codes":  # of images that the folder of codes names, if they can be read by one path alone
        name = meta.get("dataset", "")
        place = {"pairs": "test_dir", "table": "test_captions"}.get(name)
        if name == "shapes":
            return {"dataset": name, "world": meta["shapes"]["world"]} if meta.get("shapes") else {}
        return {"dataset": name, place: meta.get("source")} if place and meta.get("source") else {}
    if name not in EVAL_DATASETS or val is None:
        return {}
    if PAIR_DATASETS[name].generated:
        return {"dataset": name} | ({"world": d.world} if name == "shapes" else {})
    splits = ("val", "train") if PAIR_DATASETS[name].all_splits else ("val",)
    found = {f"test_{what}": _first(d, splits, what) for what in ("dir", "captions")}
    return {"dataset": name, **found}


def _first(data: Any, splits: Iterable[str], what: str) -> str | None:
    values = (getattr(data, setting_of(split, what)) for split in splits)
    return next((value for value in values if value), None)


def _values(config: Any) -> dict[str, Any]:
    return {leaf: value for section in as_plain(config).values() for leaf, value in section.items()}


def _typed(given: Given, leaf: str) -> bool:
    """Whether a setting was a flag."""
    return given.get(leaf, "").startswith("--")


def _file(given: Given) -> str | None:
    """The YAML file of a run, as a person types it: a shipped recipe by its bare name if it was given so."""
    file = next((source for source in given.values() if not source.startswith("--")), None)
    return Path(file).stem if file and Path(file).is_absolute() and Path(file).parent in RECIPES else file


def _sibling(given: Given, kind: str, wanted: str) -> str | None:
    """The recipe beside the run's own that is named alike, as tiny_augvae_sl.yaml beside tiny_augvae_ml.yaml."""
    file = next((Path(source) for source in given.values() if not source.startswith("--")), None)
    if file is None or not file.stem.endswith(kind):
        return None
    other = file.with_name(f"{file.stem.removesuffix(kind)}{wanted}{file.suffix}")
    return _file({"": str(other)}) if other.is_file() else None


def _script(name: str, prog: str | None) -> list[str]:
    """How a program is called, as this one was: `latent-verse NAME`, or as a script beside this one."""
    ours = Path(sys.argv[0])
    if prog is not None:
        return [*(["python", "-m", "latent_verse"] if ours.name == "__main__.py" else ["latent-verse"]), name]
    script = f"{name.replace('-', '_')}.py"
    beside = ours.with_name(script)
    return ["python", str(beside) if ours.suffix == ".py" and beside.is_file() else script]


def _flags(values: Mapping[str, Any]) -> list[str]:
    """{leaf: value} as flags; None is left out, and true is the flag alone."""
    return [word for leaf, value in values.items() if value is not None for word in _flag(leaf, value)]


def _flag(leaf: str, value: Any) -> Iterator[str]:
    if isinstance(value, bool):
        yield f"--{leaf}" if value else f"--no-{leaf}"
    elif isinstance(value, list):
        yield from (f"--{leaf}", *map(str, value))
    elif str(value).startswith("-"):
        yield f"--{leaf}={value}"
    else:
        yield from (f"--{leaf}", str(value))
