"""Decoding: every format and mode as Pillow reads it; what is damaged, too large or of another kind is refused."""

import errno
import importlib
import io
import os
import struct
import sys
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from latent_verse.data import decoding
from latent_verse.data.decoding import FORMATS, FORMATS_TEXT, UnreadableImage, decode_rgb, read_rgb
from latent_verse.data.folders import EXTENSIONS
from tests.image_files import as_tensor, bomb, encoded, gap, photo
from tests.messages import naming


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
    assert known == set(FORMATS)


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
    monkeypatch.setattr("latent_verse.data.decoding.MAX_PIXELS", 40 * 30)
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


@pytest.mark.parametrize("tile", [(40_000, 44_800), (300_000, 16)])
def test_a_tile_is_bounded_as_the_image_is(tile, monkeypatch):
    """A TIFF of one pixel may declare tiles of any size, and its decoder takes the memory of a whole one."""
    tags = {256: 1, 257: 1, 258: 8, 259: 5, 262: 1, 277: 1, 322: tile[0], 323: tile[1], 324: 134, 325: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + b"\x80\0\0"
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(UnreadableImage, match=naming("tiles", f"{tile[0]} x {tile[1]}")):
        decode_rgb(data)


# lossless, of 16383 x 5461 pixels in one colour
WEBP_HEADER = bytes.fromhex("524946461a000000574542505650384c0e0000002ffe3f5505071011fd0f4444ff03")


def test_photos_of_any_shape_that_cameras_make_are_within_the_bounds():
    for size in [(9504, 6336), (10_000, 8900), (100_000, 800), (800, 100_000)]:  # 60 and 89 MP, panoramas
        decoding.check_pixels(*size, "PNG")
    decoding.check_pixels(16383, 4096, "WEBP")


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
    monkeypatch.setattr("latent_verse.data.decoding.STRIP", 37 * 5)
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
    monkeypatch.setattr("latent_verse.data.decoding.decode_jpeg", absent)
    assert gap(decode_rgb(data), expected) <= 2


def test_jpegs_are_read_where_torchvision_has_no_decoder(monkeypatch):
    """A later torchvision may drop `decode_jpeg`."""
    image = encoded(photo(), "JPEG")
    expected = decode_rgb(image)
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    monkeypatch.delitem(sys.modules, "latent_verse.data.decoding")
    without = importlib.import_module("latent_verse.data.decoding")
    assert without.decode_jpeg is None and gap(without.decode_rgb(image), expected) <= 2


def test_a_lack_of_descriptors_is_no_fault_of_the_image(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"x")

    def full(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match="Too many open files"):
        read_rgb(tmp_path / "a.png")
