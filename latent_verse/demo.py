"""The demo: AugVAE-ML -> AugVAE-SL -> codes -> BiART on a shapes world, judged both ways, and a page about it.

    python -m latent_verse.demo --world small --out demo        what `make demo` runs

Everything is done by the scripts that a user would call, one process after another; this file only decides the order
and gathers the results. Interrupted and started again, it goes on where it was: finished stages are known by their
outputs, and unfinished ones continue by their own means (--backup, shards of codes). What follows a stage whose output
is gone is not taken for finished.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from latent_verse import demo_page
from latent_verse.config import ConfigError, Settings, TrainVAEConfig, setting
from latent_verse.config.cli import one_line_errors, parse
from latent_verse.config.train import TrainBiARTConfig
from latent_verse.data.shapes import PRESETS, World
from latent_verse.runs import write_whole

ROOT = Path(__file__).parents[1]
PREFIX = {"small": "demo", "full": "demo_full"}  # of the recipes' names
TRAIN_PAIRS = {"small": 8000, "full": 30_000}
VAL_PAIRS = 256  # for the curves and the choice among checkpoints
SAMPLES = 24  # scenes of each split that the page shows


@dataclass(frozen=True)
class DemoSettings(Settings):
    """Which demo, and where."""

    world: str = setting("small", "small: minutes on a CPU; full: two hours, or a GPU", tuple(PRESETS))
    out: str = setting("demo", "folder for everything; the same command continues what is there")
    recipes: Optional[str] = setting(None, "folder of the three recipes, named as in configs/, the default")
    train_pairs: Optional[int] = setting(
        None, "pictures with captions to train on; default 8000, for full 30000", at_least=1
    )
    count: int = setting(500, "scenes to judge in each split", at_least=1)
    rerank: int = setting(8, "pictures among which the model chooses, for the figures with re-ranking")
    gpus: int = setting(1, "0 is the CPU, 1 the GPU, or the CPU where there is none", at_least=0, at_most=1)


@dataclass(frozen=True)
class DemoConfig:
    """Everything the demo can be told."""

    demo: DemoSettings = field(default_factory=DemoSettings)


@dataclass(frozen=True)
class Stage:
    """One process. It is finished when `output`, a pattern below the demo's folder, is there."""

    name: str
    title: str
    command: list[str]  # after the interpreter
    output: str
    world: str = ""  # fingerprint of the world that it draws from, if it draws
    again: bool = False  # whether, run again, it makes its output anew; training finds itself finished

    def shown(self) -> str:
        """The command as a person types it."""
        return shlex.join(["python", *self.command])


