"""What a run says before its first step and after its last; the commands that it names work as they are."""

from __future__ import annotations

import importlib
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from latent_verse.commands import train_biart, train_vae
from latent_verse.config.cli import parse
from latent_verse.config.evaluate import EvalBiARTConfig, resolve_eval_biart
from latent_verse.config.train import PairDataConfig, TrainBiARTConfig, TrainVAEConfig
from latent_verse.config.train_rules import resolve_train_biart, resolve_train_vae
from latent_verse.data.captions import FakePairs
from latent_verse.data.pairs import PairShards
from latent_verse.training import next_commands
from latent_verse.training.next_commands import ANY_CAPTION, a_caption, after_augvae, after_biart
from tests.image_runs import SMALL, write_pictures
from tests.messages import naming
from tests.stand_ins import write_pairs

REPO = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch):
    """As if `python train_vae.py` were running, not the tests."""
    monkeypatch.setattr("sys.argv", ["train_vae.py"])


def named(said: str) -> list[list[str]]:
    """The commands that follow, without `python`: the program and its flags."""
    lines = said.partition("\nNext:\n")[2].splitlines()
    return [shlex.split(line)[1:] for line in lines]


def run(command: list[str]) -> int:
    script, *flags = command
    return importlib.import_module(f"latent_verse.commands.{Path(script).stem}").main(flags)


@pytest.mark.slow
def test_from_images_to_a_generated_one_by_the_commands_that_each_run_names(tmp_path, monkeypatch, capsys):
    """AugVAE-ML, its evaluation, AugVAE-SL; then BiART, on captioned images, and an image of it."""
    monkeypatch.chdir(tmp_path)
    write_pictures(Path("my train"), 9), write_pictures(Path("val"), 4)
    (Path("my train") / "class0" / "a.svg").write_text("<svg/>")
    assert train_vae.main([*SMALL, "--train_dir", "my train", "--val_dir", "val", "--name", "ml"]) == 0
    said = capsys.readouterr().out
    start = said.splitlines()
    assert start[:2] == ["Run folder:    results/ml", "Data:          9 images (1 .svg not read), 4 to validate"]
    assert naming("AugVAE-ML", "8 x 8", "4 x 4", 32).search(start[2]) and start[2].startswith("Model:         ")
    assert start[4] == "Steps:         2 an epoch, 1 epoch, 2 in all"
    assert naming("Trained", "2 steps").search(said)
    assert naming("Best", "results/ml/checkpoints/best-epoch=0-step=2.ckpt", "val/total_loss", "epoch 1").search(said)
    evaluate, fine_tune = named(said)
    assert [evaluate[0], fine_tune[0]] == ["eval_vae.py", "train_vae.py"]
    assert run(evaluate) == 0 and Path("results/eval-ml/metrics.json").is_file()
    capsys.readouterr()
    assert run(fine_tune) == 0
    said = capsys.readouterr().out
    assert "Model:         AugVAE-SL" in said
    assert "Needed:        captions for BiART, 1.txt beside 1.jpg, in my train" in said.splitlines()
    evaluate, biart = named(said)
    assert evaluate[:3] == ["eval_vae.py", "--ckpt_path", "results/ml-sl"] and biart[0] == "train_biart.py"

    write_pairs(Path("my train"), 9, captions=2), write_pairs(Path("val"), 4)
    tiny = "--n_layer 1 --n_head 2 --n_embd 32 --tokenizer bpe --text_len 8 --batch_size 4 --epochs 1 --num_workers 0"
    assert run([*biart, *tiny.split(), "--name", "biart"]) == 0
    said = capsys.readouterr().out
    assert "Data:          9 pairs (1 .svg not read), 18 captions, 4 to validate" in said.splitlines()
    generate, evaluate = named(said)
    assert generate[:5] == ["generate.py", "--model", "results/biart/bundle", "--text", "a red circle number 0"]
    assert run(generate) == 0 and Path("generated/0000_00.png").is_file()
    script, *flags = evaluate
    config, given = parse(EvalBiARTConfig, flags, "")
    resolve_eval_biart(config, given)
    assert script == "eval_biart.py" and config.data.test_dir == "val"


def test_a_run_that_was_finished_already_says_so_and_what_follows(tmp_path, capsys):
    flags = [*SMALL, "--train_dir", str(write_pictures(tmp_path / "a", 4)), "--log_dir", str(tmp_path), "--backup"]
    assert train_vae.main([*flags, "--name", "run"]) == 0
    first = capsys.readouterr().out
    assert train_vae.main([*flags, "--name", "run"]) == 0
    again = capsys.readouterr().out
    assert "finished already" in again and "Trained" not in again and "Steps" not in again
    assert naming("Best", "last-epoch=0-step=1.ckpt", "epoch 1").search(again)  # there was no validation
    assert named(first) == named(again) and [command[0] for command in named(again)] == ["train_vae.py"]


