"""Several training processes on one machine: if one of them ends early, all do, and one line says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher, subprocess_script
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector

from latent_verse.config.train import TrainerConfig
from latent_verse.training.launcher import PATIENCE, Launcher
from latent_verse.training.trainer import choose_strategy
from tests.image_runs import SMALL, write_pictures
from tests.messages import naming

REPO = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_lightning_has_what_the_launcher_replaces():
    assert callable(_SubprocessScriptLauncher._call_children_scripts)
    assert callable(subprocess_script._launch_process_observer)  # the watch that kills all at once, and says nothing
    assert callable(_SignalConnector._sigterm_notifier_fn)


@pytest.mark.parametrize("kind", ["auto", "fsdp"])
def test_runs_of_several_processes_have_it(kind):
    strategy = choose_strategy(TrainerConfig(strategy=kind, gpus=2, accelerator="cpu"), "cpu", 2)
    assert strategy._timeout == PATIENCE
    strategy.cluster_environment = type("Here", (), {"creates_processes_externally": False})()
    strategy.parallel_devices = [0, 1]
    strategy._configure_launcher()
    assert type(strategy._launcher) is Launcher


def others(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def two_at_work(tmp_path: Path, *flags: object, script: Path = REPO / "train_vae.py", command: Sequence = ()):
    """A run of two processes that has trained for a step; its first process, and the pids of the second and of all."""
    data = ["--train_dir", write_pictures(tmp_path / "train", 8), "--log_dir", tmp_path / "runs", "--name", "a"]
    processes = ["--epochs", 1000, "--accelerator", "cpu", "--gpus", 2, "--batch_size", 2, "--num_workers", 1]
    process = subprocess.Popen(
        [*map(str, (*(command or [sys.executable]), script, *SMALL, *data, *processes, *flags))],
        cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 240
    while not list((tmp_path / "runs" / "a").glob("logs*/metrics.csv")):
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.1)
    started = others(process.pid)
    is_rank = lambda pid: script.name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes() and others(pid)  # noqa: E731
    ranks = [pid for pid in started if is_rank(pid)]  # without the first one, but under torchrun
    return process, ranks[-1], started + [pid for rank in ranks for pid in others(rank)]


def all_end(started: list[int]) -> None:
    end = time.monotonic() + 30
    while any(map(runs, started)):
        assert time.monotonic() < end, "a process runs on"
        time.sleep(0.1)


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "number", "code", "facts"),
    [
        (1, signal.SIGKILL, 1, ("process 1 of 2", "SIGKILL")),
        (0, signal.SIGKILL, -signal.SIGKILL, ()),
        (0, signal.SIGTERM, 143, ("SIGTERM", "saved", "rerun")),
        (0, signal.SIGINT, 130, ("SIGINT", "saved", "rerun")),
        (1, signal.SIGTERM, 143, ("saved", "rerun")),
    ],
)
def test_all_processes_end_when_one_does(tmp_path, rank, number, code, facts):
    process, second, started = two_at_work(tmp_path, "--backup")
    os.kill([process.pid, second][rank], number)
    said = process.communicate(timeout=90)[0]
    assert process.returncode == code, said
    assert naming(*facts).search(said) and said.count("error: ") == bool(facts) and "Traceback" not in said, said
    all_end(started)


@linux
@pytest.mark.slow
def test_a_killed_process_of_a_sharded_run(tmp_path):
    process, second, started = two_at_work(tmp_path, "--strategy", "fsdp")
    os.kill(second, signal.SIGKILL)
    said = process.communicate(timeout=90)[0]
    assert process.returncode == 1 and naming("process 1 of 2", "SIGKILL").search(said), said
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    all_end(started)


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_signal_while_two_processes_validate(tmp_path, rank, number):
    """Most of the run's time is validation."""
    process, second, started = two_at_work(tmp_path, "--backup", "--val_dir", write_pictures(tmp_path / "val", 800))
    os.kill([process.pid, second][rank], number)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number, said
    assert naming("rerun", "step").search(said) and said.count("error: ") == 1 and "Traceback" not in said, said
    all_end(started)


@linux
@pytest.mark.slow
def test_a_killed_process_under_torchrun(tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    process, second, started = two_at_work(tmp_path, command=run)
    os.kill(second, signal.SIGKILL)
    said = process.communicate(timeout=90)[0]
    ours = said.split("exitcode: -9")[0]  # then torchrun's own traceback follows
    assert process.returncode == 1 and ours != said, said
    assert ours.count("error: ") <= 1 and "Traceback" not in ours, said  # one, if torchrun leaves the time
    all_end(started)


@linux
@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_although_one_does_not_answer(tmp_path):
    process, second, started = two_at_work(tmp_path)
    os.kill(second, signal.SIGSTOP)
    for _ in range(2):
        time.sleep(1)  # else the two would be one
        process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and naming("second Ctrl-C (SIGINT)").search(said), said
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    all_end(started)


IMPATIENT = """
import datetime, sys
from latent_verse.commands.train_vae import main
from latent_verse.training import trainer
trainer.PATIENCE = datetime.timedelta(seconds=30)  # they start within it
sys.exit(main())
"""


@linux
@pytest.mark.slow
def test_a_process_that_does_not_answer_is_waited_for_only_so_long(tmp_path):
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT)
    process, second, started = two_at_work(tmp_path, script=script)
    os.kill(second, signal.SIGSTOP)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and naming("another process").search(said), said
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    all_end(started)
