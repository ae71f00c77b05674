"""Decoding, cropping and the folder datasets: the same images as plain PIL + torchvision, and bad input refused."""

import errno
import importlib
import io
import logging
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from torchvision.transforms.functional import pil_to_tensor, resized_crop

from latent_verse import data
from latent_verse.data import DataError, FakeDataset, FlatImages, ImageDataset, transforms
from latent_verse.data.images import EXTENSIONS, NOT_READ, PathList, walk
from latent_verse.data.transforms import (
    FORMATS,
    FORMATS_TEXT,
    UnreadableImage,
    centre_crop,
    crop_box,
    decode_rgb,
    random_crop,
    read_rgb,
    sample_generator,
    to_unit_range,
)
from tests.image_files import as_tensor, encoded, gap, photo
from tests.messages import naming

# --------------------------------------------------------------------------------------------------------- same images

SIZES = [(90, 60), (60, 90), (64, 64), (301, 200), (40, 33), (640, 480), (500, 97), (33, 501)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_evaluation_image_is_that_of_pil_and_torchvision(size, kind):
    data = encoded(photo(*size), kind)
    plain = CenterCrop(64)(Resize(64, InterpolationMode.BILINEAR, antialias=True)(Image.open(io.BytesIO(data))))
    ours = centre_crop(decode_rgb(data), 64)
    assert ours.dtype == torch.uint8
    assert gap(ours, as_tensor(plain)) <= 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_training_image_is_that_of_pil_and_torchvision(size, kind):
    data = encoded(photo(*size), kind)
    for epoch in range(3):
        top, left, side = crop_box(size[1], size[0], 0.5, sample_generator(1, epoch))
        plain = resized_crop(Image.open(io.BytesIO(data)), top, left, side, side, [64, 64], antialias=True)
        ours = random_crop(decode_rgb(data), 64, 0.5, sample_generator(1, epoch))
        assert gap(ours, as_tensor(plain)) <= 2


def test_centre_crop_of_a_very_long_image_is_right_and_cheap():
    stripe = photo(3000, 20)
    plain = CenterCrop(64)(Resize(64, antialias=True)(stripe))
    assert gap(centre_crop(stripe, 64), as_tensor(plain)) <= 2
    # resized whole, this one would take 256 x 51 million pixels
    assert centre_crop(torch.zeros(3, 1, 200_000, dtype=torch.uint8), 256).shape == (3, 256, 256)


def test_centre_crop_takes_pil_and_tensor_alike():
    image = photo(70, 50)
    assert torch.equal(centre_crop(image, 32), centre_crop(pil_to_tensor(image), 32))


def test_crop_boxes_fit_cover_the_range_and_move():
    boxes = [crop_box(60, 90, 0.75, sample_generator(0, i)) for i in range(400)]
    sides = [side for _, _, side in boxes]
    assert all(0 <= top <= 60 - side and 0 <= left <= 90 - side for top, left, side in boxes)
    assert min(sides) == round(60 * 0.75**0.5) and max(sides) == 60
    assert min(left for _, left, _ in boxes) <= 2 and max(left for _, left, _ in boxes) >= 30
    assert crop_box(1, 1, 0.75, sample_generator(0)) == (0, 0, 1)


def test_unit_range():
    x = to_unit_range(torch.tensor([0, 255, 51], dtype=torch.uint8))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.tensor([-1.0, 1.0, -0.6]))


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    "kind,mode",
    [
        *[("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "1"), ("PNG", "P")],
        *[("BMP", "RGB"), ("WEBP", "RGB"), ("TIFF", "RGB"), ("TIFF", "CMYK"), ("PPM", "RGB"), ("PPM", "L")],
    ],
)
def test_formats_and_modes_decode_as_pil_does(kind, mode):
    data = encoded(photo().convert(mode), kind)
    assert gap(decode_rgb(data), as_tensor(Image.open(io.BytesIO(data)))) <= 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_scaled_not_clipped(kind):
    ramp = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    decoded = decode_rgb(encoded(Image.fromarray(ramp), kind))
    assert gap(decoded, torch.from_numpy((ramp / 257).round().astype(np.int32)).expand(3, -1, -1)) <= 1


def test_sixteen_bit_pgm_and_rgb_png():
    ramp = np.linspace(0, 65535, 32 * 32).astype(">u2").reshape(32, 32)
    decoded = decode_rgb(b"P5 32 32 65535\n" + ramp.tobytes())
    expected = torch.from_numpy((ramp.astype(np.float64) / 257).round().astype(np.int32))
    assert gap(decoded, expected.expand(3, -1, -1)) <= 1

    def chunk(kind, body):  # Pillow reads 16-bit colour PNGs but does not write them
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in ramp)
    header = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert gap(decode_rgb(png), expected.expand(3, -1, -1)) <= 1


