"""What is written is what a setting becomes: one rule for flags and YAML, and a saved configuration reads as itself."""

from __future__ import annotations

import dataclasses
import os
import random
import re
from pathlib import Path
from typing import Optional

import pytest

from latent_verse.config import ConfigError
from latent_verse.config.cli import Parser, convert, leaves, make_parser, parse, read_yaml, to_yaml
from latent_verse.config.evaluate import EvalBiARTConfig
from latent_verse.config.generate import GenerateConfig, GenerateSamplingConfig, WhatConfig
from latent_verse.config.settings import is_list, item_type, same, types_of
from latent_verse.config.train import TrainBiARTConfig, TrainerConfig, TrainVAEConfig
from tests.messages import naming
from tests.programs import PROGRAMS

ROOT = Path(__file__).parents[2]
each_program = pytest.mark.parametrize("cls", PROGRAMS)


def read(cls, *argv: str):
    return parse(cls, list(argv), "")[0]


@pytest.fixture
def from_yaml(tmp_path):
    def read_text(cls, text: str | bytes):
        file = tmp_path / "run.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read(cls, "-c", str(file))

    return read_text


def outcome(call, *arguments):
    """The configuration, or that it is refused."""
    try:
        return call(*arguments)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return "refused"


# ------------------------------------------------------------------------------------------------- one rule for all

WRITTEN = (
    "001 on off yes NO y n 010 -1 -1e-4 1e5 1e6 1e400 0o17 0x10 1_000 .5 5. +5 12:30:00 2026-11-27 nan -inf null ~ "
    "none True false 2.5 8.0 0 1 3 32 16 16.0 9007199254740993 1e23 99999999999999999999 cpu bf16 val fake a/b"
).split()


def test_a_yaml_scalar_means_what_the_same_flag_means(tmp_path):
    """For every setting of every program, whatever YAML's own types would make of it."""
    every = {f.name: (f.name, hint, f) for cls in PROGRAMS for _, f, hint in leaves(cls)}
    assert len(every) > 150
    section = dataclasses.make_dataclass("Section", every.values(), frozen=True)
    cls = dataclasses.make_dataclass("Every", [("section", section)])
    parser, file = make_parser(cls, ""), str(tmp_path / "a.yaml")
    for word in WRITTEN:
        flags = vars(parser.parse_args([f"--{name}={word}" for name in every]))
        for form in ("{}",) if word in ("null", "~", "none") else ("{}", "'{}'"):  # quotes make texts of these
            Path(file).write_text("".join(f"{name}: {form.format(word)}\n" for name in every))
            values = read_yaml(cls, file)
            for name, hint, f in every.values():
                flag, of_yaml = (outcome(convert, f, given[name], hint, "") for given in (flags, values))
                assert flag == of_yaml and type(flag) is type(of_yaml), (name, word)


@pytest.mark.parametrize(
    "word", ["001", "on", "010", "1e5", "0o17", "1_000", "12:30:00", "2026-11-27", ".5", "y", "NO"]
)
def test_text_stays_what_was_written(word, from_yaml):
    assert (
        from_yaml(TrainVAEConfig, f"name: {word}").trainer.name
        == word
        == read(TrainVAEConfig, "--name", word).trainer.name
    )
    assert from_yaml(GenerateConfig, f"text: [{word}, a]").what.text == (word, "a")


