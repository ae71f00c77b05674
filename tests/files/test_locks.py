"""A folder has one writer at a time, and a process that ends, however it ends, leaves no lock."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from latent_verse.files import (
    InUse,
    locks,
    only_writer,
    write_text,
)
from tests.messages import naming
from tests.waiting_processes import CHILD, kill, start


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    other = start(tmp_path, "with files.only_writer(folder / 'run', 'log_dir'):\n    wait()")
    try:
        told = pytest.raises(InUse, match=naming("log_dir", tmp_path / "run", other.pid, os.uname().nodename))
        with told as caught, only_writer(tmp_path / "run", "log_dir"):
            raise AssertionError
        assert "\n" not in str(caught.value)
    finally:
        kill(other)
    run = tmp_path / "run"  # a killed process leaves no lock
    with only_writer(run, "log_dir"), pytest.raises(InUse), only_writer(run, "log_dir"):
        raise AssertionError
    with only_writer(run, "log_dir"):
        pass


def test_a_forked_process_does_not_hold_the_lock(tmp_path):
    """A data loader's lives on for seconds after its parent was killed; the rerun must not be refused."""
    lines = """
with files.only_writer(folder / "run", "log_dir"):
    if os.fork() == 0:
        print("forked", flush=True)
        time.sleep(20)
        os._exit(0)
    print(os.getpid(), flush=True)
    wait()
"""
    process = subprocess.Popen([sys.executable, "-c", CHILD + lines, tmp_path], stdout=subprocess.PIPE, text=True)
    assert "forked\n" in [process.stdout.readline() for _ in range(3)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    with only_writer(tmp_path / "run", "log_dir"):
        pass
    process.stdout.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    told = pytest.warns(UserWarning, match=naming("log_dir", tmp_path / "run", "locks"))
    with told, only_writer(tmp_path / "run", "log_dir"):
        write_text(tmp_path / "run" / "a", "")
    assert os.listdir(tmp_path / "run") == ["a"]
