"""A demo's bundle as a shipped model, with a card whose results are those of that demo and of demos with other seeds.

    python -m latent_verse.demo.card --demos demo demo-seed3 demo-seed7 --out models/shapes

The first demo's bundle is shipped. The folder's card.json gets the results, and in its README.md what stands between
the two marks is written anew. CONTRIBUTING.md says how demos with other seeds are run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Tuple

from latent_verse.checkpoints.shipped import CARD, shipped_folders
from latent_verse.config.cli import parse
from latent_verse.config.messages import UserError
from latent_verse.config.program import one_line_errors
from latent_verse.config.settings import Settings, require, setting
from latent_verse.config.train import TrainBiARTConfig
from latent_verse.demo.page import Spread
from latent_verse.files import read_json_object, read_text, write_json, write_text
from latent_verse.metrics.intervals import wilson

BEGIN, END = "<!-- results: written by latent_verse/demo/card.py -->", "<!-- end of results -->"
RUN = "runs/demo_biart"  # of a demo in the small world
DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text", "reconstruction": "reconstruction"}
SPLITS = {"unseen": "unseen scenes", "heldout": "held-out combinations"}


@dataclass(frozen=True)
class CardSettings(Settings):
    """Which demos, and which model's card."""

    demos: Tuple[str, ...] = setting(
        (), "folders of finished demos of the small world, the shipped one first", path=True
    )
    out: str = setting("models/shapes", "folder of the model; its card.json and README.md are there already", path=True)


@dataclass(frozen=True)
class CardConfig:
    """Every setting of this command."""

    card: CardSettings = field(default_factory=CardSettings)


def read_demo(demo: Path) -> dict[str, Any]:
    """What a finished demo reached: {seed, commit, machine, torch, results}.

    Raises:
        UserError: a file of it cannot be read, or lacks something.
    """
    metrics = read_json_object(demo / "metrics.json")
    try:
        facts = {name: metrics["facts"][name] for name in ("commit", "machine", "torch")}
        results = {
            title: {
                name: {key: metrics[direction][split][key] for key in ("right", "total")}
                for split, name in SPLITS.items()
            }
            for direction, title in DIRECTIONS.items()
        }
        return {"seed": _recipe(demo).trainer.seed, **facts, "results": results}
    except (KeyError, TypeError) as error:
        raise UserError(f"{demo / 'metrics.json'} is not of a finished demo: {error!r} is missing in it.") from error


def _recipe(demo: Path) -> TrainBiARTConfig:
    return parse(TrainBiARTConfig, ["--config", str(demo / RUN / "config.yaml")], "")[0]


def tables(card: dict[str, Any]) -> str:
    """The results in a card.json as the Markdown that its README.md holds."""
    (shipped,) = (run for run in card["runs"] if run["seed"] == card["seed"])
    lines = [f"Everything right, seed {card['seed']}, with 95 % intervals (Wilson):", ""]
    lines += ["| | " + " | ".join(SPLITS.values()) + " |", "|---|---|---|"]
    for what, found in shipped["results"].items():
        lines.append(f"| {what} | " + " | ".join(_with_interval(found[name]) for name in SPLITS.values()) + " |")
    ways = [(what, name) for what in list(DIRECTIONS.values())[:2] for name in SPLITS.values()]
    lines += ["", "The same recipe and commands with other seeds:", ""]
    lines += ["| seed | " + " | ".join(f"{what}, {name}" for what, name in ways) + " |", "|---|---|---|---|---|"]
    shares = {run["seed"]: [run["results"][what][name] for what, name in ways] for run in card["runs"]}
    for seed, found in shares.items():
        lines.append(f"| {seed} | " + " | ".join(f"{_share(result):.1f} %" for result in found) + " |")
    ranges = [_range(column) for column in zip(*shares.values(), strict=True)]
    lines.append("| lowest to highest | " + " | ".join(f"{low:.1f} to {high:.1f} %" for low, high in ranges) + " |")
    lines += ["", f"Trained on {shipped['machine']}, with PyTorch {shipped['torch']}."]
    lines.append(f"Seed {card['seed']}; commit {shipped['commit']}.")
    return "\n".join(lines)


def spread() -> Spread | None:
    """What the shipped model's recipe reached with several seeds, from its card; None if that is not there."""
    folder = shipped_folders().get("shapes")
    if not folder or not (folder / CARD).is_file():
        return None
    runs = [run["results"] for run in read_json_object(folder / CARD)["runs"]]
    ways = (
        {s: _range([r[DIRECTIONS[d]][name] for r in runs]) for s, name in SPLITS.items()}
        for d in ("text_to_image", "image_to_text")
    )
    return Spread(len(runs), *ways)


def _range(results: Iterable[dict[str, int]]) -> tuple[float, float]:
    shares = [*map(_share, results)]
    return min(shares), max(shares)


def _share(result: dict[str, int]) -> float:
    return 100 * result["right"] / result["total"]


def _with_interval(result: dict[str, int]) -> str:
    low, high = wilson(result["right"], result["total"])
    return f"{result['right']} of {result['total']}, {_share(result):.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def with_tables(readme: str, card: dict[str, Any], name: object) -> str:
    """The text of a README.md called `name` with these results between its marks.

    Raises:
        UserError: it lacks the marks.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{name} lacks the lines {BEGIN} and {END}, between which its results stand.")
    return f"{before}{begin}\n{tables(card)}\n{end}{after}"


def write(demos: list[Path], out: Path) -> None:
    """Copy the first demo's bundle to `out` and write the results of all into its card.

    Raises:
        UserError: a demo is not finished, or the folder lacks a card.
    """
    from latent_verse.inference.pipeline import LVerse

    runs = [read_demo(demo) for demo in demos]
    if len({run["seed"] for run in runs}) < len(runs):
        raise UserError(f"demos: two of them have the same seed, of {[run['seed'] for run in runs]}.")
    card = read_json_object(out / CARD) | {"seed": runs[0]["seed"], "runs": runs}
    readme = with_tables(read_text(out / "README.md"), card, out / "README.md")
    model = LVerse.from_pretrained(demos[0] / RUN / "bundle", device="cpu")
    model.save_pretrained(out)
    write_json(out / CARD, card)
    write_text(out / "README.md", readme)


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Write; 0 when done, 2 for a mistake in the settings, a demo or the card."""
    config, _ = parse(CardConfig, argv, __doc__)
    require([config.card], "demos")
    write([Path(demo) for demo in config.card.demos], Path(config.card.out))
    print(f"Written: {config.card.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
