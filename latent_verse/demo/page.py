"""The demo's page: one HTML file that holds its images and curves (SVG) and loads nothing from the network."""

from __future__ import annotations

import contextlib
import csv
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latent_verse.config import UserError
from latent_verse.evaluation.shapes_truth import ATTRIBUTES
from latent_verse.files import write_text
from latent_verse.html import embedded, render
from latent_verse.metrics.intervals import wilson

try:
    import matplotlib
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise UserError("the demo's page needs the package matplotlib: pip install '.[demo]'") from error

TEXT_COLOUR = "#7a828c"  # of curves' axes: readable on white and on black
# letters as paths: in another font of the browser's they would not fit
STYLE = {"svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 10}
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7")
SPLIT_NAMES = {"unseen": "Unseen scenes", "heldout": "Held-out combinations"}
SPLIT_NOTES = {
    "unseen": "Scenes that no network was trained on; each of their objects occurred in other scenes. Different scenes "
    "of this kind chose, by the loss, among the checkpoints after each epoch.",
    "heldout": "Scenes with a colour and a shape that never occurred together in training, in images or in captions.",
}
DIRECTIONS = {"text_to_image": "of generated images match their text", "image_to_text": "of captions are true"}
AT_ONCE = 6  # scenes of each split that are shown at once; the others unfold


@dataclass
class Curves:
    """A plot: {label: [(step, value), ...]}."""

    title: str
    unit: str
    lines: dict[str, list[tuple[int, float]]]
    log_scale: bool = False


@dataclass
class Spread:
    """Results of several runs: the lowest and highest share that is right, in %, by split."""

    runs: int
    text_to_image: dict[str, tuple[float, float]]
    image_to_text: dict[str, tuple[float, float]]


@dataclass
class Report:
    """All that the page shows."""

    title: str
    metrics: dict[str, Any]  # what metrics.json holds
    splits: dict[str, dict[str, Any]]  # "unseen" and "heldout", as evaluation/shapes_truth.py writes its JSON file;
    # a case may have `read`: {image: what the world's reader finds in it, in words}
    folder: Path  # where the images are that `splits` names
    stages: list[tuple[str, float, str]]  # title, seconds, command
    curves: list[Curves] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)  # (name, value): machine, commit, ...
    spread: Spread | None = None  # of other runs of the same recipes


def read_curves(run: Path, names: dict[str, str]) -> dict[str, list[tuple[int, float]]]:
    """{label: points} of the columns {column: label} in a run's CSV logs; where logs overlap, the later one counts."""
    points: dict[str, dict[int, float]] = {label: {} for label in names.values()}
    for log in sorted(run.glob("logs*/metrics.csv"), key=lambda file: file.stat().st_mtime):
        with open(log, newline="") as file:
            for row in csv.DictReader(file):
                for column, label in names.items():
                    # a row may lack it, or somebody has edited it
                    with contextlib.suppress(ValueError, TypeError):
                        points[label][int(row.get("step"))] = float(row.get(column))
    return {label: sorted(of_label.items()) for label, of_label in points.items() if of_label}


def write_page(folder: Path, report: Report) -> Path:
    """Write <folder>/index.html, whole or not at all; returns its path."""
    rerank_temperature = report.metrics["draw"].get("rerank_temperature")  # None where nothing was re-ranked
    seconds = sum(seconds for _, seconds, _ in report.stages)
    best = f"best of {report.metrics['text_to_image'].get('reranked', {}).get('drawn')}"
    cases = {name: [case for case in split["cases"] if "picture" in case] for name, split in report.splits.items()}
    page = render(
        "demo.html",
        title=report.title,
        pixels=True,
        splits=[
            {
                "name": SPLIT_NAMES[name],
                "note": SPLIT_NOTES[name],
                "cards": [_card(report.folder, case, best) for case in cases[name]],
                "reconstructions": [_reconstruction(report.folder, case) for case in cases[name]],
                "results": [_result(report, direction, name) for direction in DIRECTIONS],
            }
            for name in report.splits
        ],
        at_once=AT_ONCE,
        spread=report.spread,
        seconds=seconds,
        head=["direction", "scenes", "right", "share", "95 % interval", *ATTRIBUTES],
        rows=_rows(report),
        among="" if rerank_temperature is None else f" among those sampled at temperature {rerank_temperature:g}",
        plots=[{"title": curves.title, "source": embedded(_plot(curves))} for curves in report.curves],
        stages=[*((title, f"{s:.0f} s") for title, s, _ in report.stages), ("total", f"{seconds:.0f} s")],
        commands=[command for _, _, command in report.stages],
        facts=report.facts,
    )
    path = folder / "index.html"
    write_text(path, page)
    return path