def test_transparency_goes_over_white():
    clear = Image.new("RGBA", (20, 10), (200, 0, 0, 0))
    half = Image.new("RGBA", (20, 10), (0, 0, 0, 128))
    assert decode_rgb(encoded(clear, "PNG")).unique().tolist() == [255]
    assert decode_rgb(encoded(half, "PNG")).unique().tolist() == [127]
    assert decode_rgb(encoded(clear.convert("LA"), "PNG")).unique().tolist() == [255]
    assert decode_rgb(encoded(clear, "WEBP", lossless=True)).unique().tolist() == [255]
    palette = Image.new("P", (20, 10), 3)
    palette.putpalette([10, 20, 30] * 256)
    assert decode_rgb(encoded(palette, "PNG", transparency=3)).unique().tolist() == [255]
    assert decode_rgb(encoded(palette, "PNG"))[:, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_once(kind, orientation):
    image = photo(64, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    decoded = decode_rgb(data)
    assert decoded.shape[1:] == ((40, 64) if orientation < 5 else (64, 40))
    assert gap(decoded, as_tensor(upright)) <= 2


def bomb():
    """A tiny PNG that claims 30000 x 30000 pixels."""
    data = bytearray(encoded(Image.new("L", (8, 8)), "PNG"))
    data[16:24] = struct.pack(">II", 30000, 30000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_truncated_images_are_refused(kind):
    data = encoded(photo(200, 150), kind)
    for cut in (len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(UnreadableImage):
            decode_rgb(data[:cut])


@pytest.mark.parametrize("data", [b"", b"no image at all", bomb(), encoded(photo(), "JPEG")[:3]])
def test_rubbish_and_bombs_are_refused(data):
    with pytest.raises(UnreadableImage):
        decode_rgb(data)


@pytest.mark.filterwarnings("ignore:IM image format")
def test_the_formats_that_the_readme_names_are_the_only_ones_decoded(monkeypatch):
    """Whatever a file is called: Pillow would start Ghostscript for an EPS, and knows forty formats."""
    Image.init()
    opened = []
    for kind, (factory, accept) in list(Image.OPEN.items()):
        spy = lambda *args, kind=kind, factory=factory: opened.append(kind) or factory(*args)  # noqa: E731
        monkeypatch.setitem(Image.OPEN, kind, (spy, accept))
    image = photo(40, 30)
    for kind in sorted(set(Image.SAVE) - {"PDF"}):
        try:
            data = encoded(image, kind)
        except (OSError, ValueError, KeyError, AttributeError):
            continue  # it cannot hold such an image, or Pillow has no encoder
        if kind in (*FORMATS, "MPO"):
            assert gap(decode_rgb(data), as_tensor(image)) < 80
        elif kind != "DIB":
            with pytest.raises(UnreadableImage, match=naming(FORMATS_TEXT)):
                decode_rgb(data)
    assert set(opened) <= {*FORMATS, "MPO"} and {"JPEG", "PNG", "TIFF"} <= set(opened)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert FORMATS_TEXT in " ".join(readme.split())
    known = {Image.registered_extensions()[extension] for extension in EXTENSIONS}
    assert known == set(FORMATS) and not set(EXTENSIONS) & set(NOT_READ)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encoded(photo(), "GIF"), "GIF"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
        (b"\0\0\0\x1cftypavif" + bytes(40), "AVIF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "EPS"),
        (b"%PDF-1.4\n", "PDF"),
        (b" \n<!DOCTYPE html><html>404</html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
    ],
)
def test_other_formats_are_named(tmp_path, data, name):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(UnreadableImage, match=naming(name, FORMATS_TEXT)):
        read_rgb(tmp_path / "a.png")


def test_the_content_decides_and_not_the_name(tmp_path):
    photo().save(tmp_path / "a.png", "WEBP", lossless=True)
    assert torch.equal(read_rgb(tmp_path / "a.png"), as_tensor(photo()))


def claims(width, height, kind):
    """A tiny file whose header claims another size."""
    data = bytearray(encoded(Image.new("RGB", (8, 8)), kind))
    if kind == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif kind == "PPM":
        data = bytearray(b"P6 %d %d 255\n" % (width, height))
    elif kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "JPEG"])
@pytest.mark.parametrize("size", [(13_000, 13_800), (60_000, 60_000), (89_478_486, 1), (0, 8)])
def test_an_image_s_size_is_bounded_before_it_is_decoded(kind, size):
    if kind == "JPEG" and size[0] > 65_535:
        size = (60_000, 50_000)
    tracemalloc.start()
    with pytest.raises(UnreadableImage):
        decode_rgb(claims(*size, kind))
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_the_limit_names_itself(monkeypatch):
    monkeypatch.setattr("latent_verse.data.transforms.MAX_PIXELS", 40 * 30)
    assert decode_rgb(encoded(photo(40, 30), "PNG")).shape == (3, 30, 40)
    with pytest.raises(UnreadableImage, match=naming("41 x 30", "1,200")):
        decode_rgb(encoded(photo(41, 30), "PNG"))
    large = photo(80, 30)
    halved = decode_rgb(encoded(large, "JPEG", quality=95))
    assert gap(halved, as_tensor(large.resize((40, 15), Image.Resampling.BOX))) < 20
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_rgb(encoded(large, "JPEG", exif=exif)).shape == (3, 40, 15)
    with pytest.raises(UnreadableImage, match=naming("81 x 30")):
        decode_rgb(encoded(photo(81, 30), "JPEG"))


@pytest.mark.parametrize(("size", "kind"), [((16383, 5461), "WEBP"), ((1, 300_000), "PNG"), ((300_000, 1), "PPM")])
def test_what_takes_more_memory_than_its_pixels_is_bounded_by_it(size, kind, monkeypatch):
    """A WebP's decoder holds four copies of four bytes a pixel, Pillow a pointer and more for each row."""
    file = WEBP_HEADER if kind == "WEBP" else claims(*size, kind)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(UnreadableImage, match=naming(f"{size[0]} x {size[1]}")):
        decode_rgb(file)


# lossless, of 16383 x 5461 pixels in one colour
WEBP_HEADER = bytes.fromhex("524946461a000000574542505650384c0e0000002ffe3f5505071011fd0f4444ff03")


def test_photos_of_any_shape_that_cameras_make_are_within_the_bounds():
    for size in [(9504, 6336), (10_000, 8900), (100_000, 800), (800, 100_000)]:  # 60 and 89 MP, panoramas
        transforms.check_pixels(*size, "PNG")
    transforms.check_pixels(16383, 4096, "WEBP")


def tiff(bits, white, pixels, kind=1):
    """An uncompressed gray TIFF of one row; `white` is PhotometricInterpretation's, `kind` SampleFormat's number."""
    width = len(pixels) * 8 // bits
    known = {256: width, 257: 1, 258: bits, 259: 1, 262: white, 273: 146, 277: 1, 278: 1, 279: len(pixels), 339: kind}
    tags = [struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in known.items()]
    start = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(tags) + bytes(4)
    return start.ljust(146, b"\0") + pixels


@pytest.mark.parametrize(
    ("bits", "white", "values"),
    [(16, 1, [0, 65535, 257]), (16, 0, [65535, 0, 65278]), (12, 1, [0, 4095]), (8, 0, [255, 0])],
)
def test_gray_tiffs_are_scaled_by_their_bits_and_their_white(bits, white, values):
    pixels = bytes([0, 0x0F, 0xFF]) if bits == 12 else np.array(values, f"<u{bits // 8}").tobytes()
    assert decode_rgb(tiff(bits, white, pixels))[0, 0].tolist() == [0, 255, 1][: len(values)]


@pytest.mark.parametrize(("values", "kind"), [([0, 2**32 - 1], 1), ([-5, 3], 2), ([0, 70000], 2)])
def test_integers_whose_white_is_unknown_are_refused(values, kind):
    with pytest.raises(UnreadableImage, match=naming("integers", 65535)):
        decode_rgb(tiff(32, 1, np.array(values).astype("<u4" if kind == 1 else "<i4").tobytes(), kind))


def test_transparency_of_16_bit_gray_is_white():
    image = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    assert decode_rgb(encoded(image, "PNG", transparency=257))[0, 0].tolist() == [0, 255, 255]


def test_damaged_metadata_leave_the_pixels():
    data = encoded(photo(20, 10), "PNG")
    chunk = b"eXIf" + b"no metadata"
    exif = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert torch.equal(decode_rgb(data[:33] + exif + data[33:]), decode_rgb(data))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "1", "CMYK", "I;16", "F"])