def augvae(*flags: str, levels: tuple[int, ...] = (64, 32, 16, 8), prog: str | None = None) -> list[list[str]]:
    config, given = parse(TrainVAEConfig, [*flags], "")
    model = SimpleNamespace(code_levels=levels)
    found = after_augvae(resolve_train_vae(config, given), given, model, Path("results/run"), prog)
    return [shlex.split(command) for command in found]


ON = ["--train_dir", "a b", "--val_dir", "val"]


def test_the_fine_tune_of_a_shipped_recipe_is_its_sibling(monkeypatch):
    monkeypatch.chdir(REPO)
    _, fine_tune = augvae("--config", "configs/tiny_augvae_ml.yaml", "--dataset", "flat", *ON)
    assert " ".join(fine_tune[:4]) == "python train_vae.py --config configs/tiny_augvae_sl.yaml"
    config, given = parse(TrainVAEConfig, fine_tune[2:], "")
    assert config.optim.finetune and config.optim.pretrained_path == "results/run"
    assert (config.data.dataset, config.data.train_dir, config.data.val_dir) == ("flat", "a b", "val")
    resolve_train_vae(config, given)
    by_name = augvae("--config", "tiny_augvae_ml", *ON, prog="latent-verse train-vae")[-1]
    assert by_name[:4] == ["latent-verse", "train-vae", "--config", "tiny_augvae_sl"]
    other_shape = augvae("--config", "tiny_augvae_ml", "--num_tokens", "64", *ON)[-1]  # contradicts the sibling's
    assert other_shape[:4] == ["python", "train_vae.py", "--config", "tiny_augvae_ml"]
    assert " ".join(other_shape).count("--num_tokens 64 ") and "--finetune" in other_shape


