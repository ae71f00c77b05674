"""The demo's page: one HTML file that holds its pictures and curves and asks nothing of the network.

    write_report(folder, report)        writes <folder>/index.html

Pictures are embedded as they are and enlarged by the browser, pixel by pixel; curves are SVG by matplotlib.
"""

from __future__ import annotations

import base64
import csv
import html
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latent_verse.evaluation.intervals import wilson
from latent_verse.runs import write_whole

TEXT_COLOUR = "#7a828c"  # of curves' axes: readable on white and on black
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7")


@dataclass
class Curves:
    """A plot: {label: [(step, value), ...]}."""

    title: str
    unit: str
    lines: dict[str, list[tuple[int, float]]]
    log_scale: bool = False


@dataclass
class Report:
    """All that the page shows.

    Attributes:
        metrics: what metrics.json holds.
        splits: {"unseen": judged, "heldout": judged}, each as evaluation/shapes.py writes its JSON file.
        folder: what picture names in there are relative to.
        stages: (title, seconds, command) of each stage, in order.
        facts: (name, value): machine, commit, ...
    """

    title: str
    metrics: dict[str, Any]
    splits: dict[str, dict[str, Any]]
    folder: Path
    stages: list[tuple[str, float, str]]
    curves: list[Curves] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)


def read_curves(run: Path, names: dict[str, str]) -> dict[str, list[tuple[int, float]]]:
    """{label: points} of the columns {column: label} in a run folder's CSV logs; a continued run has several of them,
    and where steps were done twice, the later counts."""
    points: dict[str, dict[int, float]] = {label: {} for label in names.values()}
    logs = sorted(run.glob("logs*/metrics.csv"), key=lambda file: file.stat().st_mtime)
    for log in logs:
        with open(log, newline="") as file:
            for row in csv.DictReader(file):
                for column, label in names.items():
                    if row.get(column):
                        points[label][int(row["step"])] = float(row[column])
    return {label: sorted(of_label.items()) for label, of_label in points.items() if of_label}


def write_report(folder: Path, report: Report) -> Path:
    """Write <folder>/index.html, whole or not at all; returns its path."""
    parts = [
        f"<h1>{_text(report.title)}</h1>",
        _lead(report),
        "<h2>Figures</h2>",
        _figures(report),
        *(_split(report, name) for name in report.splits),
        "<h2>Learning curves</h2>",
        *(
            f"<figure>{_plot(curves)}<figcaption>{_text(curves.title)}</figcaption></figure>"
            for curves in report.curves
        ),
        "<h2>What was run</h2>",
        _stages(report),
        _facts(report),
    ]
    page = PAGE.replace("{title}", _text(report.title)).replace("{style}", STYLE).replace("{body}", "\n".join(parts))
    path = folder / "index.html"
    write_whole(path, page)
    return path


# --------------------------------------------------------------------------------------------------------------- parts

SPLIT_NAMES = {"unseen": "Unseen scenes", "heldout": "Held-out combinations"}
SPLIT_NOTES = {
    "unseen": "Scenes that no network was trained on; each of their objects was seen in others. Other draws of such "
    "scenes chose, by the loss, among the checkpoints after each epoch.",
    "heldout": "Scenes with a colour and a shape that never came together in training, in pictures or in words.",
}


def _lead(report: Report) -> str:
    t2i, i2t = (report.metrics[name]["unseen"] for name in ("text_to_image", "image_to_text"))
    cards = [
        ("pictures drawn from a text are right", t2i),
        ("captions written for a picture are right", i2t),
    ]
    shown = "".join(f"<div><strong>{_percent(f)}</strong><span>{what}</span></div>" for what, f in cards)
    minutes = sum(seconds for _, seconds, _ in report.stages) / 60
    return (
        "<p>One transformer draws pictures from texts and writes texts about pictures, over the codes of an "
        "autoencoder; both were trained from nothing by the commands below. Every answer is judged by exact readers "
        "of the shapes world: a picture is right if all that its text says can be read from it and nothing else.</p>"
        f'<div class="cards">{shown}<div><strong>{minutes:.1f} min</strong><span>for everything</span></div></div>'
    )


def _figures(report: Report) -> str:
    rows = []
    for direction in ("text_to_image", "image_to_text", "reconstruction"):
        for name, figure in report.metrics.get(direction, {}).items():
            low, high = wilson(figure["right"], figure["total"])
            of = SPLIT_NAMES.get(name, name).lower()
            if name.startswith("reranked"):
                of = f"{SPLIT_NAMES[figure['split']].lower()}, best of {figure['drawn']}"
            attributes = figure.get("attributes", {})
            rows.append(
                [direction.replace("_", " "), of, f"{figure['right']} of {figure['total']}", _percent(figure)]
                + [f"{100 * low:.1f} to {100 * high:.1f} %"]
                + [_percent(attributes[a]) if a in attributes else "" for a in ATTRIBUTES]
            )
    drawn_at = report.metrics["draw"].get("rerank_temperature")  # none where nothing was re-ranked
    among = f" among those drawn at temperature {drawn_at:g}" if drawn_at is not None else ""
    head = ["direction", "scenes", "right", "share", "95 % interval", *ATTRIBUTES]
    return _table(head, rows) + (
        '<p class="note">Right: everything is true. The columns after the interval are the shares in which that '
        f"attribute alone is. Best of several: the picture{among} for which the model itself finds the text likeliest. "
        "Reconstructions are what drawing can reach at most.</p>"
    )


