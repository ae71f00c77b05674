"""Where the processes of an evaluation compute, and how they are started."""

from __future__ import annotations

import socket

import pytest
import torch

from latent_verse.config import ConfigError
from latent_verse.config.evaluate import EvalWriteConfig
from latent_verse.evaluation.distributed import device, launch, processes
from latent_verse.metrics.processes import Ranks
from tests.messages import naming


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
