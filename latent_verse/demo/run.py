"""The demo: AugVAE-ML -> AugVAE-SL -> codes -> BiART on a shapes world, evaluated in both directions, and its page.

`make demo` runs `python -m latent_verse.demo --world small --out demo`.

Each stage is a script that a user would call, in a process of its own. If interrupted, rerun the command to resume:
finished stages are recognised by their outputs, and unfinished ones resume by their own means (--backup, shards of
codes). If a stage's output is gone, the stages after it do not count as finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Optional, TypeVar

from latent_verse.config.cli import parse
from latent_verse.config.generate import GenerateSamplingConfig, WriteConfig
from latent_verse.config.messages import ConfigError, UserError
from latent_verse.config.program import SIGNALS, killed_by, one_line_errors, signal_name
from latent_verse.config.settings import Settings, as_plain, same, setting
from latent_verse.config.train import PairDataConfig, TrainBiARTConfig, TrainVAEConfig
from latent_verse.data.shapes import World
from latent_verse.demo.time_left import USUAL, seconds_left
from latent_verse.files import FileError, only_writer, read_json_object, write_json
from latent_verse.progress import duration

ROOT = Path(__file__).parents[2]
Recipe = TypeVar("Recipe", TrainVAEConfig, TrainBiARTConfig)
PREFIX = {"small": "demo", "full": "demo_full"}  # of the recipes' names in configs/
TRAIN_PAIRS = {"small": 8000, "full": 30_000}
VAL_PAIRS = 256  # for the learning curves and to choose among checkpoints
SAMPLES = 24  # scenes of each split that the page shows


@dataclass(frozen=True)
class DemoSettings(Settings):
    """Which demo, and where."""

    world: str = same(PairDataConfig, "world", "small", "shapes world: small (10 minutes on a CPU) or full (2 hours)")
    out: str = same(WriteConfig, "out", "demo", "folder for all outputs; rerun the command to resume")
    recipes: Optional[str] = setting(None, "folder with the three recipes; default configs/", path=True)
    train_pairs: Optional[int] = setting(None, "number of training pairs; default 8000, or 30000 for full", at_least=1)
    count: int = setting(500, "number of scenes to evaluate in each split", at_least=1)
    rerank: int = same(GenerateSamplingConfig, "rerank", 8, "images that the model chooses from, for re-ranked results")
    gpus: int = same(WriteConfig, "gpus")


@dataclass(frozen=True)
class DemoConfig:
    """Every setting of the demo."""

    demo: DemoSettings = field(default_factory=DemoSettings)


@dataclass(frozen=True)
class Stage:
    """One process."""

    name: str
    title: str
    command: list[str]  # arguments of the interpreter
    output: str  # a pattern below the demo's folder; the stage is finished if a file matches it
    world: str = ""  # fingerprint of the shapes world that it generates, if it does
    recipe: str = ""  # digest of the recipe that it follows, if it does
    again: bool = False  # whether a rerun makes the output anew; training does not: it finds itself finished

    def shown(self) -> str:
        """The command as a person types it."""
        return shlex.join(["python", *self.command])


class StageFailed(UserError):
    """A stage ended early, by a failure or a signal. The message names it and says how to continue."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def plan(s: DemoSettings, out: Path) -> list[Stage]:
    """The stages, in order.

    Raises:
        ConfigError: a recipe cannot be read.
    """
    folder = Path(s.recipes).resolve() if s.recipes else ROOT / "configs"
    pairs = train_pairs(s)
    recipe = {kind: folder / f"{PREFIX[s.world]}_{kind}.yaml" for kind in ("augvae_ml", "augvae_sl", "biart")}
    at = {name: shown_path(out / name) for name in ("data", "runs", "codes")}
    runs = ["--log_dir", at["runs"], "--gpus", str(s.gpus)]
    ml, sl, biart = (f"{at['runs']}/{file.stem}" for file in recipe.values())
    world = World.preset(s.world).fingerprint
    images = ["-m", "latent_verse.demo.training_data", "--world", s.world, "--out", shown_path(out)]
    images += ["--train_pairs", str(pairs)]
    stages = [Stage("pictures", "images and captions", images, "data/finished", world)]

    folders = ["--train_dir", f"{at['data']}/train", "--val_dir", f"{at['data']}/val"]
    for kind, title, more in (("augvae_ml", "AugVAE-ML", []), ("augvae_sl", "AugVAE-SL", ["--pretrained_path", ml])):
        file = recipe[kind]
        command = ["train_vae.py", "--config", shown_path(file), *folders, *more, *runs]
        config, digest = _read_recipe(TrainVAEConfig, file)
        last = f"runs/{file.stem}/checkpoints/last-epoch={config.trainer.epochs - 1}-*.ckpt"
        stages.append(Stage(kind, title, command, last, recipe=digest))

    config, digest = _read_recipe(TrainBiARTConfig, recipe["biart"])
    start = ["train_biart.py", "--config", shown_path(recipe["biart"]), "--vae_path", sl]
    sizes = ["--dataset_size", str(pairs), "--val_size", str(min(VAL_PAIRS, pairs))]
    shapes = ["--dataset", "shapes", "--world", s.world, *sizes]
    extract = [*start, *shapes, "--extract_codes", at["codes"], "--gpus", str(s.gpus)]
    stages.append(Stage("codes", "codes", extract, "codes/val/codes.json", world, digest))
    folders = ["--dataset", "codes", "--train_dir", f"{at['codes']}/train", "--val_dir", f"{at['codes']}/val"]
    bundle = f"runs/{recipe['biart'].stem}/bundle/config.json"
    stages.append(Stage("biart", "BiART", [*start, *folders, *runs], bundle, recipe=digest))

    sampling = config.sampling.arguments()
    flags = [word for name, value in sampling.items() if value is not None for word in (f"--{name}", f"{value:g}")]
    evaluate = ["-m", "latent_verse.evaluation.shapes_truth", "--model", f"{biart}/bundle", "--world", s.world, *flags]
    evaluate += ["--rerank", str(s.rerank), "--count", str(s.count), "--samples", str(min(SAMPLES, s.count))]
    for name, split in (("unseen", "val"), ("heldout", "heldout")):
        file = f"{name}.json"
        command = [*evaluate, "--split", split, "--json", shown_path(out / file), "--gpus", str(s.gpus)]
        stages.append(Stage(name, f"evaluation on {name} scenes", command, file, world, again=True))
    return stages


