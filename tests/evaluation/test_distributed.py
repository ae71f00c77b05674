"""Where the processes of an evaluation compute, and how they are started."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from latent_verse.config import ConfigError, program
from latent_verse.config.evaluate import EvalWriteConfig
from latent_verse.config.program import LOST
from latent_verse.evaluation.distributed import device, launch, processes, watch
from latent_verse.metrics.processes import Ranks
from tests.messages import naming

ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine one with so many CUDA GPUs, and with mps or without."""

    def make(gpus: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return make


def test_the_device_is_cuda_or_mps_or_the_cpu(machine, monkeypatch):
    machine(gpus=2)
    assert [device(2, rank=rank) for rank in (0, 1)] == ["cuda:0", "cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "0")  # by torchrun: the rank among all machines does not count
    assert device(2, rank=5) == "cuda:0"
    machine(mps=True)
    assert device(1) == "mps"
    assert device(0) == device(1, "cpu") == "cpu"
    machine()
    assert device(1) == "cpu"


def test_processes_are_those_that_the_machine_has_gpus_for(machine, capsys):
    machine(gpus=2)
    assert processes(EvalWriteConfig(gpus=2)) == 2
    with pytest.raises(ConfigError, match=naming("gpus", 3, 2)):
        processes(EvalWriteConfig(gpus=3))
    machine(mps=True)
    assert processes(EvalWriteConfig(gpus=1)) == 1 and "CPU" not in capsys.readouterr().out
    machine()
    assert processes(EvalWriteConfig(gpus=1)) == 1 and "CPU" in capsys.readouterr().out
    assert processes(EvalWriteConfig(gpus=3, accelerator="cpu")) == 3


def test_processes_that_torchrun_has_started_are_joined(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    seen = []
    work = lambda ranks, extra: seen.append((ranks, extra, torch.distributed.is_initialized())) or 2  # noqa: E731
    assert launch(work, 4, "x") == 2
    assert seen == [(Ranks(0, 1), "x", True)] and not torch.distributed.is_initialized()


# ------------------------------------------------------------------------------------------- when a process fails


def work(ranks: Ranks, how: str, place: str) -> int:
    """Joins the others; then the last process does what `how` says, while the first one waits for it."""
    atexit.register(os.abort)  # as gloo's threads do while Python ends, now and then
    ranks.gather({ranks.rank: None})
    try:
        if ranks.rank == ranks.world - 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "mistake":
                raise ConfigError("look at the settings")
            if how == "ours":
                raise ZeroDivisionError("ours")
        if how == "all":
            program.GRACE = 0  # as if this one were slow to end
            raise ConfigError("look at the settings")
        if how == "told":
            Path(place, f"ready{ranks.rank}").touch()
            time.sleep(100)
        ranks.gather({ranks.rank: None})
    except BaseException:
        Path(place, f"wrote{ranks.rank}").touch()  # as worker.run writes what is done
        raise
    return 0


class Ending:
    """A process that ends a moment after its sentinel says so: only the second question finds an exit code."""

    def __init__(self, code: int):
        self.sentinel, ours = os.pipe()
        os.close(ours)
        self.answers = [None, code]

    @property
    def exitcode(self) -> int | None:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def join(self, timeout: float) -> None:
        os.close(self.sentinel)


@pytest.mark.parametrize(("codes", "code"), [((LOST, -9), 1), ((0, 2), 2), ((0, 0), 0)])
def test_no_process_ends_unnoticed(codes, code):
    assert watch([Ending(c) for c in codes]) == code


LAUNCH = """
import sys
from latent_verse.config.program import one_line_errors
from latent_verse.evaluation.distributed import launch
from tests.evaluation.test_distributed import work

if __name__ == "__main__":
    sys.exit(one_line_errors(lambda: launch(work, 2, *sys.argv[1:]))())
"""


def started(how: str, tmp_path: Path) -> subprocess.Popen:
    (tmp_path / "launch.py").write_text(LAUNCH)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "launch.py"), how, str(tmp_path)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "facts"),
    [
        ("fine", 0, ()),
        ("killed", 1, ("process 1 of 2", "SIGKILL")),
        ("mistake", 2, ("look at the settings",)),
        ("all", 2, ("look at the settings",)),
        ("ours", 1, ("ZeroDivisionError", "ours", "report")),
    ],
)
def test_one_line_says_why_all_processes_end(tmp_path, how, code, facts):
    process = started(how, tmp_path)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == code, said
    assert said.count("error: ") == bool(facts) and naming(*facts).search(said)
    assert ("Traceback" in said) == (how == "ours")
    assert (tmp_path / "wrote0").exists() == bool(facts)  # the first one keeps what it has


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_ends_all_processes_and_the_first_one_writes(tmp_path, number):
    process, end = started("told", tmp_path), time.monotonic() + 100
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and said.count("\n") == 1, said
    assert (tmp_path / "wrote0").exists()
