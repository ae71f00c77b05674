"""The data as evaluation sees it: ids as the field writes them, and what was left out."""

from __future__ import annotations

import json
import os

from PIL import Image

from latent_verse.config.evaluate import EvalDataConfig
from latent_verse.evaluation.pairs import Pairs
from latent_verse.metrics.captions import coco_results, read_captions_file

R = 8


def folder_of(tmp_path, *names):
    folder = os.path.join(os.fsencode(tmp_path), b"images")
    os.mkdir(folder)
    for name in names:
        with open(os.path.join(folder, name + b".png"), "wb") as file:
            Image.new("RGB", (R, R)).save(file, "PNG")
        with open(os.path.join(folder, name + b".txt"), "wb") as file:
            file.write(b"a red circle")
    return tmp_path / "images"


def test_what_was_left_out_is_counted(tmp_path):
    folder = folder_of(tmp_path, b"a", b"b", b"c")
    assert Pairs(EvalDataConfig(dataset="pairs", test_dir=str(folder)), R, 0).left_out == {}
    (folder / "a.txt").write_bytes(b"B\xe4r")
    (folder / "b.txt").unlink()
    pairs = Pairs(EvalDataConfig(dataset="pairs", test_dir=str(folder)), R, 0)
    assert pairs.left_out == {"unreadable texts": 1, "images without a .txt": 1} and len(pairs) == 1


def test_names_that_are_not_utf8_identify_images(tmp_path):
    folder = folder_of(tmp_path, b"lat\xe9", "é".encode())
    pairs = Pairs(EvalDataConfig(dataset="pairs", test_dir=str(folder)), R, 0)
    assert sorted(pairs.names) == sorted(os.fsdecode(name) for name in (b"lat\xe9.png", "é.png".encode()))
    assert [pairs.image(i).shape for i in range(2)] == [(3, R, R)] * 2
    chosen = pairs.sample(2, 0)
    assert len(pairs.about(chosen, 0)["sha256"]) == 16
    ids = pairs.image_ids()
    file = tmp_path / "captions.json"
    file.write_bytes(coco_results(ids, ["x", "y"]).encode("utf-8", "backslashreplace"))
    assert read_captions_file(file, ids, pairs.names) == ["x", "y"]


def test_ids_that_differ_in_their_form_only_do_not_tell_images_apart(tmp_path):
    folder = folder_of(tmp_path, b"a", b"b")
    images = [
        {"filename": f"{name}.png", "cocoid": i, "split": "test", "sentences": [{"raw": "a"}]}
        for name, i in (("a", 7), ("b", "7"))
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    data = EvalDataConfig(dataset="karpathy", test_dir=str(folder), test_captions=str(tmp_path / "k.json"))
    assert Pairs(data, R, 0).image_ids() == ["a.png", "b.png"]
    images[1]["cocoid"] = "8"
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    assert Pairs(data, R, 0).image_ids() == [7, "8"]
