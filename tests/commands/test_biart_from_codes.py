"""train_biart.py on images that were encoded once."""

from __future__ import annotations

import json
import shlex
import tarfile
from pathlib import Path

import numpy as np

from latent_verse.commands import train_biart
from latent_verse.data.codes import CodesDataset
from tests.biart_runs import logged, record_losses
from tests.messages import naming


def test_codes_of_data_that_has_changed_are_refused(world, tmp_path, capsys):
    extraction = [*world, "--extract_codes", str(tmp_path / "codes")]
    for _ in range(2):
        assert train_biart.main(extraction) == 0
    capsys.readouterr()
    texts = sorted((tmp_path / "train").glob("*.txt"))[:2]
    swapped = [text.read_text() for text in reversed(texts)]
    assert swapped[0] != swapped[1]
    for text, content in zip(texts, swapped, strict=True):
        text.write_text(content)
    assert train_biart.main(extraction) == 2
    assert naming(tmp_path / "codes" / "train", "contents").search(capsys.readouterr().err)


def test_the_command_that_follows_an_extraction_trains_as_it_is_printed(world, tmp_path, capsys):
    assert train_biart.main([*world, "--resize_ratio", "1", "--extract_codes", str(tmp_path / "the codes'")]) == 0
    python, script, *flags = shlex.split(capsys.readouterr().out.partition("\nNext:\n")[2])
    assert (python, Path(script).name) == ("python", "train_biart.py")
    assert train_biart.main([*flags, "--max_steps", "1"]) == 0
    said = capsys.readouterr().out
    assert naming("12 pairs", tmp_path / "runs").search(said)


def test_codes_train_as_images_do(world, tmp_path, monkeypatch, capsys):
    flags = [*world, "--epochs", "2", "--resize_ratio", "1"]
    assert train_biart.main([*flags, "--extract_codes", str(tmp_path / "codes"), "--shard_size", "5"]) == 0
    assert capsys.readouterr().out.count("\nNext:\n") == 1
    with monkeypatch.context() as patch:
        images = record_losses(patch)
        assert train_biart.main([*flags, "--name", "images"]) == 0
    named = [
        "--train_dir",
        str(tmp_path / "codes/train"),
        "--val_dir",
        str(tmp_path / "codes/val"),
        "--dataset",
        "codes",
    ]
    with monkeypatch.context() as patch:
        codes = record_losses(patch)
        assert train_biart.main([*flags, *named, "--name", "codes"]) == 0
    assert codes == images and len(codes) == 6
    a, b = (logged(tmp_path / "runs" / name) for name in ("images", "codes"))
    assert a["val/total_loss"] == b["val/total_loss"]
    texts = [(tmp_path / "runs" / name / "images/samples_step=6.txt").read_text() for name in ("images", "codes")]
    assert texts[0] == texts[1]


def test_shards_are_extracted_to_the_codes_of_the_pair_folder(world, tmp_path):
    """The same captions and codes in the same order, whatever the shards; the tokenizer learns from them all."""
    for split, sizes in (("train", (5, 7)), ("val", (3,))):
        names = iter(sorted((tmp_path / split).glob("*.png")))
        (tmp_path / "tar" / split).mkdir(parents=True)
        for number, size in enumerate(sizes):
            with tarfile.open(tmp_path / "tar" / split / f"{number}.tar", "w") as tar:
                for image in (next(names) for _ in range(size)):
                    captions = image.with_suffix(".txt").read_text().splitlines()
                    about = image.with_suffix(".json")
                    about.write_text(json.dumps({"captions": captions}))
                    tar.add(image, image.name)
                    tar.add(about, about.name)
                    about.unlink()
    tars = [
        "--dataset",
        "webdataset",
        "--train_dir",
        str(tmp_path / "tar/train"),
        "--val_dir",
        str(tmp_path / "tar/val"),
    ]
    for name, flags in (("folder", []), ("shards", tars)):
        assert train_biart.main([*world, *flags, "--extract_codes", str(tmp_path / name)]) == 0
    for split, shards, count in (("train", 2, 12), ("val", 1, 3)):
        folder, tar = (CodesDataset(tmp_path / name / split, train=False) for name in ("folder", "shards"))
        assert len(folder) == len(tar) == count and len(tar.meta["shards"]) == shards
        assert {k: folder.meta[k] for k in ("vae", "tokenizer")} == {k: tar.meta[k] for k in ("vae", "tokenizer")}
        for i in range(count):
            (codes, caption), (expected, text) = tar[i], folder[i]
            assert np.array_equal(codes, expected) and (caption, caption.ids) == (text, text.ids)
            assert tar.captions(i) == folder.captions(i) and len(tar.captions(i)) == 2


def test_codes_and_checkpoints_of_another_augvae_are_refused(world, tmp_path, tiny_augvae, capsys):
    codes = [
        "--train_dir",
        str(tmp_path / "codes/train"),
        "--val_dir",
        str(tmp_path / "codes/val"),
        "--dataset",
        "codes",
    ]
    assert train_biart.main([*world, "--extract_codes", str(tmp_path / "codes")]) == 0
    assert train_biart.main([*world, "--max_steps", "1", "--name", "a"]) == 0
    tiny_augvae(seed=1, single_level=4).save_pretrained(tmp_path / "other")
    other = ["--vae_path", str(tmp_path / "other")]
    capsys.readouterr()
    assert train_biart.main([*world, *codes, *other]) == 2
    assert naming("train_dir", "AugVAE", "vae_path").search(capsys.readouterr().err)
    (file,) = (tmp_path / "runs/a/checkpoints").glob("last-*")
    assert train_biart.main([*world, *other, "--resume", "--ckpt_path", str(file)]) == 2
    assert naming("vae_path", file).search(capsys.readouterr().err)
    assert train_biart.main(["--export", str(tmp_path / "out"), "--ckpt_path", str(file), *other]) == 2
    assert naming("vae_path", file).search(capsys.readouterr().err) and not (tmp_path / "out").exists()
    assert train_biart.main([*world, *codes, "--tokenizer", "clip"]) == 2
    assert naming("tokenizer", "clip", "bpe").search(capsys.readouterr().err)
