"""Writing: an interrupted write leaves all that was there or all that is new."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile

import numpy as np
import pytest
import safetensors.torch
import torch

from latent_verse.files import (
    FileError,
    NotWritten,
    append,
    made_folder,
    only_writer,
    read_json,
    read_text,
    replacing,
    write_bytes,
    write_json,
    write_text,
    writing,
)
from tests.messages import naming
from tests.waiting_processes import kill, start


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
    told = FileError if error is OSError else error
    with pytest.raises(told), replacing(tmp_path / "a.txt") as unfinished:
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


def test_what_a_killed_process_was_writing_goes_and_what_a_living_one_writes_stays(tmp_path, monkeypatch):
    lines = (
        "with files.replacing(folder / 'step=1.ckpt') as unfinished:\n    unfinished.write_bytes(b'half')\n    wait()"
    )
    killed, living = start(tmp_path, lines), start(tmp_path, lines)
    try:
        kill(killed)
        assert not list(tmp_path.glob("*")) or all(name.startswith(".") for name in names(tmp_path))
        assert not list(tmp_path.rglob("*.ckpt"))
        assert len(names(tmp_path)) == 2
        (tmp_path / ".mine.tmp").mkdir()  # of the user's
        (tmp_path / ".mine.abcdefgh.tmp").write_text("a file")
        monkeypatch.setattr(writing, "_tidied", set())
        write_text(tmp_path / "other", "new")
        left = [name for name in names(tmp_path) if name.startswith(".step=1")]
        assert len(left) == 1 and list((tmp_path / left[0]).iterdir())
        write_text(tmp_path / "step=1.ckpt", "whole")  # while the other writes the same
        assert (tmp_path / "step=1.ckpt").read_text() == "whole" and (tmp_path / left[0]).is_dir()
        assert {".mine.tmp", ".mine.abcdefgh.tmp", "other"} <= set(names(tmp_path))
    finally:
        kill(living)


def test_two_writers_of_one_path_do_not_disturb_each_other(tmp_path):
    with replacing(tmp_path / "a") as first:
        first.write_text("1")
        with replacing(tmp_path / "a") as second:
            second.write_text("2")
        assert (tmp_path / "a").read_text() == "2" and first.read_text() == "1"
    assert (tmp_path / "a").read_text() == "1" and names(tmp_path) == ["a"]


def test_a_folder_killed_between_its_two_renames_gets_its_new_content(tmp_path, monkeypatch):
    with replacing(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
        (unfinished / "old").touch()
    lines = """
with files.replacing(folder / "folder") as unfinished:
    unfinished.mkdir()
    (unfinished / "new").touch()
    os.replace = lambda *paths: wait()
