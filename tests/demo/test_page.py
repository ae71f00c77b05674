"""The demo's page: it stands alone, says what the metrics say, and escapes whatever the texts hold."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from latent_verse.data.shapes import World
from latent_verse.demo import card, results
from latent_verse.demo.page import AT_ONCE, STYLE, Curves, Report, Spread, figure, read_curves, write_page
from latent_verse.metrics.intervals import wilson
from tests.browser import browser_needed, wider_than_the_page

REPO = Path(__file__).parents[2]


def results_of(folder: Path, split: str, total: int = 4) -> dict:
    """What evaluation/shapes.py writes, with images for two cases."""
    cases = []
    for i in range(total):
        right = {"text_to_image": i > 0, "image_to_text": i > 1, "reconstruction": True}
        case = {"text": f"<b>a & {i}</b>", "written": f"written {split} {i}", "right": right}
        if i < 2:
            case["read"] = {name: f"{name} {split} {i} in words" for name in ("picture", "drawn", "reconstruction")}
            for name in case["read"]:
                Image.new("RGB", (8, 8), (40 * i, 100, 200)).save(folder / f"{split}{i}{name}.png")
                case[name] = f"{split}{i}{name}.png"
        cases.append(case)
    return {"cases": cases}


@pytest.fixture
def report(tmp_path) -> Report:
    figure = {"right": 3, "total": 4, "attributes": {"count": {"right": 4, "total": 4}}}
    metrics = {
        "draw": {"temperature": 0.0, "rerank_temperature": 0.75},
        "text_to_image": {
            "unseen": figure,
            "heldout": {"right": 0, "total": 4},
            "reranked": {"right": 4, "total": 4, "drawn": 8, "split": "unseen"},
        },
        "image_to_text": {"unseen": {"right": 2, "total": 4}, "heldout": {"right": 1, "total": 4}},
        "reconstruction": {"unseen": {"right": 4, "total": 4}},
    }
    return Report(
        title="A demo",
        metrics=metrics,
        splits={name: results_of(tmp_path, name) for name in ("unseen", "heldout")},
        folder=tmp_path,
        stages=[("AugVAE", 61.4, "python train_vae.py --config a.yaml"), ("BiART", 120.0, "python train_biart.py")],
        curves=[Curves("Loss", "nats", {"train": [(0, 2.0), (10, 1.0)], "validation": [(10, 1.1)]}, log_scale=True)],
        facts=[("commit", "abc")],
        spread=Spread(7, *({"unseen": (98.25, 99), "heldout": (70, 88.5)} for _ in range(2))),
    )


class Checker(HTMLParser):
    """Collects sources and text, and fails on tags that do not close."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("img", "meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone(report, tmp_path):
    page = write_page(tmp_path, report).read_text()
    checked = Checker(page)
    assert checked.sources and all(source.startswith(("data:image/", "#")) for source in checked.sources)
    assert not re.search(r"url\(|@import|<script|<link", page)
    pngs = [s for s in checked.sources if s.startswith("data:image/png")]
    assert base64.b64decode(pngs[1].split(",")[1]) == (tmp_path / "unseen0drawn.png").read_bytes()
    # of two scenes a split: it and what was generated, and it and its reconstruction
    assert len(pngs) == 2 * 2 * (2 + 2)
    assert not list(tmp_path.glob(".*"))


def test_the_page_says_what_the_metrics_say(report, tmp_path):
    page = write_page(tmp_path, report).read_text()
    text = Checker(page).text
    for words in (
        "3 of 4",
        "75.0 %",
        "best of 8",
        "0 of 4",
        "written heldout 1",
        "python train_biart.py",
        "61 s",
        "abc",
        "among those sampled at temperature 0.75",
    ):
        assert words in text
    assert "3.0 min" in text
    assert text.count("✓ right") + text.count("✗ wrong") == 2 * 2 * (1 + 1 + 1)
    assert text.count("✗ wrong") == 2 * (1 + 2)
    # what was read in what is wrong: an image, and the scene of a caption
    assert text.count("in words") == 2 * (1 + 2) and "drawn heldout 0 in words" in text and "read as" in text
    assert "<b>a & 0</b>" in text and "<b>a &" not in page  # escaped
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_curves_are_drawn(report, tmp_path):
    (source,) = [s for s in Checker(write_page(tmp_path, report).read_text()).sources if "svg" in s]
    svg = base64.b64decode(source.split(",")[1]).decode()
    assert "<svg" in svg and "<text" not in svg  # letters are paths, so that no browser's font changes their width
    assert re.search(r"<use [^>]*fill: #f97316", svg)  # the marker of a curve of one point


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (414, 460, 0.8692, 0.9242), (5, 10, 0.2366, 0.7634), (0, 0, 0, 1)],
)
def test_wilson_interval(right, total, low, high):
    assert wilson(right, total) == pytest.approx((low, high), abs=1e-3)


