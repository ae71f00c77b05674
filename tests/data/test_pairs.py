"""Pairs of every layout: opening by the settings, collation, shards, and PairDataModule's batches and resume."""

from __future__ import annotations

import csv
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from latent_verse.config import ConfigError
from latent_verse.config.train import PairDataConfig
from latent_verse.config.train_rules import resolve_pairs
from latent_verse.data import DataError, pairs
from latent_verse.data.captions import EncodedCaption
from latent_verse.data.codes import STORED_IDS
from latent_verse.data.datasets import open_pairs
from latent_verse.data.images import SkipLog
from latent_verse.data.modules import PairDataModule
from latent_verse.data.pairs import CaptionEncoder, PairShards, all_captions, captions_of, work_of_shards
from latent_verse.data.shards import TrainShards, read_shards
from latent_verse.data.text import BPETokenizer, TokenizerError
from tests.messages import naming

R, PAD = 8, 777
CAPTIONS = [[f"image number {i}", f"the {i} th"] for i in range(10)]


def image_of(i: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(i).integers(0, 255, (R, R, 3)).astype(np.uint8))


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train([text for of_one in CAPTIONS for text in of_one], 300)


@pytest.fixture
def files(tmp_path):
    """The same ten pairs in every layout; returns the folder."""
    folder = tmp_path / "COCO" / "train2017"
    folder.mkdir(parents=True)
    for i, captions in enumerate(CAPTIONS):
        image_of(i).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text("\n".join(captions))
    images = [{"id": i, "file_name": f"{i:02d}.png"} for i in range(10)]
    annotations = [{"image_id": i, "caption": text} for i in range(10) for text in CAPTIONS[i]]
    (tmp_path / "COCO" / "annotations").mkdir()
    coco = tmp_path / "COCO" / "annotations" / "captions_train2017.json"
    coco.write_text(json.dumps({"images": images, "annotations": annotations}))
    karpathy = [
        {"filename": f"{i:02d}.png", "split": ("train", "val")[i % 2], "sentences": [{"raw": t} for t in CAPTIONS[i]]}
        for i in range(10)
    ]
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": karpathy}))
    with open(tmp_path / "table.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        rows.writerows([f"COCO/train2017/{i:02d}.png", text] for i in range(10) for text in CAPTIONS[i])
    return tmp_path


def write_tar(path, numbers, text="txt", bytes_of=None):
    with tarfile.open(path, "w") as tar:

        def add(name, data):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))

        for i in numbers:
            file = io.BytesIO()
            image_of(i).save(file, "PNG")
            add(f"{i:04d}.png", bytes_of(i) if bytes_of else file.getvalue())
            if text == "txt":
                add(f"{i:04d}.txt", CAPTIONS[i][0].encode())
            elif text == "json":
                add(f"{i:04d}.json", json.dumps({"caption": CAPTIONS[i][0], "width": R}).encode())


def settings(**given) -> PairDataConfig:
    return resolve_pairs(PairDataConfig(**{"num_workers": 0, "batch_size": 2, **given}))


def module(tokenizer, resolution=R, text_len=12, too_long="truncate", seed=3, **given) -> PairDataModule:
    data = settings(**given)
    encode = CaptionEncoder(tokenizer, text_len, too_long, PAD)
    return PairDataModule(open_pairs(data, resolution, seed), data, seed, encode)


def open_one(data, split, resolution, seed):
    return open_pairs(data, resolution, seed)[split]


def layouts(files):
    folder = str(files / "COCO" / "train2017")
    return {
        "pairs": {"train_dir": folder},
        "coco": {"dataset": "coco", "train_dir": folder},
        "table": {"dataset": "table", "train_captions": str(files / "table.csv")},
    }


def test_every_layout_gives_the_same_pairs(files):
    opened = [open_one(settings(**given), "train", R, 3) for given in layouts(files).values()]
    for i in (0, 7):
        first, *others = [dataset[(2, i)] for dataset in opened]
        for image, caption in others:
            assert torch.equal(image, first[0])
            assert caption == first[1]
    karpathy = {
        "dataset": "karpathy",
        "train_captions": str(files / "karpathy.json"),
        "train_dir": layouts(files)["pairs"]["train_dir"],
    }
    assert [len(open_one(settings(**karpathy), split, R, 3)) for split in ("train", "val")] == [5, 5]


