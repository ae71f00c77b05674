"""Round trips: image -> caption -> image and text -> image -> caption, each step by the model itself.

On shapes every step is checked exactly: a caption has to be true of its image, and a generated image of its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from latent_verse.data.shapes import Scene, World
from latent_verse.evaluation import samples
from latent_verse.evaluation.context import Context
from latent_verse.evaluation.shapes_truth import ATTRIBUTES


@dataclass
class Trip:
    """Both round trips of one pair."""

    caption: str  # of the pair's image
    regenerated: Image.Image  # for that caption
    generated: Image.Image  # for the pair's text
    recaptioned: str  # the caption of that image
    right: dict[str, dict[str, bool]] = field(default_factory=dict)  # on shapes, as `check_trip` returns it


def travel(c: Context, images: Sequence[Tensor], texts: Sequence[str], scenes: Sequence[Scene]) -> list[Trip]:
    """Both trips of every pair, shared among processes; all of them in each.

    Args:
        images: uint8 (3, R, R).
        scenes: on shapes, to check each step against the truth.
    """
    size, beams = c.config.write.batch_size, c.config.captions.beams

    def caption(images: Sequence[Image.Image] | Sequence[Tensor]) -> list[str]:
        return samples.caption(c.model, images.__getitem__, len(images), c.ranks, beams=beams, batch_size=size)

    def generate(texts: Sequence[str]) -> list[Image.Image]:
        found, calls = {}, samples.calls(c.model, texts, c.ranks.mine(len(texts)), c.seed, size)
        for part, own_seed in c.ranks.follow(calls, "round trips"):
            rows = c.model.text_to_image([texts[i] for i in part], seed=own_seed, **c.config.generation.arguments())
            found |= {i: row[0] for i, row in zip(part, rows, strict=True)}
        return list(c.ranks.gather(found).values())

    captions = caption(images)
    regenerated, generated = generate(captions), generate(texts)
    trips = [Trip(*parts) for parts in zip(captions, regenerated, generated, caption(generated), strict=True)]
    if c.pairs.world:
        for scene, text, trip in zip(scenes, texts, trips, strict=True):
            trip.right = check_trip(c.pairs.world, scene, text, trip)
    return trips


def check_trip(world: World, scene: Scene, text: str, trip: Trip) -> dict[str, dict[str, bool]]:
    """{trip: {attribute: whether both of its steps are right in it}}, by the exact readers of shapes."""
    caption, generated = world.parse_caption(trip.caption), world.parse_image(trip.generated)
    steps = {
        "image_text_image": [(scene, caption), (world.parse_image(trip.regenerated), caption)],
        "text_image_text": [(generated, world.parse_caption(t)) for t in (text, trip.recaptioned)],
    }
    found = {name: [world.compare(*step) for step in both] for name, both in steps.items()}
    return {name: {a: there[a] and back[a] for a in (*ATTRIBUTES, "all")} for name, (there, back) in found.items()}
