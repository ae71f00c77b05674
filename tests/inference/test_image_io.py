"""What LVerse takes as an image, and what it says of everything else."""

from __future__ import annotations

import io
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from latent_verse.config import UserError
from latent_verse.data import DataError
from latent_verse.data.decoding import FORMATS_TEXT
from latent_verse.inference.image_io import load_image, save_png
from tests.messages import naming

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 18, 3)).astype(np.uint8))


def test_paths_images_and_tensors_give_the_same(tmp_path):
    PHOTO.save(tmp_path / "a.png")
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")  # a name that is not UTF-8, and content that is no JPEG
    PHOTO.save(odd, "PNG")
    tensor = torch.from_numpy(np.array(PHOTO)).permute(2, 0, 1)
    given = [tmp_path / "a.png", str(tmp_path / "a.png"), odd, PHOTO, tensor]
    found = [load_image(image, 8) for image in given]
    assert all(torch.equal(x, found[0]) for x in found) and found[0].shape == (3, 8, 8)


def test_home_is_found(tmp_path, monkeypatch):
    PHOTO.save(tmp_path / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_image("~/a.png", 8).shape == (3, 8, 8)
    with pytest.raises(UserError, match=naming("~nobody-here/a.png")):
        load_image("~nobody-here/a.png", 8)


def test_files_that_are_no_images_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "half.png").write_bytes(b"")
    PHOTO.save(tmp_path / "a.ico")
    with open(tmp_path / "large.jpg", "wb") as file:
        file.truncate(1 << 40)
    for name, fact in [
        *[("pipe.png", "pipe"), ("folder.png", "folder"), ("eps.png", "EPS"), ("half.png", "empty"), ("a.ico", "ICO")],
        *[("gone.png", "No such file"), ("large.jpg", f"{1 << 40:,}")],
    ]:
        with pytest.raises(DataError, match=naming(f"image {tmp_path / name}", fact, FORMATS_TEXT)) as said:
            load_image(tmp_path / name, 8)
        assert "\n" not in str(said.value)
    for name in ("a\0b.png", "x" * 300):
        with pytest.raises(UserError, match=naming("image")) as said:
            load_image(tmp_path / name, 8)
        assert "\n" not in str(said.value)
    with pytest.raises(DataError, match=naming("device")):
        load_image("/dev/zero", 8)


def test_pillow_s_own_images_are_checked_too(tmp_path):
    file = io.BytesIO()
    PHOTO.save(file, "PNG")
    with pytest.raises(DataError, match=re.escape("PngImageFile")):
        load_image(Image.open(io.BytesIO(file.getvalue()[:200])), 8)
    with pytest.raises(DataError, match=naming("0 x 9")):
        load_image(Image.new("RGB", (0, 9)), 8)


@pytest.mark.parametrize("kind", ["GIF", "ICO", "TGA", "PCX", "JPEG2000", "TIFF"])
def test_pillow_s_own_images_may_be_of_any_format(kind):
    """Whoever opens an image has chosen its decoder; of files that LVerse opens, only FORMATS are decoded."""
    file = io.BytesIO()
    PHOTO.save(file, kind)
    opened = Image.open(io.BytesIO(file.getvalue()))
    expected = load_image(Image.open(io.BytesIO(file.getvalue())).convert("RGB"), 8)
    assert torch.equal(load_image(opened, 8), expected)


@pytest.mark.parametrize("orientation", [1, 6])
def test_pillow_s_own_images_are_read_as_their_files_are(tmp_path, orientation):
    """By the bits and the white of a TIFF, and upright."""
    gray = np.linspace(0, 65535, 12 * 18).astype(np.uint16).reshape(12, 18)
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[262] = 0  # PhotometricInterpretation: WhiteIsZero
    Image.fromarray(gray).save(tmp_path / "a.tif", tiffinfo=exif)
    expected = load_image(tmp_path / "a.tif", 8)
    assert expected[0, 0, -1] > 0 > expected[0, -1, 0]
    # from memory: Pillow 13 misreads an uncompressed TIFF that lies on its side if it opens the file by name
    with Image.open(io.BytesIO((tmp_path / "a.tif").read_bytes())) as opened:
        assert opened.tag_v2[262] == 0 and torch.equal(load_image(opened, 8), expected)
    with Image.open(tmp_path / "a.tif") as opened, pytest.raises(DataError, match=naming(f"{1 << 20} x 1")):
        opened._size = (1 << 20, 1)
        load_image(opened, 8)


@pytest.mark.parametrize(
    ("tensor", "facts"),
    [
        (torch.zeros(3, 8, 8, dtype=torch.bool), ["torch.bool"]),
        (torch.zeros(3, 8, 8, dtype=torch.int64), ["torch.int64"]),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), ["torch.complex64"]),
        (torch.full((3, 8, 8), torch.nan), ["nan"]),
        (torch.full((3, 8, 8), 2.0), [2]),
        (torch.zeros(3, 0, 8), [0]),
        (torch.zeros(2, 8, 8), [2]),
        (np.zeros((3, 8, 8)), ["array", "float64", (3, 8, 8), "uint8", "(H, W, 3)", "torch.from_numpy"]),
        (b"png", ["bytes"]),
        (None, ["NoneType"]),
    ],
)
def test_what_is_no_image_is_refused(tensor, facts):
    with pytest.raises(DataError, match=naming(*facts)):
        load_image(tensor, 8)


def test_a_png_carries_its_text_and_is_whole_or_not_there(tmp_path):
    save_png(PHOTO, tmp_path / "a.png", {"text": "a caption ✓"})
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {"text": "a caption ✓"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_floats_in_the_unit_interval_are_warned_of_where_that_is_certain(recwarn):
    """An image of ToTensor, with any level that no 8-bit image in [-1, 1] can have."""
    pixels = torch.from_numpy(np.array(PHOTO)).permute(2, 0, 1)
    with pytest.warns(UserWarning, match=naming([0, 1], [-1, 1], "2 * x - 1")):
        load_image(pixels / 255, 8)
    recwarn.clear()
    bright = pixels // 2 + 128  # in [-1, 1] all of it is above 0
    for certain in (
        pixels / 127.5 - 1,
        bright / 127.5 - 1,
        torch.zeros(3, 8, 8),
        torch.ones(3, 8, 8),
        torch.rand(3, 8, 8),
    ):
        load_image(certain, 8)
    assert not recwarn.list


@pytest.mark.parametrize(
    "array",
    [
        *(np.zeros((8, 8, 3)), np.zeros((3, 8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8), np.zeros(8, np.uint8)),
        *(np.zeros((8, 8, 2), np.uint8), np.zeros((8, 8, 3), np.int64), np.zeros((8, 8), bool)),
        np.zeros((1, 8, 8, 3), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_that_are_no_images_are_named(array):
    with pytest.raises(DataError, match=naming(array.dtype, array.shape, "uint8", "(H, W, 3)", "(H, W)")) as error:
        load_image(array, 8)
    assert "\n" not in str(error.value)
    channels_first = torch.zeros(8, 8, 3)
    with pytest.raises(DataError, match=naming((8, 8, 3), "(3, H, W)", ".permute(2, 0, 1)".strip("."))):
        load_image(channels_first, 8)
