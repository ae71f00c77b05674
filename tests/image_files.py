"""Images, their files in any format, and how far two images differ."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor


def photo(width=90, height=60, seed=0):
    """A PIL image with smooth areas, edges and texture."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    channels = [128 + 100 * np.sin(x / (7 + 3 * c) + seed) * np.cos(y / (5 + 2 * c)) for c in range(3)]
    array = np.stack(channels, -1) + rng.normal(0, 6, (height, width, 3))
    array[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 255, 3)
    return Image.fromarray(array.clip(0, 255).astype(np.uint8))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def as_tensor(image):
    return pil_to_tensor(image.convert("RGB")).int()


def gap(a, b):
    assert a.shape == b.shape
    return (a.int() - b.int()).abs().max().item()


def make_folder(root, names):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF", "pgm": "PPM"}.get(path.suffix[1:].lower())
        photo(40, 30, seed=i).save(path, kind or path.suffix[1:])
    return root


def bomb():
    """A tiny PNG that claims 30000 x 30000 pixels."""
    data = bytearray(encoded(Image.new("L", (8, 8)), "PNG"))
    data[16:24] = struct.pack(">II", 30000, 30000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)