def test_the_fine_tune_without_a_recipe_repeats_the_flags(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("attn_resolutions: [64, 32]\ncodebook_init: data\ntrain_dir: here\n")
    flags = ["--config", str(mine), "--batch_size", "4", "--no-backup", "--betas", "0.9", "0.95", "--name", "x"]
    config, given = parse(TrainVAEConfig, augvae(*flags)[-1][2:], "")
    resolved = resolve_train_vae(config, given)
    assert resolved.model.attn_resolutions == (32,) and resolved.trainer.name == "run-sl" and resolved.optim.finetune
    assert resolved.optim.betas == (0.9, 0.95) and resolved.data.train_dir == "here" and resolved.data.batch_size == 4


@pytest.mark.parametrize(("levels", "kept"), [((64, 32, 16, 8), 32), ((16, 8, 4, 2), 16), ((128, 64), 64), ((8, 4), 8)])
def test_the_level_that_is_kept_has_at_most_1024_codes(levels, kept):
    (fine_tune,) = augvae("--train_dir", "a", levels=levels)
    assert fine_tune[fine_tune.index("--attn_resolutions") + 1] == str(kept)


def test_after_a_single_level_comes_biart(monkeypatch):
    monkeypatch.chdir(REPO)
    start = ["--config", "configs/tiny_augvae_sl.yaml", "--gpus", "0"]
    evaluate, biart = augvae(*start, *ON, "--dataset", "flat", levels=(16,))
    assert evaluate[1:] == "eval_vae.py --ckpt_path results/run --dataset flat --test_dir val --gpus 0".split()
    config, given = parse(TrainBiARTConfig, biart[2:], "")
    resolved = resolve_train_biart(config, given)
    assert biart[3] == "configs/tiny_biart.yaml" and resolved.vae.vae_path == "results/run"
    assert (resolved.data.dataset, resolved.data.train_dir, resolved.trainer.gpus) == ("pairs", "a b", 0)
    shards = ["--train_dir", "s/{0..9}.tar", "--dataset", "webdataset"]
    (biart,) = augvae(*shards, levels=(16,))
    config, given = parse(TrainBiARTConfig, biart[2:], "")
    assert resolve_train_biart(config, given).data.dataset == "webdataset" and config.data.train_dir == "s/{0..9}.tar"
    evaluate, biart = augvae("--fake_data", levels=(16,))
    assert evaluate[-1] == biart[-1] == "--fake_data" and "--train_dir" not in biart


class Captions(list):
    def captions(self, i):
        return self[i]


@pytest.mark.parametrize(("settings", "flags"), [
    ({"dataset": "pairs", "val_dir": "v"}, "--dataset pairs --test_dir v"),
    ({"dataset": "coco", "val_dir": "v"}, "--dataset coco --test_dir v"),
    ({"dataset": "coco", "val_dir": "v", "val_captions": "c"}, "--dataset coco --test_dir v --test_captions c"),
    ({"dataset": "karpathy", "train_dir": "t", "train_captions": "c"},
     "--dataset karpathy --test_dir t --test_captions c"),
    ({"dataset": "table", "val_captions": "c"}, "--dataset table --test_captions c"),
    ({"dataset": "shapes", "world": "full"}, "--dataset shapes --world full"),
    ({"dataset": "webdataset", "val_dir": "v"}, None),
])  # fmt: skip
def test_evaluation_of_biart_reads_the_validation_data(settings, flags):
    config = replace(TrainBiARTConfig(), data=PairDataConfig(**settings))
    datasets = dict.fromkeys(("train", "val"), Captions([["a dog"]]))
    commands = after_biart(config, {}, datasets, Path("results/run"), None)
    assert commands[0] == "python generate.py --model results/run/bundle --text 'a dog'"
    assert commands[1:] == ([f"python eval_biart.py --model results/run/bundle {flags}"] if flags else [])
    for command in commands[1:]:
        resolve_eval_biart(*parse(EvalBiARTConfig, shlex.split(command)[2:], ""))
    assert len(after_biart(config, {}, {"train": datasets["train"]}, Path("run"), None)) == 1


@pytest.mark.parametrize(("meta", "flags"), [
    ({"dataset": "pairs", "source": "my pairs"}, "--dataset pairs --test_dir 'my pairs'"),
    ({"dataset": "table", "source": "t.csv"}, "--dataset table --test_captions t.csv"),
    ({"dataset": "shapes", "source": "shapes", "shapes": {"world": "small"}}, "--dataset shapes --world small"),
    ({"dataset": "coco", "source": "images"}, None),
    ({}, None),
])  # fmt: skip
def test_evaluation_of_biart_on_codes_reads_the_images_they_were_made_of(meta, flags):
    config = replace(TrainBiARTConfig(), data=PairDataConfig(dataset="codes"))
    val = Captions([["a dog"]])
    val.meta = meta
    commands = after_biart(config, {"gpus": "--gpus"}, {"train": val, "val": val}, Path("run"), None)
    assert [c.removesuffix(" --gpus 1") for c in commands[1:]] == (
        [f"python eval_biart.py --model run/bundle {flags}"] if flags else []
    )


@pytest.mark.parametrize(("captions", "found"), [
    (["a dog's bowl, $HOME"], "a dog's bowl, $HOME"),
    (["word " * 50], ("word " * 20).strip()),
    (["a\u202edog"], ANY_CAPTION),
    (["--help"], ANY_CAPTION),
    (["x" * 300], "x" * 100),
])  # fmt: skip
def test_the_caption_is_one_of_the_data_that_a_shell_and_a_terminal_take(captions, found):
    assert a_caption(Captions([captions])) == found
    command = next_commands._flags({"text": found})
    assert shlex.split(shlex.join(command)) == ["--text", found]


def test_no_shard_is_fetched_for_a_caption():
    remote = object.__new__(PairShards)
    remote.shards = ["https://example.org/0.tar"]
    assert a_caption(remote) == ANY_CAPTION
    assert a_caption(FakePairs(3, 16)) == "a made-up picture of kind 0"


@pytest.mark.parametrize(("argv", "prog", "found"), [
    ("train_vae.py", None, ["python", "eval_vae.py"]),
    ("/usr/bin/latent-verse", "latent-verse train-vae", ["latent-verse", "eval-vae"]),
    ("/x/latent_verse/__main__.py", "latent-verse train-vae", ["python", "-m", "latent_verse", "eval-vae"]),
    ("/x/pytest/__main__.py", None, ["python", "eval_vae.py"]),
    (str(REPO / "train_vae.py"), None, ["python", str(REPO / "eval_vae.py")]),
])  # fmt: skip
def test_commands_are_called_as_this_one_was(argv, prog, found, monkeypatch):
    monkeypatch.setattr("sys.argv", [argv])
    assert next_commands._script("eval-vae", prog) == found


def test_fake_data_goes_on_with_fake_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = "--fake_data --gpus 0 --n_layer 1 --n_head 2 --n_embd 32 --num_workers 0 --num_samples 0 --refresh_rate 0"
    assert train_biart.main(tiny.split()) == 0
    said = capsys.readouterr().out
    assert naming("512 pairs", "1,024 captions", "generated (fake)", "64 to validate").search(said)
    assert named(said)[0][-1] == "0" and named(said)[1][:5] == [
        "eval_biart.py", "--model", "results/fake-biart/bundle", "--dataset", "fake",
    ]  # fmt: skip
