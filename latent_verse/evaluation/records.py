"""Metrics with everything that is needed to compare them: library, samples, protocol, seed and checkpoint.

Protocols are compared word by word between runs: rewording one makes them "not comparable" with older runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

from latent_verse import __version__
from latent_verse.config import printable
from latent_verse.config.messages import no_file, shown
from latent_verse.config.settings import is_a, is_number
from latent_verse.data import DataError
from latent_verse.files import read_json_object, setting_named

OWN = f"latent_verse {__version__}"
SAME = ("library", "samples", "protocol", "seed", "dtype", "drawn")  # what two records must share to be comparable
# earlier versions worded the same protocols differently: their runs stay comparable
REWORDED = {
    "references a picture": "references per image",
    "one caption of the draw a picture": "one sampled caption per image",
    "a picture": "an image",
    "picture": "image",
    "drawn": "sampled",
    "drew": "sampled",
}


class Record(TypedDict, total=False):
    """One metric as metrics.json holds it; `value`, `library`, `samples`, `protocol`, `seed`, `checkpoint` always."""

    value: float
    library: str  # that computed it, with its version
    samples: int
    protocol: str
    seed: int
    checkpoint: dict[str, str]  # fingerprints of what was evaluated
    unit: str  # of the value, or its range
    better: Literal["higher", "lower"]
    interval: tuple[float, float]  # 95 %
    standard_error: float
    dtype: str  # BiART's, if not float32
    references: int  # images in the reference set
    pool: int  # candidates of a retrieval query
    classes: int
    drawn: int  # images sampled for each caption,
    selected_by: str  # and which of them this is the metric of
    written: str  # how captions were generated


class Records:
    """What was measured, in order, and what could not be, with the reason; of one checkpoint and sampling seed."""

    def __init__(self, checkpoint: dict[str, str], seed: int):
        self.checkpoint, self.seed = checkpoint, seed
        self.always: dict[str, object] = {}  # added to every record
        self.values: dict[str, Record] = {}
        self.missing: dict[str, str] = {}

    def add(self, name: str, value: float, *, samples: int, library: str, protocol: str, **more: object) -> None:
        """Keep a metric; `more`: other fields of `Record`. A value that is not finite, which JSON lacks, is missing."""
        if not math.isfinite(value):
            self.miss(name, f"it is {value} on {samples} samples")
            return
        about = {"library": library, "samples": samples, "protocol": protocol}
        about |= {"seed": self.seed, "checkpoint": self.checkpoint, **self.always}
        self.values[name] = {"value": float(value), **about, **more}

    def add_mean(self, name: str, values: Sequence[float], *, library: str, protocol: str, **more: object) -> None:
        """Keep the mean of a score over its samples."""
        self.add(name, sum(values) / len(values), samples=len(values), library=library, protocol=protocol, **more)

    def miss(self, name: str, reason: str) -> None:
        """Record why a metric is missing."""
        self.missing[name] = reason

    def as_json(self) -> dict[str, dict]:
        """{"figures": {name: record}, "missing": {name: reason}}."""
        return {"figures": self.values, "missing": self.missing}

    def table(self, title: str) -> str:
        """All metrics as lines to print, the missing ones with the reason."""
        rows = [(name, four_digits(record["value"]), _notes(record)) for name, record in self.values.items()]
        width = max((len(name) for name, _, _ in rows), default=0)
        lines = [printable(title), *(f"  {n:<{width}}  {v:>10}  {note}".rstrip() for n, v, note in rows)]
        for cause in dict.fromkeys(self.missing.values()):
            names = ", ".join(name for name, why in self.missing.items() if why == cause)
            lines += [f"  missing: {names}", f"    {cause}"]
        return "\n".join(lines)


def four_digits(value: float) -> str:
    """A value as people read it: four digits, or more before the point."""
    if 10_000 <= abs(value) < 10_000_000:
        return f"{value:.0f}"
    return f"{value:.4g}" if 0.001 <= abs(value) < 10_000 or not value else f"{value:.2e}"


def interval(record: Record) -> str:
    """The record's 95 % interval, "" if it has none."""
    return " to ".join(map(four_digits, record["interval"])) if "interval" in record else ""


def selection(record: Record) -> str:
    """Which of several images was measured, or how the captions were generated; "" if neither applies."""
    if record.get("drawn", 1) > 1:
        return f"{record.get('selected_by', 'the first')} of {record['drawn']} images"
    return record.get("written", "")


def _notes(record: Record) -> str:
    parts = [f"n={record['samples']}"]
    parts += [f"95 % {interval(record)}"] if "interval" in record else []
    parts += [record["dtype"]] if "dtype" in record else []
    parts += [selection(record)] if selection(record) else []
    parts += [f"{record['better']} is better"] if "better" in record else []
    return ", ".join(parts)


def _read_metrics(place: str) -> dict[str, dict]:
    """metrics.json of a run folder of eval_biart.py, or that file."""
    path = Path(place)
    path = path / "metrics.json" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"compare: {path} {no_file(path)}. Give a run folder of eval_biart.py, or its metrics.json.")
    with setting_named("compare"):
        content = read_json_object(path)
    figures, missing = content.get("figures"), content.get("missing", {})
    if not isinstance(figures, dict) or not isinstance(missing, dict):
        raise DataError(f"compare: {path} is not a metrics.json of eval_biart.py: it needs `figures`, an object.")
    for name, record in figures.items():
        where = f"compare: {path} is not a metrics.json of eval_biart.py: {shown(name)}"
        if not isinstance(record, dict):
            raise DataError(f"{where} is {shown(record)}, not an object.")
        for field in ("value", *SAME):
            numeric = field not in ("library", "protocol", "dtype")
            value, needed = record.get(field), field in ("value", "protocol")
            right = is_number(value) or is_a(value, int) if numeric else isinstance(value, str)  # a seed may be any int
            if not right and (needed or value is not None):
                found = f"is {shown(value)}" if field in record else "is missing"
                raise DataError(f"{where}: `{field}` {found}; it has to be a {'number' if numeric else 'text'}.")
        for old, new in REWORDED.items() if not name.startswith("zero_shot/") else ():  # quotes the user's prompt
            record["protocol"] = record["protocol"].replace(old, new)
    return {"figures": figures, "missing": missing}


def compare(first: str, second: str) -> str:
    """Two runs' metrics side by side as lines to print, noting what is not comparable.

    Raises:
        DataError: one is neither a run folder of eval_biart.py nor its metrics.json.
    """
    runs = [_read_metrics(place) for place in (first, second)]
    names = list(dict.fromkeys(name for run in runs for kind in ("figures", "missing") for name in run[kind]))
    lines = [("", printable(first), printable(second), "difference", "")]
    for name in names:
        a, b = (run["figures"].get(name) for run in runs)
        cells = [four_digits(record["value"]) if record else "missing" for record in (a, b)]
        difference, note = "", ""
        if a and b:
            a, b = {"drawn": 1} | a, {"drawn": 1} | b
            difference = f"{b['value'] - a['value']:+.4g}"
            both = (key for key in SAME if key in a and key in b)  # another system's outputs have no dtype
            other = [f"{key} {a[key]!r} and {b[key]!r}" for key in both if a[key] != b[key]]
            note = f"not comparable: {'; '.join(other)}" if other else ""
        lines.append((printable(name), *cells, difference, printable(note)))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    rows = ([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:]), note] for name, *cells, note in lines)
    return "\n".join("  ".join(row).rstrip() for row in rows)
