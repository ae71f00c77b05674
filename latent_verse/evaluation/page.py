"""An evaluation's page, one HTML file: every metric with its protocol; the best, median and worst cases by score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from latent_verse.evaluation.records import Records, four_digits, interval, selection
from latent_verse.files import write_text
from latent_verse.html import embedded, render


@dataclass(frozen=True)
class Case:
    """An image with a text, and the score that it is ordered by."""

    score: float
    image: Image.Image
    text: str
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Cases of one kind. `scored`: what the score is, and of how many the cases are chosen. `parts`: by heading."""

    title: str
    scored: str
    parts: dict[str, list[Case]]


def choose(scores: Sequence[float], count: int) -> dict[str, list[int]]:
    """Numbers of the `count` best (best first), those around the median, and the worst (worst first); none twice."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    count = min(count, len(order) // 3) or min(1, len(order))
    best, rest = order[:count], order[count:]
    worst, rest = rest[len(rest) - count :][::-1] if rest else [], rest[: max(len(rest) - count, 0)]
    middle = max(0, (len(rest) - count) // 2)
    return {"Best": best, "Median": rest[middle : middle + count], "Worst": worst}


def write(
    path: Path, title: str, records: Records, galleries: Sequence[Gallery], about: dict[str, object], settings: str
) -> None:
    """Write the page, whole or not at all. `about`: facts of the run; `settings`: its configuration as YAML."""
    measured: dict[tuple[str, str], list[str]] = {}  # names of metrics by protocol and library
    for name, record in records.values.items():
        measured.setdefault((record["protocol"], record["library"]), []).append(name)
    page = render(
        "evaluation.html",
        title=title,
        metrics=[
            (n, four_digits(r["value"]), interval(r), r["samples"], selection(r)) for n, r in records.values.items()
        ],
        protocols=[(", ".join(names), *how) for how, names in measured.items()],
        missing=records.missing,
        galleries=galleries,
        about=[(name, value) for name, value in about.items() if value],
        settings=settings,
        four_digits=four_digits,
        embedded=embedded,
    )
    write_text(path, page)
