"""What a run shows on a terminal and prints elsewhere, through the Trainer of the programs."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl

from latent_verse.training import pace, progress_bar
from latent_verse.training.backups import Interrupted
from latent_verse.training.progress_bar import ProgressBar
from tests.image_runs import SMALL, write_pictures
from tests.messages import naming
from tests.terminals import Terminal, on_a_terminal, screens
from tests.training.tiny_runs import TOKENS, Batches, run

REPO = Path(__file__).parents[2]


class Speaks(pl.Callback):
    """Prints in the middle of an epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            print("said at step 3")
            print("warned at step 3", file=sys.stderr)


@pytest.fixture
def always(monkeypatch):
    """The bar is drawn, or a line printed, after every step."""
    monkeypatch.setattr(ProgressBar, "EVERY", 0.0)
    monkeypatch.setattr(progress_bar, "LINE_EVERY", 0.0)


@pytest.fixture
def second_a_step(monkeypatch):
    """A clock by which each step takes a second, and what lies between epochs another one."""
    now = iter(range(10**6))
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: float(next(now))))


@pytest.mark.parametrize("columns", [100, 80])
def test_a_terminal_shows_one_bar_and_a_line_for_each_epoch(columns, tmp_path, monkeypatch, always, second_a_step):
    with on_a_terminal(monkeypatch, columns) as written:
        run(tmp_path / "run", 4, epochs=3, more=[Speaks()])
    assert "v_num" not in written[0]
    found = list(screens(written[0], columns))
    bars = [lines[-1] for lines in found]
    assert any(re.fullmatch(r"Epoch 2/3 █+░+ 2/4, run ends in 8 s, loss \S+, 1.00 steps/s.*", bar) for bar in bars)
    assert any(re.fullmatch(r"Epoch 2/3, validation █+░+ 1/2", bar) for bar in bars)
    assert all("█" not in line and "░" not in line for lines in found for line in lines[:-1])
    said = found[-1]
    assert said[-1] == ""  # the bar is gone
    epochs = [line for line in said if line.startswith("Epoch")]
    for number, line in enumerate(epochs, start=1):
        assert re.match(rf"Epoch {number}/3, step {4 * number}/12: train loss [\d.]+, val loss [\d.]+, ", line)
    assert len(epochs) == 3 and "run ends in 5 s" in epochs[1] and "ends" not in epochs[2]
    assert said.index("said at step 3") < said.index("warned at step 3") < said.index(epochs[0])


def test_loader_processes_are_forked_when_messages_already_appear_above(tmp_path, monkeypatch):
    """They say which images they skip."""
    seen, forking = [], Batches.__iter__
    monkeypatch.setattr(Batches, "__iter__", lambda loader: (seen.append(sys.stdout), forking(loader))[1])
    with on_a_terminal(monkeypatch, 80):
        own = sys.stdout
        run(tmp_path / "run", 2, epochs=2)
        assert sys.stdout is own
    assert len(seen) == 2 and own not in seen


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_is_answered_above_the_bar(tmp_path):
    """By a program of its own, with what Lightning logs to the stream that was there when it was imported."""
    terminal = Terminal(80)
    flags = [*SMALL, "--train_dir", write_pictures(tmp_path / "train", 12), "--log_dir", tmp_path, "--name", "run"]
    flags += ["--epochs", 10_000, "--backup", "--refresh_rate", 1]
    at = {"stdin": terminal.end, "stdout": terminal.end, "stderr": terminal.end, "cwd": REPO}
    process = subprocess.Popen([sys.executable, "train_vae.py", *map(str, flags)], **at)
    try:
        deadline = time.monotonic() + 300
        while "Epoch 2/" not in terminal.written and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
    finally:
        process.kill()
        process.wait()
    *_, said = screens(terminal.close(), 80, wraps=True)
    assert "Ctrl-C (SIGINT): saving after this step (Ctrl-C again stops at once)" in said
    assert not any("█" in line or "░" in line for line in said) and said[-1] == ""
    assert naming("error", "SIGINT", "resume").search(" ".join(said[-5:]))


def test_elsewhere_there_are_plain_lines_at_times_and_at_the_end_of_epochs(tmp_path, capsys, always, second_a_step):
    run(tmp_path / "often", 3, epochs=2)
    said = capsys.readouterr()
    assert "\r" not in said.out + said.err and "\x1b" not in said.out + said.err
    lines = [line for line in said.out.splitlines() if line.startswith("Epoch")]
    places = [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]  # the last step of an epoch has one line, not two
    assert [line.partition(":")[0] for line in lines] == [f"Epoch {e}/2, step {s}/6" for e, s in places]
    assert ["val loss" in line for line in lines] == [step in (3, 6) for _, step in places]
    assert lines[3].endswith(f"run ends in 3 s, 1.00 steps/s, {TOKENS}.0 tokens/s")


def test_lines_are_half_a_minute_apart(tmp_path, capsys, second_a_step):
    run(tmp_path / "run", 3, epochs=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]
    assert [line.partition(":")[0] for line in lines] == ["Epoch 1/2, step 3/6", "Epoch 2/2, step 6/6"]