def test_shapes_and_fake_need_no_file():
    data = settings(dataset="shapes", dataset_size=6, val_size=4)
    train, val = open_one(data, "train", 32, 0), open_one(data, "val", 32, 0)
    assert (len(train), len(val), val.split) == (6, 4, "val")
    assert not torch.equal(train[(0, 1)][0], train[(1, 1)][0])  # new scenes in each epoch
    assert torch.equal(val[(0, 1)][0], val[(1, 1)][0])
    with pytest.raises(DataError, match=naming("world", "small", 32, 64)):
        open_one(data, "train", 64, 0)
    fake = settings(fake_data=True)
    assert fake.dataset == "fake" and len(open_one(fake, "val", R, 0)) == 64


def test_what_is_missing_is_named(files, tmp_path):
    folder = layouts(files)["pairs"]["train_dir"]
    with pytest.raises(ConfigError, match=naming("train_dir", "pairs", "--fake_data")):
        settings()
    with pytest.raises(ConfigError, match=naming("train_captions", "table", ".csv", "--fake_data")):
        settings(dataset="table")
    with pytest.raises(ConfigError, match=naming("val_captions", "pairs", "coco", "karpathy", "table")):
        settings(train_dir=folder, val_captions="x.json")
    with pytest.raises(DataError, match=naming("train_captions", "captions_other.json")):
        (tmp_path / "other").mkdir()
        open_one(settings(dataset="coco", train_dir=str(tmp_path / "other")), "train", R, 0)
    with pytest.raises(DataError, match=naming("train_captions", "none.json")):
        open_one(settings(dataset="coco", train_dir=folder, train_captions="none.json"), "train", R, 0)
    for text in (tmp_path / "COCO" / "train2017").glob("*.txt"):
        text.unlink()
    with pytest.raises(DataError, match=naming("train_dir", folder, 10, ".txt")):
        open_one(settings(train_dir=folder), "train", R, 0)


def test_batches_hold_images_and_ids(files, tokenizer):
    data = module(tokenizer, **layouts(files)["pairs"])
    images, ids = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert images.shape == (2, 3, R, R) and images.dtype == torch.float32 and images.abs().max() <= 1
    assert ids.shape == (2, 12) and ids.dtype == torch.int64
    for row in ids.tolist():
        tokens = [i for i in row if i != PAD]
        assert row == tokens + [PAD] * (12 - len(tokens))
        assert tokenizer.decode(tokens) in [text for of_one in CAPTIONS for text in of_one]


def test_too_long_captions_are_cut_or_refused(files, tokenizer):
    data = module(tokenizer, text_len=2, **layouts(files)["pairs"])
    assert next(iter(data.train_dataloader()))[1].shape == (2, 2)
    data = module(tokenizer, text_len=2, too_long="error", **layouts(files)["pairs"])
    with pytest.raises(TokenizerError, match=naming("text_len", 2, "text_too_long")):
        next(iter(data.train_dataloader()))


@pytest.mark.parametrize("text_len", [4, STORED_IDS - 4, STORED_IDS - 3, STORED_IDS + 500])
def test_stored_ids_of_a_very_long_caption_are_a_beginning_and_training_takes_what_it_needs(tokenizer, text_len):
    text = "the 7 th image é字 " * 2000
    stored = EncodedCaption(text, tokenizer.encode_batch([text], STORED_IDS)[0])
    assert STORED_IDS - 4 < len(stored.ids) <= STORED_IDS
    encode = CaptionEncoder(tokenizer, text_len, "truncate", PAD)
    assert torch.equal(encode([stored]), encode([text]))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_resumes_in_the_middle_of_an_epoch(files, tokenizer, workers):
    def loader():
        return module(tokenizer, num_workers=workers, **layouts(files)["pairs"]).train_dataloader()

    whole = loader()
    batches = [*whole, *whole]  # two epochs of five
    assert len(batches) == 10
    part = loader()
    iterator = iter(part)
    seen = [next(iterator) for _ in range(3)]
    rest = loader()
    rest.load_state_dict(part.state_dict())
    resumed = [*rest, *rest]
    assert all(equal(a, b) for a, b in zip([*seen, *resumed], batches, strict=True))
    assert not all(equal(a, b) for a, b in zip(batches[:5], batches[5:], strict=True))


