"""The demo: the order of its stages, what is skipped, stopped and resumed, and a miniature demo from end to end."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from latent_verse.config import ConfigError
from latent_verse.config.cli import parse
from latent_verse.config.train import TrainBiARTConfig, TrainVAEConfig
from latent_verse.config.train_rules import resolve_train_biart, resolve_train_vae
from latent_verse.data.shapes import PRESETS
from latent_verse.demo import results
from latent_verse.demo import run as demo
from latent_verse.demo import training_data as images
from latent_verse.demo.run import DemoConfig, DemoSettings, Stage, StagesFile, Stopped
from latent_verse.evaluation import shapes_truth as shapes
from tests.messages import naming

MINIATURE = {
    "demo_augvae_ml.yaml": """
model: {hidden_dim: 32, ch_mult: [1, 1, 1], num_res_blocks: 1, resolution: 32, attn_resolutions: [8, 4],
        z_channels: 16, codebook_dim: 8, num_tokens: 16}
data: {dataset: flat, batch_size: 4, num_workers: 0}
optim: {learning_rate: 1.0e-4, codebook_init: data}
trainer: {epochs: 2, logger: csv, log_every_n_steps: 1, backup: true, backup_steps: 2}
""",
    "demo_augvae_sl.yaml": """
model: {attn_resolutions: [8]}
data: {dataset: flat, batch_size: 4, num_workers: 0}
optim: {finetune: true, learning_rate: 1.0e-4}
trainer: {epochs: 1, logger: csv, log_every_n_steps: 1, backup: true, backup_steps: 2}
""",
    "demo_biart.yaml": """
model: {preset: tiny, n_layer: 1, n_head: 2, n_embd: 16}
text: {tokenizer: bpe, bpe_vocab_size: 300, text_len: 30}
data: {batch_size: 4, num_workers: 0}
optim: {learning_rate: 1.0e-3}
trainer: {epochs: 1, logger: csv, log_every_n_steps: 1, backup: true, backup_steps: 2}
sampling: {num_samples: 2, num_judged: 2, temperature: 0.9, top_k: 4}
""",
}


@pytest.fixture
def recipes(tmp_path) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name, text in MINIATURE.items():
        (folder / name).write_text(text)
    return folder


def settings(tmp_path, recipes=None) -> DemoSettings:
    recipes = str(recipes) if recipes else None
    return DemoSettings(out=str(tmp_path / "out"), recipes=recipes, train_pairs=16, count=4, rerank=2, gpus=0)


# ------------------------------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize("world", ["small", "full"])
def test_plan_of_the_shipped_recipes(world, tmp_path):
    s = DemoSettings(world=world, out=str(tmp_path))
    stages = demo.plan(s, tmp_path)
    assert [g.name for g in stages] == ["pictures", "augvae_ml", "augvae_sl", "codes", "biart", "unseen", "heldout"]
    text = "\n".join(g.shown() for g in stages)
    for flag in ("--extract_codes", "--dataset codes", "--split heldout", "--rerank 8", f"--world {world}"):
        assert flag in text
    # every stage reads what those before it write, below the demo's folder
    prefix = demo.PREFIX[world]
    assert f"--pretrained_path {tmp_path}/runs/{prefix}_augvae_ml" in text
    assert text.count(f"--vae_path {tmp_path}/runs/{prefix}_augvae_sl") == 2
    assert text.count(f"--model {tmp_path}/runs/{prefix}_biart/bundle") == 2
    assert not any(demo.is_done(g, tmp_path) for g in stages)
    for stage in stages:  # and is one that the scripts accept
        if stage.command[0] == "train_vae.py":
            resolve_train_vae(*parse(TrainVAEConfig, stage.command[1:], ""))
        elif stage.command[0] == "train_biart.py":
            resolve_train_biart(*parse(TrainBiARTConfig, stage.command[1:], ""))
        elif stage.command[1] == images.__name__:
            parse(DemoConfig, stage.command[2:], "")
        else:
            assert stage.command[:2] == ["-m", shapes.__name__]
            shapes.check(parse(shapes.ShapesEvalConfig, stage.command[2:], "")[0])


def test_paths_below_the_repository_are_shown_short():
    assert demo.shown_path(demo.ROOT / "demo" / "runs") == os.path.join("demo", "runs")
    assert demo.shown_path(Path("/elsewhere/demo")) == "/elsewhere/demo"


def test_the_images_of_the_first_stage(tmp_path):
    (stage, *_) = demo.plan(DemoSettings(train_pairs=3), tmp_path)
    assert images.main(stage.command[2:]) == 0 and demo.is_done(stage, tmp_path)
    for split in ("train", "val"):
        files = {p.suffix: p for p in (tmp_path / "data" / split).iterdir()}
        assert len(list((tmp_path / "data" / split).iterdir())) == 6
        assert len(files[".txt"].read_text().splitlines()) == 8


# ------------------------------------------------------------------------------- stages, by processes that cost nothing


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Replaces the plan by the stages that the test puts into this list, and the page by a file."""
    planned: list[Stage] = []
    monkeypatch.setattr(demo, "plan", lambda s, out: planned)
    monkeypatch.setattr(results, "write", lambda out, world, stages, seconds: (out, seconds))
    return planned