def test_strips_change_nothing(mode, monkeypatch):
    image = photo(37, 53)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255)
    else:
        image = image.convert(mode)
    options = {"transparency": 3} if mode == "P" else {}
    data = encoded(image, "PNG" if mode not in ("CMYK", "F") else "TIFF", **options)
    whole = decode_rgb(data)
    monkeypatch.setattr("latent_verse.data.transforms.STRIP", 37 * 5)
    assert torch.equal(decode_rgb(data), whole)


def test_files_are_looked_at_before_they_are_read(tmp_path, monkeypatch):
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(10 << 30)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "lost.png").symlink_to("nowhere")
    (tmp_path / "round.png").symlink_to("round.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name, fact in [
        *[("sparse.jpg", "10,737,418,240"), ("pipe.png", "pipe"), ("folder.png", "folder"), ("zero.png", "device")],
        *[("lost.png", "No such file"), ("round.png", "symbolic links"), ("empty.png", "empty"), ("a\0.png", "null")],
    ]:
        with pytest.raises(UnreadableImage, match=naming(fact)):
            read_rgb(tmp_path / name)


def test_pillows_warnings_stay_inside():
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0" + bytes(4)  # five entries, of which there are none
    palette = Image.new("P", (20, 10), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_rgb(encoded(photo(), "WEBP", exif=exif))
        decode_rgb(encoded(palette, "PNG", transparency=bytes(range(4))))


def test_jpegs_are_read_where_torchvision_has_no_libjpeg(monkeypatch):
    def absent(*args):
        raise RuntimeError("decode_jpeg: torchvision not compiled with libjpeg support")

    data = encoded(photo(), "JPEG")
    expected = decode_rgb(data)
    monkeypatch.setattr("latent_verse.data.transforms.decode_jpeg", absent)
    assert gap(decode_rgb(data), expected) <= 2


def test_jpegs_are_read_where_torchvision_has_no_decoder(monkeypatch):
    """A later torchvision may drop `decode_jpeg`."""
    image = encoded(photo(), "JPEG")
    expected = decode_rgb(image)
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    monkeypatch.delitem(sys.modules, "latent_verse.data.transforms")
    without = importlib.import_module("latent_verse.data.transforms")
    assert without.decode_jpeg is None and gap(without.decode_rgb(image), expected) <= 2


# ------------------------------------------------------------------------------------------------------------- folders


def make_folder(root, names):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF", "pgm": "PPM"}.get(path.suffix[1:].lower())
        photo(40, 30, seed=i).save(path, kind or path.suffix[1:])
    return root


ALL_KINDS = ["a.jpg", "b.JPEG", "c.png", "d.bmp", "sub/e.webp", "sub/deep/f.tif", "sub/g.ppm", "sub/h.PGM"]


def test_flat_folder_takes_every_format_at_any_depth(tmp_path):
    make_folder(tmp_path, ALL_KINDS)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "._a.jpg").write_bytes(b"macOS leaves such files")
    dataset = FlatImages(tmp_path, 16)
    assert [os.path.relpath(dataset.paths[i], tmp_path) for i in range(8)] == [
        *["a.jpg", "b.JPEG", "c.png", "d.bmp", "sub/e.webp", "sub/g.ppm", "sub/h.PGM", "sub/deep/f.tif"]
    ]
    for image, label in (dataset[i] for i in range(len(dataset))):
        assert image.shape == (3, 16, 16) and image.dtype == torch.float32 and label == -1
        assert -1 <= image.min() < image.max() <= 1
    assert FlatImages(tmp_path, 16, as_uint8=True)[0][0].dtype == torch.uint8


