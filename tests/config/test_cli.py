"""YAML files and flags: forms, precedence, errors that name the nearest valid name, --help without torch."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from latent_verse.__main__ import COMMANDS, main
from latent_verse.checkpoints.ckpt_files import CheckpointError
from latent_verse.config import ConfigError, setting
from latent_verse.config.cli import leaves, parse
from latent_verse.config.generate import GenerateConfig
from latent_verse.config.program import one_line_errors
from latent_verse.config.train import EvalVAEConfig, TrainBiARTConfig, TrainVAEConfig
from latent_verse.config.yaml_files import to_yaml
from latent_verse.data import DataError
from latent_verse.data.text import TokenizerError
from latent_verse.training.divergence import Diverged
from tests.messages import naming

ROOT = Path(__file__).parents[2]
SCRIPTS = {"train_vae.py": TrainVAEConfig, "eval_vae.py": EvalVAEConfig}
BOTH = pytest.mark.parametrize("cls", SCRIPTS.values())

# The original's names, as the issue that asks for the scripts lists them, each with a value that it takes.
ORIGINAL_NAMES = {
    "train_dir val_dir test_dir log_dir backup_dir ckpt_path pretrained_path": "a/path",
    "resume finetune backup log_images fake_data gpu_dist lr_decay debug web_dataset": True,
    "use_attn double_z": False,
    "backup_steps image_log_steps refresh_rate seed gpus num_sanity_val_steps": 3,
    "batch_size epochs num_workers img_size dataset_size codebook_dim num_tokens": 4,
    "z_channels resolution in_channels out_channels hidden_dim num_res_blocks": 5,
    "val_percent_check learning_rate resize_ratio dropout quant_beta": 0.5,
    "quant_ema_decay quant_ema_eps p_loss_weight codebook_weight": 0.25,
    "ch_mult attn_resolutions": [1, 2, 4],
    "precision": "bf16",
    "loss_type": "lpips_l1",
}
ORIGINAL = {name: value for names, value in ORIGINAL_NAMES.items() for name in names.split()}


def read(cls, *argv: str):
    return parse(cls, list(argv), "description")[0]


def values(config) -> dict:
    """{leaf: value}"""
    return {name: value for section in vars(config).values() for name, value in vars(section).items()}


@pytest.fixture
def yaml_file(tmp_path):
    def write(content, name: str = "run.yaml") -> str:
        (tmp_path / name).write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(tmp_path / name)

    return write


# ------------------------------------------------------------------------------------------------- the original's names


@BOTH
@pytest.mark.parametrize("name", ORIGINAL)
def test_an_original_name_is_a_flag_and_a_yaml_key(cls, name, yaml_file):
    value = ORIGINAL[name]
    expected = tuple(value) if isinstance(value, list) else value
    words = [str(v) for v in value] if isinstance(value, list) else [str(value)]
    assert values(read(cls, f"--{name}", *words))[name] == expected
    assert values(read(cls, "--config", yaml_file({name: value})))[name] == expected


def test_useless_names_of_the_original_are_hidden_from_help():
    hidden = {f.name for _, f, _ in leaves(TrainVAEConfig) if f.metadata["hidden"]}
    assert hidden < ORIGINAL.keys()
    assert hidden == {"img_size", "web_dataset", "gpu_dist", "val_percent_check", "double_z"} | {
        *("in_channels", "out_channels")  # which can only be 3
    }


@BOTH
def test_leaf_names_are_unique(cls):
    names = [f.name for _, f, _ in leaves(cls)]
    assert len(names) == len(set(names)) > 60


def test_two_leaves_of_one_name_are_refused():
    one = dataclasses.make_dataclass("One", [("seed", int, setting(1, "help"))])
    two = dataclasses.make_dataclass("Two", [("seed", int, setting(1, "help"))])
    both = dataclasses.make_dataclass("Both", [("a", one), ("b", two)])
    with pytest.raises(TypeError, match=naming("seed", "a", "b")):
        list(leaves(both))


@BOTH
def test_every_leaf_has_help(cls):
    for _, f, _ in leaves(cls):
        assert 10 < len(f.metadata["help"]) < 120, f.name
        assert f.metadata["help"] == f.metadata["help"].strip() and "\n" not in f.metadata["help"], f.name


# ------------------------------------------------------------------------------------------------- forms of a YAML file

FLAT = {"hidden_dim": 64, "ch_mult": [1, 2], "batch_size": 3, "learning_rate": 1e-3, "log_dir": "here", "backup": True}
SECTIONED = {
    "model": {"hidden_dim": 64, "ch_mult": [1, 2]},
    "data": {"batch_size": 3},
    "optim": {"learning_rate": 1e-3},
    "trainer": {"log_dir": "here", "backup": True},
}
MIXED = {"model": {"hidden_dim": 64}, "ch_mult": [1, 2], "data": {"batch_size": 3}, "trainer": None} | {
    k: FLAT[k] for k in ("learning_rate", "log_dir", "backup")
}


@BOTH
def test_flat_sectioned_and_mixed_files_are_the_same(cls, yaml_file):
    flat, sectioned, mixed = (read(cls, "--config", yaml_file(tree)) for tree in (FLAT, SECTIONED, MIXED))
    assert flat == sectioned == mixed != cls()
    assert (flat.model.hidden_dim, flat.model.ch_mult, flat.trainer.backup) == (64, (1, 2), True)
    assert (
        read(cls, *[w for k, v in FLAT.items() for w in [f"--{k}", *map(str, v if isinstance(v, list) else [v])]])
        == flat
    )


@pytest.mark.parametrize("flag", ["--config", "--configs", "-c"])
def test_names_of_the_config_flag(flag, yaml_file):
    assert read(TrainVAEConfig, flag, yaml_file(FLAT)).data.batch_size == 3
    assert (
        read(TrainVAEConfig, f"{flag}={yaml_file(FLAT)}" if flag != "-c" else f"-c{yaml_file(FLAT)}").data.batch_size
        == 3
    )


def test_default_then_yaml_then_flag_and_where_each_came_from(yaml_file):
    file = yaml_file({"batch_size": 3, "hidden_dim": 64})
    for argv in (["-c", file, "--batch_size", "5"], ["--batch_size", "5", "-c", file]):
        config, given = parse(TrainVAEConfig, argv, "")
        assert (config.data.batch_size, config.model.hidden_dim) == (5, 64)
        assert config.model.num_tokens == TrainVAEConfig().model.num_tokens
        assert given == {"batch_size": "--batch_size", "hidden_dim": file}


def test_a_flag_equal_to_the_default_overrides_the_file(yaml_file):
    assert read(TrainVAEConfig, "-c", yaml_file({"batch_size": 3}), "--batch_size", "8").data.batch_size == 8


def test_an_empty_command_line_gives_the_defaults():
    assert read(TrainVAEConfig) == TrainVAEConfig()
    assert read(EvalVAEConfig) == EvalVAEConfig()


def test_written_yaml_is_read_again(yaml_file):
    config = read(EvalVAEConfig, "-c", yaml_file(FLAT), "--name", "a run", "--betas", "0.5,0.9", "--single_level", "32")
    text = to_yaml(config)
    assert list(yaml.safe_load(text)) == ["model", "data", "optim", "loss", "trainer", "eval"]
    assert read(EvalVAEConfig, "-c", yaml_file(text)) == config


# ----------------------------------------------------------------------------------------------------- forms of a value


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--use_attn"], True),
        (["--no-use_attn"], False),
        *[(["--use_attn", word], True) for word in ("true", "True", "yes", "on", "1")],
        *[(["--use_attn", word], False) for word in ("false", "False", "no", "off", "0")],
        (["--use_attn=false"], False),
        (["--use_attn", "--no-use_attn"], False),
        (["--use_attn", "--batch_size", "3"], True),
    ],
)
def test_booleans(words, expected, yaml_file):
    opposite = yaml_file({"use_attn": not expected})
    assert read(TrainVAEConfig, "-c", opposite, *words).model.use_attn is expected


@pytest.mark.parametrize("text", ["true", "yes", "on", "1", "'true'"])
def test_booleans_in_yaml(text, yaml_file):
    assert read(TrainVAEConfig, "-c", yaml_file(f"use_attn: {text}")).model.use_attn is True


def test_an_optional_boolean_is_none_true_or_false():
    assert read(TrainVAEConfig).trainer.gpu_dist is None
    assert read(TrainVAEConfig, "--gpu_dist").trainer.gpu_dist is True
    assert read(TrainVAEConfig, "--no-gpu_dist").trainer.gpu_dist is False
    assert read(TrainVAEConfig, "--gpu_dist", "none").trainer.gpu_dist is None


@pytest.mark.parametrize("words", [["1", "2", "4"], ["1,2,4"], ["[1,2,4]"], ["[1, 2, 4]"], ["(1, 2, 4)"], ["1, 2, 4"]])
def test_lists(words, yaml_file):
    assert read(TrainVAEConfig, "--ch_mult", *words).model.ch_mult == (1, 2, 4)
    if len(words) == 1 and words[0][0] != "[":
        assert read(TrainVAEConfig, "-c", yaml_file({"ch_mult": words[0]})).model.ch_mult == (1, 2, 4)


def test_a_single_number_is_a_list_of_one(yaml_file):
    assert read(TrainVAEConfig, "--attn_resolutions", "32").model.attn_resolutions == (32,)
    assert read(TrainVAEConfig, "-c", yaml_file("attn_resolutions: 32")).model.attn_resolutions == (32,)


def test_numbers(yaml_file):
    assert read(TrainVAEConfig, "--max_steps", "1e4").trainer.max_steps == 10000
    assert read(TrainVAEConfig, "--learning_rate", "1").optim.learning_rate == 1.0
    assert read(TrainVAEConfig, "-c", yaml_file("learning_rate: 4.5e-6")).optim.learning_rate == 4.5e-6
    assert read(TrainVAEConfig, "--max_steps", "-1").trainer.max_steps == -1
    assert read(TrainVAEConfig, "-c", yaml_file("precision: 16")).trainer.precision == "16"


@pytest.mark.parametrize("word", ["null", "none", "None", "~"])
def test_none_for_optional_settings(word, yaml_file):
    file = yaml_file({"dataset_size": 5, "name": "x"})
    config = read(TrainVAEConfig, "-c", file, "--dataset_size", word, "--name", word)
    assert (config.data.dataset_size, config.trainer.name) == (None, None)
    assert read(TrainVAEConfig, "-c", yaml_file("dataset_size: null")).data.dataset_size is None


# ------------------------------------------------------------------------------------------------------------- mistakes


def mistake(*argv: str, names: list, cls=TrainVAEConfig) -> None:
    """Reading these flags fails with a message that names all of `names`."""
    with pytest.raises(ConfigError, match=naming(*names)):
        read(cls, *argv)


@BOTH
def test_misspelt_flags_and_keys_name_the_nearest(cls, yaml_file):
    mistake("--bach_size", "3", names=["--bach_size", "--batch_size"], cls=cls)
    mistake("--learningrate=1", names=["--learningrate", "--learning_rate"], cls=cls)
    mistake("--confg", "x", names=["--confg", "--config"], cls=cls)
    for tree in ({"hiden_dim": 64}, {"model": {"hiden_dim": 64}}):
        file = yaml_file(tree)
        mistake("-c", file, names=[file, "hiden_dim", "hidden_dim"], cls=cls)
    mistake("-c", yaml_file({"trainr": {"gpus": 1}}), names=["trainr", "trainer"], cls=cls)
    mistake("--qqqqqq", names=["--qqqqqq", "--help"], cls=cls)


def test_flags_are_not_abbreviated():
    mistake("--batch", "3", names=["--batch"])


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("batch_size", "many", "int"),
        ("batch_size", "2.5", "int"),
        ("learning_rate", "fast", "float"),
        ("use_attn", "perhaps", "bool"),
        ("ch_mult", "a b", "a list of numbers"),
        ("dataset_size", "x", "int"),
    ],
)
def test_wrong_types_name_the_setting_the_value_and_its_source(name, value, kind, yaml_file):
    words = value.split()
    mistake(f"--{name}", *words, names=[name, *words, f"--{name}", kind])
    file = yaml_file({name: words if len(words) > 1 else value})
    mistake("-c", file, names=[name, *words, file, kind])


def test_a_required_number_is_not_none(yaml_file):
    mistake("-c", yaml_file("batch_size: null"), names=["batch_size", "null", "int"])
    mistake("-c", yaml_file("batch_size:"), names=["batch_size", "no value", "int"])


def test_a_list_where_one_value_belongs(yaml_file):
    mistake("-c", yaml_file("learning_rate: [1, 2]"), names=["learning_rate", ["1", "2"], "float"])
    file = yaml_file("epochs: 3\nbatch_size: {a: 1}")
    mistake("-c", file, names=["batch_size", "a mapping", f"{file}, line 2"])
    mistake("-c", yaml_file("ch_mult: [1, [2, 4]]"), names=["ch_mult", "list of lists"])


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("loss_type", "lpips", ["mse", "l1", "smooth_l1", "lpips_l1", "lpips_l2"]),
        ("dataset", "imagefoldr", ["imagefolder", "flat", "webdataset", "fake"]),
        ("logger", "wndb", ["tensorboard", "wandb", "csv"]),
    ],
)
def test_a_value_that_is_no_choice_lists_them(name, value, choices):
    mistake(f"--{name}", value, names=[name, value, *choices])


def test_a_flag_without_its_value():
    mistake("--batch_size", names=["--batch_size", "--help"])


def test_a_word_that_belongs_to_no_flag():
    mistake("stray", names=["stray"])


def test_a_key_in_another_section(yaml_file):
    file = yaml_file({"model": {"batch_size": 3}})
    mistake("-c", file, names=[file, "batch_size", "data", "model"])


@pytest.mark.parametrize("text", ["model: {hidden_dim: 32}\nhidden_dim: 64", "hidden_dim: 32\nhidden_dim: 64\n"])
def test_a_key_given_twice(text, yaml_file):
    mistake("-c", yaml_file(text), names=[yaml_file(text), "hidden_dim"])


RECIPES = sorted(file.stem for file in (ROOT / "configs").glob("*_augvae_*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_is_known_by_its_name_in_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, given = parse(TrainVAEConfig, ["-c", name], "")
    assert config == read(TrainVAEConfig, "-c", str(ROOT / "configs" / f"{name}.yaml"))
    assert {Path(source).stem for source in given.values()} == {name}  # which the run is named after


def test_a_file_of_ones_own_goes_before_a_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_augvae_ml").write_text("batch_size: 3\n")
    assert read(TrainVAEConfig, "-c", "tiny_augvae_ml").data.batch_size == 3


def test_a_folder_does_not(tmp_path, monkeypatch):
    """Such as the run folder that the recipe made, in results/."""
    expected = read(TrainVAEConfig, "-c", "tiny_augvae_ml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_augvae_ml").mkdir()
    assert read(TrainVAEConfig, "-c", "tiny_augvae_ml") == expected
    (tmp_path / "mine").mkdir()
    mistake("-c", "mine", names=["mine"])


def test_a_misspelt_recipe_names_the_nearest():
    mistake("-c", "tiny_augvae_mll", names=["tiny_augvae_mll", "tiny_augvae_ml"])
    mistake("-c", "qqqq", names=["qqqq", *RECIPES])


@pytest.mark.parametrize(
    ("cls", "name", "owner"),
    [
        (TrainVAEConfig, "tiny_biart", "train_biart.py"),
        (TrainBiARTConfig, "tiny_augvae_ml", "train_vae.py"),
        (GenerateConfig, "tiny_augvae_ml", "train_vae.py"),
    ],
)
def test_a_recipe_of_another_program_is_named_as_such(cls, name, owner):
    mistake("-c", name, names=[f"{name}.yaml", owner], cls=cls)


def test_a_missing_file_names_the_others_in_its_folder(yaml_file, tmp_path):
    yaml_file(FLAT, "one.yaml")
    yaml_file(FLAT, "two.yml")
    for missing, others in ((tmp_path / "three.yaml", ["one.yaml", "two.yml"]), (tmp_path / "absent" / "one.yaml", [])):
        mistake("-c", str(missing), names=[missing, *others])
    mistake("-c", str(tmp_path), names=[tmp_path, "folder"])


@pytest.mark.parametrize(
    "text", ["a: [1, 2", "a: b: c", "\tx: 1", "- 1\n- 2", "just words", "5", "batch_size: ${nope}"]
)
def test_malformed_files(text, yaml_file):
    file = yaml_file(text)
    mistake("-c", file, names=[file])


def test_an_empty_file_gives_the_defaults(yaml_file):
    assert read(TrainVAEConfig, "-c", yaml_file("")) == TrainVAEConfig()


def test_a_binary_file(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(bytes(range(256)) * 4)
    mistake("-c", str(tmp_path / "model.ckpt"), names=[tmp_path / "model.ckpt", "YAML"])


def test_a_section_that_is_no_mapping(yaml_file):
    mistake("-c", yaml_file("model: 5"), names=[yaml_file("model: 5"), "model", 5])


# ---------------------------------------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_grouped_complete_and_imports_nothing_heavy(script):
    code = f"""