class Stopped(Exception):
    """A stage failed, or the demo was told to stop; the message says what to do. `code` is the exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


# ------------------------------------------------------------------------------------------------------------ the plan


def plan(s: DemoSettings, out: Path) -> list[Stage]:
    """The stages, in order. Raises ConfigError for recipes that cannot be read."""
    folder = Path(s.recipes).resolve() if s.recipes else ROOT / "configs"
    recipe = {kind: folder / f"{PREFIX[s.world]}_{kind}.yaml" for kind in ("augvae_ml", "augvae_sl", "biart")}
    pairs = s.train_pairs or TRAIN_PAIRS[s.world]
    at = {name: shown_path(out / name) for name in ("data", "runs", "codes")}
    runs = ["--log_dir", at["runs"], "--gpus", str(s.gpus)]
    ml, sl, biart = (f"{at['runs']}/{file.stem}" for file in recipe.values())
    pictures = _write_pairs(s.world, at["data"], pairs)
    world = World.preset(s.world).fingerprint
    stages = [Stage("pictures", "pictures and captions", pictures, "data/finished", world)]

    folders = ["--train_dir", f"{at['data']}/train", "--val_dir", f"{at['data']}/val"]
    for kind, title, more in (("augvae_ml", "AugVAE-ML", []), ("augvae_sl", "AugVAE-SL", ["--pretrained_path", ml])):
        file = recipe[kind]
        command = ["train_vae.py", "--config", shown_path(file), *folders, *more, *runs]
        config, _ = parse(TrainVAEConfig, ["--config", str(file)], "")
        last = f"runs/{file.stem}/checkpoints/last-epoch={config.trainer.epochs - 1}-*.ckpt"
        stages.append(Stage(kind, title, command, last))

    config, _ = parse(TrainBiARTConfig, ["--config", str(recipe["biart"])], "")
    start = ["train_biart.py", "--config", shown_path(recipe["biart"]), "--vae_path", sl]
    sizes = ["--dataset_size", str(pairs), "--val_size", str(min(VAL_PAIRS, pairs))]
    drawn = ["--dataset", "shapes", "--world", s.world, *sizes]  # whose truth is known while BiART trains
    extract = [*start, *drawn, "--extract_codes", at["codes"], "--gpus", str(s.gpus)]
    stages.append(Stage("codes", "codes", extract, "codes/val/codes.json", world))
    folders = ["--dataset", "codes", "--train_dir", f"{at['codes']}/train", "--val_dir", f"{at['codes']}/val"]
    stages.append(Stage("biart", "BiART", [*start, *folders, *runs], f"runs/{recipe['biart'].stem}/bundle/config.json"))

    sampling = config.sampling.arguments()
    flags = [word for name, value in sampling.items() if value is not None for word in (f"--{name}", f"{value:g}")]
    judge = ["-m", "latent_verse.evaluation.shapes", "--model", f"{biart}/bundle", "--world", s.world, *flags]
    judge += ["--rerank", str(s.rerank), "--count", str(s.count), "--samples", str(min(SAMPLES, s.count))]
    for name, split in (("unseen", "val"), ("heldout", "heldout")):
        file = f"{name}.json"
        command = [*judge, "--split", split, "--json", shown_path(out / file), "--gpus", str(s.gpus)]
        stages.append(Stage(name, f"judging {name} scenes", command, file, world, again=True))
    return stages


def _write_pairs(world: str, data: str, pairs: int) -> list[str]:
    world, data = json.dumps(world), json.dumps(data)  # in double quotes, for the shell's sake
    lines = (
        "from pathlib import Path; from latent_verse.data.shapes import World, write_pairs; "
        f"w = World.preset({world}); data = Path({data}); "
        f'write_pairs(w, data / "train", {pairs}, "train", captions=8); '
        f'write_pairs(w, data / "val", {min(VAL_PAIRS, pairs)}, "val", captions=8); (data / "finished").touch()'
    )
    return ["-c", lines]


def shown_path(path: Path) -> str:
    """A path as the commands name it: from the repository's root where it lies below that."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


# ------------------------------------------------------------------------------------------------------------- running


class Record:
    """<out>/stages.json: each stage's command, the recipe it named, its seconds so far, and whether it has finished."""

    def __init__(self, file: Path):
        self.file = file
        self.stages: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}

    def check_same(self, stages: list[Stage]) -> None:
        """Raises ConfigError where a stage was begun with another command or recipe than it has now."""
        for stage in stages:
            found = self.stages.get(stage.name)
            made = found and (found["command"], found["recipe"], found.get("world", ""))
            if found and made != (stage.shown(), _recipe(stage), stage.world):
                raise ConfigError(
                    f"{self.file.parent} holds a demo made otherwise (its stage {stage.title}, by another command, "
                    f"recipe or version of the world: {found['command']}). "
                    "Delete that folder, or give another --out."
                )

    def finished(self, stage: Stage) -> bool:
        """Whether a stage has run to its end, and its output is still there."""
        return self.stages.get(stage.name, {}).get("finished", False) and is_done(stage, self.file.parent)

    def add(self, stage: Stage, seconds: float, finished: bool) -> None:
        """Say that a stage has run for so many seconds more; one that had finished is being made anew."""
        known = self.stages.get(stage.name, {"finished": True})
        so_far = 0.0 if known["finished"] else known["seconds"]
        self.stages[stage.name] = {
            "command": stage.shown(),
            "recipe": _recipe(stage),
            "world": stage.world,
            "seconds": round(so_far + seconds, 2),
            "finished": finished,
        }
        write_whole(self.file, json.dumps(self.stages, indent=1))