def test_imagefolder_labels_are_those_of_torchvision(tmp_path):
    make_folder(tmp_path, ["dog/1.png", "cat/2.jpg", "cat/more/3.jpg", "ant/4.png"])
    (tmp_path / "empty").mkdir()
    dataset = ImageDataset(tmp_path, 16)
    assert dataset.classes == ["ant", "cat", "dog", "empty"]
    assert dataset.class_to_idx == {"ant": 0, "cat": 1, "dog": 2, "empty": 3}
    assert [dataset[i][1] for i in range(4)] == [0, 1, 1, 2]


def test_links_are_followed_and_loops_end(tmp_path):
    make_folder(tmp_path / "real", ["a.png"])
    root = tmp_path / "root"
    root.mkdir()
    (root / "one").symlink_to(tmp_path / "real")
    (root / "two").symlink_to(tmp_path / "real")
    (root / "up").symlink_to(root)
    assert len(FlatImages(root, 16)) == 2


def test_links_that_lead_in_millions_of_ways_are_refused(tmp_path):
    for i in range(26):
        (tmp_path / f"d{i}").mkdir()
        for name in "ab":
            (tmp_path / f"d{i}" / name).symlink_to(f"../d{i + 1}")
    make_folder(tmp_path, ["d26/a.png"])
    with pytest.raises(DataError, match=naming(tmp_path / "d0", tmp_path / "d26", "links", 100)):
        FlatImages(tmp_path / "d0", 16)
    assert len(FlatImages(tmp_path / "d21", 16)) == 32


