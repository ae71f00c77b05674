"""Every way to name shards; lists, patterns and names of files that could do harm."""

import contextlib
import os

import pytest

from latent_verse.config import UserError
from latent_verse.data import DataError, EvalShards, Shards
from latent_verse.data.shard_names import find_shards
from tests.messages import naming
from tests.shard_files import image_bytes, write_shards


def test_every_way_to_name_shards(tmp_path):
    shards = write_shards(tmp_path, [1, 1, 1])
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "list.txt").write_text(f"# comment\n  # and another\n{shards[0]}\n\n{tmp_path}/00{{1..2}}.tar\n")
    assert find_shards(str(tmp_path)) == shards
    assert find_shards(tmp_path) == shards
    assert find_shards(f"{tmp_path}/{{000..002}}.tar") == shards
    assert find_shards(f"{tmp_path}/{{000,002}}.tar,{shards[1]}") == [shards[0], shards[2], shards[1]]
    assert find_shards(f"{tmp_path}/0*.tar") == shards
    assert find_shards(shards) == shards
    assert find_shards(f"{tmp_path}/list.txt") == shards
    assert find_shards(f"file://{shards[0]}") == shards[:1]
    assert find_shards("http://host/{00..02}.tar") == [f"http://host/0{i}.tar" for i in range(3)]
    assert find_shards("gs://bucket/a.tar,gs://bucket/b.tar") == ["gs://bucket/a.tar", "gs://bucket/b.tar"]
    pipes = [f"pipe:curl -s http://host/{i}.tar" for i in range(2)]
    assert find_shards("pipe:curl -s http://host/{0..1}.tar", allow_pipe=True) == pipes


def test_missing_shards_are_named(tmp_path):
    write_shards(tmp_path, [1, 1])
    with pytest.raises(DataError, match=naming("val_dir", "2 of 4", tmp_path / "002.tar")):
        find_shards(f"{tmp_path}/{{000..003}}.tar", "val_dir")
    with pytest.raises(DataError, match=naming("1 of 1", tmp_path / "nowhere")):
        find_shards(tmp_path / "nowhere")
    with pytest.raises(DataError, match=naming(tmp_path / "x*.tar")):
        find_shards(f"{tmp_path}/x*.tar")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(image_bytes(0))
    with pytest.raises(
        DataError, match=naming(tmp_path / "images", ".tar", "1 .jpg", "--dataset", "imagefolder", "flat")
    ):
        find_shards(tmp_path / "images")


def test_shell_commands_are_only_run_where_they_are_given_and_allowed(tmp_path):
    ran = tmp_path / "ran"
    command = f"pipe:touch {ran}"
    (tmp_path / "list.txt").write_text(f"{command}\n")
    (tmp_path / "two.txt").write_text(f"{tmp_path}/list.txt\n")
    with pytest.raises(DataError, match=naming("val_dir", command, "--allow_pipe")):
        find_shards(command, "val_dir")
    hidden = [
        tmp_path / "list.txt",
        tmp_path / "two.txt",
        f"{tmp_path}/0.tar,{command}",
        f"{{{command},http://x/0.tar}}",
    ]
    for source in [*map(str, hidden), f"http://x/0.tar::{command}", f" {{a,pipe:touch}} {ran}"]:
        with pytest.raises(DataError, match=naming("val_dir")):
            Shards(source, 8, key="val_dir", allow_pipe=True)
    assert not ran.exists()


def test_the_name_of_a_file_is_never_a_command(tmp_path, monkeypatch):
    """Names come from strangers: what a pattern, a folder or a list finds is a file, whatever it is called."""
    monkeypatch.chdir(tmp_path)
    (good,) = write_shards(tmp_path / "good", [2])
    names = ["pipe:touch ran #.tar", "pipe:touch ran;/a.tar"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.link(good, tmp_path / name)
    (tmp_path / "l.txt").write_text("*.tar\n")
    (tmp_path / "f.txt").write_text("file:pipe:touch ran;\nfile:" + names[0])
    for source in ("*.tar", "p*", "p*,good", "*/a.tar", "l.txt", "f.txt", "file:pipe:touch ran;", ".", ["*.tar"]):
        for allow in (False, True):
            with contextlib.suppress(DataError):
                shards = Shards(source, 8, allow_pipe=allow)
                assert not shards.remote and len(list(EvalShards(shards, 1))) >= 2
    assert find_shards("*.tar") == [f"./{names[0]}"] and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "url", ["ssh://h/a.tar", "scp://h/a.tar", "s3://b/a.tar", "ais://b/a", "htgs://b/a", "x://$(id)"]
)
def test_only_the_schemes_that_are_named_are_opened(tmp_path, url):
    (tmp_path / "list.txt").write_text(f"{url}\n")
    for source in (url, tmp_path / "list.txt", f"a.tar,{url}"):
        with pytest.raises(DataError, match=naming("train_dir", url, "https://", "gs://", "hf://")):
            find_shards(source)


