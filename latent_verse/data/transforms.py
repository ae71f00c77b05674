"""From a file's bytes to a square image, and which randomness belongs to which sample.

Ordinary JPEGs (RGB or gray) go through torchvision's decoder, the fastest of those measured in `benchmarks/data.py`.
Everything else, and everything that decoder refuses, goes through Pillow, as do all files where this torchvision has no
such decoder. Resizing is bilinear with antialiasing, in uint8. The results equal torchvision's transforms on PIL images
to within 2/255 (a test holds this; usually they are identical).

Only FORMATS are decoded, told by content and not by name: Pillow knows forty more, and starts Ghostscript for one of
them. Size is bounded before memory is taken: MAX_BYTES of a file, MAX_PIXELS of an image. JPEGs of up to twice as many
pixels, photos of 100 and 150 megapixels, are read at half their width and height.

JPEGs that lack data in the middle or at the end are refused, as far as their scans tell: jpeg_scans.py.

Shapes: C = 3 colours, H x W the image's size, R the resolution. uint8 images lie in [0, 255], float in [-1, 1].
"""

from __future__ import annotations

import errno
import io
import math
import os
import stat
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import InterpolationMode, resize_image

from latent_verse.data import DataError
from latent_verse.data.jpeg_scans import END, GRAY, MORE, read_scans

try:  # deprecated since torchvision 0.29
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None


FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")  # Pillow's names, of the only formats that are decoded
FORMATS_TEXT = "jpg, png, bmp, webp, tif, ppm or pgm"  # the same for messages
MAX_PIXELS = 89_478_485  # of an image: Pillow's own limit, at which it only warns; at most 1 GB while it is decoded
MAX_BYTES = 1 << 29  # of an image file: 512 MiB, which MAX_PIXELS of 16-bit RGB just fill
MAX_WEBP = 1 << 26  # pixels of a WebP: its decoder holds four copies of four bytes, so at most 1 GB as well
MAX_SIDE = 1 << 18  # pixels: Pillow takes more memory for each row than a row of a few pixels needs
STRIP = 1 << 22  # pixels that are converted at once