def test_path_list_keeps_odd_names():
    names = ["a.jpg", "ü/ö 1.png", "b\udcff.jpg", ""]
    paths = PathList("/root", names)
    assert [paths[i] for i in range(len(paths))] == [f"/root/{name}" for name in names]


def special(root):
    """What lies about in folders besides images."""
    root.mkdir(exist_ok=True)
    os.mkfifo(root / "a.jpg")
    (root / "b.png").mkdir()
    (root / "lost.png").symlink_to("nowhere")
    (root / "round.png").symlink_to("round.png")
    (root / "null.png").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as there:
        here = os.getcwd()
        os.chdir(root)  # a socket's path is short
        there.bind("socket.jpg")
        os.chdir(here)
    for name in ("._c.jpg", ".DS_Store", ".hidden/d.jpg", "__MACOSX/e.jpg", "photo.gif", "photo.HEIC"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"no image")


@pytest.mark.parametrize("kind", [ImageDataset, FlatImages])
def test_hidden_and_special_files_are_passed_over(tmp_path, kind, caplog):
    """None of them is opened: a pipe would hang the program. What a user might miss is said, in one line."""
    special(tmp_path / "class")
    make_folder(tmp_path, ["class/b.png/1.png", "class/2.jpg"])
    make_folder(tmp_path, [os.fsdecode(b"class/\xff.png")])
    dataset = kind(tmp_path, 16)
    names = [os.path.relpath(dataset.paths[i], tmp_path) for i in range(len(dataset))]
    assert names == ["class/2.jpg", os.fsdecode(b"class/\xff.png"), "class/b.png/1.png"]
    assert all(item is not None for item in dataset) and dataset.skipped.count == 0
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and naming("5 links to nothing", "1 .gif", "1 .heic").search(said[0])
    if kind is ImageDataset:
        (tmp_path / "__MACOSX").mkdir()
        (tmp_path / "round").symlink_to("round")
        assert kind(tmp_path, 16).classes == ["class"]


