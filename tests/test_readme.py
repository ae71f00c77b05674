"""Every command of README.md, docs/ and the models' cards is parsed by the real parser; README.md's Python runs.

test_readme_walk.py runs README.md's commands.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from latent_verse.config.cli import parse
from latent_verse.config.evaluate import EvalBiARTConfig, resolve_eval_biart
from latent_verse.config.generate import GenerateConfig, resolve_generate
from latent_verse.config.train import EvalVAEConfig, TrainBiARTConfig, TrainVAEConfig
from latent_verse.config.train_rules import resolve_eval_vae, resolve_train_biart, resolve_train_vae
from latent_verse.demo import run as demo
from tests.documented_commands import REPO, commands, flags


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(REPO)


@pytest.mark.parametrize("line", commands("train_vae.py"))
def test_train_commands_parse(line):
    config, given = parse(TrainVAEConfig, flags(line, "train_vae.py"), "")
    resolve_train_vae(config, given)


@pytest.mark.parametrize("line", commands("eval_vae.py"))
def test_eval_commands_parse(line):
    config, _ = parse(EvalVAEConfig, flags(line, "eval_vae.py"), "")
    resolve_eval_vae(config)


@pytest.mark.parametrize("line", commands("train_biart.py"))
def test_train_biart_commands_parse(line):
    config, given = parse(TrainBiARTConfig, flags(line, "train_biart.py"), "")
    resolve_train_biart(config, given)


@pytest.mark.parametrize("line", commands("generate.py"))
def test_generate_commands_parse(line):
    config, given = parse(GenerateConfig, flags(line, "generate.py"), "")
    resolve_generate(config, given)


@pytest.mark.parametrize("line", commands("eval_biart.py"))
def test_eval_biart_commands_parse(line):
    config, given = parse(EvalBiARTConfig, flags(line, "eval_biart.py"), "")
    resolve_eval_biart(config, given)


@pytest.mark.parametrize("target", sorted({line.removeprefix("make ") for line in commands("make ")}))
def test_make_targets_are_there_and_run_what_parses(target):
    """`make -n` says what would run; the demo's settings must be such that it can begin."""
    said = subprocess.run(["make", "-n", target], cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert said
    if target.startswith("demo"):
        (line,) = (line for line in said.splitlines() if "latent_verse.demo" in line)
        config, _ = parse(demo.DemoConfig, flags(line.partition(" || ")[0], "latent_verse.demo"), "")
        assert len(demo.plan(config.demo, REPO / config.demo.out)) == 7


def test_there_are_commands():
    scripts = ("train_vae.py", "eval_vae.py", "train_biart.py", "generate.py", "eval_biart.py")
    counts = [len(commands(script)) for script in scripts]
    assert all(n >= least for n, least in zip(counts, (8, 1, 5, 4, 7), strict=True)), counts


def test_seed_command_of_the_released_recipe():
    """The original's smoke test, and the DeepSpark port's command line."""
    config, given = parse(TrainVAEConfig, ["--fake_data", "--configs", "configs/imagenet_augvae_ml.yaml"], "")
    config = resolve_train_vae(config, given)
    assert config.trainer.limit_train_batches == 2 and config.trainer.epochs == 1
    port = "--config ./configs/imagenet_augvae_ml.yaml --train_dir a --val_dir b --gpus 8 --batch_size 4 --epochs 2"
    config, given = parse(TrainVAEConfig, port.split(), "")
    config = resolve_train_vae(config, given)
    assert (config.trainer.gpus, config.data.batch_size, config.trainer.epochs) == (8, 4, 2)


@pytest.mark.parametrize("page", [REPO / "README.md", *sorted(REPO.glob("models/*/README.md"))], ids=str)
def test_python_examples_run_as_they_stand_from_any_directory(page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert blocks
    for block in blocks:
        env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        place = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "timeout": 120}
        done = subprocess.run([sys.executable, "-W", "error", "-c", block], **place)
        assert done.returncode == 0, done.stderr
        images = [Path(found[1]) for found in re.finditer(r'\.save\("([^"]+)"\)', block)]
        assert all((tmp_path / image).is_file() for image in images)
