"""Flags and YAML keys that hold whole texts."""

from __future__ import annotations

import dataclasses
import json
from typing import Optional, Tuple

import pytest

from latent_verse.config import ConfigError, cli, setting
from tests.messages import naming


@dataclasses.dataclass
class Words:
    words: Tuple[str, ...] = setting((), "whole texts")
    maybe: Optional[Tuple[str, ...]] = setting(None, "whole texts or none")
    numbers: Tuple[int, ...] = setting((1,), "numbers, as before")


@dataclasses.dataclass
class Run:
    section: Words = dataclasses.field(default_factory=Words)


@pytest.mark.parametrize(
    "texts", [["a, b", "c d"], ["[1, 2]"], ["${oc.env:HOME}", "${x"], ["???"], ["null"], [""], ["1e6"], ["赤, 🔴"]]
)
def test_texts_stay_whole_on_the_command_line_and_in_yaml(tmp_path, texts):
    config, given = cli.parse(Run, ["--words", *texts], "")
    assert config.section.words == tuple(texts) and given == {"words": "--words"}
    plain = json.dumps(texts, ensure_ascii=False)
    (tmp_path / "c.yaml").write_text(f"words: {plain}\nnumbers: [3, 4]\n", encoding="utf-8")
    config, _ = cli.parse(Run, ["-c", str(tmp_path / "c.yaml")], "")
    assert config.section.words == tuple(texts) and config.section.numbers == (3, 4)


def test_other_forms_of_texts(tmp_path):
    (tmp_path / "c.yaml").write_text("words: one text, whole\nmaybe: null\n")
    config, _ = cli.parse(Run, ["-c", str(tmp_path / "c.yaml")], "")
    assert config.section.words == ("one text, whole",) and config.section.maybe is None
    for written, texts in (("[3, 0.50]", ("3", "0.50")), ("true", ("true",)), ("null", ("null",)), ("[on]", ("on",))):
        (tmp_path / "c.yaml").write_text(f"words: {written}\n")
        assert cli.parse(Run, ["-c", str(tmp_path / "c.yaml")], "")[0].section.words == texts
    for wrong in ("", "{a: 1}", "[[a]]"):
        (tmp_path / "c.yaml").write_text(f"words: {wrong}\n")
        with pytest.raises(ConfigError, match=naming("words", tmp_path / "c.yaml")):
            cli.parse(Run, ["-c", str(tmp_path / "c.yaml")], "")


def test_numbers_are_still_read_in_every_form():
    for argv in (["--numbers", "1", "2"], ["--numbers", "1,2"], ["--numbers", "[1, 2]"]):
        assert cli.parse(Run, argv, "")[0].section.numbers == (1, 2)
    with pytest.raises(ConfigError, match=naming("numbers", "a", "--numbers")):
        cli.parse(Run, ["--numbers", "a"], "")
