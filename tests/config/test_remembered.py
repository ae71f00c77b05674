"""What evaluations take from the run that made their model, and what they leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from latent_verse.config.cli import parse
from latent_verse.config.evaluate import EvalBiARTConfig
from latent_verse.config.remembered import with_data_of_biart_run, with_layout_of_vae_run
from latent_verse.config.train import EvalVAEConfig, TrainBiARTConfig, TrainVAEConfig
from latent_verse.config.yaml_files import to_yaml


def run_of(tmp_path: Path, settings: type, flags: str) -> Path:
    """A run folder as far as it is read here."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "bundle").mkdir()
    (run / "run.json").write_text("{}")
    (run / "config.yaml").write_text(to_yaml(parse(settings, flags.split(), "")[0]))
    return run


def vae(model: Path, more: str = ""):
    config, given = with_layout_of_vae_run(*parse(EvalVAEConfig, ["--ckpt_path", str(model), *more.split()], ""))
    return (config.data.dataset, config.data.test_dir, config.data.val_dir), given


def biart(model: Path, more: str = ""):
    config, given = with_data_of_biart_run(*parse(EvalBiARTConfig, ["--model", str(model), *more.split()], ""))
    return (config.data.dataset, config.data.test_dir, config.data.test_captions), given


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/best.ckpt"])
def test_eval_vae_takes_the_layout_and_the_images_of_the_run(tmp_path, place, capsys):
    run = run_of(tmp_path, TrainVAEConfig, "--dataset flat --train_dir a/train --val_dir a/val")
    found, given = vae(run / place)
    assert found == ("flat", None, "a/val") and given["val_dir"] == given["dataset"] == str(run / "config.yaml")
    assert f"From {run / 'config.yaml'}: dataset flat, val_dir a/val" in capsys.readouterr().out
    assert vae(run / place, "--test_dir b")[0] == ("flat", "b", None)
    assert vae(run / place, "--dataset flat")[0] == ("flat", None, "a/val")


def test_what_is_given_stays(tmp_path, capsys):
    run = run_of(tmp_path, TrainVAEConfig, "--dataset flat --train_dir a/train --val_dir a/val")
    assert vae(run, "--dataset imagefolder --test_dir b")[0] == ("imagefolder", "b", None)
    assert vae(run, "--dataset imagefolder")[0] == ("imagefolder", None, None)
    assert vae(run, "--fake_data")[0] == (None, None, None)
    assert "From" not in capsys.readouterr().out


def test_shards_are_not_guessed_where_a_folder_is_given(tmp_path):
    """It may hold images as well as tars."""
    run = run_of(tmp_path, TrainVAEConfig, "--dataset webdataset --train_dir s/{0..9}.tar --val_dir s/v.tar")
    assert vae(run)[0] == ("webdataset", None, "s/v.tar")
    assert vae(run, "--test_dir t/{0..9}.tar")[0] == ("webdataset", "t/{0..9}.tar", None)
    assert vae(run, f"--test_dir {tmp_path}")[0] == (None, str(tmp_path), None)


@pytest.mark.parametrize("flags", ["--fake_data", "--dataset webdataset --allow_pipe --train_dir a --val_dir pipe:ls"])
def test_generated_images_and_shell_commands_are_not_taken(tmp_path, flags):
    assert vae(run_of(tmp_path, TrainVAEConfig, flags))[0] == (None, None, None)


def test_other_folders_have_no_layout(tmp_path):
    run = run_of(tmp_path, TrainVAEConfig, "--dataset flat --val_dir a/val")
    (run / "run.json").unlink()
    assert vae(run)[0] == (None, None, None)
    (run / "run.json").touch()
    assert biart(run)[0] == (None, None, None)  # a run of train_vae.py
    (run / "config.yaml").write_text("a_setting_of_another_version: 1\n")
    assert vae(run)[0] == vae(tmp_path / "absent")[0] == vae(Path("owner/name"))[0] == (None, None, None)


@pytest.mark.parametrize("place", ["", "bundle"])
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--dataset pairs --train_dir a --val_dir b", ("pairs", "b", None)),
        ("--dataset coco --train_dir a --val_dir b --val_captions c", ("coco", "b", "c")),
        ("--dataset karpathy --train_dir a --train_captions c", ("karpathy", "a", "c")),
        ("--dataset table --train_captions a --val_captions b", ("table", None, "b")),
        ("--dataset codes --train_dir a --val_dir b", (None, None, None)),
        ("--fake_data", (None, None, None)),
    ],
)
def test_eval_biart_takes_the_validation_data_of_the_run(tmp_path, place, flags, expected):
    run = run_of(tmp_path, TrainBiARTConfig, flags + " --vae_path x")
    assert biart(run / place)[0] == expected
    assert biart(run / place, "--test_dir t")[0] == (None, "t", None)  # which may be of any layout


def test_eval_biart_takes_the_world(tmp_path):
    run = run_of(tmp_path, TrainBiARTConfig, "--dataset shapes --world full --vae_path x")
    config, _ = with_data_of_biart_run(*parse(EvalBiARTConfig, ["--model", str(run / "bundle")], ""))
    assert (config.data.dataset, config.data.world) == ("shapes", "full")
