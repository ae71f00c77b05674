"""Image-text pairs: each layout's captions and images, what is left out, epochs, and errors that name the file."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from latent_verse.config import UserError
from latent_verse.data import DataError
from latent_verse.data.captions import CocoCaptions, FakePairs, KarpathyCaptions, PairFolder, TableCaptions
from tests.messages import naming

R = 16


def save_image(path, value=100, size=(20, 24), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path)


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def captions_of(dataset):
    return {os.path.basename(dataset.image_path(i)): dataset.captions(i) for i in range(len(dataset))}


# -------------------------------------------------------------------------------------------------------------- folder


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(["a.png", "b.JPG", "sub/a.webp", "d.png", "e.png"]):
        save_image(tmp_path / name, 40 * i)
    write(tmp_path / "a.txt", "\ufeffone red thing\r\n\r\n  two   words \n")
    write(tmp_path / "b.txt", "ein Bär 🐻")
    write(tmp_path / "sub/a.txt", "other folder")
    write(tmp_path / "e.txt", " \n")
    write(tmp_path / "lonely.txt", "no image")
    return tmp_path


def test_folder_pairs_by_name_and_counts_the_rest(folder, caplog):
    dataset = PairFolder(folder, R)
    assert sorted(map(tuple, (dataset.captions(i) for i in range(len(dataset))))) == [
        ("ein Bär 🐻",),
        ("one red thing", "two words"),
        ("other folder",),
    ]
    assert dataset.describe() == {
        "source": str(folder),
        "pairs": 3,
        "captions": 4,
        "images without a .txt": 1,
        "texts without an image": 1,
        "empty captions": 1,
    }
    assert "d.png" in caplog.text and "lonely.txt" in caplog.text and "e.png" in caplog.text


def test_images_are_those_of_the_data_room(folder):
    dataset = PairFolder(folder, R, train=False)
    for i in range(len(dataset)):
        image, caption = dataset[i]
        assert image.shape == (3, R, R) and image.dtype == torch.float32
        assert image.min() >= -1 and image.max() <= 1
        assert caption in dataset.captions(i)
    assert PairFolder(folder, R, as_uint8=True)[0][0].dtype == torch.uint8
    values = {round((dataset[i][0].mean().item() + 1) * 127.5) for i in range(3)}
    assert all(any(abs(v - expected) <= 2 for v in values) for expected in (0, 40, 80))


def test_captions_and_crops_follow_seed_epoch_and_index(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    write(tmp_path / "a.txt", "\n".join(f"caption {i}" for i in range(5)))
    one, two, other = (PairFolder(tmp_path, R, seed=s) for s in (1, 1, 2))
    chosen = [one[(epoch, 0)][1] for epoch in range(40)]
    assert len(set(chosen)) == 5
    assert chosen == [two[(epoch, 0)][1] for epoch in range(40)]
    assert chosen != [other[(epoch, 0)][1] for epoch in range(40)]
    assert torch.equal(one[(3, 0)][0], two[(3, 0)][0])
    assert not torch.equal(one[(3, 0)][0], one[(4, 0)][0])
    one.epoch = 3
    assert one[0][1] == chosen[3] and torch.equal(one[0][0], two[(3, 0)][0])


def test_unreadable_image_brings_the_next_pair_in_training_and_none_in_evaluation(tmp_path):
    for name in ("a", "b"):
        save_image(tmp_path / f"{name}.png")
        write(tmp_path / f"{name}.txt", f"caption {name}")
    (tmp_path / "a.png").write_bytes(b"not a png")
    assert PairFolder(tmp_path, R)[0][1] == "caption b"
    dataset = PairFolder(tmp_path, R, train=False)
    assert dataset[0] is None and dataset[1][1] == "caption b"
    assert dataset.skipped.count == 1
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match=naming("train_dir", tmp_path, 2, tmp_path / "a.png")):
        PairFolder(tmp_path, R)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
def test_any_mode(tmp_path, mode):
    save_image(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), mode=mode)
    write(tmp_path / "a.txt", "x")
    assert PairFolder(tmp_path, R)[0][0].shape == (3, R, R)


def test_folder_errors(tmp_path):
    with pytest.raises(DataError, match=naming("train_dir", tmp_path / "gone")):
        PairFolder(tmp_path / "gone", R)
    write(tmp_path / "a.txt", "x")
    with pytest.raises(DataError, match=naming("val_dir", tmp_path, "1 .txt")):
        PairFolder(tmp_path, R, key="val_dir")
    save_image(tmp_path / "b.png")
    with pytest.raises(DataError, match=naming(tmp_path, 1, ".txt", "b.png")):
        PairFolder(tmp_path, R)
    write(tmp_path / "b.txt", "Bär", encoding="latin-1")
    with pytest.raises(DataError, match=naming(tmp_path / "b.txt", "UTF-8", "byte 1")):
        PairFolder(tmp_path, R)


# --------------------------------------------------------------------------------------------------- COCO and Karpathy


@pytest.fixture
def coco(tmp_path):
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        save_image(tmp_path / "train2017" / name)
    content = {
        "info": {},
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2, 3, 4)],
        "annotations": [
            {"image_id": 1, "id": 10, "caption": "A cat.\n"},
            {"image_id": 1, "id": 11, "caption": "Another  cat"},
            {"image_id": 2, "id": 12, "caption": " "},
            {"image_id": 2, "id": 13, "caption": "A dog"},
            {"image_id": 4, "id": 14, "caption": "not on disk"},
            {"image_id": 9, "id": 15, "caption": "unknown"},
        ],
    }
    return write(tmp_path / "captions_train2017.json", json.dumps(content)), tmp_path / "train2017"


def test_coco(coco):
    dataset = CocoCaptions(*coco, R)
    assert captions_of(dataset) == {"1.jpg": ["A cat.", "Another cat"], "2.jpg": ["A dog"]}
    described = dataset.describe()
    assert described["pairs"] == 2 and described["captions"] == 3
    for reason in ("images without a caption", "missing image files", "empty captions", "captions without an image"):
        assert described[reason] == 1, reason
    assert dataset[0][0].shape == (3, R, R)


def test_coco_errors(coco, tmp_path):
    path, images = coco
    with pytest.raises(UserError, match=naming("train_captions", tmp_path / "captions.json")):
        CocoCaptions(tmp_path / "captions.json", images, R)
    with pytest.raises(UserError, match=naming("train_captions", images, "folder")):
        CocoCaptions(images, images, R)
    with pytest.raises(UserError, match=naming("train_captions", tmp_path / "empty.json", "0 bytes")):
        CocoCaptions(write(tmp_path / "empty.json", ""), images, R)
    with pytest.raises(UserError, match=naming("train_captions", tmp_path / "cut.json", "JSON")):
        CocoCaptions(write(tmp_path / "cut.json", path.read_text()[:50]), images, R)
    facts = ["train_captions", tmp_path / "instances.json", "annotations[0]", "caption", "image_id", "bbox"]
    with pytest.raises(UserError, match=naming(*facts)):
        instances = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "bbox": []}]}
        CocoCaptions(write(tmp_path / "instances.json", json.dumps(instances)), images, R)
    with pytest.raises(UserError, match=naming("train_captions", tmp_path / "list.json", "images", "list")):
        CocoCaptions(write(tmp_path / "list.json", "[]"), images, R)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UserError, match=naming(3, "1.jpg", tmp_path / "elsewhere")):
        CocoCaptions(path, tmp_path / "elsewhere", R)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"annotations": []}, ["annotations", "empty"]),
        ({"images": [{"id": 1, "file_name": None}]}, ["images[0]", "file_name", None, "str"]),
        ({"images": [{"id": [1], "file_name": "1.jpg"}]}, ["images[0]", "id", [1], "int", "str"]),
        ({"annotations": [{"image_id": 1, "caption": 5}]}, ["1.jpg", "caption", 5]),
    ],
)
def test_coco_with_values_of_another_kind(coco, tmp_path, change, facts):
    path, images = coco
    content = json.loads(path.read_text()) | change
    with pytest.raises(DataError, match=naming(tmp_path / "odd.json", *facts)):
        CocoCaptions(write(tmp_path / "odd.json", json.dumps(content)), images, R)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"sentences": ["a cat"]}, ["'a cat'", "raw"]),
        ({"sentences": [{"tokens": ["a"]}]}, [{"tokens": ["a"]}, "raw"]),
        ({"sentences": None}, ["sentences", None, "list"]),
        ({"filepath": None}, ["filepath", None, "str"]),
    ],
)
def test_karpathy_with_values_of_another_kind(tmp_path, change, facts):
    image = {"filename": "0.jpg", "filepath": "", "split": "train", "sentences": [{"raw": "a"}]} | change
    path = write(tmp_path / "dataset_coco.json", json.dumps({"images": [image]}))
    with pytest.raises(DataError, match=naming(path, "images[0]", *facts)):
        KarpathyCaptions(path, tmp_path, R, split="train")


def test_karpathy(tmp_path):
    images = []
    for i, split in enumerate(["train", "restval", "val", "test", "train"]):
        save_image(tmp_path / f"images/part{i % 2}/{i}.jpg")
        sentences = [{"raw": f"Caption {i}."}, {"raw": "Second"}]
        images.append({"filename": f"{i}.jpg", "filepath": f"part{i % 2}", "split": split, "sentences": sentences})
    path = write(tmp_path / "dataset_coco.json", json.dumps({"images": images, "dataset": "coco"}))
    dataset = KarpathyCaptions(path, tmp_path / "images", R)
    assert captions_of(dataset) == {f"{i}.jpg": [f"Caption {i}.", "Second"] for i in (0, 1, 4)}
    assert list(captions_of(KarpathyCaptions(path, tmp_path / "images", R, split="test"))) == ["3.jpg"]
    with pytest.raises(DataError, match=naming(path, "valid", "train (2)", "restval (1)")):
        KarpathyCaptions(path, tmp_path / "images", R, split="valid")


# -------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("extension, between", [(".csv", ","), (".tsv", "\t")])
def test_separated_tables(tmp_path, extension, between):
    for name in ("a.png", "b.png"):
        save_image(tmp_path / "images" / name)
    rows = [
        ["id", "Image_Path", "TEXT"],
        ["1", "images/a.png", '"a ""quoted"", long\nstory"'],
        ["2", "images/b.png", "b"],
        ["3", "images/a.png", "again"],
        ["4", "images/gone.png", "missing"],
        ["5", "images/b.png", ""],
        ["6", "", "no image"],
    ]
    path = write(tmp_path / f"t{extension}", "\ufeff" + "".join(between.join(row) + "\r\n" for row in rows))
    dataset = TableCaptions(path, R)
    assert captions_of(dataset) == {"a.png": ['a "quoted", long story', "again"], "b.png": ["b"]}
    described = dataset.describe()
    assert [described[k] for k in ("missing image files", "empty captions", "rows without an image")] == [1, 1, 1]


def test_json_lines(tmp_path):
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "elsewhere/b.png")
    rows = [
        {"file_name": "a.png", "caption": ["one", "two"]},
        {"file_name": str(tmp_path / "elsewhere/b.png"), "caption": "日本"},
    ]
    path = write(tmp_path / "t.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert captions_of(TableCaptions(path, R)) == {"a.png": ["one", "two"], "b.png": ["日本"]}


@pytest.mark.parametrize(
    ("name", "text", "facts"),
    [
        ("t.csv", "img,words\na.png,x\n", ["img", "words", "image", "image_path"]),
        ("t.csv", "image,words\na.png,x\n", ["image", "words", "caption", "captions", "text", "title"]),
        ("t.csv", "image,caption\na.png,red, green\n", ["line 2", 2, "image, caption"]),
        ("t.csv", "image,caption\n", ["train_captions", "no image"]),
        ("t.csv", "image,caption\ngone.png,x\n", ["train_captions", 1, "gone.png"]),
        ("t.csv", "", ["train_captions", "0 bytes"]),
        ("t.jsonl", '{"image": "a.png", "caption": "x"}\n{"image": ', ["line 2", "JSON"]),
        ("t.jsonl", "[1]\n", ["line 1", "list"]),
        ("t.jsonl", '{"image": "a.png", "caption": 5}', ["a.png", 5]),
        ("t.parquet", "x", ["train_captions", ".csv", ".tsv", ".jsonl"]),
    ],
)
def test_table_errors(tmp_path, name, text, facts):
    save_image(tmp_path / "a.png")
    with pytest.raises(UserError, match=naming(tmp_path / name, *facts)):
        TableCaptions(write(tmp_path / name, text), R)


# ---------------------------------------------------------------------------------------------------------------- fake


def test_fake_pairs():
    dataset, again = FakePairs(12, R), FakePairs(12, R)
    image, caption = dataset[(2, 3)]
    assert image.shape == (3, R, R) and caption in dataset.captions(3)
    assert torch.equal(image, again[(2, 3)][0]) and caption == again[(2, 3)][1]
    assert len({dataset[(epoch, 3)][1] for epoch in range(20)}) == 2
    assert dataset.describe()["pairs"] == len(dataset) == 12
    with pytest.raises(IndexError):
        dataset[12]


def test_workers_can_have_it(folder):
    from torch.utils.data import DataLoader

    loader = DataLoader(PairFolder(folder, R), batch_size=2, num_workers=1, sampler=[(0, 0), (0, 1)])
    images, captions = next(iter(loader))
    assert images.shape == (2, 3, R, R) and len(captions) == 2
