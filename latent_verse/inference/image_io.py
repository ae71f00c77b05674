"""Files, PIL images and tensors -> AugVAE's input; its output -> PIL images, PNG files with metadata, a grid.

Shape suffixes: B batch, C = 3 colours, H height, W width, I images, N image codes; R is the model's resolution.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.sampling import NotFinite
from latent_verse.config.settings import expand
from latent_verse.data import DataError
from latent_verse.data.decoding import FORMATS_TEXT, UnreadableImage, pil_to_tensor, read_rgb
from latent_verse.data.transforms import centre_crop, to_unit_range
from latent_verse.files import replacing
from latent_verse.inference.arguments import warn

ImageLike = Image.Image | str | os.PathLike | np.ndarray | Tensor  # what `load_image` takes
SINGLE = (Image.Image, str, os.PathLike)  # of these, what is never several images
TAKEN = "a path, a PIL image, a uint8 array (H, W, 3) or a tensor (3, H, W)"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def load_image(image: ImageLike, resolution: int) -> Tensor:
    """An image as AugVAE takes it: float32 (3, R, R) in [-1, 1], resized and centre-cropped as in evaluation.

    Args:
        image: a path; a PIL image of any mode, size and format; a uint8 array (H, W, 3), (H, W, 4) or (H, W); or a
            tensor (3 or 1, H, W), uint8 or float in [-1, 1]. One that has the resolution already keeps its pixels.

    Raises:
        DataError: it is none of these, or cannot be read; the message names it.
    """
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if isinstance(image, (str, os.PathLike)):
        try:
            return to_unit_range(centre_crop(read_rgb(expand(image, True, "image")), resolution))
        except UnreadableImage as error:
            raise DataError(f"image {image} cannot be read: {error}. Give a whole file: {FORMATS_TEXT}.") from error
    if isinstance(image, Image.Image):
        try:
            return to_unit_range(centre_crop(pil_to_tensor(image), resolution))
        except Exception as error:  # it may still have to be decoded, and Pillow raises nearly anything then
            raise DataError(f"the image {image!r} cannot be read: {error}") from error
    if not isinstance(image, Tensor):
        raise DataError(f"{type(image).__name__} is not an image: give {TAKEN}.")
    ordinary = image.layout is torch.strided and not (image.is_nested or image.is_quantized or image.is_meta)
    if not ordinary or (image.is_floating_point() and image.dtype.itemsize == 1):
        found = f"nested {image.dtype}" if image.is_nested else f"{image.layout} {image.dtype} on {image.device}"
        raise DataError(f"an image is a tensor of {found}; give a dense one (3, H, W), float32 in [-1, 1] or uint8.")
    if image.dim() != 3 or image.shape[0] not in (1, 3) or not image.numel():
        last = " Put channels first: .permute(2, 0, 1)." if image.dim() == 3 and image.shape[2] in (1, 3, 4) else ""
        raise DataError(f"an image has shape {tuple(image.shape)}; tensors are (3, H, W) or (1, H, W).{last}")
    image = image.detach().cpu().expand(3, -1, -1)
    if image.dtype == torch.uint8:
        return to_unit_range(centre_crop(image, resolution))
    if not image.is_floating_point() or not bool((image.abs() <= 1.001).all()):  # resizing may overshoot a little
        real = image.to(torch.complex128).real
        found = f"{image.dtype} has values from {real.min():g} to {real.max():g}"
        raise DataError(f"an image of {found}; give floats in [-1, 1] (x / 127.5 - 1), or uint8 in [0, 255].")
    image = image.float().clamp(-1, 1)
    if _is_in_unit_interval(image):
        warn("a float image has 8-bit values in [0, 1], but [-1, 1] is read: give 2 * x - 1")
    if image.shape[1:] == (resolution, resolution):
        return image
    return to_unit_range(centre_crop(_to_uint8(image), resolution))


def _from_array(array: np.ndarray) -> Image.Image:
    """A uint8 array as Pillow reads it: grey (H, W) or (H, W, 1), RGB (H, W, 3) or RGBA (H, W, 4)."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not array.size or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,), (4,)):
        taken = "arrays are uint8 (H, W, 3), (H, W, 4) or (H, W); for others give torch.from_numpy of (3, H, W)"
        raise DataError(f"an image is an array of {array.dtype} with shape {array.shape}; {taken}.")
    return Image.fromarray(np.ascontiguousarray(array))


