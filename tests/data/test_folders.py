"""Walking folders: links, hidden and special files, odd names."""

import os
import shutil
import socket
import subprocess
from collections import Counter

import pytest

from latent_verse.data import DataError, FlatImages, ImageDataset
from latent_verse.data.captions import PairFolder
from latent_verse.data.datasets import how_many
from latent_verse.data.folders import walk
from latent_verse.data.images import OUTSIDE
from tests.image_files import make_folder
from tests.messages import naming


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
    for name in ("._c.jpg", ".DS_Store", ".hidden/d.jpg", "__MACOSX/e.jpg", "photo.svg", "photo.HEIC"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"no image")


@pytest.mark.parametrize("kind", [ImageDataset, FlatImages])
def test_hidden_and_special_files_are_passed_over(tmp_path, kind, caplog):
    """None of them is opened: a pipe would hang the program. What a user might miss is said."""
    special(tmp_path / "class")
    make_folder(tmp_path, ["class/b.png/1.png", "class/2.jpg"])
    make_folder(tmp_path, [os.fsdecode(b"class/\xff.png")])
    dataset = kind(tmp_path, 16)
    names = [os.path.relpath(dataset.paths[i], tmp_path) for i in range(len(dataset))]
    assert names == ["class/2.jpg", os.fsdecode(b"class/\xff.png"), "class/b.png/1.png"]
    assert all(item is not None for item in dataset) and dataset.skipped.count == 0
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and naming("5 links to nothing").search(said[0])
    assert how_many(dataset) == "3 images (1 .heic, 1 .svg not read)"
    if kind is ImageDataset:
        (tmp_path / "__MACOSX").mkdir()
        (tmp_path / "round").symlink_to("round")
        assert kind(tmp_path, 16).classes == ["class"]


def test_what_lies_beside_the_images_is_counted_by_kind(tmp_path):
    """In every layout of folders the same way; what is outside of class folders is no class's image."""
    make_folder(tmp_path, ["class/1.png"])
    for name in ("a.heic", "b.HEIC", "c.svg", "d.txt", "e.md", "f", "g.zip", "h.csv", "two\nlines.x\ny", ".hidden"):
        (tmp_path / "class" / name).write_bytes(b"")
    assert how_many(FlatImages(tmp_path, 16)).startswith("1 image (2 .heic, ")
    assert how_many(FlatImages(tmp_path, 16)).endswith(" of other kinds not read)")
    make_folder(tmp_path, ["loose.png"])
    (tmp_path / "labels.csv").write_text("")
    found = ImageDataset(tmp_path, 16)
    assert len(found) == 1 and found.others[OUTSIDE] == 1 and found.others[".csv"] == 2
    assert how_many(found).isprintable()


def test_pairs_are_counted_with_what_lies_beside_them(tmp_path):
    make_folder(tmp_path, ["a.png", "b.png"])
    for name in ("a.txt", "b.txt", "c.heic", "c.txt"):
        (tmp_path / name).write_text("a text")
    assert how_many(PairFolder(tmp_path, 16)) == "2 pairs (1 .heic not read)"


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
