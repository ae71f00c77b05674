"""train_biart.py from end to end on tiny sizes: smoke test, resume, codes, logging, bundles, mistakes."""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latent_verse.augvae.model import AugVAE
from latent_verse.biart import sampling
from latent_verse.biart.sequence import IMAGE_TO_TEXT, TEXT_TO_IMAGE
from latent_verse.checkpoints.ckpt_files import read_ckpt
from latent_verse.commands import train_biart
from latent_verse.config import ConfigError
from latent_verse.config.train import PairDataConfig, TrainBiARTConfig, resolve_train_biart
from latent_verse.data.codes import CodesDataset
from latent_verse.data.text import ClipTokenizer, load_tokenizer
from latent_verse.files import only_writer, write_text
from latent_verse.inference.pipeline import LVerse
from latent_verse.training.biart import LitBiART
from latent_verse.training.biart_setup import FAKE_VAE
from latent_verse.training.trainer import ease_smoke_test
from tests.messages import naming

REPO = Path(__file__).parents[2]

TINY = shlex.split(
    "--n_layer 1 --n_head 2 --n_embd 16 --tokenizer bpe --bpe_vocab_size 300 --text_len 8 --batch_size 4 "
    "--num_workers 0 --gpus 0 --logger csv --log_every_n_steps 1 --refresh_rate 0 --num_samples 2"
)


@pytest.fixture
def world(tmp_path, tiny_augvae):
    """Twelve training and three validation pairs, and a 16 px AugVAE of 16 codes. Returns the flags that name them."""
    for split, numbers in (("train", range(12)), ("val", range(12, 15))):
        place = tmp_path / split
        place.mkdir()
        for i in numbers:
            pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{i:02d}.png")
            (place / f"{i:02d}.txt").write_text(f"picture {i}\nthe number {i}, again")
    tiny_augvae(single_level=4).save_pretrained(tmp_path / "vae")
    folders = {"train_dir": "train", "val_dir": "val", "vae_path": "vae", "log_dir": "runs"}
    return [*TINY, *(word for flag, name in folders.items() for word in (f"--{flag}", str(tmp_path / name)))]


def logged(run: Path) -> dict[str, list[float]]:
    """Every metric of a run's metrics.csv, in order."""
    with open(run / "logs" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key]) for row in rows if row[key]] for key in rows[0]}


