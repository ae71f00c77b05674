"""Round trips: image -> caption -> image and text -> image -> caption, each step by the model itself.

On shapes every step is checked exactly: a caption has to be true of the image it was written for, and a generated image
has to match its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latent_verse.config import SamplingSettings
from latent_verse.data.shapes import Scene, World
from latent_verse.evaluation.samples import calls
from latent_verse.evaluation.shapes_truth import ATTRIBUTES
from latent_verse.inference.pipeline import LVerse
from latent_verse.metrics.processes import Ranks


@dataclass
class Trip:
    """Both round trips of one pair.

    Attributes:
        caption, regenerated: caption of the pair's image, and the image generated for that caption.
        generated, recaptioned: image generated for the pair's text, and the caption of that image.
        right: on shapes: {trip: {attribute: whether both steps are right in it}}.
    """

    caption: str
    regenerated: Image.Image
    generated: Image.Image
    recaptioned: str
    right: dict[str, dict[str, bool]] = field(default_factory=dict)


def travel(
    model: LVerse,
    images: Sequence[Tensor],
    texts: Sequence[str],
    ranks: Ranks,
    *,
    seed: int,
    beams: int,
    batch_size: int,
    sampling: SamplingSettings,
    world: World | None = None,
    scenes: Sequence[Scene] = (),
) -> list[Trip]:
    """Both trips of every pair, shared among processes; all of them in each.

    Args:
        images: uint8 (3, R, R).
        world, scenes: of shapes, to check each step against the truth.
    """

    def caption(images: Sequence[Image.Image] | Sequence[Tensor]) -> list[str]:
        mine, found = list(ranks.mine(len(images))), {}
        for start in range(0, len(mine), batch_size):
            part = mine[start : start + batch_size]
            rows = model.image_to_text([images[i] for i in part], beams=beams, seed=seed)
            found |= {i: row[0] for i, row in zip(part, rows, strict=True)}
        return list(ranks.gather(found).values())

    def generate(texts: Sequence[str]) -> list[Image.Image]:
        found = {}
        for part, own_seed in ranks.follow(
            calls(model, texts, ranks.mine(len(texts)), seed, batch_size), "round trips"
        ):
            rows = model.text_to_image([texts[i] for i in part], seed=own_seed, **sampling.arguments())
            found |= {i: row[0] for i, row in zip(part, rows, strict=True)}
        return list(ranks.gather(found).values())

    captions = caption(images)
    regenerated, generated = generate(captions), generate(texts)
    trips = [Trip(*parts) for parts in zip(captions, regenerated, generated, caption(generated), strict=True)]
    if world is not None:
        for scene, text, trip in zip(scenes, texts, trips, strict=True):
            trip.right = check_trip(world, scene, text, trip)
    return trips


def check_trip(world: World, scene: Scene, text: str, trip: Trip) -> dict[str, dict[str, bool]]:
    """{trip: {attribute: whether both of its steps are right in it}}, by the exact readers of shapes."""
    caption, generated = world.parse_caption(trip.caption), world.parse_image(trip.generated)
    steps = {
        "image_text_image": (
            world.compare(scene, caption),
            world.compare(world.parse_image(trip.regenerated), caption),
        ),
        "text_image_text": (
            world.compare(generated, world.parse_caption(text)),
            world.compare(generated, world.parse_caption(trip.recaptioned)),
        ),
    }
    return {name: {a: there[a] and back[a] for a in (*ATTRIBUTES, "all")} for name, (there, back) in steps.items()}


def as_uint8(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
