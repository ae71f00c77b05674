"""files.py: an interrupted write leaves all that was there or all that is new; text is read by one rule."""

from __future__ import annotations

import json
import os

import pytest

from latent_verse.files import (
    FileError,
    decode_text,
    differences,
    lines_of,
    parse_json,
    read_bytes,
    read_json,
    read_json_object,
    read_text,
    replacing,
    text_lines,
    write_bytes,
    write_json,
    write_text,
)
from tests.messages import naming


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writing_replaces_and_leaves_nothing_else(tmp_path):
    for text in ("old", "new é 字"):
        write_text(tmp_path / "a.txt", text)
    write_bytes(tmp_path / "b.bin", b"\x00\xff")
    write_json(tmp_path / "c.json", {"a": [1, "é"]})
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "new é 字"
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\xff"
    assert json.loads((tmp_path / "c.json").read_text()) == {"a": [1, "é"]}
    assert names(tmp_path) == ["a.txt", "b.bin", "c.json"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch, step, error):
    write_text(tmp_path / "a.txt", "old")

    def fail(*args):
        raise error

    if step != "write":
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(error), replacing(tmp_path / "a.txt") as unfinished:
        unfinished.write_text("half")
        assert (tmp_path / "a.txt").read_text() == "old"
        if step == "write":
            fail()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_it_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Or a machine that loses power could leave an empty file under the final name."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append(os.fstat(number).st_ino) or fsync(number))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append("replace") or replace(a, b))
    write_text(tmp_path / "a.txt", "new")
    assert events == [(tmp_path / "a.txt").stat().st_ino, "replace", tmp_path.stat().st_ino]


def test_an_unfinished_file_is_not_found_by_patterns_and_does_not_hinder_the_next_write(tmp_path):
    with replacing(tmp_path / "step=1.ckpt") as unfinished:
        unfinished.write_text("half")
        assert not list(tmp_path.glob("*.ckpt"))
        left = unfinished
    left.mkdir()  # whatever a killed process left
    write_text(tmp_path / "step=1.ckpt", "whole")
    assert names(tmp_path) == ["step=1.ckpt"]


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ({"a": "1", "b": "1"}, {"b": "2", "c": "2"}):
        with replacing(tmp_path / "folder") as unfinished:
            (unfinished / "deeper").mkdir(parents=True)
            for name, text in content.items():
                (unfinished / "deeper" / name).write_text(text)
        assert {p.name: p.read_text() for p in (tmp_path / "folder" / "deeper").iterdir()} == content
    with pytest.raises(OSError), replacing(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
        raise OSError
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["deeper"]


def test_a_symbolic_link_gives_way_to_the_file_and_its_target_stays(tmp_path):
    write_text(tmp_path / "target", "old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "new")
    assert [(tmp_path / name).read_text() for name in ("link", "target")] == ["new", "old"]


def test_differences_name_the_setting_and_both_values():
    old = {"lr": 0.1, "same": 1, "gone": 2}
    assert differences(old, {"lr": 0.2, "same": 1, "name": "a"}) == [
        "lr: 0.1 then, 0.2 now",
        "name: None then, 'a' now",
    ]
    assert differences(old, {"same": 1}) == []


def test_text_is_utf8_with_or_without_a_byte_order_mark(tmp_path):
    for data in ("é\u2028b\n".encode(), "\ufeffé\u2028b\n".encode()):
        (tmp_path / "a.txt").write_bytes(data)
        assert read_text(tmp_path / "a.txt") == "é\u2028b\n"
    with pytest.raises(FileError, match=naming("shard.tar: a.txt", "UTF-8", "line 2", "byte 3")):
        decode_text(b"ok\n\xe9", "shard.tar: a.txt")


def test_lines_end_at_newlines_only():
    assert lines_of("a\u2028b\x0bc\x85d\r\n\ne\n") == ["a\u2028b\x0bc\x85d", "", "e"]
    assert lines_of("") == [] and lines_of("\n") == [""] and lines_of("a") == ["a"]


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_damaged_json_is_one_line(text):
    with pytest.raises(FileError, match=naming("captions.json", "not valid JSON")) as caught:
        parse_json(text, "captions.json")
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, word in (("absent", "No such file"), (".", "a folder"), ("pipe", "a pipe"), ("a\0b", "null")):
        with pytest.raises(FileError, match=word):
            read_bytes(tmp_path / name)
    write_json(tmp_path / "list.json", [1])
    with pytest.raises(FileError, match=naming("list.json", "a list", "object")):
        read_json_object(tmp_path / "list.json")


def test_lines_are_read_one_at_a_time_by_the_same_rules(tmp_path):
    for text in ("a\u2028b\x0bc\x85d\r\n\ne\n", "", "\n", "a", "a\r", "a\rb\n\n", "\ufeffa\n\ufeffb"):
        (tmp_path / "a.txt").write_bytes(text.encode())
        assert list(text_lines(tmp_path / "a.txt")) == lines_of(read_text(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_bytes(b"ok\nno: \xe9\n")
    lines = text_lines(tmp_path / "a.txt")
    assert next(lines) == "ok"
    with pytest.raises(FileError, match=naming(tmp_path / "a.txt", "UTF-8", "line 2", "byte 7")):
        next(lines)
    with pytest.raises(FileError, match=naming(tmp_path, "a folder")):
        next(text_lines(tmp_path))


def test_names_that_are_not_utf8_are_written_so_that_json_gives_them_back(tmp_path):
    name = os.fsdecode(b"lat\xe9 \\ \xff.jpg")
    for text in (json.dumps({"image": name}, ensure_ascii=False), json.dumps({"image": name})):
        write_text(tmp_path / "a.json", text)
        assert read_json(tmp_path / "a.json") == {"image": name}
    write_json(tmp_path / "a.json", {"image": name})
    assert os.fsencode(read_json(tmp_path / "a.json")["image"]) == b"lat\xe9 \\ \xff.jpg"


def test_json_has_no_number_that_is_not_finite(tmp_path):
    write_json(tmp_path / "a.json", {"psnr": float("nan"), "more": [1.5, float("-inf"), {"n": (2, float("inf"))}]})
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert found == {"psnr": None, "more": [1.5, None, {"n": [2, None]}]}
