"""Text and JSON are read by one rule, and what is wrong is one line."""

from __future__ import annotations

import os

import pytest

from latent_verse.files import (
    FileError,
    decode_text,
    lines_of,
    parse_json,
    read_bytes,
    read_json_object,
    read_text,
    text_lines,
    write_json,
)
from tests.messages import naming


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
    with pytest.raises(FileError, match=naming("captions.json", "JSON")) as caught:
        parse_json(text, "captions.json")
    assert "\n" not in str(caught.value)


def test_a_json_key_given_twice_is_refused():
    assert parse_json('[{"a": 1, "b": {"a": 2}}, {"a": 3}]', "x.json") == [{"a": 1, "b": {"a": 2}}, {"a": 3}]
    for text in ('{"caption": "a", "caption": "b"}', '[{"b": {"caption": 1, "a": 2, "caption": 1}}]'):
        with pytest.raises(FileError, match=naming("captions.json", "'caption'", "twice")):
            parse_json(text, "captions.json")


def test_a_long_key_given_twice_is_cut():
    with pytest.raises(FileError) as caught:
        parse_json(f'{{"{"x" * 999}": 1, "{"x" * 999}": 2}}', "captions.json")
    assert len(str(caught.value)) < 200 and "xxx... twice" in str(caught.value)


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