def python(name: str, lines: str, output: str = "") -> Stage:
    return Stage(name, name, ["-c", lines], output or f"{name}.done")


def touch(tmp_path, name: str) -> str:
    """Python that makes a file and adds a line to the log of what has run."""
    out = tmp_path / "out"
    return f"open({str(out / 'log')!r}, 'a').write('{name} '); open({str(out / (name + '.done'))!r}, 'w')"


def test_finished_stages_are_skipped(tmp_path, stages, capfd):
    stages += [python(name, touch(tmp_path, name)) for name in ("first", "second")]
    _, seconds = demo.run(settings(tmp_path))
    assert list(seconds) == ["first", "second"] and all(value > 0 for value in seconds.values())
    (tmp_path / "out" / "second.done").unlink()  # an output that is lost is made again
    _, again = demo.run(settings(tmp_path))
    assert (tmp_path / "out" / "log").read_text() == "first second second "
    assert again["first"] == seconds["first"] and again["second"] > 0
    assert "first: done before" in capfd.readouterr().out


def test_what_depends_on_a_lost_output_is_made_again_or_refused(tmp_path, stages):
    """Otherwise the page would show old results beside a new model."""
    names = ("first", "second", "third")
    stages += [python(name, touch(tmp_path, name)) for name in names]
    stages[2] = dataclasses.replace(stages[2], again=True)
    demo.run(settings(tmp_path))
    (tmp_path / "out" / "second.done").unlink()
    demo.run(settings(tmp_path))
    assert (tmp_path / "out" / "log").read_text() == "first second third second third "
    (tmp_path / "out" / "first.done").unlink()
    with pytest.raises(ConfigError, match=naming(tmp_path / "out", "first", "second", "--out")):
        demo.run(settings(tmp_path))


def test_seconds_are_those_of_what_is_there(tmp_path):
    record, stage = StagesFile(tmp_path / "stages.json"), python("first", "pass")
    for seconds, finished in ((2.0, False), (1.0, True)):
        record.add(stage, seconds, finished)
    assert record.stages["first"]["seconds"] == 3.0
    for seconds, finished in ((0.5, False), (0.5, True)):
        record.add(stage, seconds, finished)
    assert record.stages["first"]["seconds"] == 1.0


def test_a_world_that_has_changed(tmp_path, monkeypatch):
    s = settings(tmp_path)
    (tmp_path / "out").mkdir()
    record = StagesFile(tmp_path / "out" / "stages.json")
    record.add(demo.plan(s, tmp_path / "out")[0], 1.0, True)
    monkeypatch.setitem(PRESETS, "small", dataclasses.replace(PRESETS["small"], counts=(1, 1)))
    with pytest.raises(ConfigError, match=naming(tmp_path / "out", "world", "--out")):
        record.check_same(demo.plan(s, tmp_path / "out"))


def test_a_failure_says_what_to_do_and_is_tried_again(tmp_path, stages, capsys, monkeypatch):
    flag = tmp_path / "works"
    stages += [
        python("first", f"import os, sys; os.path.exists({str(flag)!r}) or sys.exit(3); {touch(tmp_path, 'first')}")
    ]
    argv = ["--out", str(tmp_path / "out")]
    assert demo.main(argv) == 1
    assert naming("first", "exit code 3").search(capsys.readouterr().err)
    flag.touch()
    assert demo.main(argv) == 0


def test_a_stage_without_its_output_is_not_finished(tmp_path, stages):
    stages.append(python("first", "pass"))
    with pytest.raises(Stopped, match=naming("first", "ended early")):
        demo.run(settings(tmp_path))
    assert not StagesFile(tmp_path / "out" / "stages.json").stages["first"]["finished"]