def test_lists_and_patterns_that_never_end_are_refused(tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text(f"{tmp_path}/list.txt\n")
    with pytest.raises(DataError, match=naming(tmp_path / "list.txt", "itself")):
        find_shards(tmp_path / "list.txt")
    for pattern in ("{0..99999999999}.tar", "{0..9999}/{0..9999}.tar", "{a,b}" * 40):
        with pytest.raises(DataError, match=naming(pattern, "1,000,000")):
            find_shards(pattern)
    monkeypatch.setenv("WDS_SECRET", "x")
    for pattern in ("{0..3.tar", "a${NO_SUCH_VARIABLE}.tar", "http://h/${SECRET}.tar", "x{" + "1," * 100_000 + "}"):
        with pytest.raises(DataError, match=naming(pattern[:99])):
            find_shards(pattern)
    (tmp_path / "bad.txt").write_bytes(b"a.tar\n\xff.tar\n")
    with pytest.raises(UserError, match=naming(tmp_path / "bad.txt", "line 2")):
        find_shards(tmp_path / "bad.txt")


def test_lists_of_lists_are_bounded_together(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"{tmp_path}/{i + 1}.txt\n" * 60 if i < 5 else "http://h/{0..59}.tar\n")
        (tmp_path / f"none{i}.txt").write_text(f"{tmp_path}/none{i + 1}.txt\n" * 60 if i < 5 else ",\n" * 60)
    assert len(find_shards(f"{tmp_path}/3.txt")) == 60
    for source in (f"{tmp_path}/0.txt", [f"http://h/{i}/{{0..300000}}.tar" for i in range(4)]):
        with pytest.raises(DataError, match=naming("train_dir", "1,000,000")):
            find_shards(source)
    assert find_shards(f"{tmp_path}/none0.txt") == []
    for i in range(1500):
        (tmp_path / f"deep{i}.txt").write_text(f"{tmp_path}/deep{i + 1}.txt\n")
    with pytest.raises(DataError, match=naming("train_dir", tmp_path / "deep20.txt", 20)):
        find_shards(f"{tmp_path}/deep0.txt")


def test_a_shard_that_is_named_twice_is_read_once_and_said(tmp_path, monkeypatch, caplog):
    write_shards(tmp_path, [1, 1])
    monkeypatch.chdir(tmp_path)
    one, two = sorted(path.name for path in tmp_path.glob("*.tar"))
    (tmp_path / "list.txt").write_text(f"{one}\n./{one}\n  # a comment\n\n{two}\n{one}\n")
    assert find_shards("list.txt") == [one, two]
    assert find_shards(f"{one},./{one},{two}") == [one, two] == find_shards([one, two, f"./{two}"])
    assert find_shards(["http://h/a.tar", "http://h/a.tar"]) == ["http://h/a.tar"]
    assert len(caplog.messages) == 4 and naming("train_dir", "2 shards", f"./{one}", "once").search(caplog.messages[0])
    assert naming("http://h/a.tar", "1 shards").search(caplog.messages[-1])
    twice = ["pipe:cat a.tar", "pipe:cat a.tar"]  # which may write something else each time
    assert find_shards(twice, allow_pipe=True) == twice and find_shards(f"{one},{two}") == [one, two]
    assert len(caplog.messages) == 4


def test_home_is_found_in_lists_too(tmp_path, monkeypatch):
    write_shards(tmp_path, [1])
    monkeypatch.setenv("HOME", str(tmp_path))
    (name,) = (path.name for path in tmp_path.glob("*.tar"))
    (tmp_path / "list.txt").write_text(f"~/{name}\n")
    assert find_shards("~/list.txt") == [str(tmp_path / name)]
    (tmp_path / "list.txt").write_text(f"~nobody-here/{name}\n")
    with pytest.raises(UserError, match=naming("train_dir", f"~nobody-here/{name}")):
        find_shards(tmp_path / "list.txt")


def test_shards_that_are_no_files_are_refused(tmp_path):
    write_shards(tmp_path, [1])
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "lost.tar").symlink_to("nowhere")
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "._000.tar").write_bytes(b"x")
    assert find_shards(tmp_path) == [str(tmp_path / "000.tar")]
    for name in ("pipe.tar", "lost.tar"):
        with pytest.raises(DataError, match=naming(tmp_path / name)):
            find_shards(tmp_path / name)
