"""generate.py where no model is named, or one by its name: the shipped model, and words it does not know."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from PIL import Image

from latent_verse.commands import generate
from latent_verse.inference import tasks
from tests.messages import naming
from tests.tiny_lverse import same

pytestmark = pytest.mark.usefixtures("one_thread")

REPO = Path(__file__).parents[2]


def run(model, *argv):
    return generate.main(["--model", model, "--gpus", "0", *argv])


def test_without_a_model_the_default_is_taken_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert generate.main(["--text", "a red ring", "--gpus", "0", "--out", "a", "--temperature", "0"]) == 0
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "--model" in line)
    assert naming("No --model given", "shapes", REPO / "models" / "shapes", "a red ring left of a blue cross").search(
        said
    )
    assert run("shapes", "--text", "a red ring", "--out", "b", "--temperature", "0") == 0
    assert "--model" not in capsys.readouterr().err
    assert same([[Image.open("a/0000_00.png")]], [[Image.open("b/0000_00.png")]])
    for argv in (["--image", "a/0000_00.png"], ["--score", "a/0000_00.png", "a red ring", "a blue cup"]):
        assert generate.main([*argv, "--gpus", "0"]) == 0
        assert "a red ring" in capsys.readouterr().out
    argv = ["--complete", "a/0000_00.png", "--rows", "4", "--text", "a red ring", "--gpus", "0"]
    assert generate.main(argv) == 0
    capsys.readouterr()
    assert generate.main(["--gpus", "0"]) == 2 and naming("text", "image", "score").search(capsys.readouterr().err)


def test_a_mistyped_model_is_told_the_closest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("shpaes", "--text", "a") == 2
    assert naming("shpaes", "shapes").search(capsys.readouterr().err)


def test_words_that_the_model_has_never_seen_are_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "GROUP", 1)  # for all groups at once
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run("shapes", "--text", "a cat on a sofa", "a red cup") == 0
        assert run("shapes", "--score", "generated/0000_00.png", "a dog") == 0
        assert run("shapes", "--text", "a red cup left of a blue ring") == 0
    said = [str(one.message) for one in caught if "unknown words" in str(one.message)]
    assert sum("cat" in line for line in said) == 1
    said = list(dict.fromkeys(said))  # a pair is scored in both directions
    assert len(said) == 2 and all(len(line.splitlines()) == 1 for line in said)
    assert naming("cat", "sofa", "red", "zigzag").search(said[0]) and naming("dog").search(said[1])
