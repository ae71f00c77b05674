"""Figures with all that is needed to judge them: library, sample count, protocol, seed and what was measured.

figures = Figures(checkpoint={"biart": "0123456789abcdef"}, seed=0)
figures.add("captions/cider", 1.02, samples=5000, library=library("pycocoevalcap"), protocol="...")
print(figures.table("title")); json.dumps(figures.as_json())
print(compare("results/a", "results/b"))
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

from latent_verse import __version__
from latent_verse.data import DataError

OWN = f"latent_verse {__version__}"
SAME = ("library", "samples", "protocol", "seed", "dtype")  # what two figures have to share to be compared


def library(*packages: str) -> str:
    """ "torchmetrics 1.9.0, torch-fidelity 0.4.0": the packages that compute a figure, with their versions."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


class Figures:
    """What was measured, in order, and what could not be, with the reason.

    Args:
        checkpoint: fingerprints of what is judged: a model's parts, or another system's files.
        seed: of draws; a figure may name another.
    """

    def __init__(self, checkpoint: dict[str, str], seed: int):
        self.checkpoint, self.seed = checkpoint, seed
        self.always: dict[str, Any] = {}  # what is said with every figure besides
        self.values: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, str] = {}

    def add(self, name: str, value: float, *, samples: int, library: str, protocol: str, **more: Any) -> None:
        """Keep a figure. `more`: better ("higher", "lower"), interval, drawn, selected_by, seed, checkpoint, ...

        One that is not a finite number is kept as missing: it would be no JSON, and no figure.
        """
        if not math.isfinite(value):
            self.miss(name, f"it came out as {value} on {samples} samples")
            return
        about = {"library": library, "samples": samples, "protocol": protocol}
        about |= {"seed": self.seed, "checkpoint": self.checkpoint, **self.always}
        self.values[name] = {"value": float(value), **about, **more}

    def miss(self, name: str, reason: str) -> None:
        """Say why a figure is not there."""
        self.missing[name] = reason

    def as_json(self) -> dict[str, Any]:
        """{"figures": {name: {"value": ..., "library": ..., ...}}, "missing": {name: reason}}."""
        return {"figures": self.values, "missing": self.missing}

    def table(self, title: str) -> str:
        """All figures as lines to print, the missing ones with the reason."""
        rows = [(name, shown(f["value"]), _notes(f)) for name, f in self.values.items()]
        width = max((len(name) for name, _, _ in rows), default=0)
        lines = [title, *(f"  {n:<{width}}  {v:>10}  {note}".rstrip() for n, v, note in rows)]
        for reason in dict.fromkeys(self.missing.values()):
            names = ", ".join(name for name, why in self.missing.items() if why == reason)
            lines += [f"  missing: {names}", f"    {reason}"]
        return "\n".join(lines)


def shown(value: float) -> str:
    """A figure as people read it: four digits, or more before the point."""
    return (
        f"{value:.0f}"
        if abs(value) >= 10000
        else f"{value:.4g}"
        if abs(value) >= 0.001 or not value
        else f"{value:.2e}"
    )


def _notes(figure: dict[str, Any]) -> str:
    parts = [f"n={figure['samples']}"]
    if "interval" in figure:
        low, high = figure["interval"]
        parts.append(f"95 % {low:.3f} to {high:.3f}")
    if "dtype" in figure:
        parts.append(figure["dtype"])
    if figure.get("drawn", 1) > 1:
        parts.append(f"{figure.get('selected_by', 'the first')} of {figure['drawn']} drawn")
    if "written" in figure:
        parts.append(figure["written"])
    if "better" in figure:
        parts.append(f"{figure['better']} is better")
    return ", ".join(parts)


# ------------------------------------------------------------------------------------------------------- side by side


def read_metrics(place: str) -> dict[str, Any]:
    """metrics.json of a run folder of eval_biart.py, or that file. DataError where it is no such file."""
    path = Path(place).expanduser()
    path = path / "metrics.json" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"compare: {path} does not exist. Give a run folder of eval_biart.py, or its metrics.json.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"compare: {path} is not valid JSON ({error}).") from error
    if not isinstance(content, dict) or "figures" not in content:
        raise DataError(f"compare: {path} holds no figures of eval_biart.py. Was it written by another script?")
    return content


def compare(first: str, second: str) -> str:
    """The figures of two runs side by side, as lines to print; where they were measured otherwise, a note says how.

    Raises:
        DataError: one of them is no finished run of eval_biart.py.
    """
    runs = [read_metrics(place) for place in (first, second)]
    names = list(dict.fromkeys(name for run in runs for kind in ("figures", "missing") for name in run.get(kind, {})))
    lines = [("", first, second, "difference", "")]
    for name in names:
        a, b = (run["figures"].get(name) for run in runs)
        cells = [shown(f["value"]) if f else "missing" for f in (a, b)]
        difference, note = "", ""
        if a and b:
            difference = f"{b['value'] - a['value']:+.4g}"
            both = (key for key in SAME if key in a and key in b)  # another system's outputs have no dtype
            other = [f"{key} {a[key]!r} and {b[key]!r}" for key in both if a[key] != b[key]]
            if a.get("drawn", 1) != b.get("drawn", 1):
                other.append(f"drawn {a.get('drawn', 1)} and {b.get('drawn', 1)}")
            note = f"not comparable: {'; '.join(other)}" if other else ""
        lines.append((name, *cells, difference, note))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    text = []
    for name, a, b, difference, note in lines:
        row = f"{name:<{widths[0]}}  {a:>{widths[1]}}  {b:>{widths[2]}}  {difference:>{widths[3]}}  {note}"
        text.append(row.rstrip())
    return "\n".join(text)
