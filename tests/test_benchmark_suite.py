"""The benchmark suite's runner, on artificial areas: a case that fails, is killed or hangs costs its own row only.

Nothing here depends on how long something took, but for the limits that a case which hangs runs into.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import run
from benchmarks.measure import row
from tests.messages import naming

INF = float("inf")
AREAS = '''
import os, pathlib, signal, subprocess, sys, time

import torch

from benchmarks.measure import Case, row

FOLDER = pathlib.Path(__file__).parent


def raises():
    raise LookupError("no such thing")


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def hangs():
    """With a process of its own."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (FOLDER / "unfinished").write_text(f"{os.getpid()} {other.pid}")
    (FOLDER / "unfinished").rename(FOLDER / "pids")
    time.sleep(600)


def takes_all_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")


def case(area, name, trouble=None, early=False, **settings):
    def run():
        if trouble and early:
            trouble()
        result = row(area, name, {"seconds": 2.0, "bytes": None}, [])
        yield result
        if trouble:
            trouble()
        result["figures"]["all"] = 1
        yield result

    return Case(name, run, **settings)
'''
TROUBLED = """
from artificial import *

def cases(device, size):
    return [
        case("troubled", "1"),
        case("troubled", "raises", raises),
        case("troubled", "2"),
        case("troubled", "is killed", is_killed),
        case("troubled", "hangs", hangs, seconds=2),
        case("troubled", "takes all memory", takes_all_memory, early=True),
        case("troubled", "3"),
    ]
"""
CALM = """
from artificial import *

def cases(device, size):
    return [case("calm", "4"), case("calm", f"compiles {size}", raises, compiles=True)]
"""
GPU_TESTS = """
from artificial import *

def cases(device, size):
    return [case("gpu_tests", "a file")]
"""
HANGING = """
from artificial import *

def cases(device, size):
    return [case("hanging", "1"), case("hanging", "2"), case("hanging", "hangs", hangs), case("hanging", "3")]
"""


@pytest.fixture
def areas(tmp_path, monkeypatch) -> Path:
    """The folder of the package of artificial areas, which `run` and its children take the place of benchmarks'."""
    folder = tmp_path / "artificial"
    folder.mkdir()
    for name, text in {"__init__": AREAS, "troubled": TROUBLED, "calm": CALM, "hanging": HANGING}.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "gpu_tests.py").write_text(GPU_TESTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(run, "PACKAGE", "artificial")
    monkeypatch.setattr(run, "AREAS", {"troubled": 60.0, "calm": 60.0})
    return folder


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(folder: Path) -> bool:
    """Whether the case that hangs and the process that it has started end within ten seconds."""
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    for _ in range(100):
        if not any(map(alive, pids)):
            return True
        time.sleep(0.1)
    return False


def test_a_case_that_raises_is_killed_hangs_or_takes_all_memory_costs_its_own_row(areas, tmp_path, capfd):
    file = tmp_path / "results" / "r.json"
    assert run.main(["--json", str(file)]) == 1
    rows = {r["case"]: r for r in json.loads(file.read_text())["rows"]}
    failed = {name: r["failed"] for name, r in rows.items() if r.get("failed")}
    assert failed.keys() == {"raises", "is killed", "hangs", "takes all memory", "compiles cpu"}
    assert naming("LookupError", "no such thing").search(failed["raises"])
    assert "SIGKILL" in failed["is killed"]
    assert naming("stopped", "2 s").search(failed["hangs"])
    assert naming("OutOfMemoryError", "20 GiB").search(failed["takes all memory"])
    assert all(rows[name]["figures"] == {"all": 1} for name in ("1", "2", "3", "4"))
    for name in ("raises", "is killed", "hangs"):  # ours had been measured
        assert rows[name]["ours"]["seconds"] == 2.0
    assert not rows["takes all memory"]["ours"]
    assert gone(areas)
    said = capfd.readouterr().out
    for name, cause in failed.items():
        assert f"FAILED: {cause}" in said and naming("WRONG", name, cause).search(said)


def test_rows_outlive_a_suite_that_is_killed_and_its_processes_do_not(areas, tmp_path):
    file = tmp_path / "r.json"
    program = "import sys; from benchmarks import run; run.PACKAGE = 'artificial'; run.AREAS = {'hanging': 60.0}; "
    command = [sys.executable, "-c", program + "run.main(['--json', sys.argv[1]])", str(file)]
    with subprocess.Popen(command, cwd=run.ROOT, stdout=subprocess.DEVNULL) as suite:
        for _ in range(600):
            time.sleep(0.1)
            rows = json.loads(file.read_text())["rows"] if file.exists() else []  # whole at any moment
            if len(rows) == 3 and (areas / "pids").exists():
                break
        suite.send_signal(signal.SIGKILL)
    rows = json.loads(file.read_text())["rows"]
    assert [r["case"] for r in rows] == ["1", "2", "hangs"] and rows[2]["ours"]
    assert gone(areas)


def test_a_warm_up_checks_at_toy_size_and_measures_ours_of_what_is_compiled(areas, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(run, "AREAS", {"troubled": 60.0, "calm": 60.0})
    monkeypatch.setattr(run, "COMPILED", ("calm",))
    file = tmp_path / "r.json"
    assert run.main(["calm", "--warm-up", "--json", str(file)]) == 1
    rows = {r["case"]: r for r in json.loads(file.read_text())["rows"]}
    assert rows.keys() == {"a file", "4", "compiles toy", "compiles cpu"}
    assert rows["a file"]["area"] == "gpu_tests" and rows["4"]["figures"] == {"all": 1}
    assert rows["compiles toy"]["failed"]  # after ours
    assert rows["compiles cpu"]["ours"] and not rows["compiles cpu"].get("failed")


def test_the_compilers_caches_are_where_the_next_run_finds_them(areas, monkeypatch, capfd):
    monkeypatch.setattr(run, "AREAS", {"calm": 60.0})
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    says = "\nfor name in ('TORCHINDUCTOR', 'TRITON'): print(name, os.environ[name + '_CACHE_DIR'], file=sys.stderr)\n"
    (areas / "calm.py").write_text(CALM + says)
    run.main([])
    said = capfd.readouterr().err
    assert naming("TORCHINDUCTOR", "latent_verse_benchmarks").search(said)
    assert "TRITON /elsewhere\n" in said


@pytest.fixture
def scripted(monkeypatch):
    """Makes `in_children` see these messages, child by child, and a clock that a number among them sets."""

    def script(*children: list, code: int = 0):
        clock, waiting = [0.0], list(children)

        def messages(child, file):
            for message in waiting.pop(0):
                if isinstance(message, float):
                    clock[0] = message
                else:
                    yield message

        monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: clock[0]))
        monkeypatch.setattr(run, "_start", lambda *arguments: SimpleNamespace(returncode=code))
        monkeypatch.setattr(run, "_kill", lambda child: None)
        monkeypatch.setattr(run, "_messages", messages)

    return script


def names(*limits: float) -> dict:
    return {"cases": [[str(i), limit] for i, limit in enumerate(limits)]}


def test_an_area_ends_when_its_time_is_over_and_the_table_says_what_is_left_out(scripted):
    one = row("endless", "0", {"seconds": 1.0}, [])
    scripted([names(INF, INF, INF, INF), {"begin": 0}, {"row": one}, 9.0, {"begin": 1}, None, 11.0, None])
    rows = list(run.in_children("endless", "cuda", "toy", 10))
    assert rows[0] == one and rows[1]["case"] == "1" and "stopped" in rows[1]["failed"] and len(rows) == 3
    assert naming("2", "left out", "10 s").search("\n".join(run.table(rows[2]))) and not rows[2].get("failed")


def test_a_case_has_its_own_limit_and_a_process_a_limit_for_starting(scripted):
    scripted(
        [names(5, 5), {"begin": 0}, 4.0, None, 6.0, None],
        [6.0 + run.STARTING, None, 7.0 + run.STARTING, None],
    )
    rows = list(run.in_children("slow", "cuda", "toy", 1000))
    assert [r["case"] for r in rows] == ["0", "1"] and all("stopped" in r["failed"] for r in rows)


def test_an_area_that_cannot_be_read_is_one_failed_row(scripted):
    scripted([], code=1)
    (only,) = run.in_children("nothing", "cpu", "toy", INF)
    assert "nothing" in only["case"] and naming("exit code", "1").search(only["failed"])


def test_nothing_starts_when_the_time_is_over(scripted):
    scripted()
    (only,) = run.in_children("late", "cuda", "toy", 0)
    assert "left out" in only["case"] and not only.get("failed")