def _read_recipe(cls: type[Recipe], file: Path) -> tuple[Recipe, str]:
    """The settings of a recipe, and a digest of those that it names: of its values, not its comments."""
    config, given = parse(cls, ["--config", str(file)], "")
    settings = {leaf: value for section in as_plain(config).values() for leaf, value in section.items()}
    values = json.dumps({leaf: settings[leaf] for leaf in given}, sort_keys=True)
    return config, hashlib.sha256(values.encode()).hexdigest()[:16]


def train_pairs(s: DemoSettings) -> int:
    """Images with captions to train on."""
    return s.train_pairs or TRAIN_PAIRS[s.world]


def shown_path(path: Path) -> str:
    """A path as the commands name it: relative to the repository's root if it lies below that."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


class StagesFile:
    """<out>/stages.json: each stage's command, digest of its recipe, seconds so far, and whether it has finished.

    Raises:
        FileError: it is damaged.
    """

    def __init__(self, file: Path):
        self.file = file
        self.stages: dict[str, dict[str, Any]] = read_json_object(file) if file.exists() else {}  # type: ignore
        for found in self.stages.values():
            if not isinstance(found, dict) or not {"command", "recipe", "seconds", "finished"} <= found.keys():
                raise FileError(f"{file} is damaged. Delete {file.parent}, or give another --out.")

    def check_same(self, stages: list[Stage]) -> None:
        """Check that each stage that was started had the command, recipe and world that it has now.

        Raises:
            ConfigError: one had others.
        """
        for stage in stages:
            found = self.stages.get(stage.name)
            now = (stage.shown(), stage.recipe, stage.world)
            if found and (found["command"], found["recipe"], found.get("world", "")) != now:
                raise ConfigError(
                    f"{self.file.parent} holds a demo with different settings: {stage.title} had another command, "
                    f"recipe or version of the world ({found['command']}). Delete that folder, or give another --out."
                )

    def finished(self, stage: Stage) -> bool:
        """Whether a stage has run to its end and its output is still there."""
        return self.stages.get(stage.name, {}).get("finished", False) and is_done(stage, self.file.parent)

    def add(self, stage: Stage, seconds: float, finished: bool) -> None:
        """Record that a stage has run for `seconds` more; if it had finished before, its time starts at zero."""
        known = self.stages.get(stage.name, {"finished": True})
        so_far = 0.0 if known["finished"] else known["seconds"]
        self.stages[stage.name] = {
            "command": stage.shown(),
            "recipe": stage.recipe,
            "world": stage.world,
            "seconds": round(so_far + seconds, 2),
            "finished": finished,
        }
        write_json(self.file, self.stages)


def about_time(s: DemoSettings, stages: list[Stage], record: StagesFile) -> str:
    """`, about 9 min left`; "" where nothing is known of it: with other recipes or sizes than the shipped ones."""
    as_shipped = s == replace(DemoSettings(), world=s.world, out=s.out, gpus=s.gpus)
    names, finished = [stage.name for stage in stages], [stage.name for stage in stages if record.finished(stage)]
    if not as_shipped or names != [*USUAL[s.world]] or len(finished) == len(stages):
        return ""
    took = {name: record.stages[name]["seconds"] for name in names if name in record.stages}
    seconds, measured = seconds_left(USUAL[s.world], took, finished)
    return f", about {duration(seconds)} left" + ("" if measured else " on two idle cores")


def run_stage(stage: Stage, record: StagesFile, lock: int) -> None:
    """Run one stage to its end and show its output as it comes.

    The first SIGINT, SIGTERM or SIGHUP is passed on, at which training saves a checkpoint; the second kills.
    A stage that outlives a demo that was killed keeps its `lock`, so that no other demo runs there meanwhile.

    Raises:
        StageFailed: it failed, or a signal has stopped the demo.
    """
    received: list[int] = []
    process: subprocess.Popen | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(passed_on(number)) if len(received) == 1 else process.kill()

    def passed_on(number: int) -> int:
        # Python prints a traceback of a Ctrl-C while it imports; the scripts see to it that it does not
        return number if stage.command[0].endswith(".py") else signal.SIGTERM

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    done, code, since = False, None, time.perf_counter()
    try:
        # a session of its own: otherwise Ctrl-C would reach the stage twice, and the second time means "at once"
        kept = {"pass_fds": [lock]} if lock >= 0 else {}
        process = subprocess.Popen([sys.executable, *stage.command], cwd=ROOT, start_new_session=True, **kept)
        if received:  # while it was started
            process.send_signal(passed_on(received[0]))
        while code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=5)
            now = time.perf_counter()
            done = code == 0 and is_done(stage, record.file.parent)
            record.add(stage, now - since, finished=done)
            since = now
    finally:
        if process is not None and code is None:  # the record cannot be written, for example
            process.terminate()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        name = signal_name(received[0])
        raise StageFailed(f"stopped by {name} in stage {stage.title}. Rerun the command to resume.", 128 + received[0])
    if not done:
        known = code == UserError.exit_code or code - 128 in SIGNALS
        remedy = f"Rerun the command to resume. The stage was:\n  {stage.shown()}"
        raise StageFailed(f"stage {stage.title} {_ending(code)}. {remedy}", code if known else 1)


def _ending(code: int) -> str:
    """How a stage ended that has not finished."""
    if code < 0:
        return killed_by(-code)
    if code - 128 in SIGNALS:
        return f"was stopped by {signal_name(code - 128)}"
    return f"failed with exit code {code}; see above" if code else "ended without its output"


def is_done(stage: Stage, out: Path) -> bool:
    """Whether a stage's output exists."""
    return any(out.glob(stage.output))