"""
    kill(start(tmp_path, lines))
    assert not (tmp_path / "folder").exists()
    monkeypatch.setattr(writing, "_tidied", set())
    write_text(tmp_path / "beside", "")
    assert names(tmp_path) == ["beside", "folder"] and names(tmp_path / "folder") == ["new"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(errno.EIO, "disk error")))
    with pytest.raises(FileError, match="disk error"), replacing(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["old"]


BIG = {"weight": torch.zeros(300_000)}
SAVE = {
    "torch": lambda path: torch.save(BIG, path.open("wb")),
    "safetensors": lambda path: safetensors.torch.save_file(BIG, str(path)),
    "numpy": lambda path: np.savez(path.open("wb"), a=np.zeros(300_000)),
    "text": lambda path: path.write_text("a" * 2_000_000),
}


@pytest.mark.parametrize("how", SAVE)
def test_a_file_for_which_there_is_no_room_is_one_line_and_leaves_nothing(tmp_path, how):
    resource = pytest.importorskip("resource")
    write_text(tmp_path / "kept", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # as a full disk, but for the number of the error
    try:
        told = pytest.raises(NotWritten, match=naming(tmp_path / "kept", "too large", "free"))
        with told as caught, replacing(tmp_path / "kept") as unfinished:
            SAVE[how](unfinished)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["kept"] and (tmp_path / "kept").read_text() == "old"


def test_what_is_appended_is_there_whole_or_not_at_all(tmp_path):
    resource = pytest.importorskip("resource")
    file = tmp_path / "new" / "a.csv"
    append(file, b"first\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(NotWritten, match=naming(file, "too large", "free")):
            append(file, b"second\n")  # of which 4 bytes have room
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == b"first\n"
    append(file, b"second\n")
    assert file.read_bytes() == b"first\nsecond\n"


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((number, 1) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)),
        *((number, 2) for number in (errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP)),
    ],
)
def test_a_fault_of_the_disk_is_no_mistake_of_the_user(tmp_path, monkeypatch, number, code):
    def failing(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writing, "_sync", failing)
    with pytest.raises(FileError, match=naming(tmp_path / "a", os.strerror(number))) as caught:
        write_text(tmp_path / "a", "a")
    assert caught.value.exit_code == code and isinstance(caught.value, NotWritten) == (code == 1)


def test_nothing_passes_through_a_temporary_folder_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    for kind, save in SAVE.items():
        with replacing(tmp_path / "deep" / "er" / kind) as unfinished:
            save(unfinished)
    with only_writer(tmp_path / "run", "log_dir"):
        pass
    assert names(tmp_path / "deep" / "er") == sorted(SAVE) and names(tmp_path) == ["deep"]


def test_what_is_not_about_writing_is_left_as_it_is(tmp_path):
    for fail, error in (
        (lambda: (tmp_path / "elsewhere" / "read.txt").read_text(), FileNotFoundError),
        (lambda: int("a"), ValueError),
        (lambda: read_text(tmp_path / "absent"), FileError),
    ):
        with pytest.raises(error), replacing(tmp_path / "here" / "a"):
            fail()
    assert names(tmp_path / "here") == []


IMPOSSIBLE = {
    "too long": (lambda folder: folder / ("a" * 300), "too long"),
    "below a file": (lambda folder: folder / "file" / "b", "file is not a folder"),
    "null": (lambda folder: folder / "a\0b", "null"),
    "a file": (lambda folder: folder / "file", "file is not a folder"),
}


@pytest.mark.parametrize("below", ["", "b"])
def test_a_link_to_nothing_is_no_folder(tmp_path, below):
    (tmp_path / "link").symlink_to(tmp_path / "absent" / "nothing")
    told = pytest.raises(FileError, match=naming("out", tmp_path / "link", "link", "does not exist"))
    with told, made_folder(tmp_path / "link" / below, "out"):
        raise AssertionError


@pytest.mark.parametrize(("place", "reason"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_folders_are_one_line(tmp_path, place, reason):
    (tmp_path / "file").touch()
    for context in (made_folder, only_writer):
        told = pytest.raises(FileError, match=naming("log_dir", reason))
        with told as caught, context(place(tmp_path), "log_dir"):
            raise AssertionError
        assert "free" not in str(caught.value)  # more space would not help
    if place(tmp_path).name != "file":
        with pytest.raises(FileError, match=reason), replacing(place(tmp_path)):
            raise AssertionError  # it is found before the work
    assert names(tmp_path) == ["file"]


def test_a_full_folder_is_refused_before_the_work(tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    told = pytest.raises(FileError, match=naming("out", tmp_path / "a", "No space left", "free"))
    with told, made_folder(tmp_path / "a", "out"):
        raise AssertionError
    assert names(tmp_path) == []


@pytest.mark.parametrize("context", [made_folder, only_writer])
def test_a_folder_that_stays_empty_is_removed_with_those_above_it(tmp_path, context):
    (tmp_path / "there").mkdir()
    with context(tmp_path / "there" / "a" / "b", "out"):
        assert (tmp_path / "there" / "a" / "b").is_dir()
    with pytest.raises(KeyError), context(tmp_path / "there", "out"):
        raise KeyError
    assert names(tmp_path) == ["there"] and names(tmp_path / "there") == []  # that one was there before
    with context(tmp_path / "made" / "c", "out"):
        write_text(tmp_path / "made" / "c" / "results", "")
    assert names(tmp_path / "made" / "c") == ["results"]


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ({"a": "1", "b": "1"}, {"b": "2", "c": "2"}):
        with replacing(tmp_path / "folder") as unfinished:
            (unfinished / "deeper").mkdir(parents=True)
            for name, text in content.items():
                (unfinished / "deeper" / name).write_text(text)
        assert {p.name: p.read_text() for p in (tmp_path / "folder" / "deeper").iterdir()} == content
    with pytest.raises(FileError), replacing(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
        raise OSError
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["deeper"]


def test_a_symbolic_link_gives_way_to_the_file_and_its_target_stays(tmp_path):
    write_text(tmp_path / "target", "old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "new")
    assert [(tmp_path / name).read_text() for name in ("link", "target")] == ["new", "old"]


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


def test_a_signal_while_the_hidden_folder_is_made_or_removed_leaves_none(tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writing, "Lock", stopped)
        with writing.replacing(tmp_path / "a"):
            pytest.fail("begun without a lock")
    assert not list(tmp_path.iterdir())
    rmtree, calls = shutil.rmtree, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        rmtree(*args, **options)

    monkeypatch.setattr(writing.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), writing.replacing(tmp_path / "a") as new:
        new.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
