"""The reader of the shapes world: an image back into a scene, by comparing each blob with every rendered shape.

Evaluation relies on it, so it is strict: whatever stands out from the background and is not clearly one object of the
world (half a shape, two that touch, scattered pixels) becomes an object of unknown shape, which no caption names.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from latent_verse.data.shapes.drawing import (
    BACKGROUND,
    PALETTE,
    SPECKS,
    UNKNOWN,
    Obj,
    Scene,
    WorldSettings,
    coverage,
    softened,
)

STANDS_OUT = 70.0  # RGB distance from the background; texture and mild noise stay below, a third of any colour above
COLOUR_ERROR = 75.0  # the farthest a blob's colour may lie from the palette's; the closest two colours are 97 apart
HUE = 30.0  # the farthest apart the channels of a black blob may lie; with more it is dark red, say: not black
OVERLAP = 0.76  # the least intersection over union with a rendered shape
LEAD = 0.015  # the least lead of the best shape over the second; with less, the blob is neither
FLAW = 0.6  # the largest mean error of any 3 x 3 pixels, as a share of the step from background to object,
FLAW_RGB = 120.0  # and as an RGB distance: black, whose step is the longest, is 129 from green
SPECK = 5  # pixels; smaller blobs are noise if all of them together are no larger than this


def read_image(world: WorldSettings, image: Image.Image | np.ndarray) -> Scene:
    """An image, PIL or uint8 (H, W, 3), -> its Scene, in reading order. Unknown objects have shape or colour "?".

    Raises:
        ValueError: the image is not of the world's size.
    """
    pixels_HWC = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image, dtype=np.float32)
    expected = (world.image_size, world.image_size, 3)
    if pixels_HWC.shape != expected:
        raise ValueError(f"The {world.name} world reads images of shape {expected}, not {pixels_HWC.shape}.")
    from_background_HWC = pixels_HWC - np.array(BACKGROUND, np.float32)
    stands_out = np.square(from_background_HWC).sum(-1) > STANDS_OUT**2
    objects, specks = [], 0
    for blob in _blobs(stands_out):
        if len(blob) < SPECK:
            specks += len(blob)
        else:
            objects.append(_read_blob(world, from_background_HWC, blob))
    if specks > SPECK:
        objects.append(SPECKS)
    return Scene(tuple(sorted(objects, key=lambda o: (o.y, o.x))))


def _blobs(mask: np.ndarray) -> list[np.ndarray]:
    """The 8-connected groups of true pixels, each as an (n, 2) array of (y, x)."""
    height, width = mask.shape
    todo = set(np.flatnonzero(mask).tolist())
    blobs = []
    while todo:
        stack = [todo.pop()]
        blob = []
        while stack:
            at = stack.pop()
            blob.append(at)
            y, x = divmod(at, width)
            for ny in range(max(y - 1, 0), min(y + 2, height)):
                for n in range(ny * width + max(x - 1, 0), ny * width + min(x + 2, width)):
                    if n in todo:
                        todo.remove(n)
                        stack.append(n)
        blobs.append(np.stack(np.divmod(np.array(blob), width), axis=1))
    return blobs


def _read_blob(world: WorldSettings, from_background_HWC: np.ndarray, blob: np.ndarray) -> Obj:
    low, high = blob.min(axis=0), blob.max(axis=0) + 1
    middle_y, middle_x = ((low + high) / 2).round().astype(int)
    unknown = Obj(UNKNOWN, UNKNOWN, UNKNOWN, int(middle_x), int(middle_y))
    largest = max(world.sizes.values())
    if (high - low).max() > 2 * largest + 5:  # larger than any object even when blurred
        return unknown

    # The colour, from the blob's inner pixels: those that stand out most are least mixed with the background.
    values = from_background_HWC[blob[:, 0], blob[:, 1]]
    strength = np.square(values).sum(-1)
    inner = values[strength >= np.median(strength)].mean(axis=0)
    vectors = {name: np.array(PALETTE[name], np.float32) - np.array(BACKGROUND) for name in world.colours}
    colour = min(vectors, key=lambda name: np.square(inner - vectors[name]).sum())
    tinted = not np.ptp(vectors[colour]) and np.ptp(inner) > HUE  # the background is grey, as black is
    if tinted or np.square(inner - vectors[colour]).sum() > COLOUR_ERROR**2:
        return unknown

    # The window around the blob, with all else blanked: its faint rim belongs to it, its neighbours do not.
    pad = largest + 6
    origin = np.array([middle_y, middle_x]) - pad
    near = np.zeros((2 * pad, 2 * pad), bool)
    near[blob[:, 0] - origin[0], blob[:, 1] - origin[1]] = True
    near = _grown(near)
    ys, xs = (axis + o for axis, o in zip(np.nonzero(near), origin, strict=True))
    inside = (ys >= 0) & (xs >= 0) & (ys < world.image_size) & (xs < world.image_size)
    ys, xs = ys[inside], xs[inside]
    window_HWC = np.zeros((*near.shape, 3), np.float32)
    window_HWC[ys - origin[0], xs - origin[1]] = from_background_HWC[ys, xs]

    # How much of each pixel the object covers: where it lies on the line from the background to the colour.
    vector = vectors[colour]
    cover = np.clip(window_HWC @ (vector / (vector @ vector)), 0, 1)
    fits: dict[str, Fit] = {}
    for shape in world.shapes:
        for size, radius in world.sizes.items():
            fit = _fit(cover, size, coverage(shape, radius), softened(shape, radius))
            fits[shape] = max(fits.get(shape, fit), fit, key=lambda f: f.overlap)
    best, second = sorted(fits, key=lambda shape: fits[shape].overlap, reverse=True)[:2]
    fit = fits[best]
    clear = fit.overlap >= OVERLAP and fit.overlap - fits[second].overlap >= LEAD
    step = np.linalg.norm(vector)
    if not clear or _flaw(window_HWC / step, vector / step, fit) > min(FLAW, FLAW_RGB / step):
        return Obj(UNKNOWN, colour, UNKNOWN, int(middle_x), int(middle_y))
    return Obj(best, colour, fit.size, int(fit.x + origin[1]), int(fit.y + origin[0]))


class Fit(NamedTuple):
    """How well a rendered shape, centred at (x, y) of a window, covers a blob."""

    overlap: float  # soft intersection over union
    size: str
    template: np.ndarray
    x: int
    y: int


def _fit(cover: np.ndarray, size: str, sharp: np.ndarray, soft: np.ndarray) -> Fit:
    """The best fit within a pixel of where the centroids agree, and there that of the sharp or the softened shape."""
    reach = sharp.shape[0] // 2
    best = Fit(0.0, size, sharp, reach, reach)
    y0, x0 = (np.array(_centroid(cover)) - _centroid(sharp) + reach).round().astype(int)
    for y in (y0 - 1, y0, y0 + 1):
        for x in (x0 - 1, x0, x0 + 1):
            if min(y, x) >= reach and max(y, x) <= len(cover) - reach:
                best = max(best, Fit(_overlap(cover, sharp, y, x), size, sharp, x, y), key=lambda f: f.overlap)
    softer = Fit(_overlap(cover, soft, best.y, best.x), size, soft, best.x, best.y)
    return max(best, softer, key=lambda f: f.overlap)


def _overlap(cover: np.ndarray, template: np.ndarray, y: int, x: int) -> float:
    reach = template.shape[0] // 2
    shared = float(np.minimum(cover[y - reach : y + reach, x - reach : x + reach], template).sum())
    return shared / (float(cover.sum() + template.sum()) - shared)


def _flaw(window_HWC: np.ndarray, colour_C: np.ndarray, fit: Fit) -> float:
    """The largest mean error of any 3 x 3 pixels against the rendered object: blur and noise cancel out."""
    reach = fit.template.shape[0] // 2
    error_HWC = window_HWC.copy()
    error_HWC[fit.y - reach : fit.y + reach, fit.x - reach : fit.x + reach] -= fit.template[..., None] * colour_C
    rows = error_HWC[:-2] + error_HWC[1:-1] + error_HWC[2:]
    boxes = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
    return float(np.sqrt(np.square(boxes).sum(-1).max()))


def _centroid(cover: np.ndarray) -> tuple[float, float]:
    steps = np.arange(len(cover)) + 0.5
    total = cover.sum()
    return float(cover.sum(1) @ steps / total), float(cover.sum(0) @ steps / total)


def _grown(mask: np.ndarray) -> np.ndarray:
    """The mask and its 8 neighbours."""
    rows = mask | np.roll(mask, 1, 0) | np.roll(mask, -1, 0)
    return rows | np.roll(rows, 1, 1) | np.roll(rows, -1, 1)
