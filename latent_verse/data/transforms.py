"""From an RGB image to a square one, to batches, and which randomness belongs to which sample.

Resizing is bilinear with antialiasing, in uint8. The results equal torchvision's transforms on PIL images to within
2/255 (a test holds this; usually they are identical). Decoding is in decoding.py.

Shapes: C = 3 colours, H x W the image's size, R the resolution. uint8 images lie in [0, 255], float in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, resize_image

from latent_verse.data.decoding import pixels


def centre_crop(image: Tensor | Image.Image, resolution: int) -> Tensor:
    """The resizing and cropping of all evaluation: shorter side to `resolution` (bilinear, antialiased), centre square.

    Takes uint8 (3, H, W) or a PIL image, gives uint8 (3, R, R). Whatever is compared with a reconstruction comes from
    here, the reference statistics of FID included.
    """
    if isinstance(image, Image.Image):
        image = pixels(image)
    _, height, width = image.shape
    short, long = min(height, width), max(height, width)
    new_long = int(resolution * long / short)  # torchvision's rounding, as in Resize(resolution)
    offset = round((new_long - resolution) / 2.0)  # and CenterCrop's
    if new_long > 4 * resolution:
        # A very long image: resizing all of it could take gigabytes. Pillow can resize just the part that is kept.
        lo, hi = offset * long / new_long, (offset + resolution) * long / new_long
        box = (0, lo, width, hi) if height > width else (lo, 0, hi, height)
        pil = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        return pixels(pil.resize((resolution, resolution), Image.Resampling.BILINEAR, box=box))
    if height > width:
        return _resize(image, (new_long, resolution))[:, offset : offset + resolution]
    return _resize(image, (resolution, new_long))[:, :, offset : offset + resolution]


def random_crop(image: Tensor, resolution: int, resize_ratio: float, generator: torch.Generator) -> Tensor:
    """The training crop: a random square of `crop_box`, resized. uint8 (3, H, W) -> uint8 (3, R, R)."""
    top, left, side = crop_box(image.shape[1], image.shape[2], resize_ratio, generator)
    return _resize(image[:, top : top + side, left : left + side], (resolution, resolution))


def crop_box(height: int, width: int, resize_ratio: float, generator: torch.Generator) -> tuple[int, int, int]:
    """(top, left, side) of a random square whose area is `resize_ratio` to 1 times that of the largest that fits.

    On square images this is torchvision's RandomResizedCrop(scale=(resize_ratio, 1), ratio=(1, 1)). On others that
    class measures the area against the whole image: at 0.75 and 4:3 no square fits, so it would always crop the centre.
    """
    largest = min(height, width)
    area, down, right = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    side = min(max(round(largest * math.sqrt(resize_ratio + (1 - resize_ratio) * area)), 1), largest)
    return int(down * (height - side + 1)), int(right * (width - side + 1)), side


def _resize(image_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    # the vectorised uint8 kernel wants channels-last memory: a whole decoded image has it, a crop does not
    image_CHW = image_CHW[None].contiguous(memory_format=torch.channels_last)[0]
    return resize_image(image_CHW, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)


def to_unit_range(x: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1], contiguous, on the tensor's own device."""
    return x.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def labels(found: Sequence[int]) -> Tensor:
    """Labels as int64 (B,)."""
    return torch.tensor(found, dtype=torch.int64)


class Collate:
    """(image or codes, target) items -> [uint8 (B, 3, R, R) or int32 (B, N), targets (B, ...)]; None is left out.

    Args:
        shape: of one image, (3, R, R), or of one image's codes, (N,).
        targets: what makes a tensor of the items' labels, or of their captions.
    """

    def __init__(self, shape: tuple[int, ...], targets: Callable[[list], Tensor] = labels):
        self.shape, self.targets = shape, targets

    def __call__(self, items: Sequence[tuple[Tensor | np.ndarray, object] | None]) -> list[Tensor]:
        kept = [item for item in items if item is not None]
        return [self._stacked([x for x, _ in kept]), self.targets([target for _, target in kept])]

    def _stacked(self, items: list) -> Tensor:
        if len(self.shape) == 1:
            return torch.from_numpy(np.array(items, np.int32).reshape(-1, *self.shape))
        if not items:
            return torch.empty(0, *self.shape, dtype=torch.uint8)
        # images lie in memory as HWC, as decoders leave them: stacked so, it is one copy each
        return torch.stack([image.permute(1, 2, 0) for image in items]).permute(0, 3, 1, 2)


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several non-negative integers, the same on every machine; (1, 2) differs from (2, 1)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1  # NumPy 1 cannot shift a uint64


def sample_generator(*parts: int) -> torch.Generator:
    """The randomness that belongs to `parts` (seed, epoch, sample index), whichever worker or rank uses it."""
    return torch.Generator().manual_seed(mix_seed(*parts))
