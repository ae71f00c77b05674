"""The shapes world: images of generated scenes, captions that are true of them, and exact readers of both.

    world = World.preset("small")
    scene = world.scene(0, "val")                     # unseen scenes of combinations seen in training
    image, text = world.render(scene), world.caption(scene, random.Random(0))
    world.satisfies(world.parse_image(image), world.parse_caption(text))      # True

The same call gives the same answer on every machine. Splits are disjoint sets of scenes:
    heldout   scenes with a held-out (colour, shape) pair. No other split has it, though each colour and each shape
    val       one scene in five of the rest, by a hash of the scene (objects, sizes, cells; not jitter or texture)
    train     the others

`small` is made for minutes on a CPU. Its shapes are made of 4 px squares on a grid and stand in the corners, so a code
of an 8 x 8 map sees one colour: the codes give the colours, and their arrangement gives the shapes. Why there are many
shapes: docs/experiments.md. It has 38,720 distinct scenes: 25,176 train, 6,216 val and 7,328 held out.
`full` takes longer: 64 px, up to three of 48 kinds of objects in two sizes, anywhere in their quarters of the image in
steps of 8 px (a patch of an 8 x 8 map), on a soft texture. It has 456,384 scenes, each with up to 729 layouts.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image

from latent_verse.data.shapes.drawing import BACKGROUND, PALETTE, Obj, Scene, WorldSettings, coverage
from latent_verse.data.shapes.grammar import Statement, compare, describe, read_caption, write_caption
from latent_verse.data.shapes.reader import read_image

SPLITS = ("train", "val", "heldout")
VAL_SHARE = 5  # one scene in five
GAP = 3  # pixels between any two objects, so that an encoder and the reader see two of them


@dataclass(frozen=True)
class World(WorldSettings):
    """A shapes world; `World.preset(name)` gives the two that are used."""

    @classmethod
    def preset(cls, name: str) -> World:
        """`small` (32 px, one or two objects) or `full` (64 px, one to three).

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"There is no shapes world {name!r}; the presets are {', '.join(PRESETS)}.")
        return PRESETS[name]

    @property
    def fingerprint(self) -> str:
        """A digest of the settings, 16 hex digits: a preset may change from one version to the next."""
        settings = {f.name: getattr(self, f.name) for f in fields(self)} | {"heldout": sorted(self.heldout)}
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def key(self, scene: Scene) -> tuple:
        """The kinds and cells of the objects, in any order: equal for two scenes that show the same."""
        return tuple(sorted((*self.cell(o), o.shape, o.colour, o.size) for o in scene.objects))

    def split_of(self, scene: Scene) -> str:
        """The split a scene belongs to."""
        if any((o.colour, o.shape) in self.heldout for o in scene.objects):
            return "heldout"
        digest = hashlib.blake2b(repr(self.key(scene)).encode(), digest_size=8).digest()
        return "val" if int.from_bytes(digest, "big") % VAL_SHARE == 0 else "train"

    def scene(self, index: int | str, split: str = "train") -> Scene:
        """The scene of an index in a split: the number of objects by `counts`, then cells and attributes uniformly.

        Raises:
            ValueError: there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"There is no split {split!r} in the shapes world; the splits are {', '.join(SPLITS)}.")
        rng = random.Random(f"{self.name}/{split}/{index}")
        while True:
            scene = self._sample(rng)
            if self._apart(scene) and self.split_of(scene) == split:
                return scene

    def _sample(self, rng: random.Random) -> Scene:
        objects = []
        (count,) = rng.choices(range(1, self.max_objects + 1), self.counts)
        for cell in rng.sample(range(self.grid**2), count):
            row, column = divmod(cell, self.grid)
            shape, colour, size = rng.choice(self.shapes), rng.choice(self.colours), rng.choice(list(self.sizes))
            x, y = (self._centre(at, self.sizes[size], rng) for at in (column, row))
            objects.append(Obj(shape, colour, size, x, y))
        return Scene(tuple(sorted(objects, key=lambda o: (o.y, o.x))), texture=rng.getrandbits(32))

    def _centre(self, at: int, radius: int, rng: random.Random) -> int:
        """Where the centre of an object in a column or row of the grid lies, in pixels."""
        if self.jitter:
            side = self.image_size // self.grid
            return at * side + radius + self.jitter * rng.randrange((side - 2 * radius) // self.jitter + 1)
        return radius + round(at * (self.image_size - 2 * radius) / (self.grid - 1))

    def _apart(self, scene: Scene) -> bool:
        for i, a in enumerate(scene.objects):
            for b in scene.objects[i + 1 :]:
                reach = self.sizes[a.size] + self.sizes[b.size] + GAP
                if abs(a.x - b.x) < reach and abs(a.y - b.y) < reach:
                    return False
        return True

    def render(self, scene: Scene) -> Image.Image:
        """The image of a scene: RGB, `image_size` square, edges anti-aliased."""
        image = Image.fromarray(self._background(scene.texture))
        for o in scene.objects:
            cover = coverage(o.shape, self.sizes[o.size])
            corner = (o.x - len(cover) // 2, o.y - len(cover) // 2)
            mask = Image.fromarray((cover * 255).round().astype(np.uint8))
            image.paste(PALETTE[o.colour], (*corner, corner[0] + len(cover), corner[1] + len(cover)), mask)
        return image

    def _background(self, seed: int) -> np.ndarray:
        flat = np.full((self.image_size, self.image_size, 3), BACKGROUND, np.uint8)
        if not self.texture:
            return flat
        coarse = np.random.default_rng(seed).uniform(-self.texture, self.texture, (3, 3)).astype(np.float32)
        soft = Image.fromarray(coarse).resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return (flat + np.asarray(soft)[..., None]).round().clip(0, 255).astype(np.uint8)

    def caption(self, scene: Scene, rng: random.Random) -> str:
        """One of the true captions of a scene; the grammar is in grammar.py."""
        return write_caption(self, scene, rng)

    def parse_image(self, image: Image.Image | np.ndarray) -> Scene:
        """The scene an image shows, with the shape "?" for what is no object of this world; see reader.read_image."""
        return read_image(self, image)

    def parse_caption(self, text: str) -> Statement | None:
        """What a caption states; None if it does not follow the grammar."""
        return read_caption(self, text)

    def describe(self, scene: Scene) -> str:
        """What a scene shows, in words, whatever the reader has found in an image; see grammar.describe."""
        return describe(self, scene)

    def satisfies(self, scene: Scene, statement: Statement | None) -> bool:
        """Whether all that is stated is true of the scene, and the scene has no other object. False for None."""
        return self.compare(scene, statement)["all"]

    def compare(self, scene: Scene, statement: Statement | None) -> dict[str, bool]:
        """The same by attribute: {count, colour, shape, size, layout, all}; see grammar.compare."""
        return compare(self, scene, statement)


PRESETS = {
    "small": World(
        name="small",
        image_size=32,
        grid=2,
        counts=(1, 3),  # of single objects there are only 320 scenes
        shapes=("square", "cross", "ring", "arch", "staircase", "cup", "tee", "ell", "zigzag", "ladder"),
        colours=tuple(PALETTE),
        sizes={"large": 6},
        heldout=frozenset(zip(PALETTE, "staircase arch cross ring square tee cup ladder".split(), strict=True)),
    ),
    "full": World(
        name="full",
        image_size=64,
        grid=2,
        counts=(1, 2, 2),
        shapes=("circle", "square", "triangle", "cross"),
        colours=("red", "green", "blue", "yellow", "purple", "orange"),
        sizes={"small": 8, "large": 12},
        heldout=frozenset({("yellow", "circle"), ("purple", "square"), ("green", "triangle"), ("blue", "cross")}),
        jitter=8,
        texture=6.0,
        phrasing="rich",
    ),
}