import sys
sys.argv = [{script!r}, "--help"]
sys.path.insert(0, ".")
import {script.removesuffix(".py")} as script
try:
    script.main()
finally:
    heavy = sorted({{"torch", "torchvision", "pytorch_lightning", "torchmetrics", "yaml"}} & set(sys.modules))
    print("heavy:", heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stdout
    lines = done.stdout.splitlines()
    unused = {"model", "optim", "loss"} if script == "eval_vae.py" else set()  # of training
    for section, f, _ in leaves(SCRIPTS[script]):
        assert (f"{section}:" in lines) == (section not in unused)
        shown = any(line.startswith(f"  --{f.name}") for line in lines)
        assert shown == (not f.metadata["hidden"] and section not in unused), f.name
    text = " ".join(done.stdout.split())
    assert "images per step and process (default: 8)" in text
    assert ("(default: [64, 32, 16, 8])" in text) == (not unused)
    assert "--no-" not in text


def test_help_names_the_program_as_it_was_called(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: latent-verse {command} [")


@pytest.mark.parametrize(("before", "kept"), [("", True), ("import torch", False), ("gc.disable()", False)])
def test_quick_imports_collect_no_garbage_and_keep_only_what_they_made(before, kept):
    """A program's own imports; not those of whoever has PyTorch already, nor where nothing is collected anyway."""
    code = f"""
import gc
from latent_verse.config.cli import quick_imports
{before}
on = gc.isenabled()
try:
    with quick_imports():
        inside = gc.isenabled()
        import torch
        raise KeyError
except KeyError:
    print(on, inside, gc.isenabled(), gc.get_freeze_count() > 10_000)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    on = before != "gc.disable()"
    assert done.stdout.split() == [str(on), str(on and not kept), str(on), str(kept)], done.stderr


def test_a_mistake_of_the_user_is_one_line_and_any_other_error_keeps_its_traceback(capsys):
    def program(error: BaseException | None) -> int:
        if error:
            raise error
        return 0

    wrapped = one_line_errors(program)
    assert wrapped(None) == 0
    for kind in (ConfigError, CheckpointError, DataError, TokenizerError, Diverged):
        assert wrapped(kind("what to do")) == kind.exit_code
        assert capsys.readouterr().err == "error: what to do\n"
    for kind in (ValueError, RuntimeError, KeyError):
        with pytest.raises(kind):
            wrapped(kind("ours"))
        assert capsys.readouterr().err.startswith("error: this is a bug in L-Verse")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_is_one_line_and_exit_code_2(script):
    argv = [sys.executable, script, "--bach_size", "3"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch("error: .*--bach_size.*--batch_size.*\n", done.stderr)
