"""What is installed: dependencies, packages, recipes in the wheel, commands, and names of earlier versions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import latent_verse
from latent_verse import __main__ as command_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def lines(file: str) -> set[str]:
    text = (ROOT / file).read_text().splitlines()
    return {line.strip() for line in text if line.strip() and not line.startswith(("#", "-r"))}


def test_requirements_are_the_dependencies_and_the_extras():
    extras = PROJECT["project"]["optional-dependencies"]
    assert lines("requirements.txt") == {*PROJECT["project"]["dependencies"], *extras["eval"], *extras["demo"]}
    assert lines("requirements-dev.txt") == {*extras["dev"]} - {"latent-verse[eval,demo]"}


def test_every_room_is_in_the_wheel():
    rooms = {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in ROOT.glob("latent_verse/**/__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == rooms | {"latent_verse.configs", "latent_verse.models"}


def test_names_of_earlier_versions():
    from latent_verse.checkpoint import load_augvae
    from latent_verse.pipeline import LVerse

    assert load_augvae is latent_verse.load_augvae and LVerse is latent_verse.LVerse


def test_the_first_import_of_augvae_can_read_and_write_files():
    code = "from latent_verse import AugVAE; AugVAE.from_pretrained, AugVAE.save_pretrained"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


# a process in which the packages of the extras are not installed; then what `code` does in it
WITHOUT = """
import importlib.metadata, sys
from importlib.machinery import PathFinder
absent = set({packages})
find_spec, from_name = PathFinder.find_spec, importlib.metadata.Distribution.from_name
def distribution(name):
    if name.lower().replace("-", "_") in absent:
        raise importlib.metadata.PackageNotFoundError(name)
    return from_name(name)
importlib.metadata.Distribution.from_name = distribution
PathFinder.find_spec = lambda name, *more: None if name.split(".")[0] in absent else find_spec(name, *more)
{code}
"""
PROGRAMS = """
import json
from pathlib import Path
from PIL import Image
from latent_verse.__main__ import main
from latent_verse.demo.run import main as demo
Path("images").mkdir()
for i in range(2):
    Image.new("RGB", (40, 40), (i, 90, 200)).save(f"images/{i}.png")
assert main(["eval-biart", "--model", "bundle", "--fake_data"]) == 2  # without jinja2
assert demo(["--recipes", "nowhere"]) == 2
quick = ["--gpus", "0", "--num_workers", "0"]
steps = ["--max_steps", "1", "--limit_val_batches", "1", "--name", "run"]
assert main(["train-vae", "--config", "tiny_augvae_ml", "--fake_data", *quick, *steps]) == 0
for name, data in (("fake", ["--fake_data"]), ("real", ["--test_dir", "images", "--dataset", "flat"])):
    assert main(["eval-vae", "--ckpt_path", "results/run", "--name", name, *data, *quick]) == 0
assert "pip install '.[eval]'" in json.loads(Path("results/real/metrics.json").read_text())["missing"]["rfid"]
assert not Path("results/real/index.html").exists()
absent.remove("jinja2")
assert demo(["--recipes", "nowhere"]) == 2  # without matplotlib
import latent_verse.evaluation.worker
assert not absent & {module.split(".")[0] for module in sys.modules}
main(["generate", "--help"])
"""


def test_without_the_extras(tmp_path):
    """What needs their packages is missing, and says what to install; all else works."""
    extras = PROJECT["project"]["optional-dependencies"]
    packages = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in extras["eval"] + extras["demo"]}
    code = WITHOUT.format(packages=packages, code=PROGRAMS)
    paths = {"PYTHONPATH": str(ROOT), "TORCH_HOME": str(tmp_path), "HOME": str(tmp_path)}
    place = {"cwd": tmp_path, "capture_output": True, "text": True, "env": os.environ | paths, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", code], **place)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    remedies = [("jinja2", "'.[eval]'"), ("jinja2", "'.[eval]'"), ("matplotlib", "'.[demo]'")]
    assert done.stdout.count("Without a page: pages need the package jinja2") == 2
    assert len(errors) == 3 and all(a in e and b in e for e, (a, b) in zip(errors, remedies, strict=True)), errors


def test_commands(capsys):
    assert command_line.main([]) == 0 and command_line.main(["--help"]) == 0
    said = capsys.readouterr().out
    files = {p.stem.replace("_", "-") for p in (ROOT / "latent_verse" / "commands").glob("[!_]*.py")}
    assert set(command_line.COMMANDS) == files and all(name in said for name in files)
    assert {p.stem.replace("_", "-") for p in ROOT.glob("*.py")} == files - {"models"}  # which is a command only
    assert command_line.main(["train-vea"]) == 2 and "train-vae" in capsys.readouterr().err
    assert command_line.main(["train-vae", "--epoch", "3"]) == 2 and "--epochs" in capsys.readouterr().err


def test_scripts_are_only_their_commands():
    for script in ROOT.glob("*.py"):
        code = script.read_text().splitlines()
        assert f"from latent_verse.commands.{script.stem} import main" in code and len(code) < 12, script.name
        assert code[-2:] == ['if __name__ == "__main__":', "    sys.exit(main())"], script.name


@pytest.mark.slow
def test_a_wheel_runs_a_shipped_recipe_and_a_shipped_model_from_any_folder(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    names = ["latent_verse", "configs", "models", "pyproject.toml", "README.md", "LICENSE"]
    source.mkdir()
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(source)], check=True)  # build/ stays there
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("latent_verse-*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(tmp_path / "site")
        names = set(content.namelist())
    assert {f"latent_verse/configs/{p.name}" for p in (ROOT / "configs").glob("*.yaml")} <= names
    assert {f"latent_verse/templates/{p.name}" for p in (ROOT / "latent_verse" / "templates").iterdir()} <= names
    models = [file for file in (ROOT / "models").rglob("*") if file.is_file()]
    assert models and {f"latent_verse/models/{file.relative_to(ROOT / 'models')}" for file in models} <= names
    assert "latent_verse/py.typed" in names
    (tmp_path / "elsewhere").mkdir()
    command = [
        sys.executable,
        "-m",
        "latent_verse",
        "train-vae",
        "--config",
        "tiny_augvae_ml",
        "--fake_data",
        "--gpus",
        "0",
    ]
    command += ["--max_steps", "1", "--limit_val_batches", "1", "--num_workers", "0"]
    place = {"cwd": tmp_path / "elsewhere", "capture_output": True, "text": True}
    done = subprocess.run(
        command, **place, env={"PATH": "", "PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "elsewhere" / "results" / "fake-tiny_augvae_ml" / "config.yaml").is_file()
    command = [sys.executable, "-m", "latent_verse", "generate", "--text", "a red ring", "--gpus", "0"]
    done = subprocess.run(
        command, **place, env={"PATH": "", "PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path)}, timeout=120
    )
    assert done.returncode == 0 and str(tmp_path / "site" / "latent_verse" / "models" / "shapes") in done.stderr
    assert (tmp_path / "elsewhere" / "generated" / "0000_00.png").is_file()
