"""Decoding, cropping and the folder datasets: the same images as plain PIL + torchvision, and bad input refused."""

import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latent_verse import data
from latent_verse.data import DataError, FakeDataset, FlatImages, ImageDataset
from latent_verse.data.images import PathList
from tests.image_files import bomb, make_folder
from tests.messages import naming

# ------------------------------------------------------------------------------------------------------------- folders


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


def test_path_list_keeps_odd_names():
    names = ["a.jpg", "ü/ö 1.png", "b\udcff.jpg", ""]
    paths = PathList("/root", names)
    assert [paths[i] for i in range(len(paths))] == [f"/root/{name}" for name in names]


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