def record_losses(monkeypatch) -> list[float]:
    """Collect the training losses of the runs that follow."""
    losses = []
    step = LitBiART.training_step

    def recorded(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(LitBiART, "training_step", recorded)
    return losses


# ---------------------------------------------------------------------------------------------------------- whole runs


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


def weights_of(bundle: Path) -> dict[str, torch.Tensor]:
    return LVerse.from_pretrained(bundle).biart.state_dict()


def record_first_weights(monkeypatch) -> dict[str, torch.Tensor]:
    """Filled with the transformer's weights when training begins."""
    seen = {}

    def copy(self):
        seen.update({key: tensor.clone() for key, tensor in self.model.state_dict().items()})

    monkeypatch.setattr(LitBiART, "on_fit_start", copy)
    return seen


@pytest.mark.parametrize("source", ["bundle", "", "checkpoints"])
def test_a_run_starts_from_the_weights_of_another(world, tmp_path, monkeypatch, source):
    """Of a bundle, run folder or file: shape, tokenizer and AugVAE come with them, and other data may follow."""
    assert train_biart.main([*world, "--epochs", "1", "--name", "first", "--pos_by_modality"]) == 0
    first = tmp_path / "runs/first"
    place = next((first / source).glob("best-*")) if source == "checkpoints" else first / source
    for file in (tmp_path / "train").glob("*.txt"):
        file.write_text("something else")
    none = "--num_workers 0 --gpus 0 --logger csv --refresh_rate 0 --num_samples 2 --batch_size 4 --epochs 1".split()
    data = ["--train_dir", str(tmp_path / "train"), "--log_dir", str(tmp_path / "runs")]
    start = [*none, *data, "--pretrained_path", str(place)]
    seen = record_first_weights(monkeypatch)
    assert train_biart.main([*start, "--name", "second", "--learning_rate", "1e-30", "--weight_decay", "0"]) == 0
    before, after = weights_of(first / "bundle"), weights_of(tmp_path / "runs/second/bundle")
    for key, tensor in before.items():
        assert torch.equal(seen[key], tensor) and torch.equal(after[key], tensor), key
    bundles = [LVerse.from_pretrained(run / "bundle") for run in (first, tmp_path / "runs/second")]
    assert bundles[0].tokenizer.fingerprint == bundles[1].tokenizer.fingerprint
    assert bundles[0].fingerprints["vae"] == bundles[1].fingerprints["vae"]


def test_averaged_weights_are_what_another_run_starts_from(world, tmp_path, monkeypatch):
    world += ["--epochs", "1"]
    assert train_biart.main([*world, "--name", "first", "--ema_decay", "0.9", "--learning_rate", "1e-2"]) == 0
    seen = record_first_weights(monkeypatch)
    first = tmp_path / "runs/first"
    assert train_biart.main([*world, "--name", "second", "--pretrained_path", str(first)]) == 0
    assert all(torch.equal(seen[key], tensor) for key, tensor in weights_of(first / "bundle").items())


@pytest.mark.parametrize(("decay", "exported"), [("0.9", "ema."), ("0", "model.")])
def test_a_bundle_holds_the_averaged_weights_where_there_are_any(world, tmp_path, monkeypatch, decay, exported):
    """And samples are generated with them."""
    generate, used = sampling.generate, []
    monkeypatch.setattr(
        sampling,
        "generate",
        lambda net, *args, **kw: used.append(net.head.weight.clone()) or generate(net, *args, **kw),
    )
    assert train_biart.main([*world, "--epochs", "1", "--ema_decay", decay, "--learning_rate", "1e-2"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    (file,) = (run / "checkpoints").glob("best-*")
    state = read_ckpt(file)["state_dict"]
    assert any(key.startswith("ema.") for key in state) == (exported == "ema.")
    found = weights_of(run / "bundle")
    for key, tensor in found.items():
        assert torch.equal(tensor, state[exported + key]), key
    if exported == "ema.":
        assert not torch.equal(found["head.weight"], state["model.head.weight"])
    assert len(used) == 2 and all(torch.equal(weight, found["head.weight"]) for weight in used)


def test_a_run_from_weights_resumes_its_own(world, tmp_path, monkeypatch, capsys):
    assert train_biart.main([*world, "--epochs", "1", "--name", "first"]) == 0
    start = [*world, "--name", "second", "--backup", "--pretrained_path", str(tmp_path / "runs/first/bundle")]
    assert train_biart.main([*start, "--epochs", "1"]) == 0
    capsys.readouterr()
    losses = record_losses(monkeypatch)
    assert train_biart.main([*start, "--epochs", "2"]) == 0
    assert naming(tmp_path / "runs/second/checkpoints/last-epoch=0-step=3.ckpt").search(capsys.readouterr().out)
    assert len(losses) == 3


def test_what_contradicts_the_weights_to_start_from_is_refused(world, tmp_path, tiny_augvae, capsys):
    assert train_biart.main([*world, "--epochs", "1", "--name", "first"]) == 0
    start = [*world, "--epochs", "1", "--name", "second", "--pretrained_path", str(tmp_path / "runs/first/bundle")]
    tiny_augvae(seed=5, single_level=4).save_pretrained(tmp_path / "other_vae")
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.pt").write_bytes(b"no")
    capsys.readouterr()
    bundle = tmp_path / "runs/first/bundle"
    for flags, facts in (
        (["--n_layer", "2", "--text_len", "9"], ["pretrained_path", bundle, "n_layer", 2, 1, "text_len", 9, 8]),
        (["--preset", "12x768"], []),  # n_* of `world` are the same
        (["--resume", "--ckpt_path", "x.ckpt"], ["pretrained_path", "resume"]),
        (["--tokenizer", "clip"], ["pretrained_path", bundle, "tokenizer", "clip", "bpe"]),
        (["--vae_path", str(tmp_path / "other_vae")], ["vae_path", bundle]),
        (["--pretrained_path", str(tmp_path / "vae")], [tmp_path / "vae", "AugVAE"]),
        (["--pretrained_path", str(tmp_path / "empty")], [tmp_path / "empty", "config.json"]),
        (["--pretrained_path", str(tmp_path / "none.ckpt")], [tmp_path / "none.ckpt"]),
        (["--pretrained_path", str(tmp_path / "weights.pt")], [tmp_path / "weights.pt"]),
    ):
        assert train_biart.main([*start, *flags, "--max_steps", "1"]) == (2 if facts else 0), flags
        assert naming(*facts).search(capsys.readouterr().err), flags


def test_the_augvae_of_a_run_that_is_gone_is_taken_from_its_bundle(world, tmp_path, capsys):
    """A YAML file's vae_path does not count beside pretrained_path, which brings its own; a flag's does."""
    assert train_biart.main([*world, "--epochs", "1", "--name", "first"]) == 0
    (tmp_path / "vae").rename(tmp_path / "moved")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"vae_path: {tmp_path / 'nowhere'}\nepochs: 1\n")
    at = world.index("--vae_path")
    start = ["--config", str(recipe), *world[:at], *world[at + 2 :], "--pretrained_path", str(tmp_path / "runs/first")]
    assert train_biart.main([*start, "--name", "second"]) == 0
    assert train_biart.main([*start, "--name", "third", "--vae_path", str(tmp_path / "moved")]) == 0
    assert train_biart.main(["--export", str(tmp_path / "again"), "--ckpt_path", str(tmp_path / "runs/second")]) == 0
    shutil.rmtree(tmp_path / "runs/first/bundle")
    capsys.readouterr()
    assert train_biart.main([*start, "--name", "fourth"]) == 2
    assert naming("AugVAE", tmp_path / "vae", "--vae_path").search(capsys.readouterr().err)
    assert train_biart.main([*start, "--vae_path", str(tmp_path / "nowhere")]) == 2
    assert naming(tmp_path / "nowhere").search(capsys.readouterr().err)


def test_a_smoke_test_may_be_started_from_as_well(tmp_path, capsys):
    fake = [*TINY, "--fake_data", "--log_dir", str(tmp_path), "--max_steps", "1"]
    assert train_biart.main([*fake, "--name", "first"]) == 0
    start = ["--pretrained_path", str(tmp_path / "first")]
    capsys.readouterr()
    assert train_biart.main([*fake, *start, "--name", "second", "--seed", "7"]) == 0
    assert "preset" not in capsys.readouterr().out
    prints = [LVerse.from_pretrained(tmp_path / name / "bundle").fingerprints["vae"] for name in ("first", "second")]
    assert prints[0] == prints[1]
    shutil.rmtree(tmp_path / "first/bundle")
    assert train_biart.main([*fake, *start, "--name", "third"]) == 2
    assert naming("AugVAE", tmp_path / "first", "--vae_path").search(capsys.readouterr().err)


def test_a_bundle_in_half_precision_is_trained_in_full(world, tmp_path, monkeypatch):
    world += ["--epochs", "1"]
    assert train_biart.main([*world, "--name", "first"]) == 0
    half = LVerse.from_pretrained(tmp_path / "runs/first/bundle", dtype="bfloat16")
    half.save_pretrained(tmp_path / "half")
    seen = record_first_weights(monkeypatch)
    assert train_biart.main([*world, "--name", "second", "--pretrained_path", str(tmp_path / "half")]) == 0
    for key, tensor in half.biart.state_dict().items():
        assert seen[key].dtype == torch.float32 and torch.equal(seen[key], tensor.float()), key


def test_codes_for_a_run_from_weights_have_its_tokenizer(world, tmp_path):
    assert train_biart.main([*world, "--epochs", "1", "--name", "first"]) == 0
    for file in (tmp_path / "train").glob("*.txt"):
        file.write_text("quite other words")
    start = [*world, "--epochs", "1", "--pretrained_path", str(tmp_path / "runs/first/bundle")]
    assert train_biart.main([*start, "--extract_codes", str(tmp_path / "codes")]) == 0
    codes = [
        "--dataset",
        "codes",
        "--train_dir",
        str(tmp_path / "codes/train"),
        "--val_dir",
        str(tmp_path / "codes/val"),
    ]
    assert train_biart.main([*start, *codes, "--name", "second"]) == 0


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


def test_codes_train_as_images_do(world, tmp_path, monkeypatch, capsys):
    flags = [*world, "--epochs", "2", "--resize_ratio", "1"]
    assert train_biart.main([*flags, "--extract_codes", str(tmp_path / "codes"), "--shard_size", "5"]) == 0
    command = f"--dataset codes --tokenizer bpe --train_dir {tmp_path / 'codes' / 'train'}"
    assert command in capsys.readouterr().out
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


def test_presets_and_shipped_files():
    from latent_verse.config.cli import parse

    for file in sorted((REPO / "configs").glob("*_biart.yaml")):
        config, given = parse(TrainBiARTConfig, ["--configs", str(file)], "")
        resolve_train_biart(config, given)
        with pytest.raises(ConfigError, match=naming("resume", "ckpt_path")):
            resolve_train_biart(*parse(TrainBiARTConfig, ["--configs", str(file), "--resume"], ""))