def test_refresh_rate_0_is_silent(tmp_path, capsys, always):
    run(tmp_path / "run", 3, epochs=2, refresh_rate=0)
    said = capsys.readouterr()
    assert said.out.splitlines() == ["Steps:         3 an epoch, 2 epochs, 6 in all"] and "Epoch" not in said.err


def test_a_resumed_run_shows_where_it_is(tmp_path, monkeypatch, capsys, always, second_a_step):
    place = tmp_path / "run"
    with pytest.raises(Interrupted):
        run(place, 5, stop_at=7, epochs=2)
    capsys.readouterr()
    with on_a_terminal(monkeypatch, 100) as written:
        run(place, 5, place / "backups" / "step=7.ckpt", epochs=2)
    found = list(screens(written[0], 100))
    bars = [lines[-1] for lines in found if "█" in lines[-1] and "validation" not in lines[-1]]
    assert [re.search(r"\d/5", bar)[0] for bar in dict.fromkeys(bars)] == ["2/5", "3/5", "4/5", "5/5"]
    assert all(bar.startswith("Epoch 2/2") for bar in bars)
    assert "Steps:         5 an epoch, 2 epochs, 10 in all, 7 of them done" in found[-1]
    assert [line.partition(":")[0] for line in found[-1] if line.startswith("Epoch")] == ["Epoch 2/2, step 10/10"]


@pytest.mark.parametrize(("settings", "places", "length"), [
    ({"max_steps": 5, "epochs": 9}, ["1/2, step 3/5", "2/2, step 5/5"], "3 an epoch, 2 epochs, 5 in all"),
    ({"accumulate_grad_batches": 2, "epochs": 2}, ["1/2, step 2/4", "2/2, step 4/4"], "2 an epoch, 2 epochs, 4 in all"),
    ({"limit_train_batches": 2, "epochs": 1}, ["1/1, step 2/2"], "2 an epoch, 1 epoch, 2 in all"),
    ({"max_steps": 2}, ["1/1, step 2/2"], "2 of the 3 of an epoch"),
])  # fmt: skip
def test_what_limits_a_run_is_counted(settings, places, length, tmp_path, capsys):
    run(tmp_path / "run", 3, **settings)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines if line.startswith("Epoch")] == [f"Epoch {at}" for at in places]
    assert f"Steps:         {length}" in lines


def test_once_enough_steps_are_timed_a_run_says_what_it_will_take(tmp_path, capsys, second_a_step):
    """Ten steps, after two that do not count; here in the first epoch, before any validation."""
    run(tmp_path / "one", 20, epochs=3)
    run(tmp_path / "two", 8, epochs=3, val=0)
    about = [line for line in capsys.readouterr().out.splitlines() if line.startswith("About")]
    assert about == [
        "About 20 s an epoch, 48 s to the end of the run (1 s a step; validation comes on top)",
        "About 8 s an epoch, 14 s to the end of the run (1 s a step)",
    ]


@pytest.mark.parametrize(("refresh_rate", "steps", "updated"), [
    (1, 10, [1, 5, 9, 10]), (1, 8, [1, 5, 8]), (3, 10, [3, 9, 10]),
])  # fmt: skip
def test_the_bar_reads_losses_five_times_a_second_and_at_either_end(monkeypatch, refresh_rate, steps, updated):
    """Reading one waits for the device."""
    seen, clock = [], [0.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(ProgressBar, "_draw", lambda bar, *_: seen.append(bar._place.epoch_step))
    bar = ProgressBar(refresh_rate)
    bar.has_bar = True
    limits = {"accumulate_grad_batches": 1, "current_epoch": 0, "max_epochs": 1}
    for batch_idx in range(steps):
        now = {"is_last_batch": batch_idx == 9, "global_step": batch_idx + 1, "max_steps": -1 if steps == 10 else steps}
        bar.on_train_batch_end(SimpleNamespace(num_training_batches=10, **limits, **now), None, None, None, batch_idx)
        clock[0] += 0.0501
    assert seen == updated


def test_without_a_bar_no_loss_is_read_but_for_a_line(monkeypatch):
    bar = ProgressBar(1)
    bar.has_bar = False
    monkeypatch.setattr(ProgressBar, "_losses", None)  # would fail
    limits = {"accumulate_grad_batches": 1, "current_epoch": 0, "max_epochs": 1, "max_steps": -1}
    now = SimpleNamespace(num_training_batches=10, is_last_batch=False, global_step=1, **limits)
    bar.on_train_start(now, None)
    bar.on_train_batch_start(now, None, None, 0)
    bar.on_train_batch_end(now, None, None, None, 0)


@pytest.mark.parametrize(("out", "err"), [(True, True), (False, True), (True, False), (False, False)])
def test_the_bar_is_for_terminals(monkeypatch, out, err):
    monkeypatch.setattr("sys.stdout.isatty", lambda: out)
    monkeypatch.setattr("sys.stderr.isatty", lambda: err)
    assert ProgressBar(1).has_bar == (out and err)


def test_a_log_that_cannot_be_written_ends_no_training(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stdout", Full())
    assert run(tmp_path / "run", 2, epochs=1).global_step == 2
