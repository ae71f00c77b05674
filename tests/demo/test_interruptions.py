"""The demo interrupted: signals, a second process, a record that cannot be written; what a rerun finds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latent_verse.demo import results
from latent_verse.demo import run as demo
from latent_verse.demo.run import Stage, StagesFile
from latent_verse.files import InUse, NotWritten, only_writer
from tests.demo_stages import python, settings
from tests.messages import naming

STAND_IN = """
import os, pathlib, signal, sys, time
name, out = sys.argv[1], pathlib.Path(sys.argv[2])
def save(number, *_):
    (out / (name + ".saved")).write_text(str(number))
    if name == "stubborn":
        return
    if name == "last":  # it was just done
        (out / (name + ".done")).touch()
    sys.exit(0 if name == "last" else 143)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, save)
(out / (name + ".ready")).touch()
while name == "stubborn" or not (out / (name + ".saved")).exists():
    time.sleep(0.01)
(out / (name + ".done")).touch()
"""


def running(tmp_path: Path, names: list[str]) -> multiprocessing.Process:
    """A demo of stand-in stages, in a process of its own. It is forked, to start at once."""
    out, script = tmp_path / "out", tmp_path / "stand_in.py"
    script.write_text(STAND_IN)

    def work() -> None:
        for number, stream in ((1, "said"), (2, "errors")):
            os.dup2(os.open(tmp_path / stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        demo.plan = lambda s, o: [Stage(n, n, [str(script), n, str(out)], f"{n}.done") for n in names]
        results.write = lambda *_: out / "index.html"
        os._exit(demo.main(["--out", str(out)]))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def stopped(tmp_path: Path, names: list[str], at: str, *numbers: int) -> tuple[int, str]:
    """The exit code and stderr of such a demo that gets signals as soon as the stage `at` is at work."""
    process = running(tmp_path, names)
    for number, marker in zip(numbers, ("ready", "saved"), strict=False):
        end = time.monotonic() + 60
        while not (tmp_path / "out" / f"{at}.{marker}").exists():
            assert process.is_alive() and time.monotonic() < end
            time.sleep(0.01)
        os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode is not None, process.kill()
    return process.exitcode, (tmp_path / "errors").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_any_stage_ends_the_demo_and_a_rerun_resumes(tmp_path, number):
    names = ["first", "middle", "last"]
    for at in names:
        code, said = stopped(tmp_path, names, at, number)
        assert code == 128 + number and naming(number.name, at, "Rerun").search(said) and said.count("\n") == 1, said
        record = StagesFile(tmp_path / "out" / "stages.json")
        finished = [name for name in names if record.stages.get(name, {}).get("finished")]
        assert finished == (names if at == "last" else names[: names.index(at)])  # the last one had just ended
        assert not (tmp_path / "out" / ".lock").exists()
        assert (tmp_path / "out" / f"{at}.saved").read_text() == str(int(number))  # so that it names the right one
        assert ("Ctrl-C" in said) == (number == signal.SIGINT)
    process = running(tmp_path, names)
    process.join(60)
    assert process.exitcode == 0 and (tmp_path / "said").read_text().count("done before") == 3


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("group", "ends", "code", "text"),
    [(True, "130", -signal.SIGINT, ""), (True, "3", 2, "Error 3"), (False, "130", 2, "Error 130")],
)
def test_make_ends_without_an_error_of_its_own_at_ctrl_c(tmp_path, group, ends, code, text):
    """And with one at any other failure. Ctrl-C of a terminal reaches the group: make, its shell and the demo."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\n"
        f"signal.signal(signal.SIGINT, lambda *_: (time.sleep(0.3), print('saved', flush=True), os._exit({ends})))\n"
        "print(os.getpid(), sys.argv[1:], flush=True)\ntime.sleep(60)\n"
    )
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / ".installed").touch()
    command = ["make", "-f", str(demo.ROOT / "Makefile"), "-o", f"{tmp_path}/.installed", "demo", f"VENV={tmp_path}"]
    env = {name: value for name, value in os.environ.items() if "MAKE" not in name and name != "MFLAGS"}  # of make test
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=demo.ROOT, env=env, start_new_session=True, **pipes)
    try:
        pid, said = process.stdout.readline().split(" ", 1)
        assert said == "['-m', 'latent_verse.demo', '--world', 'small', '--out', 'demo']\n"
        if group:
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(int(pid), signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert said.startswith("saved\n") and process.returncode in (code, -signal.SIGINT)
    assert text in said and (said == "saved\n" or text)


def test_a_second_signal_kills_a_stage_that_does_not_end(tmp_path):
    code, said = stopped(tmp_path, ["stubborn"], "stubborn", signal.SIGINT, signal.SIGINT)
    assert code == 130 and said.count("\n") == 1, said


def test_a_demo_that_was_killed_leaves_its_stage_the_lock(tmp_path, stages):
    """Else a rerun would write beside it."""
    assert stopped(tmp_path, ["first"], "first", signal.SIGKILL)[0] == -signal.SIGKILL
    with pytest.raises(InUse, match=naming("out", tmp_path / "out")):
        demo.run(settings(tmp_path))
    (tmp_path / "out" / "first.saved").touch()  # lets it end
    end = time.monotonic() + 30
    while True:
        try:
            demo.run(settings(tmp_path))
            break
        except InUse:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_stage_ends_with_a_demo_whose_record_cannot_be_written(tmp_path, stages, monkeypatch):
    out = tmp_path / "out"
    stages.append(
        python("first", f"import os, time; open({str(out / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(90)")
    )
    waits = subprocess.Popen.wait

    def full(*_: object) -> None:
        if (out / "pid").exists() and (out / "pid").stat().st_size:
            raise NotWritten("stages.json cannot be written: No space left on device.")

    def short(self, timeout=None):
        return waits(self, timeout and 1)

    monkeypatch.setattr(subprocess.Popen, "wait", short)
    monkeypatch.setattr(demo, "write_json", full)
    with pytest.raises(NotWritten):
        demo.run(settings(tmp_path))
    with pytest.raises(ProcessLookupError):
        os.kill(int((out / "pid").read_text()), 0)


def test_two_demos_in_one_folder(tmp_path, stages):
    with only_writer(tmp_path / "out", "out"), pytest.raises(InUse, match=naming("out", tmp_path / "out")):
        demo.run(settings(tmp_path))
