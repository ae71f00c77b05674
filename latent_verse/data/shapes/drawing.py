"""What a shapes world is made of: its settings, objects, scenes, colours, and how each shape covers pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

BACKGROUND = (235, 235, 235)
PALETTE = {  # every two are at least 97 apart in RGB, and each at least 190 from the background
    "red": (215, 35, 45),
    "green": (30, 160, 65),
    "blue": (40, 80, 225),
    "yellow": (250, 215, 20),
    "purple": (150, 45, 190),
    "orange": (255, 125, 15),
    "cyan": (0, 190, 215),
    "black": (35, 35, 35),
}
UNKNOWN = "?"  # the shape or colour of something in an image that is no object of the world
SUBPIXELS = 8  # per axis: coverage, and so anti-aliasing, is in 64ths


@dataclass(frozen=True)
class Obj:
    """One object: its attributes, and the pixel coordinates of its centre (x to the right, y down)."""

    shape: str
    colour: str
    size: str
    x: int
    y: int


SPECKS = Obj(UNKNOWN, UNKNOWN, UNKNOWN, 0, 0)  # many small spots, anywhere in an image


@dataclass(frozen=True)
class Scene:
    """The objects of an image, and the seed of its background's texture (which is not part of what it shows)."""

    objects: tuple[Obj, ...]
    texture: int = 0

    def __len__(self) -> int:
        return len(self.objects)


def place_names(grid: int) -> dict[str, tuple[int, int]]:
    """The name of each cell of a grid of 2 or 3 per side -> (column, row): "top left", "top", ..., "centre"."""
    rows, columns = ("top", "", "bottom"), ("left", "", "right")
    steps = (0, 2) if grid == 2 else (0, 1, 2)
    cells = [(column, row) for row in range(grid) for column in range(grid)]
    return {f"{rows[steps[row]]} {columns[steps[column]]}".strip() or "centre": (column, row) for column, row in cells}


@dataclass(frozen=True)
class WorldSettings:
    """What a shapes world is made of."""

    name: str
    image_size: int  # pixels per side
    grid: int  # cells per side, 2 or 3; an object stands in a cell
    counts: tuple[int, ...]  # relative frequency of one, two, ... objects; crowded scenes are then sampled again
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: dict[str, int] = field(hash=False)  # name -> radius in pixels
    heldout: frozenset[tuple[str, str]]  # (colour, shape) pairs kept out of training
    jitter: int = 0  # pixels: objects stand anywhere in their cells in steps of this many; 0: at the image's edge
    texture: float = 0.0  # amplitude of the background's texture, in grey levels of 255
    phrasing: str = "short"  # short, or rich: synonyms and longer forms

    @property
    def max_objects(self) -> int:
        """The most objects a scene has."""
        return len(self.counts)

    @property
    def margin(self) -> float:
        """Pixels between centres from which on one object is left of (above) another: half a cell."""
        return self.image_size / self.grid / 2

    def cell(self, obj: Obj) -> tuple[int, int]:
        """The (column, row) an object's centre lies in."""
        return tuple(min(max(int(at * self.grid / self.image_size), 0), self.grid - 1) for at in (obj.x, obj.y))

    def place(self, obj: Obj) -> str:
        """The name of that cell: "top left", "bottom", "centre"."""
        return {cell: name for name, cell in place_names(self.grid).items()}[self.cell(obj)]


def _circle(u, v):
    return u * u + v * v <= 1


def _square(u, v):
    return (abs(u) <= 1) & (abs(v) <= 1)


def _triangle(u, v):  # apex up
    return (abs(v) <= 1) & (abs(u) <= (v + 1) / 2)


def _of_thirds(rows: str):
    """A shape made of ninths of its square: three rows, from the top, of three that are filled (#) or not (.)."""
    filled = np.array([[mark == "#" for mark in row] for row in rows.split()])

    def covers(u, v):
        column, row = (np.clip(np.floor((axis + 1) * 1.5), 0, 2).astype(int) for axis in (u, v))
        return _square(u, v) & filled[row, column]

    return covers


SHAPES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _of_thirds(".#. ### .#."),
    "ring": _of_thirds("### #.# ###"),
    "arch": _of_thirds("### #.# #.#"),
    "staircase": _of_thirds("#.. ##. ###"),
    "cup": _of_thirds("#.# #.# ###"),
    "tee": _of_thirds("### .#. .#."),
    "ell": _of_thirds("#.. #.. ###"),
    "zigzag": _of_thirds("##. .#. .##"),
    "ladder": _of_thirds("#.# ### #.#"),
}


@lru_cache(maxsize=256)
def coverage(shape: str, radius: int) -> np.ndarray:
    """The share of each pixel that a shape covers, in [0, 1]: a read-only (2 radius + 4, 2 radius + 4) float32 array.

    Its centre (a pixel corner) is the object's centre. The rim of two pixels holds what `softened` spreads.
    """
    reach = radius + 2
    steps = (np.arange(2 * reach * SUBPIXELS) + 0.5) / SUBPIXELS - reach
    u, v = np.meshgrid(steps / radius, steps / radius)
    inside = SHAPES[shape](u, v).reshape(2 * reach, SUBPIXELS, 2 * reach, SUBPIXELS)
    cover = inside.mean(axis=(1, 3), dtype=np.float32)
    cover.setflags(write=False)
    return cover


@lru_cache(maxsize=256)
def softened(shape: str, radius: int) -> np.ndarray:
    """`coverage` blurred by about 0.7 pixels, as an autoencoder reconstructs it."""
    cover = np.pad(coverage(shape, radius), 1)
    for axis in (0, 1):
        cover = 0.54 * cover + 0.23 * (np.roll(cover, 1, axis) + np.roll(cover, -1, axis))
    cover = cover[1:-1, 1:-1]
    cover.setflags(write=False)
    return cover
