"""Files, PIL images and tensors -> AugVAE's input; its output -> PIL images, PNG files with metadata, a grid.

Shape suffixes: B batch, C = 3 colours, H height, W width; R is the model's resolution.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from latent_verse.biart.sampling import NotFinite
from latent_verse.config.settings import expand
from latent_verse.data import DataError
from latent_verse.data.decoding import FORMATS_TEXT, UnreadableImage, pil_to_tensor, read_rgb
from latent_verse.data.transforms import centre_crop, to_unit_range
from latent_verse.files import replacing

ImageLike = Image.Image | str | os.PathLike | Tensor  # what `load_image` takes
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def load_image(image: ImageLike, resolution: int) -> Tensor:
    """An image as AugVAE takes it: float32 (3, R, R) in [-1, 1], resized and centre-cropped as in evaluation.

    Args:
        image: a path, a PIL image of any mode, size and format, or a tensor (3 or 1, H, W): float in [-1, 1], or
            uint8. One that has the resolution already keeps its pixels.

    Raises:
        DataError: it is none of these, or cannot be read; the message names it.
    """
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
        raise DataError(f"{type(image).__name__} is not an image: give a path, a PIL image or a tensor (3, H, W).")
    if image.dim() != 3 or image.shape[0] not in (1, 3) or not image.numel():
        raise DataError(f"an image has shape {tuple(image.shape)}; tensors are (3, H, W) or (1, H, W).")
    image = image.detach().cpu().expand(3, -1, -1)
    if image.dtype == torch.uint8:
        return to_unit_range(centre_crop(image, resolution))
    if not image.is_floating_point() or not bool((image.abs() <= 1.001).all()):  # resizing may overshoot a little
        real = image.to(torch.complex128).real
        found = f"{image.dtype} has values from {real.min():g} to {real.max():g}"
        raise DataError(f"an image of {found}; give floats in [-1, 1] (x / 127.5 - 1), or uint8 in [0, 255].")
    image = image.float().clamp(-1, 1)
    if image.shape[1:] == (resolution, resolution):
        return image
    return to_unit_range(centre_crop(_to_uint8(image), resolution))


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