def test_names_are_logged_in_one_line_of_plain_characters(tmp_path, caplog):
    odd = ["\x1b[2J.png", "two\nlines.png", os.fsdecode(b"\xff.png")]
    make_folder(tmp_path, ["a.png"])
    for name in odd:
        (tmp_path / name).write_bytes(b"no image")
    dataset = FlatImages(tmp_path, 16, train=False)
    assert sum(item is None for item in dataset) == 3 == dataset.skipped.count
    assert all(record.getMessage().isprintable() for record in caplog.records) and len(caplog.records) >= 3


def test_folders_that_cannot_be_read_are_said_once(tmp_path, monkeypatch, caplog):
    make_folder(tmp_path, ["a/1.png", "b/2.png", "c/3.png", "d/4.png"])
    scandir = os.scandir

    def closed(path):
        if os.path.basename(path) in ("b", "c"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", closed)
    assert len(FlatImages(tmp_path, 16)) == 2
    assert len(caplog.records) == 1
    assert naming("2 folders", tmp_path / "b", "Permission denied").search(caplog.text)


def test_folders_may_be_nested_deeper_than_python_recurses(tmp_path):
    make_folder(tmp_path, ["1.png"])
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        shutil.copy(tmp_path / "1.png", "2.png")
        assert len(list(walk(str(tmp_path), (".png",), Counter()))) == 2
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # shutil.rmtree recurses


@pytest.mark.parametrize("kind", [ImageDataset, FlatImages])
def test_missing_and_empty_folders(tmp_path, kind):
    with pytest.raises(DataError, match=naming("train_dir", tmp_path / "nowhere")):
        kind(tmp_path / "nowhere", 16, key="train_dir")
    (tmp_path / "file.png").write_bytes(b"x")
    with pytest.raises(DataError, match=naming(tmp_path / "file.png", "file")):
        kind(tmp_path / "file.png", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=naming(tmp_path / "empty", ".jpg", "no file")):
        kind(tmp_path / "empty", 16)
    (tmp_path / "text" / "class").mkdir(parents=True)
    for i in range(12):
        (tmp_path / "text" / "class" / f"{i}.txt").write_text("x")
    with pytest.raises(DataError, match=naming(tmp_path / "text", ".jpg", "12 .txt")):
        kind(tmp_path / "text", 16)


def test_layout_mistakes_are_named(tmp_path):
    make_folder(tmp_path / "flat", ["a.png", "b.png"])
    with pytest.raises(DataError, match=naming(tmp_path / "flat", 2, "--dataset flat")):
        ImageDataset(tmp_path / "flat", 16)
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(b"x")
    for kind in (ImageDataset, FlatImages):
        with pytest.raises(DataError, match=naming(tmp_path / "tars", "--dataset webdataset")):
            kind(tmp_path / "tars", 16)


def test_folder_without_one_readable_image(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(b"damaged")
    with pytest.raises(DataError, match=naming(5, tmp_path / "0.jpg", "format")):
        FlatImages(tmp_path, 16)


# ------------------------------------------------------------------------------------------------------- corrupt files


@pytest.fixture
def damaged(tmp_path):
    """Eight images of which 2, 3 and 7 are damaged."""
    make_folder(tmp_path, [f"{i}.jpg" for i in range(8)])
    (tmp_path / "2.jpg").write_bytes(b"")
    (tmp_path / "3.jpg").write_bytes((tmp_path / "4.jpg").read_bytes()[:400])
    (tmp_path / "7.jpg").write_bytes(bomb())
    return tmp_path


def test_training_takes_the_next_readable_image(damaged, caplog):
    class Numbered(FlatImages):
        def target(self, used, epoch, index):
            return used

    dataset = Numbered(damaged, 16, as_uint8=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            items = [dataset[i] for i in range(8)]
    assert [used for _, used in items] == [0, 1, 4, 4, 4, 5, 6, 0]
    assert all(image.shape == (3, 16, 16) for image, _ in items)
    assert dataset.skipped.count == 3
    assert len(caplog.records) == 3  # once each, not once per epoch
    for name in ("2.jpg", "3.jpg", "7.jpg"):
        assert str(damaged / name) in caplog.text


def test_evaluation_drops_them(damaged):
    dataset = FlatImages(damaged, 16, train=False)
    assert [dataset[i] is None for i in range(8)] == [i in (2, 3, 7) for i in range(8)]
    assert dataset.skipped.count == 3


def test_all_files_lost_after_the_start_is_an_error_not_a_recursion(tmp_path):
    dataset = FlatImages(make_folder(tmp_path, [f"{i}.png" for i in range(30)]), 16)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(DataError, match=naming(30, tmp_path / "13.png")):  # names are in string order
        dataset[5]


# ---------------------------------------------------------------------------------------------------------- randomness


def test_crops_depend_on_seed_epoch_and_index_only(tmp_path):
    make_folder(tmp_path, ["0.png", "1.png"])

    def crop(seed, epoch, index):
        return FlatImages(tmp_path, 16, seed=seed, as_uint8=True)[(epoch, index)][0]

    first = crop(0, 0, 0)
    torch.manual_seed(123)  # the global generator plays no part
    assert torch.equal(crop(0, 0, 0), first)
    assert not torch.equal(crop(0, 1, 0), first)
    assert not torch.equal(crop(1, 0, 0), first)
    dataset = FlatImages(tmp_path, 16, as_uint8=True)
    dataset.epoch = 1
    assert torch.equal(dataset[0][0], crop(0, 1, 0))
    ours = FlatImages(tmp_path, 16, train=False, as_uint8=True)
    assert torch.equal(ours[(0, 1)][0], ours[(5, 1)][0])


def test_fake_images_are_repeatable_varied_and_not_noise():
    dataset = FakeDataset(20, 32, as_uint8=True)
    assert len(dataset) == 20
    assert torch.equal(dataset[3][0], FakeDataset(50, 32, as_uint8=True)[3][0])
    assert not torch.equal(dataset[3][0], dataset[4][0])
    assert not torch.equal(dataset[3][0], FakeDataset(20, 32, train=False, as_uint8=True)[3][0])
    image, label = FakeDataset(20, 32)[13]
    assert image.dtype == torch.float32 and image.min() >= -1 and image.max() <= 1 and label == 3
    neighbours = (image[:, :, 1:] - image[:, :, :-1]).abs().median()
    assert neighbours < 0.1 < image.std()
    with pytest.raises(IndexError):
        dataset[20]


def test_datasets_can_be_sent_to_spawned_workers(tmp_path):
    dataset = FlatImages(make_folder(tmp_path, ["0.png", "1.png"]), 16, as_uint8=True)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[(2, 1)][0], dataset[(2, 1)][0])


def test_the_original_s_name_stays():
    from latent_verse.data import ImageDataset2

    assert ImageDataset2 is FlatImages


def test_the_room_s_map_lists_every_file_and_every_name_is_there():
    folder = Path(data.__file__).parent
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if path.name != "__init__.py"}
    assert set(re.findall(r"^    (\S+\.py) ", data.__doc__, re.MULTILINE)) == files
    assert all(hasattr(data, name) for name in data.__all__)


def test_importing_the_room_is_cheap():
    code = "import sys, latent_verse.data as d; d.DataError; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_lack_of_descriptors_is_no_fault_of_the_image(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"x")

    def full(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match="Too many open files"):
        read_rgb(tmp_path / "a.png")
