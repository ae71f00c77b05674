"""The card of the shipped shapes model: written from demos' results, and true of the model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from latent_verse.config.cli import parse
from latent_verse.data.shapes import World
from latent_verse.demo import card
from latent_verse.evaluation import shapes_truth
from latent_verse.files import read_json_object
from latent_verse.inference.pipeline import LVerse
from latent_verse.metrics.intervals import wilson
from tests.documented_commands import commands, flags
from tests.messages import naming
from tests.tiny_lverse import make_lverse

pytestmark = pytest.mark.usefixtures("one_thread")

REPO = Path(__file__).parents[2]
SHAPES = REPO / "models" / "shapes"
PAGE = f"# a model\n\n{card.BEGIN}\nold\n{card.END}\n\n## Limits\n"


def write_demo(folder: Path, seed: int, right: int, vae) -> Path:
    """What `make demo` leaves behind, as far as a card needs it."""
    run = folder / card.RUN
    make_lverse(vae).save_pretrained(run / "bundle")
    (run / "config.yaml").write_text(f"trainer: {{seed: {seed}}}\n")
    counts = {
        "unseen": {"right": right, "total": 200},
        "heldout": {"right": right - 100, "total": 200, "attributes": {}},
    }
    facts = {"machine": "a machine, 2 cores", "torch": "2.9.0", "Python": "3.11", "commit": f"c0ffee{seed}"}
    metrics = {**dict.fromkeys(card.DIRECTIONS, counts), "facts": facts}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.fixture
def demos(tmp_path, tiny_augvae):
    return [write_demo(tmp_path / f"d{seed}", seed, 190 + seed, tiny_augvae(seed, single_level=4)) for seed in (7, 3)]


@pytest.fixture
def model(tmp_path, tiny_augvae):
    """A shipped model with a card, as it was before."""
    folder = tmp_path / "models" / "shapes"
    make_lverse(tiny_augvae(5, single_level=4)).save_pretrained(folder)
    (folder / "README.md").write_text(PAGE)
    (folder / "card.json").write_text('{"does": "things", "example": "a thing", "seed": 1, "runs": []}')
    return folder


def test_the_first_demo_becomes_the_model_and_all_its_results(demos, model, capsys):
    assert card.main(["--demos", *map(str, demos), "--out", str(model)]) == 0
    shipped, first = (LVerse.from_pretrained(folder, "cpu") for folder in (model, demos[0] / card.RUN / "bundle"))
    assert shipped.fingerprints == first.fingerprints
    about = read_json_object(model / "card.json")
    assert (about["does"], about["example"], about["seed"]) == ("things", "a thing", 7)
    assert [(run["seed"], run["commit"], run["torch"]) for run in about["runs"]] == [
        (7, "c0ffee7", "2.9.0"),
        (3, "c0ffee3", "2.9.0"),
    ]
    assert about["runs"][0]["results"]["image to text"]["held-out combinations"] == {"right": 97, "total": 200}
    page = (model / "README.md").read_text()
    assert page.startswith("# a model") and page.endswith("## Limits\n") and "old" not in page
    low, high = wilson(197, 200)
    assert f"197 of 200, 98.5 % ({100 * low:.1f} to {100 * high:.1f})" in page
    assert "| 7 | 98.5 % | 48.5 % | 98.5 % | 48.5 % |" in page and "| 3 | 96.5 % | 46.5 % |" in page
    assert "| lowest to highest | 96.5 to 98.5 % | 46.5 to 48.5 % |" in page
    assert naming("a machine, 2 cores", "2.9.0", "c0ffee7", 7).search(page)
    assert card.main(["--demos", *map(str, demos), "--out", str(model)]) == 0  # again: the same
    assert (model / "README.md").read_text() == page


def test_a_demo_or_card_that_cannot_be_used_changes_nothing(demos, model, capsys):
    before = {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}

    def refused(*facts, out=model, demos=demos):
        assert card.main(["--demos", *map(str, demos), "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert naming(*facts).search(said) and "Traceback" not in said
        assert {file: file.read_bytes() for file in before} == before

    assert card.main([]) == 2 and naming("demos").search(capsys.readouterr().err)
    refused(7, demos=[demos[0], demos[0]])
    metrics = json.loads((demos[1] / "metrics.json").read_text())
    (demos[1] / "metrics.json").write_text(json.dumps({**metrics, "image_to_text": {}}))
    refused(demos[1] / "metrics.json", "unseen")
    (demos[1] / "metrics.json").unlink()
    refused(demos[1] / "metrics.json")
    (model / "README.md").write_text("# no marks\n")
    before[model / "README.md"] = b"# no marks\n"
    refused(model / "README.md", demos=demos[:1])


def test_the_page_of_the_shipped_model_says_what_its_card_holds():
    page = (SHAPES / "README.md").read_text(encoding="utf-8")
    assert card.with_tables(page, read_json_object(SHAPES / "card.json"), SHAPES) == page
    weights = sum(file.stat().st_size for file in SHAPES.rglob("*.safetensors"))
    assert f"{weights / 1e6:.1f} MB of safetensors" in page
    parameters = LVerse.from_pretrained(SHAPES, "cpu").biart.num_parameters()
    assert f"{parameters / 1e6:.1f} million parameters" in page


def evaluations() -> dict[str, shapes_truth.ShapesEvalConfig]:
    """The commands by which the card was evaluated, as it names them: {split: settings}."""
    lines = commands("latent_verse.evaluation.shapes_truth", [SHAPES / "README.md"])
    configs = [parse(shapes_truth.ShapesEvalConfig, flags(line, "shapes_truth"), "")[0] for line in lines]
    return {config.what.split: config for config in configs}


def test_the_card_names_the_commands_of_its_results():
    found = evaluations()
    assert set(found) == {"val", "heldout"}
    for config in found.values():
        assert (config.what.model, config.what.world, config.what.count, config.what.seed) == (
            "shapes",
            "small",
            500,
            0,
        )
        assert config.draw.temperature == 0
    totals = re.findall(r"\d+ of (\d+), ", (SHAPES / "README.md").read_text(encoding="utf-8"))
    assert len(totals) == 6 and set(totals) == {"500"}


@pytest.mark.slow
@pytest.mark.parametrize("split", ["val", "heldout"])
def test_the_results_of_the_card_are_those_of_the_model(split):
    """By its own commands, within its 95 % intervals: another processor rounds differently."""
    config, world = evaluations()[split], World.preset("small")
    model = LVerse.from_pretrained(config.what.model, "cpu")
    found, _ = shapes_truth.evaluate(model, world, split, config.what.count, config.what.seed, config.draw)
    about = read_json_object(SHAPES / "card.json")
    (stated,) = (run["results"] for run in about["runs"] if run["seed"] == about["seed"])
    where = card.SPLITS["unseen" if split == "val" else split]
    for direction, title in card.DIRECTIONS.items():
        here, there = found[direction], stated[title][where]
        low, high = wilson(there["right"], there["total"])
        assert low <= here["right"] / here["total"] <= high, (title, here, there)