def _split(report: Report, name: str) -> str:
    shown = [case for case in report.splits[name]["cases"] if "picture" in case]
    drawn = "".join(
        _card(report, [("drawn", case["drawn"])], case["text"], case["right"]["text_to_image"]) for case in shown
    )
    written = "".join(
        _card(report, [("given", case["picture"])], case["written"], case["right"]["image_to_text"]) for case in shown
    )
    rebuilt = "".join(
        _card(
            report,
            [("given", case["picture"]), ("rebuilt", case["reconstruction"])],
            "",
            case["right"]["reconstruction"],
        )
        for case in shown[: len(shown) // 2]
    )
    return (
        f"<h2>{SPLIT_NAMES[name]}</h2><p>{SPLIT_NOTES[name]} Shown are the first {len(shown)} scenes, not a choice.</p>"
        f'<h3>Text to image</h3><div class="grid">{drawn}</div>'
        f'<h3>Image to text</h3><div class="grid">{written}</div>'
        f'<h3>Reconstructions: given, and from its codes</h3><div class="grid">{rebuilt}</div>'
    )


def _card(report: Report, pictures: list[tuple[str, str]], text: str, right: bool) -> str:
    images = "".join(_picture(report.folder / file, f"{what}: {text}" if text else what) for what, file in pictures)
    mark = f'<b class="{"right" if right else "wrong"}">{"✓ right" if right else "✗ wrong"}</b>'
    return f'<div class="card"><div class="pictures">{images}</div><p>{_text(text)}</p>{mark}</div>'


def _stages(report: Report) -> str:
    rows = [[title, f"{seconds:.0f} s"] for title, seconds, _ in report.stages]
    total = sum(seconds for _, seconds, _ in report.stages)
    commands = "\n\n".join(command for _, _, command in report.stages)
    return (
        _table(["stage", "time"], [*rows, ["all", f"{total:.0f} s"]])
        + "<p>The commands, from the repository's root:</p>"
        + f"<pre>{_text(commands)}</pre>"
    )


def _facts(report: Report) -> str:
    return _table(["", ""], [[name, value] for name, value in report.facts])


def _plot(curves: Curves) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(6.2, 2.9), layout="constrained")
        for (label, points), colour in zip(curves.lines.items(), COLOURS * 2, strict=False):
            axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.5)
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
            axes.legend(frameon=False, labelcolor=TEXT_COLOUR)
        out = io.BytesIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return f'<img class="plot" alt="{_text(curves.title)}" src="data:image/svg+xml;base64,{_base64(out.getvalue())}">'


def _picture(file: Path, what: str) -> str:
    return f'<img alt="{_text(what)}" title="{_text(what)}" src="data:image/png;base64,{_base64(file.read_bytes())}">'


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    header = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table>{header}<tbody>{body}</tbody></table></div>'


def _percent(figure: dict[str, int]) -> str:
    return f"{100 * figure['right'] / figure['total']:.1f} %" if figure["total"] else "-"


def _text(text: str) -> str:
    return html.escape(str(text))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


ATTRIBUTES = ("count", "colour", "shape", "size", "layout")
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
STYLE = """
:root { --ink: #1b1f24; --paper: #fff; --soft: #f4f5f7; --line: #dfe2e6; --faint: #5c656f; --ok: #15803d;
  --no: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #14171a; --soft: #1e2226; --line: #31363c;
  --faint: #9aa3ad; --ok: #4ade80; --no: #f87171; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 1rem; }
h2 { margin: 2.5rem 0 0.5rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.3rem; }
h3 { margin: 1.5rem 0 0.6rem; font-size: 1rem; }
.cards { display: flex; flex-wrap: wrap; gap: 0.8rem; }
.cards div { flex: 1 1 12rem; padding: 0.8rem 1rem; background: var(--soft); border-radius: 0.6rem; }
.cards strong { display: block; font-size: 1.8rem; line-height: 1.2; }
.cards span, .note, figcaption { color: var(--faint); font-size: 0.88rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.8rem; }
.card { padding: 0.6rem; background: var(--soft); border-radius: 0.6rem; font-size: 0.85rem; line-height: 1.35; }
.card p { margin: 0.45rem 0 0.2rem; }
.pictures { display: flex; gap: 0.4rem; }
.pictures img { flex: 1 1 0; min-width: 0; width: 100%; image-rendering: pixelated; border-radius: 0.3rem; }
.right { color: var(--ok); } .wrong { color: var(--no); }
figure { margin: 1rem 0; } .plot { width: 100%; max-width: 44rem; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; min-width: 50%; }
th, td { padding: 0.35rem 0.7rem 0.35rem 0; text-align: left; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th { color: var(--faint); font-weight: 600; }
pre { padding: 0.8rem 1rem; background: var(--soft); border-radius: 0.6rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 0.8rem; }
"""
