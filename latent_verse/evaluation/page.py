"""An evaluation's page, one HTML file: images, then every metric by what it tells, with its protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from latent_verse.evaluation.records import Record, Records, four_digits, interval, selection
from latent_verse.files import write_text
from latent_verse.html import embedded, render

Images = dict[str, Image.Image]  # by what they are: "true image", "generated"
Texts = dict[str, list[str]]  # by what they are: "text", "caption", "references"
GROUPS = {  # what metrics tell, by how their names begin: (heading, in words)
    "generation": (
        "Image quality",
        "Images generated for texts: how real, how varied, and how well they fit the text.",
    ),
    "captions": ("Text quality", "Captions generated for images, against the references and among themselves."),
    "likelihood": (
        "Likelihood",
        "Bits the model needs for a text or an image it has not seen, given the other of the pair or alone.",
    ),
    "retrieval": ("Retrieval", "Finding the caption of an image among others, and the image of a caption."),
    "zero_shot": ("Classification", "Naming the class of an image, without training for it."),
    "round_trip": ("Round trips", "Image to text to image, and text to image to text."),
    "shapes": ("Truth", "Images and captions of shapes in which everything is right, by exact readers."),
    "reconstruction": ("Reconstruction", "Images against what their codes hold of them."),
    "": ("Other metrics", ""),
}
BETTER = {"higher": "↑ higher", "lower": "↓ lower", "": ""}
COLUMNS = ("metric", "value", "unit", "better", "95 % interval", "samples", "selection")


@dataclass(frozen=True)
class Case:
    """Images and texts that belong together, and the score that they are ordered by, if there is one."""

    score: float | None
    images: Images
    texts: Texts


@dataclass(frozen=True)
class Gallery:
    """Cases of one kind. `scored`: what the score is, "" without one; `total`: of how many the cases are chosen."""

    title: str
    scored: str
    total: int
    parts: dict[str, list[Case]]  # by heading


def choose(scores: Sequence[float | None], count: int) -> dict[str, Sequence[int]]:
    """Numbers of the `count` best (best first), those around the median, and the worst (worst first); none twice.

    Without scores (None), those of the first.
    """
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return {"First": range(min(count, len(scores)))}
    order = sorted(range(len(known)), key=lambda i: (-known[i], i))
    count = min(count, len(order) // 3) or min(1, len(order))
    best, rest = order[:count], order[count:]
    worst, rest = rest[len(rest) - count :][::-1] if rest else [], rest[: max(len(rest) - count, 0)]
    middle = max(0, (len(rest) - count) // 2)
    return {"Best": best, "Median": rest[middle : middle + count], "Worst": worst}


def write(
    path: Path, title: str, records: Records, galleries: Sequence[Gallery], about: Mapping[str, object], settings: str
) -> None:
    """Write the page, whole or not at all. `about`: facts of the run; `settings`: its configuration as YAML."""
    shown = [image for g in galleries for cases in g.parts.values() for case in cases for image in case.images.values()]
    page = render(
        "evaluation.html",
        title=title,
        groups=_groups(records),
        missing=_by_reason(records.missing),
        galleries=[
            (g.title, g.scored, g.total, {name: [_card(g, case) for case in cases] for name, cases in g.parts.items()})
            for g in galleries
        ],
        pixels=all(max(image.size) <= 64 for image in shown),
        about=[(name, _in_words(value)) for name, value in about.items() if value],
        settings=settings,
    )
    write_text(path, page)


def _card(gallery: Gallery, case: Case) -> tuple[list[tuple], list[tuple]]:
    """The images and the texts of a card, as `parts.html` takes them: none of them is marked right or wrong."""
    about = next((lines[0] for lines in case.texts.values() if lines), "")
    images = [(what, f"{what}: {about}" if about else what, embedded(x), None) for what, x in case.images.items()]
    score = [] if case.score is None else [(gallery.scored, [four_digits(case.score)])]
    return images, [(what, lines, None) for what, lines in [*case.texts.items(), *score]]


def _groups(records: Records) -> list[dict[str, object]]:
    """The groups that have metrics: heading, note, head and rows of a table, and protocols with their metrics."""
    named: dict[str, dict[str, Record]] = {start: {} for start in GROUPS}
    for name, record in records.values.items():
        start = name.partition("/")[0]
        named[start if start in GROUPS else ""][name] = record
    found = []
    for start, of_group in named.items():
        rows = [
            (
                name,
                four_digits(r["value"]),
                r.get("unit", ""),
                BETTER[r.get("better", "")],
                interval(r),
                f"{r['samples']:,}",
                selection(r),
            )
            for name, r in of_group.items()
        ]
        used = [column for column in range(len(COLUMNS)) if any(row[column] != "" for row in rows)]
        heading, note = GROUPS[start]
        how = {name.removeprefix(f"{start}/"): f"{r['protocol']} ({r['library']})" for name, r in of_group.items()}
        group = {"heading": heading, "note": note, "head": [COLUMNS[i] for i in used], "protocols": _by_reason(how)}
        found.append(group | {"rows": [[row[i] for i in used] for row in rows]})
    return [group for group in found if group["rows"]]


def _by_reason(texts: Mapping[str, str]) -> list[tuple[str, str]]:
    """[(names, text)] of {name: text}, with the names that share a text together."""
    return [(", ".join(name for name in texts if texts[name] == text), text) for text in dict.fromkeys(texts.values())]


def _in_words(value: object) -> object:
    return ", ".join(f"{name}: {of_it}" for name, of_it in value.items()) if isinstance(value, dict) else value
