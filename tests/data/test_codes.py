"""Codes ahead of training: what is written, what comes back, interruption, and codes of another AugVAE."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from latent_verse.checkpoints.ckpt_files import fingerprint
from latent_verse.data import DataError
from latent_verse.data.captions import PairFolder
from latent_verse.data.codes import CodesDataset, check_codes, smallest_type
from latent_verse.data.codes_writer import extract, work_of
from latent_verse.data.pairs import PairShards, work_of_shards
from latent_verse.data.shapes import PRESETS, ShapesDataset, World
from latent_verse.data.text import BPETokenizer
from latent_verse.data.transforms import centre_crop, to_unit_range
from tests.messages import naming

R, PAIRS = 16, 7


@pytest.fixture
def folder(tmp_path):
    """Seven square images of 16 px with one to three captions each."""
    place = tmp_path / "images"
    place.mkdir()
    for i in range(PAIRS):
        pixels = np.random.default_rng(i).integers(0, 255, (R, R, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text("\n".join(f"caption {n} of image {i} ✓" for n in range(1 + i % 3)))
    return place


@pytest.fixture
def made(folder, tmp_path, tiny_augvae):
    """Runs the extraction of `folder`: made(crops=1, shard_size=3, encode=None, out="codes") -> (folder, vae, bpe)."""

    def make(crops=1, shard_size=3, encode=None, out="codes", seed=0, resize_ratio=1.0):
        vae = tiny_augvae(seed=seed)
        dataset = PairFolder(folder, R, train=False, as_uint8=True, resize_ratio=resize_ratio)
        bpe = BPETokenizer.train((t for i in range(PAIRS) for t in dataset.captions(i)), 300)
        plan = {
            "format": "latent_verse/codes",
            "vae": fingerprint(vae),
            "codebook_size": vae.config.num_tokens,
            "image_len": vae.num_codes,
            "tokenizer": bpe.fingerprint,
            "text_vocab": bpe.vocab_size,
            "crops_per_image": crops,
        }
        work = work_of(dataset, crops, shard_size)
        encode = encode or vae.codes
        extract(work, tmp_path / out, encode, bpe, plan, batch_size=2, threads=2, progress=False)
        return tmp_path / out, vae, bpe

    return make


def test_codes_and_captions_come_back(made, folder):
    out, vae, bpe = made()
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"codes-{i:05d}.tar" for i in range(3)),
        "codes.json",
        "tokenizer",
    ]
    images = PairFolder(folder, R, train=False, as_uint8=True)
    codes = CodesDataset(out, train=False)
    assert len(codes) == PAIRS
    for i in range(PAIRS):
        image, caption = images[(0, i)]
        found, text = codes[(0, i)]
        assert np.array_equal(found, vae.codes(to_unit_range(image)[None])[0].numpy())
        assert text == (caption, bpe.encode(caption))
        assert codes.captions(i) == images.captions(i)
    assert codes[0][0].dtype == np.uint16


def test_other_programs_can_read_the_shards(made):
    import webdataset as wds

    out, vae, _ = made()
    samples = list(wds.WebDataset(str(out / "codes-00000.tar"), shardshuffle=False).decode())
    assert len(samples) == 3
    assert samples[0]["npy"].shape == (1, vae.num_codes) and samples[2]["json"]["captions"][0].endswith("✓")


def test_training_chooses_captions_as_from_images_and_crops_of_its_own(made, folder):
    out, vae, _ = made(crops=3, resize_ratio=0.3)
    images, codes = PairFolder(folder, R, seed=5), CodesDataset(out, seed=5)
    assert [codes[(e, i)][1].text for e in range(4) for i in range(PAIRS)] == [
        images[(e, i)][1] for e in range(4) for i in range(PAIRS)
    ]
    crops = {codes[(e, 0)][0].tobytes() for e in range(20)}
    assert len(crops) == 3
    assert codes[(3, 0)][0].tobytes() == CodesDataset(out, seed=5)[(3, 0)][0].tobytes()
    centre = vae.codes(to_unit_range(PairFolder(folder, R, train=False, as_uint8=True)[0][0][None]))[0]
    assert all(np.array_equal(CodesDataset(out, train=False)[(e, 0)][0], centre.numpy()) for e in range(5))


@pytest.fixture
def wide_pairs(tmp_path):
    """Writes seven images of 24 x 20 px with their captions as a pair folder and as tar shards of the given sizes:
    wide_pairs(sizes) -> (folder, shards). The third image cannot be read."""

    def write(sizes, out="shards"):
        place = tmp_path / "wide"
        place.mkdir(exist_ok=True)
        (tmp_path / out).mkdir()
        members = []
        for i in range(PAIRS):
            pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{i}.png")
            content = (place / f"{i}.png").read_bytes() if i != 2 else b"no image"
            (place / f"{i}.png").write_bytes(content)
            captions = [f"caption {n} of image {i} ✓" for n in range(1 + i % 3)]
            (place / f"{i}.txt").write_text("\n".join(captions))
            text = (
                (f"{i}.txt", captions[0]) if len(captions) == 1 else (f"{i}.json", json.dumps({"captions": captions}))
            )
            members.append([(f"{i}.png", content), (text[0], text[1].encode())])
        shards, left = [], iter(members)
        for number, size in enumerate(sizes):
            shards.append(str(tmp_path / out / f"{number}.tar"))
            with tarfile.open(shards[-1], "w") as tar:
                for name, content in (member for _ in range(size) for member in next(left)):
                    about = tarfile.TarInfo(name)
                    about.size = len(content)
                    tar.addfile(about, io.BytesIO(content))
        return place, shards

    return write


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 2, 4)])
def test_shards_give_the_codes_and_captions_of_a_pair_folder(wide_pairs, tmp_path, tiny_augvae, sizes):
    place, shards = wide_pairs(sizes)
    vae, images = tiny_augvae(), PairFolder(place, R, train=False, as_uint8=True)
    bpe = BPETokenizer.train((t for i in range(PAIRS) for t in images.captions(i)), 300)
    plan = {
        "format": "latent_verse/codes",
        "vae": fingerprint(vae),
        "codebook_size": vae.config.num_tokens,
        "image_len": vae.num_codes,
        "tokenizer": bpe.fingerprint,
        "text_vocab": bpe.vocab_size,
        "crops_per_image": 1,
    }
    found = []
    for name, work in (("pairs", work_of(images, 1, 3)), ("tar", work_of_shards(PairShards(shards, R), 1))):
        extract(work, tmp_path / name, vae.codes, bpe, plan, batch_size=2, threads=2, progress=False)
        found.append(CodesDataset(tmp_path / name, train=False))
    folder, tar = found
    assert len(tar.meta["shards"]) == len(sizes)
    assert len(folder) == len(tar) == PAIRS - 1 and folder.meta["skipped"] == tar.meta["skipped"] == 1
    for i in range(PAIRS - 1):
        (codes, caption), (expected, text) = tar[i], folder[i]
        assert np.array_equal(codes, expected) and caption == text
        assert tar.captions(i) == folder.captions(i)
    assert len({tar[i][0].tobytes() for i in range(PAIRS - 1)}) == PAIRS - 1


def test_crops_from_shards_depend_on_seed_and_name_and_not_on_the_shard(wide_pairs, tmp_path):
    def crops_of(sizes, crops=3, seed=0, resize_ratio=0.25):
        _, shards = wide_pairs(sizes, f"{sizes}{crops}{seed}{resize_ratio}")
        work = work_of_shards(PairShards(shards, R, resize_ratio, seed), crops)
        return {name: load() for part in work for name, load, _ in part if name != "2"}

    def differing(some, others, crop):
        return sum(not torch.equal(some[name][crop], others[name][crop]) for name in some)

    whole = crops_of((7,))
    assert list(whole) == list("013456")
    for name, crops in whole.items():
        with Image.open(tmp_path / "wide" / f"{name}.png") as image:
            assert torch.equal(crops[0], centre_crop(image, R))
        assert len({crop.numpy().tobytes() for crop in crops}) == len(crops) == 3
    for sizes in ((3, 4), (2, 5)):
        other = crops_of(sizes)
        assert [differing(whole, other, crop) for crop in range(3)] == [0, 0, 0]
    fewer = crops_of((7,), crops=2)
    assert [differing(fewer, whole, crop) for crop in range(2)] == [0, 0]
    for changed in (crops_of((7,), seed=1), crops_of((7,), resize_ratio=0.9)):
        assert differing(whole, changed, 0) == 0 and differing(whole, changed, 1) > 3


def test_an_interrupted_extraction_resumes_and_is_not_read_before(made, tiny_augvae, tmp_path):
    calls = []

    def failing(x):
        calls.append(len(x))
        if len(calls) > 3:
            raise KeyboardInterrupt
        return tiny_augvae().codes(x)

    with pytest.raises(KeyboardInterrupt):
        made(encode=failing)
    with pytest.raises(DataError, match=naming("train_dir", tmp_path / "codes", "unfinished")):
        CodesDataset(tmp_path / "codes")
    first = (tmp_path / "codes" / "codes-00000.tar").stat().st_mtime_ns

    def counting(x):
        calls.append(len(x))
        return tiny_augvae().codes(x)

    calls.clear()
    out, _, _ = made(encode=counting)
    assert sum(calls) == PAIRS - 3  # the first shard was whole
    assert (out / "codes-00000.tar").stat().st_mtime_ns == first
    whole, _, _ = made(out="whole")
    for name in ("codes-00000.tar", "codes-00002.tar"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    calls.clear()
    made(encode=counting)  # complete: nothing to do
    assert not calls


def test_nothing_is_overwritten(made, tmp_path, tiny_augvae):
    made()
    with pytest.raises(
        DataError,
        match=naming("extract_codes", tmp_path / "codes", "vae", *(fingerprint(tiny_augvae(seed=i)) for i in (0, 1))),
    ):
        made(seed=1)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".unfinished.json.tmp").write_text("{")  # before anything else was written
    made(out="killed")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("42")
    with pytest.raises(DataError, match=naming("extract_codes", tmp_path / "mine")):
        made(out="mine")


def test_codes_of_another_augvae_or_tokenizer_are_refused(made, tiny_augvae):
    out, vae, bpe = made()
    meta = CodesDataset(out).meta
    sizes = {name: meta[name] for name in ("image_len", "codebook_size", "text_vocab")}
    assert sizes == {"image_len": vae.num_codes, "codebook_size": vae.config.num_tokens, "text_vocab": bpe.vocab_size}
    check_codes(meta, fingerprint(vae), bpe.fingerprint, sizes, "train_dir")
    for name, size in sizes.items():  # the weights' fingerprint says nothing of what codes.json declares
        with pytest.raises(DataError, match=naming("train_dir", name, size, size + 1)):
            check_codes(meta, fingerprint(vae), bpe.fingerprint, {**sizes, name: size + 1}, "train_dir")
    other = fingerprint(tiny_augvae(seed=1))
    with pytest.raises(DataError, match=naming("train_dir", fingerprint(vae), "vae_path", other)):
        check_codes(meta, other, bpe.fingerprint, sizes, "train_dir")
    with pytest.raises(DataError, match=naming("val_dir", bpe.fingerprint, "0123456789abcdef")):
        check_codes(meta, fingerprint(vae), "0123456789abcdef", sizes, "val_dir")


def test_damaged_folders_are_named(made, tmp_path):
    with pytest.raises(DataError, match=naming("train_dir", tmp_path / "nothing", "codes.json", "--extract_codes")):
        CodesDataset(tmp_path / "nothing")
    out, _, _ = made(out="all/train")
    with pytest.raises(DataError, match=naming("train_dir", tmp_path / "all", out)):
        CodesDataset(tmp_path / "all")
    meta = json.loads((out / "codes.json").read_text())
    (out / "codes.json").write_text(json.dumps({**meta, "pairs": PAIRS + 1}))
    with pytest.raises(DataError, match=naming(out, "codes.json", PAIRS, PAIRS + 1)):
        CodesDataset(out)
    (out / "codes.json").write_text(json.dumps({**meta, "codebook_size": 2}))
    with pytest.raises(DataError, match=naming(out, "codes.json")):
        CodesDataset(out)
    (out / "codes.json").write_text(json.dumps(meta))
    with open(out / "codes-00001.tar", "r+b") as file:
        file.truncate(700)
    with pytest.raises(DataError, match=naming("train_dir", out / "codes-00001.tar")):
        CodesDataset(out)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"pairs": 10**15}, [f"{10**15:,}"]),  # before memory is taken
        ({"crops_per_image": 10**9}, [f"{10**9}"]),
        ({"pairs": "7"}, ["pairs", "'7'"]),
        ({"pairs": True}, ["pairs", "True"]),
        ({"pairs": -1}, ["pairs", -1]),
        ({"image_len": 0}, ["image_len", 0]),
        ({"codebook_size": None}, ["codebook_size", "None"]),
        ({"text_vocab": 1.5}, ["text_vocab", 1.5]),
        ({"text_vocab": 2}, ["codes-00000.tar", "ids"]),
        ({"text_vocab": 2**40}, ["text_vocab", 2**40]),
        ({"codebook_size": 2**40}, ["codebook_size", 2**40]),
        *[({"shapes": about}, ["codes.json", "shapes"]) for about in (5, ["small"], {"world": "nope"}, {"world": []})],
        ({"shapes": {"fingerprint": 1}}, ["codes.json", "shapes"]),
        ({"shapes": {"world": "small", "split": "all", "seed": 0}}, ["codes.json", "shapes"]),
        ({"shapes": {"world": "small", "split": "val", "seed": "0"}}, ["codes.json", "shapes"]),
        ({"shapes": {"world": "small", "split": "val", "seed": 0}}, ["small", "None"]),
        ({"image_len": 4}, ["codes-00000.tar", "codes.json"]),
        ({"vae": ["x"]}, ["vae"]),
        ({"tokenizer": None}, ["tokenizer"]),
        ({"shards": []}, ["shards"]),
        ({"shards": {"codes-00000.tar": 3}}, ["shards"]),
        ({"shards": {"../codes-00000.tar": {"pairs": 3, "captions": 6, "skipped": 0}}}, ["shards"]),
        ({"shards": {"gone.tar": {"pairs": 7, "captions": 6, "skipped": 0}}}, ["gone.tar"]),
    ],
)
def test_a_damaged_description_is_named(made, changes, facts):
    out, _, _ = made()
    meta = json.loads((out / "codes.json").read_text())
    (out / "codes.json").write_text(json.dumps(meta | changes))
    with pytest.raises(DataError, match=naming(out, *facts)):
        CodesDataset(out)


def test_shards_other_than_those_that_were_written_are_named(made):
    out, _, _ = made()
    names = [f"codes-0000{i}.tar" for i in range(3)]
    whole = [(out / name).read_bytes() for name in names]
    meta = json.loads((out / "codes.json").read_text())

    def refused(name, data, *facts):
        (out / name).write_bytes(data)
        with pytest.raises(DataError, match=naming("train_dir", out / name, *facts)):
            CodesDataset(out)
        (out / name).write_bytes(whole[names.index(name)])

    refused(names[0], whole[1], "checksum")  # two of one size, exchanged
    refused(names[2], whole[0])
    at = whole[1].index(b"NUMPY") + 123  # a bit of a code, which no count shows
    refused(names[1], whole[1][:at] + bytes([whole[1][at] ^ 1]) + whole[1][at + 1 :])
    refused(names[1], whole[1][:3000])
    refused(names[1], whole[1][:1024] + b"rubbish " * 64 + whole[1][1536:])
    refused(names[1], b"<!DOCTYPE html>" * 100)
    (out / names[1]).unlink()
    with pytest.raises(DataError, match=naming("train_dir", out / names[1])):
        CodesDataset(out)
    (out / names[1]).write_bytes(whole[1])
    for counts in meta["shards"].values():
        del counts["crc32"]  # as earlier versions wrote it
    (out / "codes.json").write_text(json.dumps(meta))
    assert len(CodesDataset(out)) == PAIRS


@pytest.mark.parametrize(
    "about",
    [
        [],
        {"captions": ["a"]},
        {"captions": [], "ids": []},
        {"captions": ["a", 3], "ids": [[1], [2]]},
        {"captions": ["a"], "ids": [[1], [2]]},
        {"captions": ["a"], "ids": [["1"]]},
        {"captions": ["a"], "ids": [[-1]]},
        {"captions": ["a"], "ids": [[True]]},
        {"captions": ["a"], "ids": [[10**9]]},
    ],
)
def test_captions_and_ids_are_checked(tmp_path, about):
    meta = {"format": "latent_verse/codes", "vae": "a", "tokenizer": "b", "codebook_size": 8, "image_len": 4}
    meta |= {"text_vocab": 300, "crops_per_image": 1, "pairs": 1, "captions": 1, "skipped": 0}
    counts = {"pairs": 1, "captions": 1, "skipped": 0}
    (tmp_path / "codes.json").write_text(json.dumps(meta | {"shards": {"codes-00000.tar": counts}}))
    np.save(npy := io.BytesIO(), np.zeros((1, 4), np.uint16))
    for known, content in ((True, {"captions": ["a"], "ids": [[1]]}), (False, about)):
        with tarfile.open(tmp_path / "codes-00000.tar", "w") as tar:
            for name, data in (("0.json", json.dumps(content).encode()), ("0.npy", npy.getvalue())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        if known:
            assert len(CodesDataset(tmp_path)) == 1
            continue
        with pytest.raises(DataError, match=naming(tmp_path / "codes-00000.tar")):
            CodesDataset(tmp_path)


def test_a_resumed_extraction_writes_shards_that_were_removed_again(made, tiny_augvae, tmp_path):
    def failing(x, calls=[]):  # noqa: B006 - counts the calls
        calls.append(x)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return tiny_augvae().codes(x)

    with pytest.raises(KeyboardInterrupt):
        made(encode=failing)
    assert sorted(p.name for p in (tmp_path / "codes").iterdir() if p.is_file()) == [
        "codes-00000.tar",
        "unfinished.json",
    ]
    (tmp_path / "codes" / "codes-00000.tar").unlink()
    out, _, _ = made()
    assert len(CodesDataset(out)) == PAIRS


def test_unreadable_images_are_left_out_and_counted(made, folder):
    (folder / "2.png").write_bytes(b"no image")
    out, _, _ = made()
    codes = CodesDataset(out)
    assert len(codes) == PAIRS - 1 and codes.meta["skipped"] == 1
    assert [codes.captions(i)[0][-3] for i in range(len(codes))] == list("013456")
    with tarfile.open(out / "codes-00000.tar") as tar:
        assert [name for name in tar.getnames() if name.endswith("npy")] == ["000000000.npy", "000000001.npy"]


def test_shapes_keep_their_truth(tmp_path, monkeypatch):
    world = World.preset("small")
    dataset = ShapesDataset(world, "val", 5, seed=3, as_uint8=True)
    bpe = BPETokenizer.train(dataset.captions(0), 300)
    plan = {
        "format": "latent_verse/codes",
        "vae": "0" * 16,
        "codebook_size": 70_000,
        "image_len": 4,
        "tokenizer": bpe.fingerprint,
        "text_vocab": bpe.vocab_size,
        "crops_per_image": 1,
        "shapes": {"world": "small", "fingerprint": world.fingerprint, "split": "val", "seed": 3},
    }

    def encode(x):
        return torch.full((len(x), 4), 69_999)

    extract(work_of(dataset, 1, 10), tmp_path, encode, bpe, plan, batch_size=2, threads=1, progress=False)
    codes = CodesDataset(tmp_path, train=False)
    assert smallest_type(70_000) is np.uint32 and codes[0][0].tolist() == [69_999] * 4
    for i in range(5):
        assert codes.scene(i) == dataset.scene(i)
        assert all(codes.world.satisfies(codes.scene(i), world.parse_caption(text)) for text in codes.captions(i))
        assert codes.captions(i) == dataset.sample_captions(i, 8)  # frequent ones more than once
    monkeypatch.setitem(PRESETS, "small", dataclasses.replace(world, counts=(1, 1)))
    with pytest.raises(DataError, match=naming("train_dir", tmp_path, "small", world.fingerprint)):
        CodesDataset(tmp_path, train=False)
