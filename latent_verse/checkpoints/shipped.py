"""The models that come with this repository, by name: each is a folder of models/ that holds a bundle and its card.

A further model needs nothing but its folder. Nothing heavy is imported, so that they are listed at once.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latent_verse.config.messages import UserError
from latent_verse.config.settings import expand
from latent_verse.files import read_json_object

PLACES = (Path(__file__).parents[1] / "models", Path(__file__).parents[2] / "models")  # installed; in the repository
DEFAULT = "shapes"  # where no model is named
BUNDLE = "config.json"  # a folder that holds it is a model
CARD = "card.json"  # what its README.md says, for programs


@dataclass(frozen=True)
class Card:
    """What a shipped model is, for a list; each is empty where its card.json does not say it.

    Attributes:
        does: what it generates, in a line.
        example: a text as its captions are.
        results: {what: {on what: {right, total}}}, of the run that is shipped.
    """

    does: str = ""
    example: str = ""
    results: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)


def shipped_folders() -> dict[str, Path]:
    """{name: folder} of every shipped model, by name; none if models/ is not there."""
    place = next((place for place in PLACES if place.is_dir()), None)
    return {file.parent.name: file.parent for file in sorted(place.glob(f"*/{BUNDLE}"))} if place else {}


def read_card(folder: Path) -> Card:
    """What the card.json of a shipped model says.

    Raises:
        UserError: it cannot be read.
    """
    card: dict[str, Any] = read_json_object(folder / CARD) if (folder / CARD).exists() else {}
    try:
        results: Any = next((run["results"] for run in card.get("runs", ()) if run["seed"] == card["seed"]), {})
        [count["right"] / count["total"] for found in results.values() for count in found.values()]
    except (ArithmeticError, AttributeError, KeyError, TypeError) as error:
        what = "each of its runs has to have a seed and results, as counts of right and total"
        raise UserError(f"{folder / CARD} is damaged: {what}.") from error
    return Card(str(card.get("does", "")), str(card.get("example", "")), results)


def located(path: str | os.PathLike) -> str:
    """A path with `~` expanded; for the bare name of a shipped model its folder, unless the path exists.

    Raises:
        ConfigError: as `config.settings.expand`.
    """
    path = expand(path, "hub", "path")
    return path if os.path.lexists(path) else str(shipped_folders().get(path, path))


def default_model() -> Path:
    """The folder of the model that is taken where none is named.

    Raises:
        UserError: it is not there.
    """
    if folder := shipped_folders().get(DEFAULT):
        return folder
    raise UserError(f"No model is named, and {PLACES[-1] / DEFAULT} is not there. Name a bundle or a hub id.")


def default_notice(missing: str, instead: str) -> str:
    """What to say where the default model is taken: what was `missing`, and what to give `instead`."""
    folder = default_model()
    place = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    using = f"using the {DEFAULT} model that comes with this repository ({place})"
    texts = f'which knows texts such as "{read_card(folder).example}"'
    return f"{missing}: {using}, {texts}. For your own model, give {instead}."


@functools.cache
def say_default() -> None:
    """Log the notice for Python, once in a process."""
    said = default_notice("No model named", 'LVerse.from_pretrained("results/NAME/bundle")')
    logging.getLogger("latent_verse").warning(said)
