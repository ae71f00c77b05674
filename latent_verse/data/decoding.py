"""From a file's bytes to an RGB image: which formats are decoded, how large they may be, and what is refused.

Ordinary JPEGs (RGB or gray) go through torchvision's decoder, the fastest of those measured in `benchmarks/data.py`.
Everything else, and everything that decoder refuses, goes through Pillow, as do all files where this torchvision has no
such decoder.

Only FORMATS are decoded, told by content and not by name: Pillow knows forty more, and starts Ghostscript for one of
them. Size is bounded before memory is taken: MAX_BYTES of a file, MAX_PIXELS of an image. JPEGs of up to twice as many
pixels, photos of 100 and 150 megapixels, are read at half their width and height. JPEGs that lack data in the middle or
at the end are refused, as far as their scans tell: jpeg_scans.py.

Shapes: C = 3 colours, H x W the image's size. Images are uint8 in [0, 255].
"""

from __future__ import annotations

import errno
import io
import os
import stat
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from latent_verse.config.messages import reason
from latent_verse.data import DataError
from latent_verse.data.jpeg_scans import END, GRAY, MORE, read_scans

try:  # deprecated since torchvision 0.29
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None


FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # Pillow's names, of the only formats that are decoded
FORMATS_TEXT = "jpg, png, gif, bmp, webp, tif, ppm or pgm"  # the same for messages
MAX_PIXELS = 89_478_485  # of an image: Pillow's own limit, at which it only warns; at most 1 GB while it is decoded
MAX_BYTES = 1 << 29  # of an image file: 512 MiB, which MAX_PIXELS of 16-bit RGB just fill
MAX_WEBP = 1 << 26  # pixels of a WebP: its decoder holds four copies of four bytes, so at most 1 GB as well
MAX_SIDE = 1 << 18  # pixels: Pillow takes more memory for each row than a row of a few pixels needs
MAX_GIF_START = 1 << 20  # bytes of a GIF before its first image, which Pillow reads piece by piece
STRIP = 1 << 22  # pixels that are converted at once