def run(s: DemoSettings) -> Path:
    """Run all stages that are not finished yet; returns the page's path.

    Raises:
        UserError: a recipe cannot be read, a package is missing, or the folder holds another demo, or is in use.
        StageFailed: see `run_stage`.
    """
    from latent_verse.demo import results  # before the stages: it says which package the page lacks

    out = Path(s.out).resolve()
    stages = plan(s, out)
    with only_writer(out, "out") as lock:
        record = StagesFile(out / "stages.json")
        record.check_same(stages)
        first = next((i for i, stage in enumerate(stages) if not record.finished(stage)), len(stages))
        stale = [stage for stage in stages[first:] if record.finished(stage) and not stage.again]
        if stale:
            raise ConfigError(
                f"{out} lacks the output of its stage {stages[first].title}, but has that of {stale[0].title}, which "
                "depends on it. Delete that folder, or give another --out."
            )
        print(f"{len(stages)} stages{about_time(s, stages, record)}", flush=True)
        for number, stage in enumerate(stages, start=1):
            title = f"[{number}/{len(stages)}] {stage.title}"
            if number <= first:
                print(f"{title}: done before, in {duration(record.stages[stage.name]['seconds'])}", flush=True)
                continue
            print(f"\n{title}\n  {stage.shown()}", flush=True)
            run_stage(stage, record, lock)
            took = duration(record.stages[stage.name]["seconds"])
            print(f"{title}: done in {took}{about_time(s, stages, record)}", flush=True)
        seconds = {stage.name: record.stages[stage.name]["seconds"] for stage in stages}
        return results.write(out, s.world, [(g.name, g.title, g.shown()) for g in stages], seconds)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 when done, 2 for a mistake in the settings, 128 + N when stopped by signal N, 1 for a failure."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait busily slow each other down on few cores
    config, _ = parse(DemoConfig, argv, __doc__, "python -m latent_verse.demo")
    print(f"\nThe page: {run(config.demo)}")
    bundle = shown_path(Path(config.demo.out).resolve() / "runs" / f"{PREFIX[config.demo.world]}_biart" / "bundle")
    print(f'Try the model: python generate.py --model {bundle} --text "a red cross left of a blue square" --num 4')
    return 0