# What the others begin with, to name them: (offset, bytes, name)
_OTHER_FORMATS = (
    (0, b"GIF8", "GIF"),
    *((8, brand, "HEIC") for brand in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")),
    *((8, brand, "AVIF") for brand in (b"avif", b"avis")),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (0, b"%!PS", "EPS"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "PSD"),
    (0, b"\x00\x00\x01\x00", "ICO"),
    (0, b"qoif", "QOI"),
    (0, b"DDS ", "DDS"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "XML (SVG?)"),
    (0, b"<html", "an HTML page"),
    (0, b"<!DOCTYPE", "an HTML page"),
    (0, b"<!doctype", "an HTML page"),
    (0, b"version https://git-lfs", "a Git LFS pointer: fetch the file itself"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "gzip"),
)


class UnreadableImage(DataError):
    """This is no readable image: absent, corrupt, truncated, too large, of another format."""

    remedy = f"Were the shards written with image bytes under {FORMATS_TEXT}?"  # where many do so in a row


# EXIF orientation -> what turns a CHW tensor upright. 1 is upright already.
_UPRIGHT: dict[int, Callable[[Tensor], Tensor]] = {
    2: lambda x: x.flip(2),
    3: lambda x: x.flip(1, 2),
    4: lambda x: x.flip(1),
    5: lambda x: x.transpose(1, 2),
    6: lambda x: x.flip(1).transpose(1, 2),
    7: lambda x: x.flip(1, 2).transpose(1, 2),
    8: lambda x: x.flip(2).transpose(1, 2),
}


# faults of the machine's: no file is left out for them
NOT_THE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def read_rgb(path: str | os.PathLike) -> Tensor:
    """The image in a file as uint8 (3, H, W); see decode_rgb.

    Raises:
        UnreadableImage: the file is absent, no regular file, of more than MAX_BYTES, or no whole, readable image.
        OSError: the machine lacks file descriptors or memory.
    """
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # reading a pipe or device might never end
            raise UnreadableImage("it is a folder" if stat.S_ISDIR(info.st_mode) else "it is a pipe or device, no file")
        check_bytes(info.st_size)
        with open(path, "rb") as file:
            data = file.read()
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        if isinstance(error, UnreadableImage) or getattr(error, "errno", None) in NOT_THE_FILES:
            raise
        raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from error
    return decode_rgb(data)


def check_bytes(size: int) -> None:
    """Refuse an image file of too many bytes, before it is read.

    Raises:
        UnreadableImage: there are more than MAX_BYTES, or none.
    """
    if not 0 < size <= MAX_BYTES:
        raise UnreadableImage(f"it holds {size:,} bytes; at most {MAX_BYTES:,} are read" if size else "it is empty")


def decode_rgb(data: bytes) -> Tensor:
    """The image in `data` as uint8 (3, H, W), upright by its EXIF orientation.

    Transparency is composited over white. Images of 12 and 16 bits are scaled to 8, not clipped. An animation gives its
    first frame. Colour profiles are not applied. H and W are half those of a JPEG of more than MAX_PIXELS.

    Raises:
        UnreadableImage: it is not a whole, readable image of one of FORMATS, or has more than MAX_PIXELS (a JPEG twice
            as many, a WebP MAX_WEBP) or a side of more than MAX_SIDE; with the reason.
    """
    try:
        check_bytes(len(data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata; what matters to us is raised
            return _decode(data)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:  # whose own text names a buffer's address
        raise UnreadableImage(_what_else(data)) from error
    except MemoryError as error:
        raise UnreadableImage("there is not enough memory to decode it") from error
    except Exception as error:  # decoders raise nearly anything on damaged bytes, from SyntaxError to struct.error
        raise UnreadableImage(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _what_else(data: bytes) -> str:
    """Why data of none of FORMATS cannot be read: what it is, if that can be told."""
    start = data[:256].lstrip()
    for offset, mark, name in _OTHER_FORMATS:
        if start[offset : offset + len(mark)] == mark:
            return f"it is {name}; images may be {FORMATS_TEXT}"
    return f"it is not an image of a known format ({FORMATS_TEXT}), or damaged from its first bytes on"


def check_pixels(width: int, height: int, kind: str | None = None) -> None:
    """Refuse an image of too many pixels, before it is decoded.

    Args:
        kind: its format, one of FORMATS.

    Raises:
        UnreadableImage: there are more than MAX_PIXELS (of a WebP, MAX_WEBP), or none, or a side is beyond MAX_SIDE.
    """
    most = MAX_WEBP if kind == "WEBP" else MAX_PIXELS
    if not 0 < width * height <= most:
        raise UnreadableImage(f"it has {width} x {height} pixels; between 1 and {most:,} are decoded")
    if max(width, height) > MAX_SIDE:
        raise UnreadableImage(f"it is {width} x {height} pixels large; at most {MAX_SIDE:,} a side are decoded")


def _decode(data: bytes) -> Tensor:
    image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
    if image.format in ("JPEG", "MPO"):  # a phone's MPO is a JPEG with more behind it
        orientation = _orientation(image) if "exif" in image.info or "xmp" in image.info else 1
        return _UPRIGHT.get(orientation, lambda x: x)(_whole_jpeg(data, image))
    return pil_to_tensor(image)


def _whole_jpeg(data: bytes, image: Image.Image) -> Tensor:
    """The pixels of a JPEG that Pillow has opened, as they are stored.

    Where its markers or a gray corner raise doubt, more data are put behind its own: if they change the pixels, some
    were missing.

    Raises:
        UnreadableImage: it is cut off, or damaged in the middle.
    """
    scans = read_scans(data)
    if scans.damage:
        raise UnreadableImage(f"it is damaged: {scans.damage}")
    if not scans.doubtful:
        x_CHW, corner = _jpeg_pixels(data, image)
        if not all(value in GRAY for value in corner):
            return x_CHW
    own = data[: scans.end]
    x_CHW, more_CHW = (_jpeg_pixels(own + end)[0] for end in (END, MORE + END))
    if not torch.equal(x_CHW, more_CHW):
        raise UnreadableImage("it is cut off or damaged: the data of its pixels end before its last pixel")
    return x_CHW


def _jpeg_pixels(data: bytes, image: Image.Image | None = None) -> tuple[Tensor, Sequence[int]]:
    """A JPEG's pixels, and the channels of the last one as the file has them; `image` if Pillow has opened it."""
    image = image or Image.open(io.BytesIO(data), formats=FORMATS)
    halved = MAX_PIXELS < image.width * image.height <= 2 * MAX_PIXELS
    if halved:
        image.draft("RGB", (image.width // 2, image.height // 2))
    check_pixels(*image.size)
    if decode_jpeg and image.mode in ("RGB", "L") and not halved:
        try:
            x_CHW = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
            return x_CHW, x_CHW[:, -1, -1].tolist()
        except RuntimeError:
            pass  # this torchvision has no libjpeg, or the file is damaged: Pillow decides
    image.load()
    last = image.getpixel((image.width - 1, image.height - 1))
    return _pixels(image), last if isinstance(last, tuple) else [last]


def pil_to_tensor(image: Image.Image) -> Tensor:
    """A PIL image of any mode and format as uint8 (3, H, W), upright by its EXIF orientation; see decode_rgb.

    Raises:
        UnreadableImage: as check_pixels. Pillow, which may still have to decode it, raises nearly anything.
    """
    check_pixels(*image.size, image.format)
    image.load()
    check_pixels(*image.size, image.format)  # a WebP's or TIFF's header may have said something else
    return _UPRIGHT.get(_orientation(image), lambda x: x)(_pixels(image))


def _orientation(image: Image.Image) -> int:
    """EXIF's; 1, upright, where its metadata are damaged: the pixels are not."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # Pillow raises nearly anything on damaged bytes
        return 1


def _pixels(image: Image.Image) -> Tensor:
    """An image of any mode as uint8 (3, H, W), made strip by strip: a large one's copies would add up to gigabytes."""
    width, height = image.size
    rows = max(1, STRIP // width)
    levels = _levels(image)
    if rows >= height:
        return torch.from_numpy(np.array(_to_rgb(image, *levels))).permute(2, 0, 1)
    x_HWC = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        x_HWC[top:bottom] = np.asarray(_to_rgb(image.crop((0, top, width, bottom)), *levels))
    return torch.from_numpy(x_HWC).permute(2, 0, 1)


def _levels(image: Image.Image) -> tuple[int, int]:
    """(black, white) of a gray image of more than 8 bits: a TIFF may have 12 bits, or 0 for white."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]  # BitsPerSample
    white = (1 << bits) - 1 if image.mode.startswith("I;16") else 1 if image.mode == "F" else 65535
    return (white, 0) if tags.get(262) == 0 else (0, white)  # PhotometricInterpretation: WhiteIsZero


def _to_rgb(image: Image.Image, black: int, white: int) -> Image.Image:
    """Any Pillow mode to RGB without clipping and without guessing what lies under transparency.

    Args:
        black, white: of gray images of more than 8 bits, which are mode F and those that begin with I.
    """
    if image.mode == "F" or image.mode.startswith("I"):  # 16-bit gray is stored as I;16, I;16B or I
        gray = np.asarray(image).astype(np.float64)
        most = max(black, white)
        if not (np.isfinite(gray).all() and gray.min() >= 0 and gray.max() <= most):
            kind = "a floating-point image" if image.mode == "F" else "an image of integers"
            raise ValueError(f"{kind} with values outside [0, {most}], so its white is unknown")
        scaled = ((gray - black) * (255 / (white - black))).round().astype(np.uint8)
        if isinstance(clear := image.info.get("transparency"), int):
            scaled[gray == clear] = 255
        return Image.fromarray(scaled).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def centre_crop(image: Tensor | Image.Image, resolution: int) -> Tensor:
    """The resizing and cropping of all evaluation: shorter side to `resolution` (bilinear, antialiased), centre square.

    Takes uint8 (3, H, W) or a PIL image, gives uint8 (3, R, R). Whatever is compared with a reconstruction comes from
    here, the reference statistics of FID included.
    """
    if isinstance(image, Image.Image):
        image = _pixels(image)
    _, height, width = image.shape
    short, long = min(height, width), max(height, width)
    new_long = int(resolution * long / short)  # torchvision's rounding, as in Resize(resolution)
    offset = round((new_long - resolution) / 2.0)  # and CenterCrop's
    if new_long > 4 * resolution:
        # A very long image: resizing all of it could take gigabytes. Pillow can resize just the part that is kept.
        lo, hi = offset * long / new_long, (offset + resolution) * long / new_long
        box = (0, lo, width, hi) if height > width else (lo, 0, hi, height)
        pil = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        return _pixels(pil.resize((resolution, resolution), Image.Resampling.BILINEAR, box=box))
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