@pytest.mark.parametrize(
    ("name", "word", "value"),
    [
        ("batch_size", "010", 10),
        ("max_steps", "1e6", 1_000_000),
        ("max_steps", "1_000", 1000),
        ("max_steps", "9007199254740993", 9007199254740993),  # which a float would round
        ("batch_size", "8.0", 8),
        ("resize_ratio", ".5", 0.5),
        ("learning_rate", "1", 1.0),
        ("use_attn", "NO", False),
        ("use_attn", "On", True),
    ],
)
def test_numbers_and_switches_mean_what_a_person_means(name, word, value, from_yaml):
    for config in (read(TrainVAEConfig, f"--{name}", word), from_yaml(TrainVAEConfig, f"{name}: {word}")):
        (found,) = (vars(section)[name] for section in vars(config).values() if name in vars(section))
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("argv", "facts"),
    [
        ("--learning_rate -1e-4", ["learning_rate", -0.0001, "above 0"]),
        ("--learning_rate -.5", ["learning_rate", -0.5, "above 0"]),
        ("--betas 0.9", ["betas", 0.9, "2 values", "0.9 0.999"]),
        ("--betas 0.9 -1e-3", ["betas", "at least 0"]),
        ("--gpus 0,1", ["gpus", "0,1", "number", "CUDA_VISIBLE_DEVICES"]),
        ("--batch_size 12:30", ["batch_size", "12:30", "int"]),
        ("--batch_size 0x10", ["batch_size", "0x10", "int"]),
        ("--batch_size 2.5", ["batch_size", "2.5", "int"]),
        ("--batch_size \u22128", ["batch_size", "U+2212"]),
        ("--batch_size 8\u00a00", ["batch_size", "U+00A0"]),
        ("--batch_size \u0661", ["batch_size", "U+0661"]),
        ("--learning_rate 1e400", ["learning_rate", "finite"]),
        ("--learning_rate -inf", ["learning_rate", "finite"]),
        ("--max_steps 99999999999999999999", ["max_steps", 2**63 - 1]),
        (f"--batch_size {'9' * 5000}", ["batch_size", "int"]),
        (f"--learning_rate {'9' * 400}", ["learning_rate", "finite"]),
        ("--no-use_attn=true", ["--no-use_attn", "true"]),
        ("--config a --config b", ["--config", "twice"]),
        ("--name=", ["name", "empty"]),
        ("--dataset_size=", ["dataset_size", "int"]),
    ],
)
def test_mistakes_are_named(argv, facts):
    with pytest.raises(ConfigError, match=naming(*facts)) as caught:
        read(TrainVAEConfig, *argv.split(" "))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_forms_of_flags():
    assert read(GenerateConfig, "--text", "-5", "a").what.text == ("-5", "a")
    assert read(GenerateConfig, "--text=-x").what.text == ("-x",)
    assert read(TrainVAEConfig, "--batch_size", "3", "--batch_size", "5").data.batch_size == 5  # as a script's "$@"
    assert read(TrainVAEConfig, "--ch_mult", "1", "2", "--ch_mult", "4").model.ch_mult == (4,)
    with pytest.raises(ConfigError, match=naming("--text", "--flag=value")):
        read(GenerateConfig, "--text", "-x")
    with pytest.raises(ConfigError, match=naming("--text", "twice")):
        read(GenerateConfig, "--text", "a", "--text", "b")


def test_argparse_asks_the_attribute_that_the_parser_sets():
    """A private one, which decides what is a negative number."""
    plain = Parser.__mro__[1]()
    assert isinstance(plain._negative_number_matcher, re.Pattern) and not plain._negative_number_matcher.match("-1e-4x")
    assert Parser()._negative_number_matcher.match("-1e-4") and not Parser()._negative_number_matcher.match("-c")


# ---------------------------------------------------------------------------------------------- null and nothing


def test_null_words_leave_an_optional_setting_out_unless_in_quotes(from_yaml):
    for word in ("null", "~", "None", ""):
        assert from_yaml(TrainVAEConfig, f"name: {word}\ndataset_size: {word}").trainer.name is None
    for word in ("null", "~", "None"):
        assert from_yaml(TrainVAEConfig, f"name: '{word}'").trainer.name == word
        assert from_yaml(GenerateConfig, f"text: [{word}]").what.text == (word,)
    assert from_yaml(EvalBiARTConfig, "prior: null").likelihood.prior == "null"  # one of its choices
    for text in ("batch_size:", "log_dir:", "ch_mult:"):
        with pytest.raises(ConfigError, match=naming(text[:-1], "no value")):
            from_yaml(TrainVAEConfig, text)


def test_values_made_in_python_are_checked_and_converted_too():
    numpy = pytest.importorskip("numpy")
    made = TrainVAEConfig(trainer=TrainerConfig(seed=numpy.int64(3), gradient_clip_val=numpy.float32(0.5)))
    assert type(made.trainer.seed) is int and type(made.trainer.gradient_clip_val) is float
    for wrong in ({"seed": "3"}, {"seed": True}, {"seed": 3.5}, {"backup": 1}, {"log_dir": None}, {"epochs": 10**5000}):
        with pytest.raises(ConfigError, match=naming(*wrong)):
            TrainerConfig(**wrong)
    with pytest.raises(ConfigError, match=naming("beams", 2000, 1024)):
        GenerateSamplingConfig(beams=2000)