def _recipe(stage: Stage) -> str:
    """A digest of the recipe a stage names, "" where it names none."""
    if "--config" not in stage.command:
        return ""
    file = ROOT / stage.command[stage.command.index("--config") + 1]
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


@contextlib.contextmanager
def only_one(out: Path) -> Iterator[int]:
    """Hold the folder's lock, an open file that stages inherit: a stage whose demo was killed still holds it.

    Raises:
        ConfigError: another demo, or a stage of one, is at work there.
    """
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"out: another demo, or a stage of one, is still at work in {out}. Wait.") from None
        yield lock.fileno()


def run_stage(stage: Stage, record: Record, lock: int) -> None:
    """Run one stage to its end, its output shown as it comes.

    A signal to stop is passed on once as SIGTERM, at which training saves; a second one kills.

    Raises:
        Stopped: told to stop, or the stage failed.
    """
    told: list[int] = []

    def stop(number: int, frame) -> None:
        told.append(number)
        process.send_signal(signal.SIGTERM if len(told) == 1 else signal.SIGKILL)

    since = time.perf_counter()
    # in a session of its own, or Ctrl-C would reach it directly as well, and twice means "at once"
    process = subprocess.Popen([sys.executable, *stage.command], cwd=ROOT, pass_fds=[lock], start_new_session=True)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = None
        while code is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=5)
            now = time.perf_counter()
            done = code == 0 and is_done(stage, record.file.parent)
            record.add(stage, now - since, finished=done)
            since = now
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if told and not done:
        raise Stopped(f"Stopped in stage {stage.title}. The same command goes on from here.", 128 + told[0])
    if not done:
        why = f"failed with exit code {code}" if code else "ended early"
        raise Stopped(f"Stage {stage.title} {why}; see above. The same command tries it again:\n  {stage.shown()}", 1)


def is_done(stage: Stage, out: Path) -> bool:
    """Whether a stage's output is there."""
    return any(out.glob(stage.output))


def run(s: DemoSettings) -> Path:
    """Everything, as far as it is not done yet; returns the page's path.

    Raises:
        ConfigError: recipes that cannot be used, or a folder that holds another demo.
        Stopped: see `run_stage`.
    """
    out = Path(s.out).expanduser().resolve()
    stages = plan(s, out)
    out.mkdir(parents=True, exist_ok=True)
    with only_one(out) as lock:
        record = Record(out / "stages.json")
        record.check_same(stages)
        first = next((i for i, stage in enumerate(stages) if not record.finished(stage)), len(stages))
        stale = [stage for stage in stages[first:] if record.finished(stage) and not stage.again]
        if stale:
            raise ConfigError(
                f"{out} lacks the output of its stage {stages[first].title}, though {stale[0].title}, which rests on "
                "it, is there. Delete that folder, or give another --out."
            )
        for number, stage in enumerate(stages, start=1):
            title = f"[{number}/{len(stages)}] {stage.title}"
            if number <= first:
                print(f"{title}: done before, in {record.stages[stage.name]['seconds']:.0f} s", flush=True)
                continue
            print(f"\n{title}\n  {stage.shown()}", flush=True)
            run_stage(stage, record, lock)
        seconds = {stage.name: record.stages[stage.name]["seconds"] for stage in stages}
        return demo_page.write(out, s.world, [(g.name, g.title, g.shown()) for g in stages], seconds)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 when done, 2 for a mistake in the settings, 128 + signal when told to stop, 1 for a failure."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait busily slow each other down on few cores
    config, _ = parse(DemoConfig, argv, __doc__)
    try:
        page = run(config.demo)
    except Stopped as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        return stopped.code
    print(f"\nThe page: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
