"""Checkpoints of BiART: what is wrong in one, where they may lie, and runs that were moved."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from latent_verse.checkpoints.biart import export_bundle, load_pretrained
from latent_verse.checkpoints.ckpt_files import CheckpointError
from latent_verse.commands import train_biart
from tests.messages import naming
from tests.small_checkpoints import changed, many, own_ckpt, put

TINY = (
    "--n_layer 1 --n_head 2 --n_embd 16 --tokenizer bpe --bpe_vocab_size 300 --text_len 8 --batch_size 4 --fake_data "
    "--num_workers 0 --gpus 0 --logger csv --refresh_rate 0 --num_samples 0 --ema_decay 0.9"
).split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The run folder of a smoke test."""
    folder = tmp_path_factory.mktemp("runs")
    assert train_biart.main([*TINY, "--log_dir", str(folder), "--name", "run"]) == 0
    return folder / "run"


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    (file,) = trained.glob("checkpoints/best-*.ckpt")
    return Path(shutil.copy(file, tmp_path / "b.ckpt"))


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (put("latent_verse", "model", "n_layer", value=10**6), ()),
        (put("latent_verse", "model", "image_vocab", value=10**12), ()),
        (put("latent_verse", "model", value="BiART"), ("settings", "str")),
        (put("latent_verse", "run", value=[1]), ()),
        (put("latent_verse", "run", "optim", value=None), ()),
        (lambda content: content["latent_verse"]["run"].pop("optim"), ("optim",)),
        (put("latent_verse", "run", "loss", "reference_dropout", value="0.1"), ("reference_dropout",)),
        (put("latent_verse", "run", "text", "text_too_long", value=many()), ("text_too_long",)),
        (put("latent_verse", "vae", value=None), ()),
        (put("latent_verse", "vae", "path", value=5), ("AugVAE",)),
        (put("latent_verse", "vae", "fingerprint", value=[1]), ("AugVAE",)),
        (put("latent_verse", "tokenizer", value="bpe"), ("tokenizer",)),
        (put("latent_verse", "tokenizer", "files", value=["tokenizer.json"]), ("tokenizer",)),
        (put("latent_verse", "tokenizer", "files", "tokenizer.json", value=5), ("tokenizer",)),
        (put("latent_verse", "tokenizer", "files", "tokenizer.json", value="[" * 10**5), ("tokenizer.json",)),
        (put("latent_verse", "tokenizer", "files", value={}), ("tokenizer_config.json",)),
        (put("state_dict", "ema.head.weight", value=lambda w: w * torch.nan), ("finite", "ema.head.weight")),
        (put("state_dict", "model.head.weight", value=lambda w: w * torch.nan), ("finite", "model.head.weight")),
        (put("state_dict", "ema.head.weight", value=5), ("ema.head.weight",)),
    ],
)
def test_content_of_a_biart_checkpoint(checkpoint, unbuilt_biart, change, facts):
    changed(checkpoint, change)
    for load in (load_pretrained, lambda file: export_bundle(file, checkpoint.parent / "bundle")):
        with pytest.raises(CheckpointError, match=naming(checkpoint, *facts)) as error:
            load(checkpoint)
        assert len(str(error.value)) < 3000
    assert not (checkpoint.parent / "bundle").exists()


def test_the_home_folder_is_found_in_python_too(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_pretrained("~/b.ckpt").where == checkpoint
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    best = checkpoint.rename(tmp_path / "run" / "checkpoints" / "best-epoch=0-step=1.ckpt")
    assert load_pretrained("~/run").where == best
    with pytest.raises(CheckpointError, match=naming(best, "smoke test")):  # found, though without its AugVAE
        export_bundle("~/run", "~/bundle")


def test_a_checkpoint_at_the_root_of_a_file_system(checkpoint):
    found = dataclasses.replace(load_pretrained(checkpoint), where=Path("/x.ckpt"))
    with pytest.raises(CheckpointError, match=naming("/x.ckpt", "--vae_path")):
        found.augvae()


def test_a_file_outside_is_never_written(checkpoint, tmp_path):
    """Names of a packed tokenizer's files are not paths."""
    changed(checkpoint, put("latent_verse", "tokenizer", "files", "../outside.json", value="{}"))
    load_pretrained(checkpoint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.ckpt"]


def test_reading_needs_no_temporary_directory(checkpoint, trained, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert load_pretrained(checkpoint).tokenizer.fingerprint == load_pretrained(trained).tokenizer.fingerprint


def test_runs_that_were_moved_find_their_augvae(tiny_augvae, checkpoint, tmp_path, monkeypatch):
    """Recorded is where AugVAE was, from the folder of then; it is found beside, and known by its weights."""
    from latent_verse.checkpoints.ckpt_files import fingerprint

    vae = tiny_augvae(single_level=4)
    then = tmp_path / "then" / "results"
    own_ckpt(vae, then / "vae" / "checkpoints" / "best-epoch=0-step=1.ckpt")
    place = then / "biart" / "checkpoints" / "best-epoch=0-step=2.ckpt"
    place.parent.mkdir(parents=True)

    def record(path: str):
        def change(content):
            content["latent_verse"]["vae"] = {"path": path, "fingerprint": fingerprint(vae)}

        return change

    (tmp_path / "now").mkdir()
    monkeypatch.chdir(tmp_path / "now")
    for path in (
        "results/vae",
        str(then / "vae"),
        str(then / "vae" / "checkpoints" / "best-epoch=0-step=1.ckpt"),
        "../then/results/vae",
    ):
        moved = tmp_path / "elsewhere"
        changed(checkpoint, record(path), to=place)
        shutil.copytree(then, moved)
        if path == "results/vae":  # another one is there by now
            own_ckpt(tiny_augvae(seed=9, single_level=4), Path("results/vae/checkpoints/best-epoch=0-step=1.ckpt"))
        (tmp_path / "then").rename(tmp_path / "gone")
        found = load_pretrained(moved / "biart").augvae()
        assert fingerprint(found) == fingerprint(vae)
        (tmp_path / "gone").rename(tmp_path / "then")
        shutil.rmtree(moved)