def test_validation_has_each_pair_once(files, tokenizer, monkeypatch):
    given = layouts(files)["pairs"]
    seen, sizes = [], []
    for rank in range(3):
        data = module(tokenizer, val_dir=given["train_dir"], **given)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        batches = list(data.val_dataloader())
        sizes.append([len(batch[0]) for batch in batches])
        seen += [image for batch in batches for image in batch[0]]
    assert len({image.numpy().tobytes() for image in seen}) == len(seen) == 10
    assert sizes == [[2, 2], [2, 1], [2, 1]]
    empty = data.collate([None])
    assert empty[0].shape == (0, 3, R, R) and empty[1].shape == (0, 12)


def test_shards_of_img2dataset(tmp_path, tokenizer):
    write_tar(tmp_path / "a.tar", range(5))
    write_tar(tmp_path / "b.tar", range(5, 10), text="json")
    given = {"dataset": "webdataset", "train_dir": str(tmp_path), "val_dir": str(tmp_path)}
    data = module(tokenizer, resize_ratio=1.0, **given)
    assert sorted(all_captions(data.datasets["train"])) == sorted(of_one[0] for of_one in CAPTIONS)
    train, val = list(data.train_dataloader()), list(data.val_dataloader())
    known = {np.array(image_of(i)).tobytes(): CAPTIONS[i][0] for i in range(10)}
    for batches in (train, val):
        pairs = [
            (image.permute(1, 2, 0).contiguous().numpy().tobytes(), [i for i in row.tolist() if i != PAD])
            for batch in batches
            for image, row in zip(*batch, strict=True)
        ]
        assert len({image for image, _ in pairs}) == 10
        assert all(known[image] == tokenizer.decode(ids) for image, ids in pairs)
    examples = data.examples(3)
    assert examples.captions == [CAPTIONS[i][0] for i in range(3)] and examples.x.shape == (3, 3, R, R)


@pytest.mark.parametrize(
    ("limit", "numbers"),
    [(100, range(10)), (20, range(10)), (19, range(0, 10, 2)), (5, (0, 4, 8)), (3, (0, 7)), (1, (0,))],
)
def test_a_tokenizer_learns_from_all_captions_or_of_many_from_a_part(files, monkeypatch, limit, numbers):
    monkeypatch.setattr(pairs, "TOKENIZER_CAPTIONS", limit)
    config = PairDataConfig(dataset="pairs", train_dir=str(files / "COCO/train2017"))
    assert list(all_captions(open_one(config, "train", R, 0))) == [text for i in numbers for text in CAPTIONS[i]]


