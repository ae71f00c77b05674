"""eval_biart.py in one process: open the model and the data, do the tasks, write the table, metrics.json, the page."""

from __future__ import annotations

import itertools
import json
import os
import warnings
from contextlib import ExitStack
from pathlib import Path

from latent_verse.config import ConfigError, as_plain, printable
from latent_verse.config.evaluate import EvalBiARTConfig
from latent_verse.data import DataError
from latent_verse.data.datasets import how_many
from latent_verse.data.shapes import ShapesDataset, World
from latent_verse.evaluation import image_tasks, page, text_tasks
from latent_verse.evaluation.context import Context
from latent_verse.evaluation.distributed import device
from latent_verse.evaluation.pairs import Pairs
from latent_verse.evaluation.records import Records
from latent_verse.files import FileError, made_folder, only_writer, read_json_object, valid_json, write_text
from latent_verse.inference.arguments import ABOUT_TEXTS
from latent_verse.inference.pipeline import LVerse
from latent_verse.machine import commit, machine
from latent_verse.metrics import likelihood
from latent_verse.metrics.processes import Ranks
from latent_verse.training import runs

WORK = {
    "likelihood": text_tasks.likelihoods,
    "generation": image_tasks.generate,
    "captions": text_tasks.caption,
    "retrieval": text_tasks.retrieve,
    "zero_shot": text_tasks.classify,
    "round_trip": image_tasks.round_trip,
    "shapes": image_tasks.shapes_truth,
}
RESOLUTION = 256  # to compare another system's images at, unless a setting says otherwise


def run(ranks: Ranks, config: EvalBiARTConfig, tasks: tuple[str, ...], yaml_text: str) -> int:
    """Evaluate; returns 0. If a task fails, or a signal stops it, the results of those before it are written.

    Raises:
        UserError: a mistake in the settings, the model or the data.
    """
    folder, statistics = _folder(config), config.generation.reference_stats
    with ExitStack() as held:
        if ranks.is_first:
            held.enter_context(only_writer(folder, "log_dir"))
            if statistics and not os.path.isfile(statistics):
                held.enter_context(made_folder(Path(statistics).parent, "reference_stats"))
        return _run(ranks, config, folder, tasks, yaml_text)


def _run(ranks: Ranks, config: EvalBiARTConfig, folder: Path, tasks: tuple[str, ...], yaml_text: str) -> int:
    with warnings.catch_warnings():
        # captions of other datasets are often too long, which is counted, and have other words
        warnings.filterwarnings("ignore", ABOUT_TEXTS)
        context = _open_context(config, ranks, folder)
        _check_model(context, tasks)
        if ranks.is_first:
            print(f"Evaluating on {how_many(context.pairs.dataset)} of {printable(context.pairs.source)}", flush=True)
        about: dict[str, dict | None] = {}
        try:
            for task in tasks:
                if ranks.is_first:
                    print(f"{task} ...", flush=True)
                about[task] = WORK[task](context)
            context.pairs.unreadable = set().union(*ranks.gather({ranks.rank: context.pairs.unreadable}).values())
        except BaseException:  # keep the results of the tasks before it, which may have taken hours
            if ranks.is_first and about:
                write(context, tuple(about), about, yaml_text)
            raise
        if ranks.is_first:
            write(context, tasks, about, yaml_text)
    return 0


def _open_context(config: EvalBiARTConfig, ranks: Ranks, folder: Path) -> Context:
    """The model and the data."""
    j, w = config.judged, config.write
    place = device(w.gpus, w.accelerator, ranks.rank)
    model = LVerse.from_pretrained(j.model, device=place, dtype=w.dtype) if j.model else None
    world = World.preset(config.data.world).image_size if config.data.dataset == "shapes" else None
    natural = model.vae.config.resolution if model else world
    resolution = config.generation.fid_resolution or natural or RESOLUTION
    if model and resolution != natural:
        raise ConfigError(
            f"fid_resolution {resolution}, but {j.model} generates images of {natural} px. Leave it out, or evaluate "
            "the images that it has generated with --generated_dir."
        )
    pairs = Pairs(config.data, resolution, w.seed)
    records = Records(model.fingerprints if model else {}, w.seed)
    if model and w.dtype != "float32":
        records.always["dtype"] = w.dtype
    classes = text_tasks.open_classes(config.likelihood, resolution) if config.likelihood.classes_dir else None
    return Context(config, ranks, place, folder, model, pairs, resolution, records, classes)


