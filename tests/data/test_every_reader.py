"""What counts as an image is the same wherever images are read: in every layout of data, and in every program."""

from __future__ import annotations

import io
import json
from collections import Counter

import pytest
from PIL import Image

from latent_verse.data import EvalShards, FlatImages, ImageDataset, Shards
from latent_verse.data.captions import CocoCaptions, KarpathyCaptions, PairFolder, TableCaptions
from latent_verse.data.datasets import how_many
from latent_verse.data.folders import EXTENSIONS
from latent_verse.data.pairs import PairShards
from latent_verse.evaluation.samples import read_groups, read_image
from latent_verse.inference.tasks import read_images
from tests.messages import naming
from tests.shard_files import write_tar

KINDS = {".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".webp": "WEBP", ".gif": "GIF"}
KINDS |= {".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".ppm": "PPM", ".pgm": "PPM"}
RED = (255, 0, 0)


def bytes_of(kind: str) -> bytes:
    """A red image; of a format that can hold several, a blue one follows."""
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, "blue")]
    more = {"save_all": True, "append_images": frames[1:]} if kind in ("GIF", "WEBP", "TIFF", "PNG") else {}
    frames[0].save(data := io.BytesIO(), kind, **more, **({"lossless": True} if kind == "WEBP" else {}))
    return data.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Pairs in a class folder: an image of every kind with its caption, and files that are not read."""
    place = tmp_path / "data" / "class"
    place.mkdir(parents=True)
    for extension, kind in KINDS.items():
        (place / f"{extension[1:]}{extension}").write_bytes(bytes_of(kind))
        (place / f"{extension[1:]}.txt").write_text("red")
    for name in ("a.heic", "b.svg", "c.HEIC"):
        (place / name).write_bytes(b"")
    return place


def checked(dataset, unit: str, beside: str) -> None:
    assert how_many(dataset) == f"{len(KINDS)} {unit}s{beside}"
    items = list(EvalShards(dataset, 2)) if isinstance(dataset, Shards) else [dataset[i] for i in range(len(dataset))]
    assert len(items) == len(KINDS)
    for x, _ in items:
        red, green, blue = (x if isinstance(dataset, Shards) else (x + 1) * 127.5).float().mean(dim=(1, 2)).tolist()
        assert red > 250 and green < 5 and blue < 5


def test_every_kind_is_tried_here():
    assert set(KINDS) == set(EXTENSIONS)


def test_folders(folder):
    beside = f" ({len(KINDS)} .txt, 2 .heic, 1 .svg not read)"
    checked(FlatImages(folder, 16, train=False), "image", beside)
    checked(ImageDataset(folder.parent, 16, train=False), "image", beside)
    checked(PairFolder(folder, 16, train=False), "pair", " (2 .heic, 1 .svg not read)")


@pytest.mark.parametrize(("dataset", "unit"), [(Shards, "image"), (PairShards, "pair")])
def test_shards(folder, tmp_path, dataset, unit):
    write_tar(tmp_path / "a.tar", [(file.name, file.read_bytes()) for file in sorted(folder.iterdir())])
    checked(dataset(str(tmp_path / "a.tar"), 16), unit, " (2 .heic, 1 .svg not read) in 1 shard")


def test_captions_files(folder, tmp_path):
    names = [f"{extension[1:]}{extension}" for extension in KINDS]
    (tmp_path / "a.csv").write_text("image,caption\n" + "".join(f"{folder / name},red\n" for name in names))
    checked(TableCaptions(tmp_path / "a.csv", 16, train=False), "pair", "")
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    annotations = [{"image_id": i, "caption": "red"} for i in range(len(names))]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    checked(CocoCaptions(tmp_path / "a.json", folder, 16, train=False), "pair", "")
    about = [{"filename": name, "split": "val", "sentences": [{"raw": "red"}]} for name in names]
    (tmp_path / "b.json").write_text(json.dumps({"images": about}))
    checked(KarpathyCaptions(tmp_path / "b.json", folder, 16, split="val", train=False), "pair", "")


def test_images_to_caption_and_those_of_another_system(folder, capsys):
    found = dict(read_images([str(folder)], 16))
    assert len(found) == len(KINDS) and all(x[0].mean() > 0.95 and x[2].mean() < -0.95 for x in found.values())
    assert naming(folder, f"{len(KINDS)} images", "2 .heic", "not read").search(capsys.readouterr().err)
    others = Counter()
    groups = read_groups(folder, others)
    assert len(groups) == len(KINDS) and others[".heic"] == 2
    for group in groups:
        image = read_image(group.files[0], 16)
        red, _, blue = image.float().mean(dim=(1, 2)).tolist()
        assert red > 250 and blue < 5