def test_a_stage_that_somebody_else_stops(tmp_path, stages):
    """train_vae.py saves at a SIGTERM and ends with 143."""
    stages.append(python("first", "raise SystemExit(143)"))
    with pytest.raises(Stopped, match=naming("first", "stopped by a signal", "Rerun")):
        demo.run(settings(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_stage_saves_first(tmp_path, stages, number):
    out = tmp_path / "out"
    stages.append(
        python(
            "first",
            f"""
import os, pathlib, signal, sys, time
out = pathlib.Path({str(out)!r})
if (out / "saved").exists():
    {touch(tmp_path, "first")}
    sys.exit()
def save(*_):
    (out / "saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, lambda *_: os._exit(9))
(out / "ready").touch()
time.sleep(60)
""",
        )
    )

    def interrupt():
        while not (out / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Stopped, match=naming("first", "resume")) as stopped:
        demo.run(settings(tmp_path))
    thread.join()
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == before
    demo.run(settings(tmp_path))
    assert StagesFile(out / "stages.json").stages["first"]["finished"]


def test_two_demos_in_one_folder(tmp_path, stages):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=naming("out", tmp_path / "out")):
            demo.run(settings(tmp_path))


def test_another_demo_in_the_folder(tmp_path, stages):
    stages.append(python("first", touch(tmp_path, "first")))
    demo.run(settings(tmp_path))
    stages[0] = python("first", touch(tmp_path, "first") + "; 1")
    with pytest.raises(ConfigError, match=naming(tmp_path / "out", "first", "--out")):
        demo.run(settings(tmp_path))


def test_a_recipe_that_has_changed(tmp_path, recipes):
    s = settings(tmp_path, recipes)
    planned = demo.plan(s, tmp_path / "out")
    (tmp_path / "out").mkdir()
    record = StagesFile(tmp_path / "out" / "stages.json")
    record.add(planned[1], 1.0, True)
    StagesFile(record.file).check_same(planned)
    recipe = recipes / "demo_augvae_ml.yaml"
    recipe.write_text("# only a comment\n" + recipe.read_text())
    StagesFile(record.file).check_same(demo.plan(s, tmp_path / "out"))
    recipe.write_text(recipe.read_text().replace("epochs: 2", "epochs: 3"))
    with pytest.raises(ConfigError, match=naming(tmp_path / "out", "AugVAE-ML", "--out")):
        StagesFile(record.file).check_same(demo.plan(s, tmp_path / "out"))


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--world", "large"], ["world", "large", "small", "full"]),
        (["--recipes", "/nowhere"], ["/nowhere/demo_augvae_ml.yaml"]),
    ],
)
def test_mistakes(flags, facts, tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path / "out"), *flags]) == 2
    assert naming(*facts).search(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------- what it leaves


def test_metrics():
    def split(right: int) -> dict:
        names = ("text_to_image", "image_to_text", "reconstruction")
        scores = {name: {"right": right, "total": 10} for name in names}
        return scores | {"draw": {"temperature": 0.0}, "reranked": {"right": right + 1, "total": 10, "drawn": 8}}

    metrics = results.gather("small", {"unseen": split(9), "heldout": split(5)}, {"codes": 1.5, "biart": 2.0})
    assert metrics["text_to_image"]["unseen"] == {"right": 9, "total": 10}
    assert metrics["text_to_image"]["reranked"] == {"right": 10, "total": 10, "drawn": 8, "split": "unseen"}
    assert metrics["image_to_text"] == {"unseen": {"right": 9, "total": 10}, "heldout": {"right": 5, "total": 10}}
    assert metrics["seconds"] == {"codes": 1.5, "biart": 2.0, "total": 3.5}


@pytest.mark.slow
def test_a_miniature_demo_interrupted_and_resumed(tmp_path, recipes):
    """The real scripts: stopped while AugVAE trains, resumed, and the page and metrics that result."""
    out = tmp_path / "out"
    flags = f"--recipes {recipes} --out {out} --train_pairs 16 --count 4 --rerank 2 --gpus 0".split()
    command = [sys.executable, "-m", "latent_verse.demo", *flags]
    process = subprocess.Popen(command, cwd=demo.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    backups = out / "runs" / "demo_augvae_ml" / "backups"
    while not list(backups.glob("step=*.ckpt")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=200)[0]
    assert process.returncode in (130, 0), said  # 0 where it was too quick to be stopped
    record = StagesFile(out / "stages.json")
    assert record.stages["pictures"]["finished"]

    again = subprocess.run(command, cwd=demo.ROOT, capture_output=True, text=True, timeout=500)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "images and captions: done before" in again.stdout
    if process.returncode and not record.stages["augvae_ml"]["finished"]:
        assert "Resuming from" in again.stdout
    metrics = json.loads((out / "metrics.json").read_text())
    for direction in ("text_to_image", "image_to_text"):
        for split in ("unseen", "heldout"):
            assert metrics[direction][split]["total"] == 4
            assert 0 <= metrics[direction][split]["right"] <= 4
    assert metrics["text_to_image"]["reranked"]["drawn"] == 2
    assert metrics["draw"]["temperature"] == 0.9 and metrics["draw"]["top_k"] == 4
    names = ["pictures", "augvae_ml", "augvae_sl", "codes", "biart", "unseen", "heldout", "total"]
    assert list(metrics["seconds"]) == names and all(s > 0 for s in metrics["seconds"].values())
    page = (out / "index.html").read_text()
    assert page.count("train_biart.py --config") == 2
    assert "AugVAE-ML: reconstruction error" in page and "BiART: loss" in page
    assert "BiART: share of a few validation scenes that is right" in page
    assert "sampled at temperature 1 for which" in page

    third = subprocess.run(command, cwd=demo.ROOT, capture_output=True, text=True, timeout=100)
    assert third.returncode == 0 and third.stdout.count("done before") == 7
