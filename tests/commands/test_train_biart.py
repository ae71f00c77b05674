"""train_biart.py from end to end on tiny sizes: smoke test, resume, logging, processes, bundles."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latent_verse.augvae.model import AugVAE
from latent_verse.biart import sampling
from latent_verse.biart.sequence import IMAGE_TO_TEXT, TEXT_TO_IMAGE
from latent_verse.checkpoints.ckpt_files import read_ckpt
from latent_verse.commands import train_biart
from latent_verse.config import ConfigError
from latent_verse.config.train import PairDataConfig, TrainBiARTConfig
from latent_verse.config.train_rules import resolve_train_biart
from latent_verse.data.text import ClipTokenizer
from latent_verse.data.tokenizer_files import load_tokenizer
from latent_verse.files import write_text
from latent_verse.inference.pipeline import LVerse
from latent_verse.training.biart import LitBiART
from latent_verse.training.biart_setup import FAKE_VAE
from latent_verse.training.trainer import ease_smoke_test
from tests.biart_runs import TINY, logged, record_losses
from tests.messages import naming

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_loggers_get_losses_and_samples(tmp_path, monkeypatch, logger):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert train_biart.main([*TINY, "--fake_data", "--log_dir", str(tmp_path), "--logger", logger]) == 0
    (run,) = tmp_path.iterdir()
    if logger == "wandb":
        (offline,) = run.glob("wandb/offline-run-*")
        assert list((offline / "files" / "media" / "images" / "val").glob("drawn_*.png"))
        assert list((offline / "files" / "media" / "table" / "val").glob("written_*.json"))
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "logs"))
    events.Reload()
    tags = events.Tags()
    assert {"train/total_loss", "val/total_loss"} <= set(tags["scalars"])
    assert tags["images"] == ["val/drawn"] and "val/written/text_summary" in tags["tensors"]


def test_fake_data_needs_no_file(tmp_path, capsys):
    assert train_biart.main([*TINY, "--fake_data", "--log_dir", str(tmp_path)]) == 0
    (run,) = tmp_path.iterdir()
    assert run.name == "fake-biart"
    metrics = logged(run)
    assert len(metrics["train/total_loss"]) == 2
    for stage in ("train", "val"):
        for direction in (TEXT_TO_IMAGE, IMAGE_TO_TEXT):
            for modality in ("text", "image"):
                assert all(math.isfinite(x) for x in metrics[f"{stage}/{direction}/{modality}_loss"])
    assert metrics["train/tokens_per_second"][-1] > 0
    names = {"config.yaml", "run.json", "checkpoints", "images", "logs", "tokenizer", "bundle"}
    assert names == {path.name for path in run.iterdir()}
    assert sorted(path.name for path in (run / "images").iterdir()) == ["samples_step=2.png", "samples_step=2.txt"]
    assert "caption: a made-up picture" in (run / "images" / "samples_step=2.txt").read_text()
    assert load_tokenizer(run / "tokenizer").name == "bpe"
    model = LVerse.from_pretrained(run / "bundle")
    assert model.info == {"reference_dropout": 0.1, "text_too_long": "truncate"}
    assert len(model.text_to_image(["a made-up picture of kind 1"])[0]) == 1
    assert naming(run / "bundle").search(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("flags", "expected"),  # 3 steps an epoch
    [
        ("--sample_every_n_epochs 2", [6, 12]),
        ("--sample_every_n_epochs 3", [9]),
        ("--sample_every_n_epochs 1 --num_sanity_val_steps 1", [3, 6, 9, 12]),
        ("--sample_every_n_epochs 2 --log_images --image_log_steps 5", [5, 6, 10, 12]),
        ("--sample_every_n_epochs 5 --image_log_steps 5", []),
        # 2 steps an epoch, each of one or two batches: no step is sampled for twice, nor the one before the first
        ("--sample_every_n_epochs 5 --log_images --image_log_steps 3 --accumulate_grad_batches 2", [3, 6]),
        ("--sample_every_n_epochs 1 --num_samples 0", []),
    ],
)
def test_samples_are_generated_when_the_settings_say(world, tmp_path, monkeypatch, flags, expected):
    sampled_at, forgotten = [], []

    def recorded(path, text):
        sampled_at.append(int(path.stem.removeprefix("samples_step=")))
        write_text(path, text)

    monkeypatch.setattr("latent_verse.training.image_logging.write_text", recorded)
    monkeypatch.setattr(sampling, "forget_decoders", forgotten.append)
    assert train_biart.main([*world, "--epochs", "4", "--name", "a", *flags.split()]) == 0
    assert sampled_at == expected and len(forgotten) == len(expected)  # training needs the memory
    names = {path.name for path in (tmp_path / "runs/a/images").glob("*")}
    assert names == {f"samples_step={step}.{kind}" for step in expected for kind in ("png", "txt")}


def test_a_checkpoint_describes_itself_and_holds_no_frozen_network(world, tmp_path, capsys):
    assert train_biart.main([*world, "--max_steps", "2", "--name", "a"]) == 0
    (file,) = (tmp_path / "runs" / "a" / "checkpoints").glob("best-*")  # validated though stopped within an epoch
    content = read_ckpt(file)
    about = content["latent_verse"]
    assert all(key.startswith("model.") for key in content["state_dict"])
    assert about["kind"] == "biart" and about["model"]["image_len"] == 16 and about["model"]["n_layer"] == 1
    assert about["run"]["vae"]["vae_path"] == about["vae"]["path"] == str(tmp_path / "vae")
    assert set(about["tokenizer"]["files"]) == {"tokenizer.json", "tokenizer_config.json"}
    # export from it by command; a folder of something else is left alone
    assert train_biart.main(["--export", str(tmp_path / "out"), "--ckpt_path", str(tmp_path / "runs" / "a")]) == 0
    exported, first = LVerse.from_pretrained(tmp_path / "out"), LVerse.from_pretrained(tmp_path / "runs/a/bundle")
    assert exported.fingerprints == first.fingerprints
    assert train_biart.main(["--export", str(tmp_path / "train"), "--ckpt_path", str(file)]) == 2
    assert naming(tmp_path / "train", "bundle").search(capsys.readouterr().err)


def test_a_resumed_run_does_not_sample_again_for_the_step_of_its_backup(world, tmp_path, monkeypatch, killed):
    sampled_at = []
    monkeypatch.setattr("latent_verse.training.image_logging.write_text", lambda path, _: sampled_at.append(path.stem))
    flags = [*world, "--batch_size", "2", "--accumulate_grad_batches", "2", "--epochs", "1", "--backup", "--name", "a"]
    flags += ["--backup_steps", "1", "--log_images", "--image_log_steps", "1", "--sample_every_n_epochs", "5"]
    with killed(LitBiART, step=2):
        train_biart.main(flags)
    assert train_biart.main(flags) == 0
    assert sampled_at == ["samples_step=1", "samples_step=2", "samples_step=3"]


@pytest.mark.parametrize(("optimizer", "dataset"), [("adamw", "pairs"), ("muon", "pairs"), ("adamw", "codes")])
def test_a_killed_run_resumes_exactly(world, tmp_path, monkeypatch, capsys, killed, optimizer, dataset):
    flags = [
        *world,
        "--epochs",
        "3",
        "--optimizer",
        optimizer,
        "--backup",
        "--backup_steps",
        "2",
        "--warmup_steps",
        "2",
    ]
    flags += ["--resid_pdrop", "0.3", "--embd_pdrop", "0.1", "--reference_dropout", "0.4", "--ema_decay", "0.8"]
    flags += ["--word_dropout", "0.2", "--code_dropout", "0.1"]
    flags += ["--text_to_image_share", "0.4", "--learning_rate", "0.01", "--num_samples", "1"]
    if dataset == "codes":  # of two crops and two captions each, chosen anew in each epoch
        codes = tmp_path / "codes"
        assert train_biart.main([*world, "--extract_codes", str(codes), "--crops_per_image", "2"]) == 0
        flags += ["--dataset", "codes", "--train_dir", str(codes / "train"), "--val_dir", str(codes / "val")]
    with monkeypatch.context() as patch:
        whole = record_losses(patch)
        assert train_biart.main([*flags, "--name", "whole"]) == 0
    assert len(whole) == 9
    with monkeypatch.context() as patch:
        before = record_losses(patch)
        with killed(LitBiART, step=5):
            train_biart.main([*flags, "--name", "killed"])
    with monkeypatch.context() as patch:
        after = record_losses(patch)
        assert train_biart.main([*flags, "--name", "killed"]) == 0
    assert before == whole[:5] and after == whole[4:]
    ends = []
    for name in ("whole", "killed"):
        (file,) = (tmp_path / "runs" / name / "checkpoints").glob("last-*")
        assert "step=9" in file.name
        ends.append(read_ckpt(file))
    a, b = (end["state_dict"] for end in ends)
    assert a.keys() == b.keys() and any(key.startswith("ema.") for key in a)
    assert all(torch.equal(a[key], b[key]) for key in a)
    capsys.readouterr()
    assert train_biart.main([*flags, "--name", "killed"]) == 0
    assert naming(tmp_path / "runs" / "killed", "--epochs").search(capsys.readouterr().out)
    bundles = [LVerse.from_pretrained(tmp_path / "runs" / name / "bundle").fingerprints for name in ("whole", "killed")]
    assert bundles[0] == bundles[1]


def test_a_run_killed_before_its_first_checkpoint_starts_anew_with_a_new_tokenizer(world, tmp_path, killed):
    flags = [*world, "--backup", "--max_steps", "1", "--name", "a"]
    with killed(LitBiART, step=0):
        train_biart.main(flags)
    run = tmp_path / "runs" / "a"
    first = load_tokenizer(run / "tokenizer")
    for text in (tmp_path / "train").glob("*.txt"):
        text.write_text("altogether different words")
    assert train_biart.main([*flags, "--bpe_vocab_size", "280"]) == 0
    now = load_tokenizer(run / "tokenizer")
    assert now.vocab_size <= 280 and now.fingerprint != first.fingerprint
    assert load_tokenizer(run / "bundle" / "tokenizer").fingerprint == now.fingerprint


def test_a_run_with_the_vocabulary_of_clip(world, tmp_path):
    """It is in the checkpoint and the bundle, and captions go through it to the network and back."""
    at = world.index("--tokenizer")
    assert train_biart.main([*world[:at], *world[at + 4 :], "--tokenizer", "clip", "--epochs", "1", "--name", "a"]) == 0
    run = tmp_path / "runs" / "a"
    metrics = logged(run)
    assert len(metrics["train/total_loss"]) == 3 and math.isfinite(metrics["val/total_loss"][0])
    # of 49408 words and the end of the text
    assert metrics[f"train/{IMAGE_TO_TEXT}/text_loss"][0] == pytest.approx(math.log(49409), abs=0.1)
    model = LVerse.from_pretrained(run / "bundle", device="cpu")
    assert model.tokenizer.name == "clip" and model.biart.config.text_vocab == 49408
    assert model.encode_texts(["picture 3"])[0].tolist() == [
        *ClipTokenizer().encode("picture 3"),
        *[model.biart.vocab.pad] * 6,
    ]
    assert load_tokenizer(run / "tokenizer").fingerprint == ClipTokenizer().fingerprint
    lines = (run / "images/samples_step=3.txt").read_text().splitlines()
    assert lines[0] == "0. caption: picture 12"


def test_a_run_in_bf16_keeps_its_weights_in_float32(world, tmp_path):
    """And rounds what it computes: losses near those of float32, but others."""
    for name, flags in (("full", []), ("half", ["--precision", "bf16"])):
        assert train_biart.main([*world, "--epochs", "1", "--ema_decay", "0.9", "--name", name, *flags]) == 0
    full, half = (logged(tmp_path / "runs" / name) for name in ("full", "half"))
    losses = [key for key in full if key.endswith(("text_loss", "image_loss"))]
    assert len(losses) == 8
    for key in losses:
        assert half[key] == pytest.approx(full[key], rel=1e-3) and half[key] != full[key], key
    (file,) = (tmp_path / "runs/half/checkpoints").glob("last-*")
    content = read_ckpt(file)
    assert {tensor.dtype for tensor in content["state_dict"].values()} == {torch.float32}
    moments = [state["exp_avg"] for state in content["optimizer_states"][0]["state"].values()]
    assert {tensor.dtype for tensor in moments} == {torch.float32}
    assert content["latent_verse"]["run"]["trainer"]["precision"] == "bf16-mixed"


def test_a_smoke_test_on_a_cpu_is_small_unless_flags_ask(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    at = TINY.index("--batch_size")
    for name, flags, size in (("a", [*TINY[:at], *TINY[at + 2 :]], 1), ("b", TINY, 4)):
        assert train_biart.main([*flags, "--fake_data", "--log_dir", str(tmp_path), "--name", name]) == 0
        assert f"batch_size: {size}\n" in (tmp_path / name / "config.yaml").read_text()
    for given, preset in (({}, "tiny"), ({"n_layer": "--n_layer"}, "12x768"), ({"preset": "a.yaml"}, "12x768")):
        config = TrainBiARTConfig(data=PairDataConfig(fake_data=True))
        eased = ease_smoke_test(config, given)
        assert eased.model.preset == preset and eased.data.batch_size == 1
        assert config.model.preset == "12x768"


def test_without_validation_the_last_weights_are_exported(world, tmp_path):
    at = world.index("--val_dir")
    assert train_biart.main([*world[:at], *world[at + 2 :], "--max_steps", "2", "--name", "a"]) == 0
    run = tmp_path / "runs" / "a"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last-epoch=0-step=2.ckpt"]
    assert (run / "bundle").is_dir() and not (run / "images").exists()


@pytest.mark.slow
def test_validation_is_the_same_on_two_processes(tmp_path):
    """Seven pairs on two processes: one has fewer, and an empty batch. The rate is so small that no weight moves."""
    script = str(REPO / "train_biart.py")
    flags = [
        *TINY,
        "--fake_data",
        "--dataset_size",
        "32",
        "--val_size",
        "7",
        "--epochs",
        "1",
        "--learning_rate",
        "1e-30",
    ]
    flags += ["--log_dir", str(tmp_path)]
    for name, more in (
        ("one", ["--batch_size", "8"]),
        ("ddp", ["--batch_size", "3", "--accelerator", "cpu", "--gpus", "2"]),
        ("fsdp", ["--batch_size", "2", "--accelerator", "cpu", "--gpus", "2", "--strategy", "fsdp"]),
    ):
        command = [sys.executable, script, *flags, *more, "--name", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    one, *others = (logged(tmp_path / name) for name in ("one", "ddp", "fsdp"))
    for metrics in others:
        for key in (key for key in one if key.startswith("val/")):
            assert metrics[key] == pytest.approx(one[key], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "share"), [("ddp", "1"), ("ddp", "0"), ("fsdp", "0")])
def test_two_processes_equal_one_on_the_joined_batch(world, tmp_path, strategy, share):
    """In one direction at a time: which rows go which way depends on how they lie in a process's batch."""
    script = str(REPO / "train_biart.py")
    flags = [*world, "--text_to_image_share", share, "--reference_dropout", "0", "--reference_weight", "0.5"]
    flags += ["--epochs", "2", "--learning_rate", "0.01", "--gradient_clip_val", "1"]
    for name, more in (
        ("one", ["--batch_size", "4"]),
        ("two", ["--batch_size", "2", "--accelerator", "cpu", "--gpus", "2", "--strategy", strategy]),
    ):
        command = [sys.executable, script, *flags, *more, "--name", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (logged(tmp_path / "runs" / name) for name in ("one", "two"))
    assert len(one["val/total_loss"]) == 2 and one["val/total_loss"][1] != one["val/total_loss"][0]
    for key in (key for key in one if key.startswith("val/")):
        assert two[key] == pytest.approx(one[key], rel=1e-4)


def test_loss_falls_on_shapes_and_truth_is_logged(tmp_path):
    flags = [*TINY, "--dataset", "shapes", "--vae_path", str(tmp_path / "vae"), "--log_dir", str(tmp_path / "runs")]
    torch.manual_seed(0)
    AugVAE(FAKE_VAE).save_pretrained(tmp_path / "vae")
    flags += ["--dataset_size", "160", "--val_size", "8", "--num_judged", "4", "--epochs", "1", "--text_len", "24"]
    flags += ["--n_embd", "32", "--optimizer", "muon", "--learning_rate", "0.02"]
    assert train_biart.main([*flags, "--name", "shapes"]) == 0
    metrics = logged(tmp_path / "runs" / "shapes")
    losses = metrics["train/total_loss"]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.7 * sum(losses[:5])
    for direction in (TEXT_TO_IMAGE, IMAGE_TO_TEXT):
        assert 0 <= metrics[f"val/{direction}/right"][0] <= 1
    text = (tmp_path / "runs/shapes/images/samples_step=40.txt").read_text()
    assert text.count("(right)") + text.count("(wrong)") == 2


def test_shapes_are_checked_where_no_samples_are_written(tmp_path):
    flags = [*TINY, "--dataset", "shapes", "--vae_path", str(tmp_path / "vae"), "--log_dir", str(tmp_path / "runs")]
    torch.manual_seed(0)
    AugVAE(FAKE_VAE).save_pretrained(tmp_path / "vae")
    flags += ["--dataset_size", "4", "--val_size", "6", "--num_samples", "0", "--num_judged", "4", "--epochs", "1"]
    assert train_biart.main([*flags, "--name", "shapes"]) == 0
    for direction in (TEXT_TO_IMAGE, IMAGE_TO_TEXT):
        (right,) = logged(tmp_path / "runs" / "shapes")[f"val/{direction}/right"]
        assert 4 * right in (0, 1, 2, 3, 4)
    assert not (tmp_path / "runs/shapes/images").exists()


def test_presets_and_shipped_files():
    from latent_verse.config.cli import parse

    for file in sorted((REPO / "configs").glob("*_biart.yaml")):
        config, given = parse(TrainBiARTConfig, ["--configs", str(file)], "")
        resolve_train_biart(config, given)
        with pytest.raises(ConfigError, match=naming("resume", "ckpt_path")):
            resolve_train_biart(*parse(TrainBiARTConfig, ["--configs", str(file), "--resume"], ""))