def test_curves_of_a_resumed_run(tmp_path):
    """Steps repeated after an interruption count once: the later values."""
    for name, rows in (("logs", "0,2.0,\n10,1.5,3.0\n20,9.0,"), ("logs-2", "20,1.0,\n30,0.5,2.0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"step,train/loss,val/loss\n{rows}\n")
    curves = read_curves(tmp_path, {"train/loss": "train", "val/loss": "validation", "absent": "nothing"})
    assert curves == {"train": [(0, 2.0), (10, 1.5), (20, 1.0), (30, 0.5)], "validation": [(10, 3.0), (30, 2.0)]}
    assert read_curves(tmp_path / "nowhere", {"a": "b"}) == {}


def test_held_out_results_are_as_prominent_as_unseen_ones(report, tmp_path):
    page = write_page(tmp_path, report).read_text()
    for kind in ("<h3>{}</h3>", "<strong>{}</strong>"):
        found = re.findall(kind.format("(.*?)"), page)
        names = ["Unseen scenes", "Held-out combinations"] * 2
        assert found == (names if "h3" in kind else ["75.0 %", "50.0 %", "0.0 %", "25.0 %"])
    text = Checker(page).text
    assert text.count("in 7 other runs: 98.2 to 99.0 %") == text.count("in 7 other runs: 70.0 to 88.5 %") == 2
    assert text.count("95 % interval: ") == 4 and text.index("Images") < text.index("Results") < text.index("curves")
    report.spread = None
    assert "other runs" not in write_page(tmp_path, report).read_text()


def test_the_readme_and_the_results_state_the_spread_that_the_page_states():
    spread = card.spread()
    assert spread.runs >= 5
    for file in ("README.md", "docs/results.md"):
        text = (REPO / file).read_text(encoding="utf-8")
        for of_splits in (spread.text_to_image, spread.image_to_text):
            for low, high in of_splits.values():
                assert f"{low:.1f} to {high:.1f} %" in text


def test_what_was_read_in_the_images_of_a_case(tmp_path):
    world = World.preset("small")
    scenes = [world.scene(i) for i in range(2)]
    for name, scene in zip(("a.png", "b.png"), scenes, strict=True):
        world.render(scene).save(tmp_path / name)
    cases = [{"text": "x", "picture": "a.png", "drawn": "b.png"}, {"text": "not shown"}]
    results.add_readings(tmp_path, world, cases)
    assert cases[0]["read"] == {"picture": world.describe(scenes[0]), "drawn": world.describe(scenes[1])}
    assert cases[1]["read"] == {}


def test_scenes_beyond_the_first_unfold(report, tmp_path):
    for split in report.splits.values():
        split["cases"] = [split["cases"][0]] * (AT_ONCE + 3)
    page = write_page(tmp_path, report).read_text()
    assert page.count("<summary>3 more scenes</summary>") == 2 and "first 9 scenes" in page


@pytest.mark.parametrize("columns", [results.VAE_COLUMNS, results.NATS_COLUMNS, results.RIGHT_COLUMNS, {"x": "y" * 45}])
def test_every_entry_of_a_legend_lies_inside_the_figure(columns):
    lines = {label: [(0, 0.5 + i), (2000, 1e-5)] for i, label in enumerate([*columns.values(), "another"])}
    with matplotlib.rc_context(STYLE):
        drawn = figure(Curves("A title", "a unit", lines, log_scale=True))
        drawn.draw_without_rendering()
        (legend,) = drawn.legends
        assert [text.get_text() for text in legend.get_texts()] == list(lines)
        boxes = [part.get_window_extent() for part in (*legend.get_texts(), *legend.get_lines(), drawn.axes[0].yaxis)]
    assert all(drawn.bbox.x0 <= b.x0 and b.x1 <= drawn.bbox.x1 and b.y1 <= drawn.bbox.y1 for b in boxes)
    assert all(box.y0 >= drawn.axes[0].bbox.y1 for box in boxes[:-1])  # none lies on the curves


@pytest.mark.slow
@browser_needed
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_cuts_nothing_off(report, tmp_path, width):
    assert wider_than_the_page(write_page(tmp_path, report), width, tmp_path) == []