# What the others begin with, to name them: (offset, bytes, name)
_OTHER_FORMATS = (
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
    """This is not a readable image: absent, corrupt, truncated, too large, of another format."""

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
        UnreadableImage: the file is absent, no regular file, of more than MAX_BYTES, or not a whole, readable image.
        OSError: the machine lacks file descriptors or memory.
    """
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # reading a pipe or device might never end
            raise UnreadableImage(
                "it is a folder" if stat.S_ISDIR(info.st_mode) else "it is a pipe or device, not a file"
            )
        check_bytes(info.st_size)
        with open(path, "rb") as file:
            data = file.read()
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        if isinstance(error, UnreadableImage) or getattr(error, "errno", None) in NOT_THE_FILES:
            raise
        raise UnreadableImage(reason(error)) from error
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

    Transparency is composited over white. Images of 12 and 16 bits are scaled to 8, not clipped. Of several images in a
    file (an animation, the pages of a TIFF) the first is taken. Colour profiles are not applied. H and W are half those
    of a JPEG of more than MAX_PIXELS.

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
        raise UnreadableImage(f"{type(error).__name__}: {reason(error)}") from error


def _what_else(data: bytes) -> str:
    """Why data of none of FORMATS cannot be read: what it is, if that can be told."""
    start = data[:256].lstrip()
    for offset, mark, name in _OTHER_FORMATS:
        if start[offset : offset + len(mark)] == mark:
            return f"it is {name}; images may be {FORMATS_TEXT}"
    return f"it is not an image of a known format ({FORMATS_TEXT}), or damaged from its first bytes on"


def check_pixels(width: int, height: int, kind: str | None = None, what: str = "") -> None:
    """Refuse an image of too many pixels, before it is decoded.

    Args:
        kind: its format, one of FORMATS.
        what: has so many pixels, for the message; the image itself without it.

    Raises:
        UnreadableImage: there are more than MAX_PIXELS (of a WebP, MAX_WEBP), or none, or a side is beyond MAX_SIDE.
    """
    most = MAX_WEBP if kind == "WEBP" else MAX_PIXELS
    if not 0 < width * height <= most:
        raise UnreadableImage(f"it has {what}{width} x {height} pixels; between 1 and {most:,} are decoded")
    if max(width, height) > MAX_SIDE:
        raise UnreadableImage(f"it has {what}{width} x {height} pixels; at most {MAX_SIDE:,} a side are decoded")


def _decode(data: bytes) -> Tensor:
    if data.startswith(b"GIF8"):
        _check_gif(data)
    image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
    if image.format == "GIF":
        return _gif_pixels(image)
    if image.format in ("JPEG", "MPO"):  # a phone's MPO is a JPEG with more behind it
        orientation = _orientation(image) if "exif" in image.info or "xmp" in image.info else 1
        return _UPRIGHT.get(orientation, lambda x: x)(_whole_jpeg(data, image))
    return pil_to_tensor(image)


def _check_gif(data: bytes) -> None:
    """Refuse a GIF whose first image comes late: Pillow reads what is before it piece by piece, which takes long.

    Raises:
        UnreadableImage: it comes late, or not at all.
    """
    known = data[: 1024 + MAX_GIF_START]  # header, palette, and what else may come before the image
    try:
        at = 13 + (6 << (known[10] & 7) if known[10] & 128 else 0)
        while known[at] != ord(","):
            if known[at] == ord("!"):  # an extension: its kind, and blocks that begin with their length
                at += 2
                while known[at]:
                    at += 1 + known[at]
            elif known[at]:  # some programs leave zeros between extensions
                raise UnreadableImage("it is a GIF without an image, or damaged before its first one")
            at += 1
    except IndexError as error:
        found = "is cut off" if len(known) == len(data) else f"has {MAX_GIF_START:,} bytes and more"
        raise UnreadableImage(f"it is a GIF that {found} before its first image") from error


def _gif_pixels(image: Image.Image) -> Tensor:
    """The first image of a GIF that Pillow has opened. It may cover a part of the canvas; the rest is transparent."""
    left, top, right, bottom = image.tile[0][1]
    x_CHW = pil_to_tensor(image)
    if (left, top, right, bottom) == (0, 0, *image.size):
        return x_CHW
    canvas_CHW = torch.full_like(x_CHW, 255)
    canvas_CHW[:, top:bottom, left:right] = x_CHW[:, top:bottom, left:right]
    return canvas_CHW


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
    first_CHW = None
    if not scans.doubtful:
        first_CHW, corner = _jpeg_pixels(data, image)
        if not all(value in GRAY for value in corner):
            return first_CHW
    own = data[: scans.end]
    x_CHW, more_CHW = (_jpeg_pixels(own + end, None, True)[0] for end in (END, MORE + END))
    if not torch.equal(x_CHW, more_CHW):
        raise UnreadableImage("it is cut off or damaged: the data of its pixels end before its last pixel")
    return x_CHW if first_CHW is None else first_CHW


def _jpeg_pixels(data: bytes, image: Image.Image | None = None, quiet: bool = False) -> tuple[Tensor, Sequence[int]]:
    """A JPEG's pixels, and the channels of the last one as the file has them.

    Args:
        image: it, if Pillow has opened it.
        quiet: use Pillow, which prints nothing; torchvision's decoder prints whatever it finds odd.
    """
    image = image or Image.open(io.BytesIO(data), formats=FORMATS)
    halved = MAX_PIXELS < image.width * image.height <= 2 * MAX_PIXELS
    if halved:
        image.draft("RGB", (image.width // 2, image.height // 2))
    check_pixels(*image.size)
    if decode_jpeg and not quiet and image.mode in ("RGB", "L") and not halved:
        try:
            x_CHW = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
            return x_CHW, x_CHW[:, -1, -1].tolist()
        except RuntimeError:
            pass  # this torchvision has no libjpeg, or the file is damaged: Pillow decides
    image.load()
    last = image.getpixel((image.width - 1, image.height - 1))
    return pixels(image), last if isinstance(last, tuple) else [last]


def pil_to_tensor(image: Image.Image) -> Tensor:
    """A PIL image of any mode and format as uint8 (3, H, W), upright by its EXIF orientation; see decode_rgb.

    Raises:
        UnreadableImage: as check_pixels. Pillow, which may still have to decode it, raises nearly anything.
    """
    check_pixels(*image.size, image.format)
    tile = [getattr(image, "tag_v2", {}).get(tag) for tag in (322, 323)]  # a TIFF's, whose decoder takes a whole one
    if all(isinstance(side, int) for side in tile):
        check_pixels(*tile, what="tiles of ")
    image.load()
    check_pixels(*image.size, image.format)  # a WebP's or TIFF's header may have said something else
    return _UPRIGHT.get(_orientation(image), lambda x: x)(pixels(image))


def _orientation(image: Image.Image) -> int:
    """EXIF's; 1, upright, where its metadata are damaged: the pixels are not."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # Pillow raises nearly anything on damaged bytes
        return 1


def pixels(image: Image.Image) -> Tensor:
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
