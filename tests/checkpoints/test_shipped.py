"""The models that come with the repository: found by name from anywhere, taken where none is named, and their cards."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from latent_verse.checkpoints import shipped
from latent_verse.checkpoints.augvae import load_augvae
from latent_verse.checkpoints.biart import load_pretrained
from latent_verse.checkpoints.ckpt_files import CheckpointError, find_checkpoint, fingerprint
from latent_verse.config import UserError
from latent_verse.data.shapes import World
from latent_verse.inference.pipeline import LVerse
from tests.messages import naming
from tests.tiny_lverse import make_lverse

pytestmark = pytest.mark.usefixtures("one_thread")

REPO = Path(__file__).parents[2]
SHAPES = REPO / "models" / "shapes"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A models/ folder of its own, and a working directory beside it."""
    (tmp_path / "models").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(shipped, "PLACES", (tmp_path / "nowhere", tmp_path / "models"))
    return tmp_path / "models"


def test_a_name_stands_for_the_folder_of_the_model_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.located("shapes") == str(find_checkpoint("shapes")) == str(SHAPES)
    assert shipped.located("~/shapes") == os.path.expanduser("~/shapes")
    for other in ("shapes/vae", "owner/shapes", str(tmp_path / "shapes"), "shape"):
        assert shipped.located(other) == other


def test_what_lies_in_the_working_directory_wins(place, tiny_augvae):
    make_lverse(tiny_augvae(single_level=4)).save_pretrained(place / "shapes")
    assert LVerse.from_pretrained("shapes", "cpu").vae.config.num_tokens == 24
    make_lverse(tiny_augvae(single_level=4, num_tokens=20)).save_pretrained("shapes")
    assert LVerse.from_pretrained("shapes", "cpu").vae.config.num_tokens == 20
    assert LVerse.from_pretrained(None, "cpu").vae.config.num_tokens == 24  # no folder of that name was asked for
    shutil.rmtree("shapes")
    Path("shapes").touch()
    with pytest.raises(CheckpointError, match=naming("shapes", "file")):
        LVerse.from_pretrained("shapes", "cpu")


def test_another_model_needs_nothing_but_its_folder(place, tiny_augvae):
    (place / "notes").mkdir()
    (place / "README.md").touch()
    for name in ("emoji", "cats"):
        make_lverse(tiny_augvae(single_level=4)).save_pretrained(place / name)
    assert shipped.shipped_folders() == {name: place / name for name in ("cats", "emoji")}
    assert shipped.read_card(place / "cats") == shipped.Card()
    assert LVerse.from_pretrained("emoji", "cpu").vae.num_codes == 16


def test_training_starts_from_one_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, vae = load_pretrained("shapes"), fingerprint(load_augvae(SHAPES / "vae"))
    assert found.where == SHAPES and fingerprint(found.augvae()) == vae == fingerprint(load_augvae("shapes"))


@pytest.mark.parametrize("load", [LVerse.from_pretrained, load_augvae])
def test_a_mistyped_name_is_told_the_closest(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=naming("shpaes", "shapes")):
        load("shpaes")
    with pytest.raises(CheckpointError, match=naming("something", "shapes")):  # nothing is close: what there is
        load("something")


def test_no_model_named_is_the_default_and_said_once(caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped.say_default.cache_clear()
    with caplog.at_level(logging.WARNING, "latent_verse"):
        models = [LVerse.from_pretrained(device="cpu") for _ in range(2)]
    assert models[0].fingerprints == LVerse.from_pretrained(SHAPES, "cpu").fingerprints == models[1].fingerprints
    (said,) = caplog.messages
    assert naming("shapes", SHAPES, "red", "from_pretrained").search(said) and len(said.splitlines()) == 1


def test_python_prints_the_notice_as_one_line(tmp_path):
    code = "from latent_verse import LVerse; LVerse.from_pretrained(device='cpu')"
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert naming("No model named", "shapes").search(line)


def test_without_any_shipped_model_one_has_to_be_named(place):
    for missing in (True, False):
        if missing:
            shutil.rmtree(place)
        else:
            place.mkdir()
        assert shipped.shipped_folders() == {}
        with pytest.raises(UserError, match=naming("shapes")):
            LVerse.from_pretrained()
        with pytest.raises(CheckpointError, match=naming("shapes", "hub id")):
            LVerse.from_pretrained("shapes")


def test_a_damaged_card_is_told_by_its_file(place):
    (place / "a").mkdir()
    card, run = place / "a" / "card.json", '{"seed": 1, "runs": [{"seed": 1, "results": %s}]}'
    for text in (
        "[]",
        "{",
        '{"seed": 1, "runs": [{}]}',
        '{"runs": 5}',
        run % "5",
        run % '{"a": {"b": {}}}',
        run % '{"a": []}',
    ):
        card.write_text(text)
        with pytest.raises(UserError, match=naming(card)):
            shipped.read_card(place / "a")


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in (REPO / "models").glob("*/config.json")), ids=lambda f: f.name
)
def test_every_shipped_model_is_small_and_has_a_card(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 8e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".md"}
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    about = yaml.safe_load(header)
    assert about["license"] == "mit" and about["pipeline_tag"] == "text-to-image" and about["library_name"]
    assert f'LVerse.from_pretrained("{folder.name}")' in text and "## Limits" in text and "## Licence" in text
    card = shipped.read_card(folder)
    assert card.does and card.example in text and card.results
    assert LVerse.from_pretrained(folder.name, "cpu").tokenizer.about_unknown_words([card.example]) == ""


def test_git_keeps_the_weights():
    for file in SHAPES.rglob("*.safetensors"):
        ignored = subprocess.run(["git", "check-ignore", "-q", "--no-index", str(file)], cwd=REPO, timeout=60)
        assert ignored.returncode != 0, file


def test_the_default_model_generates_what_a_sentence_says():
    world, model = World.preset("small"), LVerse.from_pretrained("shapes", "cpu")
    sentence = shipped.read_card(SHAPES).example
    [[image]] = model.text_to_image([sentence], temperature=0)
    assert world.satisfies(world.parse_image(image), world.parse_caption(sentence))
    [[caption]] = model.image_to_text([image])
    assert world.satisfies(world.parse_image(image), world.parse_caption(caption))