# ---------------------------------------------------------------------------------------------- saved and read again

ODD = [
    *(
        "${x}",
        "${oc.env:HOME}",
        "${oc.decode:1}",
        "???",
        "\\${x}",
        "a'b",
        'a"b',
        "tab\there",
        "ünï",
        "赤🔴",
        "lat\udce9.jpg",
    ),
    *(
        " lead",
        "trail ",
        "a: b",
        "a #b",
        "#",
        "null",
        "~",
        "None",
        "yes",
        "1e5",
        "0x10",
        "1_000",
        "2026-11-27",
        "x" * 300,
    ),
    *(
        "a b " * 100,
        "\x85a",
        "a\u2028b",
        "\ufeffa",
        "-",
        "- a",
        "?",
        "!tag",
        "&a",
        "*a",
        "%a",
        "@a",
        "`a",
        "|",
        ">",
        "a\\b",
    ),
    *(
        "{a: 1}",
        "[1]",
        ",",
        "\x7f",
        "\x1b[0m",
        "\U0010ffff",
        "\ufffe",
        "<<",
        "=",
        "a\rb",
        "a\nb",
        "\n\n",
        "\x00",
        "  \n",
    ),
]
PIECES = [
    *"\n\r\t '\"\\:#-?!&*{}[]|>%@`~é\x85\u2028\ufeff\ud800\U0001f600\x00\x1f<=$",
    "null",
    "${",
    "a",
    "1",
    "0.",
    "e5",
]


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    return ODD + ["".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(count)]


def test_any_text_is_read_back_from_a_saved_configuration(from_yaml):
    some = tuple(texts(300))
    config = GenerateConfig(what=WhatConfig(text=some, score=("a.png", *some)))
    assert from_yaml(GenerateConfig, to_yaml(config)) == config
    text_of = dataclasses.make_dataclass("Texts", [("name", Optional[str], same(TrainerConfig, "name"))], frozen=True)
    cls = dataclasses.make_dataclass("Run", [("section", text_of)])
    for text in filter(str.strip, ODD):  # and of a setting that may be null
        assert from_yaml(cls, to_yaml(cls(text_of(text)))) == cls(text_of(text)), repr(text)


def any_value(rng: random.Random, f: dataclasses.Field, hint):
    """A value that the setting may take."""
    bounds, kind = f.metadata["bounds"], item_type(hint)
    low, high = bounds.get("at least", bounds.get("above", -5)), bounds.get("at most", bounds.get("below", 10**6))

    def one():
        if kind is str:
            return rng.choice(tuple(f.metadata["choices"] or ODD))
        if kind is bool:
            return rng.random() < 0.5
        if kind is int:
            return rng.randint(int(low), int(high))
        return rng.choice([rng.uniform(low, min(high, low + 1)), 10 ** rng.uniform(-12, 6), 1, 1e-7])

    return tuple(one() for _ in range(2)) if is_list(hint) else one()


@each_program
def test_a_configuration_of_any_values_is_read_back(cls, from_yaml):
    rng = random.Random(1)
    changed = dict.fromkeys((f.name for _, f, _ in leaves(cls)), 0)
    for _ in range(8):
        sections = {}
        for section, kind in types_of(cls).items():
            values = {}
            for f in dataclasses.fields(kind):
                value = any_value(rng, f, types_of(kind)[f.name])
                if outcome(lambda kind=kind, values={**values, f.name: value}: kind(**values)) != "refused":
                    values[f.name] = value
                    changed[f.name] += 1
            sections[section] = kind(**values)
        config = cls(**sections)
        assert from_yaml(cls, to_yaml(config)) == config
    never = {name for name, times in changed.items() if not times}
    assert never <= {"double_z"}  # which can only be false


PROGRAM_OF = {"augvae": TrainVAEConfig, "biart": TrainBiARTConfig}
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_that_is_saved_reads_as_itself_and_yaml_had_the_same_values(file, from_yaml):
    yaml = pytest.importorskip("yaml")
    cls = next(cls for name, cls in PROGRAM_OF.items() if name in file.stem)
    config = read(cls, "-c", str(file))
    assert from_yaml(cls, to_yaml(config)) == config
    for section, values in yaml.safe_load(file.read_text()).items():
        for name, value in values.items():
            found = getattr(getattr(config, section), name)
            assert found == (
                tuple(value) if isinstance(value, list) else str(value) if isinstance(found, str) else value
            )


