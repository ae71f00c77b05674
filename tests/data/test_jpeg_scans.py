"""JPEGs that lack data are told from whole ones, whatever the whole ones look like."""

from __future__ import annotations

import io
import random

import pytest
import torch
from PIL import Image

from latent_verse.data import decoding, jpeg_scans
from latent_verse.data.decoding import UnreadableImage, decode_rgb
from latent_verse.data.jpeg_scans import read_scans
from latent_verse.inference.image_io import load_image
from tests.image_files import encoded, gap, photo
from tests.messages import naming

KINDS = {
    "baseline": {},
    "4:2:0": {"subsampling": 2},
    "optimized": {"optimize": True, "quality": 95, "subsampling": 0},
    "progressive": {"progressive": True},
    "restarts by row": {"restart_marker_rows": 1},
    "restarts by block": {"restart_marker_blocks": 3},
    "gray": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def jpeg(kind, image=None):
    options = dict(KINDS[kind])
    return encoded((image or photo(300, 200)).convert(options.pop("mode", "RGB")), "JPEG", **options)


def damaged(data, how, at):
    """The file with something in its pixels' data, at byte `at`: torchvision and Pillow take it without a word."""
    return {
        "ends": data[:at] + b"\xff\xd9" * 20 + data[at + 40 :],
        "another marker": data[:at] + b"\xff\xb7" + data[at + 2 :],
        "a marker's length": data[:at] + b"\xff\xc0" + data[at + 2 :],
        "restarts": data[:at] + b"\xff\xd6" + data[at + 2 :],
        "cut": data[:at],
        "cut, then zeros": data[:at] + bytes(len(data) - at),
        "cut and closed": data[:at] + b"\xff\xd9",
    }[how]


@each_kind
@pytest.mark.parametrize("how", ["ends", "another marker", "a marker's length", "restarts", "cut", "cut, then zeros"])
def test_damage_in_the_middle_is_found(kind, how):
    data = jpeg(kind)
    start = data.index(b"\xff\xda") + 20
    for part in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(UnreadableImage):
            decode_rgb(damaged(data, how, start + int(part * (len(data) - start))))


@each_kind
def test_a_file_that_was_cut_and_closed_is_found(kind):
    data = jpeg(kind)
    start = data.index(b"\xff\xda") + 20
    for part in (0.02, 0.3, 0.5):  # of the last progressive scan, only the finest bits would be missing
        with pytest.raises(UnreadableImage):
            decode_rgb(damaged(data, "cut and closed", start + int(part * (len(data) - start))))


@each_kind
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + bytes(3000),
        lambda data: data + random.Random(0).randbytes(3000),
        lambda data: data + data,  # as in MPO and motion photos: another image behind the first
        lambda data: data[:-2] + b"\xff\xff\xff\xff\xd9",  # fill bytes before a marker
        lambda data: data[:-2],  # some cameras write no end
        lambda data: data[:-2] + b"and text",
        lambda data: data[:2] + b"\xff\xe1\x00\x09\xff\xda\xff\xd9\xff\xd8\xff" + data[2:],  # a thumbnail's markers
        lambda data: data[:-2] + b"\xff\xfe\x00\x04no" + data[-2:],  # a comment behind the scan
        lambda data: data[:2] + b"\xff\xff" + data[2:],
    ],
)
def test_whole_photos_are_read(kind, change):
    data = jpeg(kind)
    assert gap(decode_rgb(change(data)), decode_rgb(data)) == 0


@each_kind
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (17, 9), (64, 64)])
def test_gray_corners_raise_a_doubt_that_is_dispelled(kind, size, monkeypatch):
    gray = Image.new("RGB", size, (128, 128, 128))
    data = jpeg(kind, gray)
    decoded = []
    monkeypatch.setattr(decoding, "_jpeg_pixels", lambda *a, f=decoding._jpeg_pixels: decoded.append(1) or f(*a))
    assert decode_rgb(data).shape == (3, size[1], size[0])
    assert len(decoded) == 3 or kind == "CMYK"


def test_whole_photos_are_decoded_once(monkeypatch):
    decoded = []
    monkeypatch.setattr(decoding, "_jpeg_pixels", lambda *a, f=decoding._jpeg_pixels: decoded.append(1) or f(*a))
    for number in range(10):
        for kind in KINDS:
            decode_rgb(jpeg(kind, photo(60, 40, seed=number)))
    assert len(decoded) == 10 * len(KINDS)


def test_photos_of_phones_are_read():
    """MPO: a second image behind the first, which refers to it."""
    file = io.BytesIO()
    photo(64, 48).save(file, "MPO", save_all=True, append_images=[photo(64, 48, seed=1)])
    assert gap(decode_rgb(file.getvalue()), decode_rgb(encoded(photo(64, 48), "JPEG"))) <= 2


