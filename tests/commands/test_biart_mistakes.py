"""train_biart.py: what is refused, and what is said of what has no effect."""

from __future__ import annotations

import os
import tarfile

import pytest

from latent_verse.commands import train_biart
from latent_verse.files import only_writer
from tests.messages import naming


def test_a_checkpoint_of_another_shape_is_refused_and_one_of_another_dropout_is_not(world, tmp_path, capsys):
    assert train_biart.main([*world, "--max_steps", "1", "--name", "a"]) == 0
    (file,) = (tmp_path / "runs/a/checkpoints").glob("last-*")
    resume = [*world, "--resume", "--ckpt_path", str(file), "--max_steps", "2", "--name", "b"]
    capsys.readouterr()
    for flags, facts in (
        (["--n_embd", "32"], ["n_embd", 16, 32]),
        (["--text_len", "9"], ["text_len", 8, 9]),
        (["--pos_by_modality"], ["pos_by_modality", False, True]),
    ):
        assert train_biart.main([*resume, *flags]) == 2
        assert naming(file, *facts).search(capsys.readouterr().err)
    assert train_biart.main([*resume, "--resid_pdrop", "0.2"]) == 0
    bundle = str(tmp_path / "runs/a/bundle")
    capsys.readouterr()
    assert train_biart.main([*world, "--resume", "--ckpt_path", bundle, "--max_steps", "2", "--name", "c"]) == 2
    assert naming(bundle, ".ckpt", "--pretrained_path").search(capsys.readouterr().err)


def test_what_is_not_read_is_said(world, tmp_path, capsys):
    assert train_biart.main([*world, "--extract_codes", str(tmp_path / "codes"), "--max_steps", "1"]) == 0
    codes = [
        "--dataset",
        "codes",
        "--train_dir",
        str(tmp_path / "codes/train"),
        "--val_dir",
        str(tmp_path / "codes/val"),
    ]
    capsys.readouterr()
    flags = ["--max_steps", "1", "--name", "a", "--ckpt_path", "some.ckpt", "--world", "full"]
    assert train_biart.main([*world, *codes, *flags]) == 0
    said = capsys.readouterr().out
    assert naming("No effect: bpe_vocab_size", "No effect: world", "shapes").search(said)
    assert naming("ckpt_path", "some.ckpt", "--resume").search(said)
    assert train_biart.main([*world, "--max_steps", "1", "--name", "b"]) == 0
    assert "No effect" not in capsys.readouterr().out


def test_mistakes_are_one_line_on_stderr(world, tmp_path, capsys):
    for flags, facts in (
        ("--lerning_rate 1", ["--lerning_rate", "--learning_rate"]),
        ("--preset huge", ["preset", "huge", "tiny", "12x768", "24x1024"]),
        ("--n_embd 17", ["n_embd", 17, "n_head", 2]),
        (f"--vae_path {tmp_path / 'none'}", [tmp_path / "none"]),
        (f"--vae_path {tmp_path / 'val'}", [tmp_path / "val", "config.json"]),
        ("--img_size 32", ["img_size", 32, tmp_path / "vae", 16]),
        ("--top_k 25", ["top_k", 25, 24]),
        ("--guidance 2 --reference_dropout 0", ["guidance", 2.0, "reference_dropout"]),
        ("--muon_learning_rate 1", ["muon_learning_rate", "optimizer", "muon"]),
        ("--text_len 2 --text_too_long error", ["text_len", 2, "text_too_long"]),
        ("--batch_size 13", ["batch_size", 13, 12]),
        ("--dataset shapes", ["world", "small", 32, 16]),
        ("--dataset codes", ["train_dir", tmp_path / "train", "--extract_codes"]),
        ("--export x", ["export", "ckpt_path"]),
        ("--crops_per_image 2", ["crops_per_image", 2, "extract_codes"]),
        ("--limit_train_batches 0.001", ["limit_train_batches", 0.001]),
    ):
        assert train_biart.main([*world, *flags.split()]) == 2, flags
        assert naming(*facts).search(capsys.readouterr().err), flags
    (tmp_path / "train" / "00.png").write_bytes(b"")
    for text in (tmp_path / "train").glob("*.txt"):
        text.write_text("\n")
    assert train_biart.main(world) == 2
    assert naming("train_dir", tmp_path / "train", 12, "empty").search(capsys.readouterr().err)


def test_folders_are_tried_and_held_before_anything_is_computed(world, tmp_path, capsys):
    (tmp_path / "file").touch()
    before = set(tmp_path.iterdir())
    with only_writer(tmp_path / "codes", "extract_codes"):
        for flags, facts in (
            (["--extract_codes", tmp_path / "codes"], ["extract_codes", tmp_path / "codes", os.getpid()]),
            (["--extract_codes", tmp_path / "file" / "x"], ["extract_codes", "file is not a folder"]),
            (["--export", tmp_path / ("a" * 300), "--ckpt_path", "absent"], ["export", 255]),
            (["--log_dir", tmp_path / "file" / "runs"], ["log_dir", "file is not a folder"]),
        ):
            assert train_biart.main([*world, "--train_dir", "absent", *map(str, flags)]) == 2
            said = capsys.readouterr().err
            assert naming(*facts).search(said) and said.count("\n") == 1, said
    assert train_biart.main([*world, "--export", str(tmp_path / "new"), "--ckpt_path", "absent"]) == 2
    assert set(tmp_path.iterdir()) == before


def test_a_diverged_run_says_so(world, tmp_path, capsys):
    flags = [*world, "--learning_rate", "1e30", "--max_steps"]
    assert train_biart.main([*flags, "2"]) == 1
    assert naming("diverged", "step 2", "--learning_rate").search(capsys.readouterr().err)
    with pytest.warns(UserWarning) as said:  # a step less: only validation and samples show it
        assert train_biart.main([*flags, "1", "--name", "one"]) == 1
    assert naming("val/total_loss", "step 1", "--learning_rate").search(capsys.readouterr().err)
    assert not (tmp_path / "runs/one/bundle").exists()
    for facts in (("val/total_loss", "step 1"), ("samples", "step 1")):
        assert [w for w in said if naming(*facts).search(str(w.message))]
    assert [p.name for p in (tmp_path / "runs/one/checkpoints").iterdir()] == ["last-epoch=0-step=1.ckpt"]


def test_tar_shards_without_a_member_are_named(world, tmp_path, capsys):
    tarfile.open(tmp_path / "none.tar", "w").close()
    shard = str(tmp_path / "none.tar")
    assert train_biart.main([*world, "--dataset", "webdataset", "--train_dir", shard, "--val_dir", shard]) == 2
    assert naming("train_dir", tmp_path / "none.tar").search(capsys.readouterr().err)


def test_validation_shards_without_captions_stop_the_run_before_it_begins(world, tmp_path, capsys):
    for split, suffixes in (("train", (".png", ".txt")), ("val", (".png",))):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for file in sorted((tmp_path / split).iterdir()):
                if file.suffix in suffixes:
                    tar.add(file, file.name)
    flags = ["--dataset", "webdataset", "--train_dir", str(tmp_path / "train.tar")]
    assert train_biart.main([*world, *flags, "--val_dir", str(tmp_path / "val.tar")]) == 2
    assert naming("val_dir", 3, tmp_path / "val.tar").search(capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()