def test_samples_without_a_caption_are_counted(tmp_path, tokenizer):
    write_tar(tmp_path / "a.tar", range(6))
    write_tar(tmp_path / "b.tar", range(6, 8), text=None)
    given = {"dataset": "webdataset", "train_dir": str(tmp_path), "val_dir": str(tmp_path)}
    data = module(tokenizer, **given)
    assert sum(len(batch[0]) for batch in data.val_dataloader()) == 6
    assert data.skipped == 2
    assert captions_of({"json": b"not json"}) == captions_of({"json": b"[]"}) == captions_of({}) == []
    assert captions_of({"json": b'{"caption": 3}'}) == []
    assert captions_of({"json": json.dumps({"captions": ["a  b", "", 3]}).encode()}) == ["a b"]
    both = {"txt": b" \n", "json": b'{"caption": "found"}'}
    assert captions_of(both) == ["found"] and captions_of({**both, "txt": b"first"}) == ["first"]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": "Bär".encode("latin-1")}, ["UTF-8", "line 1", "byte 1"]),
        ({"txt": "a dog".encode("utf-16")}, ["UTF-8"]),
        ({"txt": b"a\0 \0d\0"}, ["not text"]),
        ({"json": b'{"caption": "B\xe4r"}'}, ["UTF-8"]),
        ({"json": b"{"}, ["JSON"]),
        ({"json": b"[" * 100_000}, ["JSON"]),
        ({"json": b'{"caption": "\\ud83d"}'}, ["not text"]),
        ({"json": b'{"caption": 3}'}, ["3"]),
        ({"json": b'{"caption": {"en": "x"}}'}, ["{'en': 'x'}"]),
        ({"json": b'{"captions": [3, null]}'}, ["[3, None]"]),
        ({"txt": b" \n\xe3\x80\x80\xe2\x80\x8b"}, ["caption"]),
        ({}, ["caption"]),
    ],
)
def test_a_bad_caption_in_shards_is_left_out_logged_and_counted(tmp_path, tokenizer, caplog, members, reason):
    """As in a folder, in training, evaluation and extraction of codes alike."""
    write_tar(tmp_path / "a.tar", range(4))
    write_tar(tmp_path / "b.tar", [4], text=None)
    with tarfile.open(tmp_path / "b.tar", "a") as tar:
        for kind, data in members.items():
            member = tarfile.TarInfo(f"0004.{kind}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    given = {"dataset": "webdataset", "train_dir": str(tmp_path), "val_dir": str(tmp_path)}
    with pytest.raises(DataError, match=naming("train_dir", 1, tmp_path / "b.tar", "0004", *reason)):
        module(tokenizer, **{**given, "train_dir": str(tmp_path / "b.tar")})
    data = module(tokenizer, **given)
    assert len(list(all_captions(data.datasets["train"]))) == 4
    for loader in (data.val_dataloader(), data.train_dataloader()):
        caplog.clear()
        assert sum(len(batch[0]) for batch in loader) == 4
        assert [naming("0004", *reason).search(record.message) is not None for record in caplog.records] == [True]
    assert data.skipped == 2  # of training and of validation
    caplog.clear()
    shards = PairShards(str(tmp_path), R)
    loaded = [load() for part in work_of_shards(shards, 1) for _, load, _ in part]
    assert [image is not None for image in loaded] == [True] * 4 + [False]
    assert shards.skipped.count == len(caplog.records) == 1


def test_the_caption_of_a_sample_is_found_without_its_image(tmp_path):
    write_tar(tmp_path / "a.tar", range(2))
    shards = PairShards(str(tmp_path), R)
    assert [shards.target(raw) for raw in read_shards(shards.shards, SkipLog(1))] == [CAPTIONS[i][0] for i in range(2)]


def test_names_in_shards_need_not_be_utf8(tmp_path, tokenizer):
    write_tar(tmp_path / "a.tar", range(2))
    data = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "b.tar", "w") as out, tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            content = tar.extractfile(member)
            member.name = "lat\udce9" + member.name
            out.addfile(member, content)
    data = module(tokenizer, dataset="webdataset", train_dir=str(tmp_path / "b.tar"), val_dir=str(tmp_path / "b.tar"))
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert sum(len(batch[0]) for batch in loader) == 2


def test_shards_without_any_caption_are_named(tmp_path, tokenizer, monkeypatch):
    write_tar(tmp_path / "a.tar", range(6))
    write_tar(tmp_path / "b.tar", range(6, 8), text=None)
    for key in ("train_dir", "val_dir"):
        given = {"train_dir": str(tmp_path / "a.tar"), "val_dir": str(tmp_path / "a.tar"), key: str(tmp_path / "b.tar")}
        with pytest.raises(DataError, match=naming(key, 2, tmp_path / "b.tar", "caption")):
            module(tokenizer, dataset="webdataset", **given)
    # shards that are not looked at first, such as remote ones
    monkeypatch.setattr("latent_verse.data.shards.MAX_SKIPS", 3)
    write_tar(tmp_path / "c.tar", range(2), bytes_of=lambda i: b"no image")
    for name, missing in (("b", "caption"), ("c", "image bytes")):
        shards = PairShards(f"pipe:cat {tmp_path / name}.tar", R, allow_pipe=True)
        with pytest.raises(DataError, match=naming(3, f"pipe:cat {tmp_path / name}.tar", missing)):
            next(iter(TrainShards(shards, steps=1, batch_size=1)))
    data = module(tokenizer, dataset="webdataset", train_dir=str(tmp_path / "a.tar"), val_dir=str(tmp_path / "c.tar"))
    with pytest.raises(DataError, match=naming("val_dir", tmp_path / "c.tar")):
        data.examples(2)


def test_examples_of_shapes_come_with_the_truth(tokenizer):
    data = module(tokenizer, resolution=32, dataset="shapes", val_size=8)
    examples = data.examples(5)
    for caption, scene in zip(examples.captions, examples.scenes, strict=True):
        assert examples.world.satisfies(scene, examples.world.parse_caption(caption))
    assert len(data.examples(50).captions) == 8
