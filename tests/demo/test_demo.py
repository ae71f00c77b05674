"""The demo: the order of its stages, what is skipped, stopped and resumed, and a miniature demo from end to end."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latent_verse.config import ConfigError
from latent_verse.config.cli import parse
from latent_verse.config.generate import GenerateConfig, resolve_generate
from latent_verse.config.train import TrainBiARTConfig, TrainVAEConfig
from latent_verse.config.train_rules import resolve_train_biart, resolve_train_vae
from latent_verse.data.shapes import PRESETS
from latent_verse.demo import results
from latent_verse.demo import run as demo
from latent_verse.demo import training_data as images
from latent_verse.demo.run import DemoConfig, DemoSettings, StagesFile
from latent_verse.demo.time_left import USUAL, seconds_left
from latent_verse.evaluation import shapes_truth as shapes
from latent_verse.files import FileError
from tests.demo_stages import python, settings, touch
from tests.messages import naming

PLAN = demo.plan
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


def test_finished_stages_are_skipped(tmp_path, stages, capfd):
    stages += [python(name, touch(tmp_path, name)) for name in ("first", "second")]
    _, seconds = demo.run(settings(tmp_path))
    assert list(seconds) == ["first", "second"] and all(value > 0 for value in seconds.values())
    (tmp_path / "out" / "second.done").unlink()  # an output that is lost is made again
    _, again = demo.run(settings(tmp_path))
    assert (tmp_path / "out" / "log").read_text() == "first second second "
    assert again["first"] == seconds["first"] and again["second"] > 0
    assert "first: done before" in capfd.readouterr().out


@pytest.mark.parametrize("world", ["small", "full"])
def test_the_usual_times_are_of_the_stages_that_there_are(world, tmp_path):
    assert [*USUAL[world]] == [stage.name for stage in demo.plan(DemoSettings(world=world), tmp_path)]


def test_time_left_follows_the_machine():
    usual = {"first": 10.0, "second": 90.0, "third": 200.0}
    assert seconds_left(usual, {}, []) == (300, False)
    assert seconds_left(usual, {"first": 100.0}, ["first"]) == (290, False)  # too little to say anything
    assert seconds_left(usual, {"first": 20.0, "second": 180.0}, ["first", "second"]) == (400, True)
    assert seconds_left(usual, {"first": 5.0, "second": 45.0, "third": 60.0}, ["first", "second"]) == (40, True)
    assert seconds_left(usual, {"first": 5.0, "second": 45.0, "third": 900.0}, ["first", "second"]) == (0, True)


def test_the_demo_says_how_long_it_takes(tmp_path, stages, capfd, monkeypatch):
    stages += [python(name, touch(tmp_path, name)) for name in ("first", "second")]
    monkeypatch.setitem(USUAL, "small", {"first": 100, "second": 500})
    s = DemoSettings(out=str(tmp_path / "out"))
    demo.run(s)
    said = capfd.readouterr().out
    assert "2 stages, about 10 min left on two idle cores" in said
    assert naming("[1/2] first: done in", "left", "[2/2] second: done in").search(said)
    assert said.count("left") == 2 and said.count("idle cores") == 1
    stages.append(python("third", touch(tmp_path, "third")))  # whose time nobody knows
    demo.run(s)
    assert "left" not in capfd.readouterr().out
    (tmp_path / "out" / "third.done").unlink()
    del stages[2]
    (tmp_path / "out" / "second.done").unlink()
    demo.run(dataclasses.replace(s, count=7))  # another size
    assert "left" not in capfd.readouterr().out


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


@pytest.mark.parametrize(
    ("ends", "code", "facts"),
    [
        ("sys.exit(3)", 1, ("exit code 3",)),
        ("sys.exit(2)", 2, ("exit code 2",)),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, ("SIGKILL", "memory")),  # as Linux does when memory runs out
        ("os.kill(os.getpid(), signal.SIGSEGV)", 1, ("SIGSEGV",)),
        ("sys.exit(143)", 143, ("SIGTERM",)),  # somebody has stopped the stage: train_vae.py saves and ends so
        ("sys.exit(0)", 1, ("output",)),
    ],
)
def test_a_stage_that_fails_is_named_and_tried_again(tmp_path, stages, capfd, ends, code, facts):
    flag = tmp_path / "works"
    stages.append(python("before", touch(tmp_path, "before")))
    lines = f"import os, signal, sys\nif not os.path.exists({str(flag)!r}): {ends}\n{touch(tmp_path, 'first')}"
    stages.append(python("first", lines))
    argv = ["--out", str(tmp_path / "out")]
    assert demo.main(argv) == code
    said = capfd.readouterr().err
    assert (
        naming("stage first", "Rerun", *facts).search(said) and said.count("error: ") == 1 and "Traceback" not in said
    )
    assert not StagesFile(tmp_path / "out" / "stages.json").stages["first"]["finished"]
    flag.touch()
    assert demo.main(argv) == 0
    assert (tmp_path / "out" / "log").read_text() == "before first "


@pytest.mark.parametrize("world", sorted(PRESETS))
def test_the_end_says_how_to_use_the_model_that_was_trained(tmp_path, stages, world, capfd):
    assert demo.main(["--out", str(tmp_path / "out"), "--world", world]) == 0
    (line,) = (line for line in capfd.readouterr().out.splitlines() if "generate.py" in line)
    config, given = parse(GenerateConfig, shlex.split(line.partition("generate.py")[2]), "")
    assert resolve_generate(config, given)[1] == "text"
    assert config.what.model == str(tmp_path / "out" / "runs" / f"{demo.PREFIX[world]}_biart" / "bundle")
    outputs = [stage.output for stage in PLAN(DemoSettings(world=world), tmp_path / "out")]
    assert str((Path(config.what.model) / "config.json").relative_to(tmp_path / "out")) in outputs
    (text,) = config.what.text
    assert PRESETS[world].parse_caption(text) is not None


@pytest.mark.parametrize("content", ["{", "[]", '{"first": 1}', '{"first": {"command": "x"}}'])
def test_a_damaged_record(tmp_path, stages, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stages.json").write_text(content)
    with pytest.raises(FileError, match=naming(tmp_path / "out" / "stages.json")):
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
    """The real scripts: stopped while AugVAE trains and as two other stages begin, resumed, and what results."""
    out = tmp_path / "out"
    flags = f"--recipes {recipes} --out {out} --train_pairs 16 --count 4 --rerank 2 --gpus 0".split()
    command = [sys.executable, "-m", "latent_verse.demo", *flags]
    backups = out / "runs" / "demo_augvae_ml" / "backups"
    for stop, number in ((2, signal.SIGINT), (4, signal.SIGTERM), (6, signal.SIGINT)):
        said = open(tmp_path / f"said{stop}.txt", "w+")  # noqa: SIM115
        process = subprocess.Popen(command, cwd=demo.ROOT, stdout=said, stderr=subprocess.STDOUT, text=True)
        end = time.monotonic() + 200
        while not _begun(tmp_path / f"said{stop}.txt", f"[{stop}/7]") or (
            stop == 2 and not list(backups.glob("step=*"))
        ):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / f"said{stop}.txt").read_text()
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(timeout=200)
        text = (tmp_path / f"said{stop}.txt").read_text()
        assert process.returncode == 128 + number and "Traceback" not in text, text
        assert naming("stopped by", number.name, "Rerun").search(text.splitlines()[-1]), text
    record = StagesFile(out / "stages.json")
    assert record.stages["pictures"]["finished"]

    again = subprocess.run(command, cwd=demo.ROOT, capture_output=True, text=True, timeout=500)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done before") == 5
    assert "Resuming from" in (tmp_path / "said4.txt").read_text()
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


def _begun(file: Path, title: str) -> bool:
    return any(line.startswith(title) and "done before" not in line for line in file.read_text().splitlines())
