"""train_biart.py --pretrained_path: runs that start from the weights of another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from latent_verse.biart import sampling
from latent_verse.checkpoints.ckpt_files import read_ckpt
from latent_verse.commands import train_biart
from latent_verse.inference.pipeline import LVerse
from latent_verse.training.biart import LitBiART
from tests.biart_runs import TINY, record_losses
from tests.messages import naming


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