def _check_model(c: Context, tasks: tuple[str, ...]) -> None:
    """Refuse, before hours of sampling, a model or data that lack what a later task needs."""
    k = c.config.likelihood
    if {"retrieval", "zero_shot"} & set(tasks) and k.prior_weight and k.prior == "null" and not c.model.null_trained:
        raise ConfigError(likelihood.NO_PRIOR.format(k.prior_weight))
    if "shapes" in tasks:
        for split in ("val", "heldout"):
            try:
                ShapesDataset(World.preset(c.config.data.world), split, len(c.pairs), c.seed)
            except DataError as error:
                raise ConfigError(f"test_size: the task shapes evaluates both splits: {error}") from error


def _folder(config: EvalBiARTConfig) -> Path:
    """<log_dir>/<name>, where a rerun resumes."""
    j, w = config.judged, config.write
    evaluated = j.model or j.generated_dir or j.captions_file
    stem = runs.stem(evaluated.rstrip("/")).removesuffix(".jsonl").removesuffix(".json")
    if stem == "bundle":  # as training names it, in the run's folder
        stem = Path(evaluated).resolve().parent.name or stem
    stem = f"fake-{stem}" if config.data.fake_data else stem  # a smoke test keeps out of the real results' folder
    return runs.run_folder(w.log_dir, w.name or "-".join(["eval", stem, *j.tasks]))


def _keep_earlier(folder: Path, settings: dict[str, dict]) -> str:
    """Rename results of different settings in the folder, so that they are not overwritten: metrics-1.json, ...

    Returns what to say about it.
    """
    file = folder / "metrics.json"
    if not file.is_file():
        return ""
    try:
        if read_json_object(file)["settings"] == json.loads(json.dumps(settings)):
            return ""
    except (FileError, KeyError):
        pass  # another program's: kept as well
    number = next(n for n in itertools.count(1) if not (folder / f"metrics-{n}.json").exists())
    for name in ("metrics.json", "index.html", "config.yaml"):
        old = folder / name
        if old.is_file():
            old.rename(folder / f"{old.stem}-{number}{old.suffix}")
    return f"{file} had different settings: kept as metrics-{number}.json\n"


def write(c: Context, tasks: tuple[str, ...], about: dict[str, dict | None], yaml_text: str) -> None:
    """Print the table; write metrics.json, config.yaml and index.html."""
    j = c.config.judged
    evaluated = " and ".join(name for name in (j.model, j.generated_dir, j.captions_file) if name)
    facts = machine() | {"commit": commit()}
    draw = (about.get("generation") or {}).get("draw")
    content = c.records.as_json() | {
        "judged": evaluated,
        "tasks": list(tasks),
        "checkpoint": c.records.checkpoint,
        "data": {"source": c.pairs.source, "pictures": len(c.pairs), "unreadable": len(c.pairs.unreadable)}
        | ({"left_out": c.pairs.left_out} if c.pairs.left_out else {}),
        "draw": draw,
        "about": {task: said for task, said in about.items() if said},
        "facts": facts,
        "settings": as_plain(c.config),
    }
    kept = _keep_earlier(c.folder, content["settings"])
    text = json.dumps(valid_json(content), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(c.folder / "metrics.json", text + "\n")
    write_text(c.folder / "config.yaml", yaml_text)
    title = f"{evaluated} on {c.pairs.source}"
    about_run = facts | {"captions": draw, "checkpoint": c.records.checkpoint}
    page.write(c.folder / "index.html", title, c.records, c.galleries, about_run, yaml_text)
    print(kept + c.records.table(title))  # all is written by now: printing may fail
    print(f"Written to {c.folder}: metrics.json and index.html")
