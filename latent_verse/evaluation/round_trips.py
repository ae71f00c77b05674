"""There and back: picture -> caption -> picture, and text -> picture -> caption, with what the model itself makes.

On shapes a trip is judged exactly, step by step: the words have to be true of the picture they were written for, and
the picture of the words it was drawn for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latent_verse.data.shapes import World
from latent_verse.evaluation.ranks import Ranks
from latent_verse.evaluation.samples import calls

ATTRIBUTES = ("count", "colour", "shape", "size", "layout", "all")


@dataclass
class Trip:
    """One pair's trips. `caption` was written for the given picture, `redrawn` drawn for that caption; `drawn` was
    drawn for the given text, `reworded` written for that picture."""

    caption: str
    redrawn: Image.Image
    drawn: Image.Image
    reworded: str
    right: dict[str, dict[str, bool]] = field(default_factory=dict)  # on shapes: {trip: {attribute: ...}}


def travel(
    model: Any,
    pictures: Sequence[Tensor],
    texts: Sequence[str],
    ranks: Ranks,
    *,
    seed: int,
    beams: int,
    batch_size: int,
    settings: dict[str, Any],
    world: World | None = None,
    scenes: Sequence[Any] = (),
) -> list[Trip]:
    """Both trips of every pair, shared among processes; all of them in each.

    Args:
        pictures: uint8 (3, R, R). settings: of drawing: temperature, top_k, top_p, guidance.
        world, scenes: of shapes, to judge each step by the truth.
    """

    def written(of: Sequence[Any]) -> list[str]:
        mine, found = list(ranks.mine(len(of))), {}
        for start in range(0, len(mine), batch_size):
            part = mine[start : start + batch_size]
            rows = model.image_to_text([of[i] for i in part], beams=beams, seed=seed)
            found |= {i: row[0] for i, row in zip(part, rows, strict=True)}
        return list(ranks.gather(found).values())

    def drawn(of: Sequence[str]) -> list[Image.Image]:
        found = {}
        for part, own_seed in ranks.follow(calls(model, of, ranks.mine(len(of)), seed, batch_size), "round trips"):
            rows = model.text_to_image([of[i] for i in part], seed=own_seed, **settings)
            found |= {i: row[0] for i, row in zip(part, rows, strict=True)}
        return list(ranks.gather(found).values())

    captions = written(pictures)
    redrawn, first = drawn(captions), drawn(texts)
    trips = [Trip(*parts) for parts in zip(captions, redrawn, first, written(first), strict=True)]
    if world is not None:
        for scene, text, trip in zip(scenes, texts, trips, strict=True):
            trip.right = judge(world, scene, text, trip)
    return trips


def judge(world: World, scene: Any, text: str, trip: Trip) -> dict[str, dict[str, bool]]:
    """{trip: {attribute: whether both of its steps are right in it}}, by the exact readers of shapes."""
    said, seen = world.parse_caption(trip.caption), world.parse_image(trip.drawn)
    steps = {
        "image_text_image": (world.compare(scene, said), world.compare(world.parse_image(trip.redrawn), said)),
        "text_image_text": (
            world.compare(seen, world.parse_caption(text)),
            world.compare(seen, world.parse_caption(trip.reworded)),
        ),
    }
    return {name: {a: there[a] and back[a] for a in ATTRIBUTES} for name, (there, back) in steps.items()}


def as_uint8(picture: Image.Image) -> Tensor:
    """An RGB picture as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