def test_halved_images_are_checked_too(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 300 * 200 // 2)
    data = jpeg("baseline")
    assert decode_rgb(data).shape == (3, 100, 150)
    with pytest.raises(UnreadableImage):
        decode_rgb(damaged(data, "ends", len(data) // 2))


def test_without_torchvisions_decoder(monkeypatch):
    monkeypatch.setattr(decoding, "decode_jpeg", None)
    data = jpeg("baseline")
    assert gap(decode_rgb(data[:-2]), decode_rgb(data)) == 0
    with pytest.raises(UnreadableImage):
        decode_rgb(damaged(data, "ends", len(data) // 2))


def test_the_reason_is_said():
    data = jpeg("restarts by row")
    at = data.index(b"\xff\xd2")
    assert "restart marker 2" in read_scans(data[:at] + data[at + 2 :]).damage
    data = jpeg("progressive")
    assert "progressive" in read_scans(data[: data.rindex(b"\xff\xda")] + b"\xff\xd9").damage
    assert read_scans(b"") == read_scans(b"\xff\xd8\xff") == jpeg_scans.Scans(0, True)


def test_any_bytes_can_be_looked_at():
    rng, data = random.Random(0), jpeg("progressive", photo(40, 30))
    for _ in range(2000):
        at = rng.randrange(len(data))
        read_scans(data[:at] + rng.randbytes(rng.randrange(6)) + data[at + rng.randrange(6) :])
    for marker in range(256):
        read_scans(bytes((0xFF, 0xD8, 0xFF, marker, 0, 3, 255)) * 3)


def test_every_reader_of_files_refuses_them(tmp_path):
    from latent_verse.data import DataError
    from latent_verse.data.images import FlatImages
    from latent_verse.evaluation.samples import read_image

    data = jpeg("baseline")
    (tmp_path / "damaged.jpg").write_bytes(damaged(data, "ends", len(data) // 2))
    (tmp_path / "whole.jpg").write_bytes(data)
    dataset = FlatImages(tmp_path, 16, train=False)
    assert dataset[0] is None and torch.is_tensor(dataset[1][0]) and dataset.skipped.count == 1
    for read in (load_image, read_image):
        with pytest.raises(DataError, match=naming("damaged.jpg")):
            read(tmp_path / "damaged.jpg", 16)


def test_thousands_of_scans_are_refused_before_anything_is_decoded(monkeypatch):
    """Each costs a pass over all pixels: 2,000 of one byte, 22 kB, would be decoded for 8 seconds."""
    data = jpeg("progressive")
    last = data.rindex(b"\xff\xda")
    many = data[:last] + data[last : last + 12] * 10_000 + data[last:]
    monkeypatch.setattr(decoding, "_jpeg_pixels", None)
    with pytest.raises(UnreadableImage, match=naming("scans")):
        decode_rgb(many)


@pytest.mark.parametrize("kind", ["baseline", "progressive", "gray", "CMYK"])
def test_more_pixels_than_the_file_has_bytes_for_are_refused_before_they_are_decoded(kind, monkeypatch):
    """Decoders would fill an image of 89 megapixels, or two gigabytes of a progressive one, with gray."""
    data = bytearray(jpeg(kind, Image.new("RGB", (16, 16), (10, 20, 30))))
    at = next(data.index(bytes((0xFF, frame))) for frame in (0xC0, 0xC2) if bytes((0xFF, frame)) in data)
    data[at + 5 : at + 9] = (9459).to_bytes(2, "big") * 2
    monkeypatch.setattr(decoding, "_jpeg_pixels", None)
    with pytest.raises(UnreadableImage, match=naming("9459 x 9459", f"{len(data):,}")):
        decode_rgb(bytes(data))
    with pytest.raises(UnreadableImage, match=naming("9459 x 9459", "progressive")):
        monkeypatch.setattr(jpeg_scans, "MAX_COEFFICIENTS", 9459**2 - 1)
        decode_rgb(bytes(data) + bytes(1 << 20)) if kind == "progressive" else decode_rgb(progressive(data, at))


def progressive(data, at):
    """The file with its frame declared as progressive, and bytes behind its end."""
    return bytes(data[:at]) + b"\xff\xc2" + bytes(data[at + 2 :]) + bytes(1 << 20)


def test_the_largest_images_of_few_bytes_are_read():
    """One colour takes a bit or two for each block of 8 x 8."""
    for kind in KINDS:
        for size in ((2000, 2000), (3000, 9)):
            assert decode_rgb(jpeg(kind, Image.new("RGB", size, "white"))).min() == 255


def test_whole_gray_photos_are_read_without_a_word(capfd):
    for kind in KINDS:
        decode_rgb(jpeg(kind, Image.new("RGB", (64, 64), (128, 128, 128))))
    assert capfd.readouterr() == ("", "")


def test_pixels_may_end_with_zeros():
    """A file without an end mark, of which the last block is flat."""
    read = 0
    for level in range(0, 256, 3):
        image = photo(64, 64, seed=level)
        image.paste((level,) * 3, (32, 32, 64, 64))
        data = jpeg("baseline", image)
        read += data[:-2].endswith(b"\0")
        assert gap(decode_rgb(data[:-2]), decode_rgb(data)) == 0
    assert read