def _is_in_unit_interval(image_CHW: Tensor) -> bool:
    """Whether this is certainly an 8-bit image divided by 255, as torchvision's ToTensor does, and not one in [-1, 1].

    From 8 bits to [-1, 1], x / 127.5 - 1, all values are odd multiples of 1/255.
    """
    if image_CHW.min() < 0:
        return False
    level = image_CHW * 255
    even = (level.round() % 2 == 0) & (level.round() > 0)
    return bool(((level - level.round()).abs() < 1e-3).all() & even.any())


def encode_images(vae: AugVAE, images: Sequence[ImageLike], at_a_time: int) -> Tensor:
    """AugVAE's codes of images, `at_a_time` on its device: (I, N) int64, on the CPU.

    Raises:
        DataError: as `load_image`.
    """
    codes = []
    for start in range(0, len(images), at_a_time):
        x_BCHW = torch.stack([load_image(image, vae.config.resolution) for image in images[start : start + at_a_time]])
        codes.append(vae.codes(x_BCHW.to(vae.device)).cpu())
    return torch.cat(codes)


def decode_images(vae: AugVAE, codes_IN: Tensor, at_a_time: int) -> list[Image.Image]:
    """The images of codes (I, N) int64 on any device, decoded `at_a_time`.

    Raises:
        ValueError: as `AugVAE.decode_codes`.
        NotFinite: as `to_images`.
    """
    if not isinstance(codes_IN, Tensor) or codes_IN.dim() != 2:
        vae.decode_codes(codes_IN)  # says what is wrong
    parts = codes_IN.split(at_a_time)
    return [image for part in parts for image in to_images(vae.decode_codes(part.to(vae.device)))]


def to_images(x_BCHW: Tensor) -> list[Image.Image]:
    """Tensors (B, 3, H, W) in [-1, 1] -> RGB images.

    Raises:
        NotFinite: they hold numbers that are not finite.
    """
    if not x_BCHW.isfinite().all():
        raise NotFinite("AugVAE's images are not finite: its weights are damaged, or overflow in this precision.")
    x_BHWC = rearrange(_to_uint8(x_BCHW), "B C H W -> B H W C").contiguous().cpu()
    return [Image.fromarray(x_HWC.numpy()) for x_HWC in x_BHWC]


def _to_uint8(x: Tensor) -> Tensor:
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_png(image: Image.Image, path: Path, about: dict[str, str]) -> None:
    """Write a PNG, whole or not at all, with `about` as its text metadata (`Image.open(path).text`)."""
    info = PngInfo()
    for key, value in about.items():
        info.add_text(key, value.encode("utf-8", "backslashreplace").decode())  # names that are not UTF-8
    with replacing(path, durable=False) as unfinished:
        image.save(unfinished, format="PNG", pnginfo=info)


def grid(rows: list[tuple[str, list[Image.Image]]], side: int = 128, gap: int = 8) -> Image.Image:
    """Rows of images of one size, each row below its text. Small images are enlarged to at least `side` pixels.

    The font is DejaVu Sans if the system has it, otherwise Pillow's own; letters that it lacks appear as boxes.
    """
    font, line = _font(), 18
    width, height = rows[0][1][0].size
    scale = max(1, math.ceil(side / width))
    width, height = width * scale, height * scale
    total = gap + max(max(len(images) for _, images in rows) * (width + gap), 320)
    texts = [_wrap(text, font, total - 2 * gap) for text, _ in rows]
    sheet = Image.new("RGB", (total, gap + sum(len(lines) * line + height + 2 * gap for lines in texts)), "white")
    canvas, y = ImageDraw.Draw(sheet), gap
    for lines, (_, images) in zip(texts, rows, strict=True):
        for text in lines:
            canvas.text((gap, y), text, fill="black", font=font)
            y += line
        for column, image in enumerate(images):
            sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (gap + column * (width + gap), y))
        y += height + 2 * gap
    return sheet


def _font() -> Font:
    try:
        return ImageFont.truetype("DejaVuSans.ttf", 14)
    except OSError:
        return ImageFont.load_default(14)


def _wrap(text: str, font: Font, width: int, most: int = 3) -> list[str]:
    """`text` in lines of at most `width` pixels, broken at spaces if there are any; cut after `most` lines."""
    text, lines = " ".join(text.split()), list[str]()
    while text and len(lines) < most:
        end = next((n for n in range(1, len(text) + 1) if font.getlength(text[:n]) > width), len(text) + 1) - 1
        if end < len(text):
            end = max(text.rfind(" ", 0, end + 1), 0) or max(end, 1)
        lines.append(text[:end])
        text = text[end:].lstrip()
    if text:
        lines[-1] = lines[-1][:-1] + "…"
    return lines