def _card(folder: Path, case: dict[str, Any], best: str) -> tuple[list[tuple], list[tuple]]:
    """The images and texts of a scene, as `parts.html` takes them; a wrong one with what was read in its image."""
    text, written, right, read = case["text"], case["written"], case["right"], case.get("read", {})
    images = [("scene", f"scene: {text}", embedded(folder / case["picture"]), None)]
    texts = [("sentence", [text], None)]
    for what, name, direction in (("generated", "drawn", "text_to_image"), (best, "reranked", "reranked")):
        if name in case:
            images.append((what, f"{what}: {text}", embedded(folder / case[name]), right[direction]))
            if not right[direction] and name in read:
                texts.append((f"{what}, read as", [read[name]], None))
    texts.append(("caption of the scene", [written], right["image_to_text"]))
    if not right["image_to_text"] and "picture" in read:
        texts.append(("scene, read as", [read["picture"]], None))
    return images, texts


def _reconstruction(folder: Path, case: dict[str, Any]) -> tuple[list[tuple], list[tuple]]:
    """The same for a scene and its reconstruction."""
    right, read = case["right"]["reconstruction"], case.get("read", {})
    images = [("scene", f"scene: {case['text']}", embedded(folder / case["picture"]), None)]
    images.append(("reconstruction", "reconstruction", embedded(folder / case["reconstruction"]), right))
    return images, [] if right or "reconstruction" not in read else [("read as", [read["reconstruction"]], None)]


def _result(report: Report, direction: str, split: str) -> tuple[str, str, str, str]:
    """A share, what it is of, its interval, and the range of other runs."""
    result = report.metrics[direction][split]
    others = "{:.1f} to {:.1f} %".format(*getattr(report.spread, direction)[split]) if report.spread else ""
    return _percent(result), DIRECTIONS[direction], _interval(result), others


def _rows(report: Report) -> list[list[str]]:
    rows = []
    for direction in ("text_to_image", "image_to_text", "reconstruction"):
        for name, result in report.metrics.get(direction, {}).items():
            scenes = SPLIT_NAMES.get(name, name).lower()
            if name.startswith("reranked"):
                scenes = f"{SPLIT_NAMES[result['split']].lower()}, best of {result['drawn']}"
            attributes = result.get("attributes", {})
            rows.append(
                [direction.replace("_", " "), scenes, f"{result['right']} of {result['total']}", _percent(result)]
                + [_interval(result)]
                + [_percent(attributes[a]) if a in attributes else "" for a in ATTRIBUTES]
            )
    return rows


def _percent(result: dict[str, int]) -> str:
    return f"{100 * result['right'] / result['total']:.1f} %" if result["total"] else "-"


def _interval(result: dict[str, int]) -> str:
    low, high = wilson(result["right"], result["total"])
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def _plot(curves: Curves) -> bytes:
    """The curves as SVG."""
    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure(curves).savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


def figure(curves: Curves) -> Figure:
    """The curves as a figure, the legend above them."""
    drawn = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = drawn.subplots()
    for (label, points), colour in zip(curves.lines.items(), COLOURS * 2, strict=False):
        alone = "o" if len(points) == 1 else None  # a line of one point would not be seen
        axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.5, marker=alone)
    axes.set_xlabel("step", color=TEXT_COLOUR)
    axes.set_ylabel(curves.unit, color=TEXT_COLOUR)
    if curves.log_scale:
        axes.set_yscale("log")
    axes.tick_params(which="both", colors=TEXT_COLOUR)
    axes.grid(alpha=0.2)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(TEXT_COLOUR)
    if curves.lines:
        columns = 2 if max(map(len, curves.lines)) < 32 else 1
        drawn.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=TEXT_COLOUR)
    return drawn
