"""Every path is expanded once, wherever it comes from; what can be no path is refused where it is given."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from latent_verse import LVerse, load_augvae
from latent_verse.commands import eval_biart, eval_vae, generate, train_biart, train_vae
from latent_verse.config import ConfigError, UserError
from latent_verse.config.cli import leaves, naming_sources, parse
from latent_verse.config.evaluate import EvalBiARTConfig, resolve_eval_biart
from latent_verse.config.generate import GenerateConfig, WhatConfig, WriteConfig, resolve_generate
from latent_verse.config.settings import expand, expand_paths, split_shards
from latent_verse.config.train import TrainBiARTConfig, TrainerConfig, TrainVAEConfig
from latent_verse.config.train_rules import resolve_train_biart, resolve_train_vae
from latent_verse.config.yaml_files import to_yaml
from latent_verse.data import DataError
from latent_verse.data.caption_files import check_file
from latent_verse.data.codes import read_meta
from latent_verse.data.images import FlatImages
from latent_verse.inference.image_io import load_image
from latent_verse.training import runs
from tests.messages import naming
from tests.programs import PROGRAMS

HUB = {"model", "vae_path", "ckpt_path", "pretrained_path"}
SHARDS = {"train_dir", "val_dir", "test_dir"}
# each of PROGRAMS' settings that names a file or folder
PATHS = (
    HUB
    | SHARDS
    | set(
        "log_dir backup_dir train_captions val_captions test_captions extract_codes export generated_dir captions_file "
        "compare reference_stats classes_dir class_names clip_weights text_file image score complete out json "
        "recipes".split()
    )
)
each_program = pytest.mark.parametrize("cls", PROGRAMS)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def paths_of(cls) -> dict[str, dataclasses.Field]:
    return {f.name: f for _, f, _ in leaves(cls) if f.metadata["path"]}


def value_of(config, name: str):
    (found,) = (vars(section)[name] for section in vars(config).values() if name in vars(section))
    return found


def test_every_path_is_declared_as_one():
    found = {name: f.metadata["path"] for cls in PROGRAMS for name, f in paths_of(cls).items()}
    assert found.keys() == PATHS
    assert {name for name, kind in found.items() if kind == "hub"} == HUB
    assert {name for name, kind in found.items() if kind == "shards"} == SHARDS


@each_program
def test_flags_yaml_and_python_expand_the_home_folder_once(cls, home, tmp_path):
    for name in paths_of(cls):
        (tmp_path / "a.yaml").write_text(f"{name}: ~/a\n")
        for argv in ([f"--{name}", "~/a"], ["-c", "~/../a.yaml"]):
            config = parse(cls, argv, "")[0]
            assert value_of(config, name) in (f"{home}/a", (f"{home}/a",)), name
            (tmp_path / "saved.yaml").write_text(to_yaml(config))
            assert parse(cls, ["-c", str(tmp_path / "saved.yaml")], "")[0] == config


@each_program
def test_an_error_names_the_file_that_a_path_came_from(cls, home, tmp_path):
    """And the flag that gives another, for every path; nothing is added to those that flags gave."""
    for name in paths_of(cls):
        (tmp_path / "a.yaml").write_text(f"{name}: some/where\n")

        def said(argv: list[str], message: str) -> str:
            with pytest.raises(DataError) as error, naming_sources(*parse(cls, argv, "")):
                raise DataError(message)
            return str(error.value)

        of_yaml = ["-c", str(tmp_path / "a.yaml")]
        assert said(of_yaml, "some/where does not exist.") == (
            f"{name} some/where (from a.yaml) does not exist. Give --{name}."
        )
        assert (
            said(of_yaml, f"{name}: 'some/where' is odd")
            == f"{name}: 'some/where' (from a.yaml) is odd. Give --{name}."
        )
        (tmp_path / "some/where").mkdir(parents=True, exist_ok=True)
        assert said(of_yaml, "it is in some/where") == f"it is in {name} some/where (from a.yaml)."
        (tmp_path / "some/where").rmdir()
        for other in ("no path", "some/where/else is odd", "/some/where is odd", "some/where.png is odd"):
            assert said(of_yaml, other) == other
        assert said([*of_yaml, f"--{name}", "some/where"], "some/where is odd") == "some/where is odd"


@pytest.mark.parametrize(
    ("program", "setting", "more"),
    [
        (train_vae, "train_dir", ""),
        (train_vae, "pretrained_path", "--fake_data"),
        (eval_vae, "ckpt_path", "--fake_data"),
        (eval_vae, "test_dir", "--ckpt_path x/y/z.ckpt"),
        (train_biart, "vae_path", "--train_dir ."),
        (train_biart, "train_captions", "--dataset table --vae_path {vae}"),
        (eval_biart, "test_dir", "--captions_file x.json"),
        (generate, "model", "--text a"),
        (generate, "text_file", "--model x"),
    ],
)
def test_programs_name_the_file_that_a_path_came_from(program, setting, more, home, tmp_path, tiny_augvae, capsys):
    tiny_augvae().save_pretrained(tmp_path / "vae")
    (tmp_path / "mine.yaml").write_text(f"{setting}: no/such/place\n")
    more = more.replace("{vae}", str(tmp_path / "vae")).replace("x/y/z.ckpt", str(tmp_path / "vae"))
    assert program.main(["-c", "mine.yaml", *more.split(), "--gpus", "0"]) == 2
    said = capsys.readouterr().err
    assert naming(setting, "no/such/place (from mine.yaml)", f"--{setting}").search(said) and said.count("\n") == 1


def test_of_two_settings_with_one_path_the_one_that_the_message_names_is_told(home, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("train_dir: no/such/place\nvae_path: no/such/place\n")
    assert train_biart.main(["-c", "mine.yaml", "--gpus", "0"]) == 2
    said = capsys.readouterr().err
    assert said.count("(from mine.yaml)") == 1 and said.count("Give --") == 1


def test_sections_made_in_python_are_expanded_too(home):
    assert TrainerConfig(log_dir="~/runs").log_dir == f"{home}/runs"
    assert WriteConfig(out=Path("~/out")).out == f"{home}/out"
    assert WhatConfig(score=("~/a.png", "~/a")).score == (f"{home}/a.png", "~/a")
    assert dataclasses.replace(TrainerConfig(), backup_dir="~/b").backup_dir == f"{home}/b"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("~/a,~/b", "{home}/a,{home}/b"),
        ("~/a, ~/b", "{home}/a,{home}/b"),
        ("x y,z", "x y,z"),
        ("cats, dogs", "cats, dogs"),
        ("s/{a,~b}.tar", "s/{a,~b}.tar"),
        ("https://x.org/{0..9}.tar,~/b", "https://x.org/{0..9}.tar,~/b"),
        ("~/{0..9}.tar,s3://b/a.tar", "{home}/{0..9}.tar,s3://b/a.tar"),
        ("pipe:cat ~/a, ~/b", "pipe:cat ~/a, ~/b"),
        ("a/~/b", "a/~/b"),
        ("./~a", "./~a"),
        ("../a/./b/", "../a/./b/"),
        ("$HOME/a", "$HOME/a"),
    ],
)
def test_lists_of_shards_and_what_stays_as_it_was_written(written, read, home):
    assert expand(written, "shards", "train_dir") == read.replace("{home}", str(home))


def test_shards_are_split_at_commas_outside_of_braces_in_one_pass():
    assert split_shards("a,{b,c},{d,{e,f}}.tar,,g") == ["a", "{b,c}", "{d,{e,f}}.tar", "", "g"]
    assert len(split_shards("," * 300_000)) == 300_001


def test_the_home_of_another_user(home):
    assert expand("~root/a", True, "out") == os.path.expanduser("~root/a") != "~root/a"


NO_PATHS = ["~nobody-of-this-name/a", "", " ", "a\0b", "\ud800"]
TOO_LONG = ["n" * 256, "é" * 128, "a/" + "n" * 300]  # but for patterns of shards


@pytest.mark.parametrize(
    ("kind", "path"),
    [(kind, path) for kind in (True, "hub") for path in NO_PATHS + TOO_LONG] + [("shards", path) for path in NO_PATHS],
)
def test_what_can_be_no_path_is_one_line(kind, path):
    with pytest.raises(ConfigError, match=naming("train_dir")) as caught:
        expand(path, kind, "train_dir", " (from --train_dir)")
    assert "\n" not in str(caught.value) and "--train_dir" in str(caught.value) and len(str(caught.value)) < 300


def test_names_up_to_the_longest_and_those_that_are_not_utf8_are_paths():
    for path in ("n" * 255, "é" * 127, "lat\udce9.jpg", "a/" * 1000, "tab\there"):
        assert expand(path, True, "image") == path


@each_program
def test_an_empty_path_is_refused_not_left_out(cls):
    for name in paths_of(cls):
        with pytest.raises(ConfigError, match=naming(name, "empty")):
            parse(cls, [f"--{name}="], "")


@each_program
@pytest.mark.parametrize("url", ["file:///data/x", "s3://bucket/x", "https://huggingface.co/owner/name"])
def test_a_url_is_refused_where_none_can_be_read(cls, url):
    for name in paths_of(cls).keys() - SHARDS:
        hint = "owner/name" if name in HUB else "path"
        with pytest.raises(ConfigError, match=naming(name, url, "URL", hint)):
            parse(cls, [f"--{name}", url], "")


def test_only_tar_shards_are_read_from_urls():
    for url in ("s3://bucket/x", "https://x.org/a.tar"):
        for cls, resolve, more in (
            (TrainVAEConfig, resolve_train_vae, []),
            (TrainBiARTConfig, resolve_train_biart, ["--vae_path", "v"]),
        ):
            config, given = parse(cls, ["--train_dir", url, "--dataset", "webdataset", *more], "")
            assert resolve(config, given).data.train_dir == url
            config, given = parse(cls, ["--train_dir", url, *more], "")
            with pytest.raises(ConfigError, match=naming("train_dir", url, "URL", "webdataset")):
                resolve(config, given)
            config, given = parse(cls, ["--train_dir", "x", "--val_dir", url, *more], "")
            with pytest.raises(ConfigError, match=naming("val_dir", url)):
                resolve(config, given)
            config, given = parse(cls, ["--train_dir", url, "--fake_data"], "")
            resolve(config, given)  # a smoke test reads none of it
        config, given = parse(EvalBiARTConfig, ["--model", "m", "--test_dir", url], "")
        with pytest.raises(ConfigError, match=naming("test_dir", url)):
            resolve_eval_biart(config, given)


def test_generate_scores_the_expanded_image(home):
    config, _ = resolve_generate(*parse(GenerateConfig, ["--model", "m", "--score", "~/a.png", "~/a"], ""))
    assert config.what.score == (f"{home}/a.png", "~/a")


def test_a_run_that_an_earlier_version_recorded_with_a_home_folder_is_resumed(home):
    """Its run.json holds `~`."""
    recorded = {"data": {"train_dir": "~/a,~/b"}, "trainer": {"seed": 42}, "model": {}}
    now = {"data": {"train_dir": f"{home}/a,{home}/b"}, "trainer": {"seed": 42}, "model": {}}
    run = runs.open_run("results", "old", True, None, recorded)
    runs.start(run, recorded, "")
    (run.checkpoints).mkdir(exist_ok=True)
    (run.checkpoints / "last-epoch=0-step=1.ckpt").write_bytes(b"")
    assert runs.open_run("results", "old", True, None, now).id == run.id
    assert json.loads((run.folder / "run.json").read_text())["config"] == recorded
    assert expand_paths("~/a,~nobody-of-this-name") == f"{home}/a,~nobody-of-this-name"  # never an error


def test_the_librarys_functions_expand_the_home_folder(home, tiny_augvae):
    from PIL import Image

    tiny_augvae().save_pretrained("~/vae")
    assert sorted(os.listdir(home / "vae")) == ["config.json", "model.safetensors"] and not os.path.exists("~")
    load_augvae("~/vae")
    (home / "images").mkdir()
    Image.new("RGB", (8, 8)).save(home / "images" / "a.png")
    assert load_image("~/images/a.png", 8).shape == (3, 8, 8)
    assert len(FlatImages("~/images", resolution=8)) == 1
    (home / "a.json").write_text("{}")
    assert check_file("~/a.json", "captions") == str(home / "a.json")
    for call in (load_augvae, LVerse.from_pretrained, lambda path: read_meta(path, "train_dir")):
        with pytest.raises(UserError, match=naming(str(home / "absent"))):
            call("~/absent")
        with pytest.raises(UserError, match=naming("https://x.org/y", "URL")):
            call("https://x.org/y")