def test_names_that_are_not_utf8_survive(from_yaml):
    name = b"lat\xe9.jpg".decode(errors="surrogateescape")
    config = read(GenerateConfig, "--image", name)
    to_yaml(config).encode()  # as the file is written
    assert from_yaml(GenerateConfig, to_yaml(config)) == config
    assert config.what.image == (name,)


# ---------------------------------------------------------------------------------------------------------- YAML itself


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (b"batch_size: 3\nepochs: 1\nbatch_size: 4\n", ["batch_size", "line 3", "line 1"]),
        (b"data:\n  batch_size: 3\n  batch_size: 4\n", ["batch_size", "line 3", "line 2"]),
        (b"data: {batch_size: 3}\nmodel: {}\ndata: {}\n", ["data", "line 3", "line 1"]),
        (b"1: x", [1]),
        (b"null: x", ["null"]),
        (b"on: x", ["on"]),
        (b"'': x", ["''"]),
        (b"? [a, b]\n: x", ["line 1", "list"]),
        (b"? {a: b}\n: x", ["line 1", "mapping"]),
        (b"batch_size: !!python/object/apply:os.system [echo]", ["python/object/apply:os.system"]),
        (b"name: !env HOME", ["env", "line 1"]),
        (b"!x\nname: a", ["x"]),
        (b"model: !x {hidden_dim: 64}", ["x"]),
        (b"name: &a [*a]", ["name"]),
        (b"a: 1\n---\nb: 2", ["line 2", "document"]),
        (b"batch_size: 3\n\tepochs: 1", ["line 2"]),
        (b"name: \xe9t\xe9", ["line 1", "UTF-8"]),
        ("name: a".encode("utf-16"), ["UTF-8"]),
        ("name: a".encode("utf-16-le"), ["YAML"]),
        (b"name: " + b"[" * 10_000, ["deeply"]),
        (b"name: " + b"{a: " * 10_000, ["deeply"]),
        (b'name: "\\U99999999"', ["YAML"]),
        (b"%YAML 1.x\n---\nname: a", ["line 1"]),
        (b"x" * 900 + b": 1", ["line 1", "x" * 79 + "..."]),
        (b"#" * 2_000_001, ["2,000,001", "2,000,000"]),
    ],
    ids=lambda value: ascii(value[:20]),
)
def test_yaml_that_is_refused_names_the_line(text, facts, from_yaml, tmp_path):
    with pytest.raises(ConfigError, match=naming(tmp_path / "run.yaml", *facts)) as caught:
        from_yaml(TrainVAEConfig, text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_bomb_of_anchors_is_one_line(from_yaml):
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    for text in (bomb, bomb.replace("a29: &a29", "name:"), "ch_mult: &a0 [1]\n" + bomb.replace("&a0", "&b0", 1)):
        with pytest.raises(ConfigError) as caught:
            from_yaml(TrainVAEConfig, text)
        assert len(str(caught.value)) < 500


def test_yaml_that_is_read(from_yaml):
    assert from_yaml(TrainVAEConfig, b"\xef\xbb\xbfname: caf\xc3\xa9\r\nepochs: 3\r\n").trainer.name == "café"
    assert from_yaml(TrainVAEConfig, "train_dir: &d data\nval_dir: *d").data.val_dir == "data"
    assert from_yaml(TrainVAEConfig, "trainer:\nmodel: ~\n") == TrainVAEConfig()
    assert from_yaml(TrainVAEConfig, "name: !!str 001").trainer.name == "001"
    assert from_yaml(TrainVAEConfig, "train_dir: ${oc.env:HOME}/x").data.train_dir == "${oc.env:HOME}/x"


def test_a_pipe_is_no_config(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=naming(tmp_path / "pipe.yaml", "pipe")):
        read(TrainVAEConfig, "-c", str(tmp_path / "pipe.yaml"))
    with pytest.raises(ConfigError, match=naming("config", 255)):
        read(TrainVAEConfig, "-c", "x" * 300)
