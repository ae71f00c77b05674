"""The page of an evaluation: every figure with its protocol, and the best, median and worst cases by score.

One HTML file that holds its pictures and asks nothing of the network.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from latent_verse.evaluation.figures import shown
from latent_verse.report import PAGE, STYLE
from latent_verse.runs import write_whole


@dataclass(frozen=True)
class Case:
    """A picture with a text, and the score that it is ordered by."""

    score: float
    picture: Image.Image
    text: str
    note: str = ""


@dataclass(frozen=True)
class Gallery:
    """Cases of one kind. `scored`: what the score is, and of how many the cases are chosen."""

    title: str
    scored: str
    best: list[Case]
    median: list[Case]
    worst: list[Case]


def choose(scores: Sequence[float], count: int) -> tuple[list[int], list[int], list[int]]:
    """Numbers of the `count` best (best first), those around the median, and the worst (worst first); none twice."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    count = min(count, len(order) // 3) or min(1, len(order))
    best, rest = order[:count], order[count:]
    worst, rest = rest[len(rest) - count :][::-1] if rest else [], rest[: max(len(rest) - count, 0)]
    middle = max(0, (len(rest) - count) // 2)
    return best, rest[middle : middle + count], worst


def write(path: Path, title: str, content: dict[str, Any], galleries: Sequence[Gallery]) -> None:
    """Write the page, whole or not at all. `content` is what metrics.json holds."""
    parts = [f"<h1>{_text(title)}</h1>", "<h2>Figures</h2>", _figures(content["figures"])]
    if content["missing"]:
        rows = [[name, reason] for name, reason in content["missing"].items()]
        parts += ["<h2>Missing</h2>", _table(["figure", "why"], rows)]
    for gallery in galleries:
        parts.append(f"<h2>{_text(gallery.title)}</h2><p class='note'>{_text(gallery.scored)}</p>")
        for name in ("best", "median", "worst"):
            cards = "".join(map(_card, getattr(gallery, name)))
            if cards:
                parts.append(f'<h3>{name.capitalize()}</h3><div class="grid">{cards}</div>')
    about = {
        **content.get("facts", {}),
        "draw": content.get("draw"),
        "checkpoint": content.get("checkpoint"),
    }
    parts += ["<h2>What was run</h2>", _table(["", ""], [[k, v] for k, v in about.items() if v])]
    parts.append(f"<pre>{_text(content.get('settings', ''))}</pre>")
    page = PAGE.replace("{title}", _text(title)).replace("{style}", STYLE).replace("{body}", "\n".join(parts))
    write_whole(path, page)


def _figures(figures: dict[str, Any]) -> str:
    rows = []
    for name, f in figures.items():
        interval = " to ".join(f"{v:.3f}" for v in f["interval"]) if "interval" in f else ""
        drawn = (
            f"{f.get('selected_by', 'the first')} of {f['drawn']}" if f.get("drawn", 1) > 1 else f.get("written", "")
        )
        rows.append([name, shown(f["value"]), interval, f["samples"], drawn, f["protocol"], f["library"]])
    return _table(["figure", "value", "95 % interval", "samples", "drawn, written", "protocol", "library"], rows)


def _card(case: Case) -> str:
    data = io.BytesIO()
    case.picture.save(data, format="PNG")
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    note = f'<p class="note">{_text(case.note)}</p>' if case.note else ""
    return (
        f'<div class="card"><div class="pictures"><img alt="{_text(case.text)}" src="{source}"></div>'
        f"<p>{_text(case.text)}</p>{note}<b>{_text(shown(case.score))}</b></div>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    header = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table>{header}<tbody>{body}</tbody></table></div>'


def _text(value: Any) -> str:
    return html.escape(str(value))
