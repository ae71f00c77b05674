"""Speed, the norm of gradients and the time left, as they are logged and shown."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from latent_verse.augvae.model import AugVAE
from latent_verse.config.train import TrainVAEConfig
from latent_verse.training import pace
from latent_verse.training.augvae import LitAugVAE
from latent_verse.training.optimizer import make_optimizer
from latent_verse.training.pace import Pace, Place, gradient_norm, place
from tests.training.tiny_runs import TOKENS, run


def logged(folder: Path, name: str) -> dict[int, float]:
    with open(folder / "logs" / "metrics.csv") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def trainer(**known) -> SimpleNamespace:
    known = {"num_training_batches": 10, "accumulate_grad_batches": 1, "max_epochs": 3, "max_steps": -1} | known
    return SimpleNamespace(current_epoch=0, global_step=0, **known)


@pytest.mark.parametrize(("known", "batches", "found"), [
    ({}, 0, Place(1, 3, 0, 10, 0, 30)),
    ({"current_epoch": 2, "global_step": 24}, 4, Place(3, 3, 4, 10, 24, 30)),
    ({"current_epoch": 1, "global_step": 999}, 10, Place(2, 3, 10, 10, 999, 1009)),  # other data before it resumed
    ({"max_steps": 14}, 0, Place(1, 2, 0, 10, 0, 14)),
    ({"max_steps": 14, "current_epoch": 1, "global_step": 12}, 2, Place(2, 2, 2, 4, 12, 14)),
    ({"max_steps": 14, "current_epoch": 1, "global_step": 14}, 4, Place(2, 2, 4, 4, 14, 14)),
    ({"max_steps": 100}, 0, Place(1, 3, 0, 10, 0, 30)),
    ({"accumulate_grad_batches": 4}, 10, Place(1, 3, 3, 3, 0, 6)),
])  # fmt: skip
def test_where_a_run_is_follows_from_what_is_left(known, batches, found):
    now = trainer()
    vars(now).update(known)
    assert place(now, batches) == found


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass between two looks at it: one after the other, then ever 1."""
    times = []

    def look() -> float:
        times.append((times[-1] if times else 100.0) + (clock.pop(0) if clock else 1.0))
        return times[-1]

    clock: list[float] = []
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=look))
    return clock


def test_tokens_per_second_are_tokens_over_the_time_of_steps(tmp_path, clock):
    """Of the steps since they were last logged, without what lies between epochs; the clock is read at their ends."""
    clock += [0, 2, 5, 1, 1, 1000, 3, 3, 4, 4]  # a start, four steps, a break, four steps
    run(tmp_path / "run", 4, epochs=2, log_every_n_steps=2)
    steps = [2 * TOKENS / seconds for seconds in (7, 2, 6, 8)]
    assert list(logged(tmp_path / "run", "train/tokens_per_second").items()) == [
        (step, pytest.approx(rate)) for step, rate in zip((1, 3, 5, 7), steps, strict=True)
    ]


def test_batches_of_one_step_are_counted_together(tmp_path, clock):
    clock += [0, 4, 2]
    run(tmp_path / "run", 5, epochs=1, log_every_n_steps=1, accumulate_grad_batches=3)
    found = logged(tmp_path / "run", "train/tokens_per_second")
    assert list(found.values()) == [pytest.approx(3 * TOKENS / 4), pytest.approx(2 * TOKENS / 2)]


def test_time_left_is_that_of_recent_steps_and_of_breaks(clock):
    clock += [0, 50, 50, 3, 5, 20, 4, 4]
    measured, module = Pace(), SimpleNamespace(amount=lambda batch: 8, unit="images", log=lambda *_: None)
    now = trainer(num_training_batches=4, log_every_n_steps=10, world_size=2, is_global_zero=False)
    assert measured.left(place(now, 0)) is None
    for batch_idx in range(4):
        now.is_last_batch, now.global_step = batch_idx == 3, batch_idx + 1
        measured.on_train_batch_start(now, module, None, batch_idx)
        measured.on_train_batch_end(now, module, None, None, batch_idx)
    assert measured.left(place(now, 4)) == 8 * 4  # the first two steps do not count, nor breaks before one was seen
    assert measured.per_second == 16 / 4
    now.current_epoch, now.is_last_batch = 1, False
    measured.on_train_batch_start(now, module, None, 0)
    now.global_step = 5
    measured.on_train_batch_end(now, module, None, None, 0)
    assert measured.left(place(now, 1)) == 7 * 4 + 2 * 20
    assert measured.left(place(now, 1), ended=True) == 7 * 4 + 20


# --------------------------------------------------------------------------------------------------- norms of gradients


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_norm_is_that_of_all_gradients_as_clipping_sees_it(tiny_config, optimizer):
    model = AugVAE(tiny_config())
    torch.manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    next(model.parameters()).grad = None  # as of a weight that is not used
    norm = gradient_norm(make_optimizer(model, optimizer, 1e-3, 1e-3, 0.1))
    assert norm.shape == ()
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    expected = math.sqrt(sum(p.numel() for p in model.parameters() if p.grad is not None))
    assert norm == pytest.approx(expected, rel=0.1)


def test_norms_are_logged_before_clipping_at_the_steps_that_are_logged(tmp_path):
    for clip in (None, 1e-3):
        run(tmp_path / str(clip), 4, epochs=1, log_every_n_steps=2, gradient_clip_val=clip)
    free, clipped = (logged(tmp_path / str(clip), "train/grad_norm") for clip in (None, 1e-3))
    assert list(free) == list(clipped) == [1, 3] and min(*free.values(), *clipped.values()) > 0.01


def test_measuring_changes_no_step(tmp_path, monkeypatch):
    run(tmp_path / "with", 4, epochs=2)
    monkeypatch.setattr(Pace, "on_before_optimizer_step", lambda *_: None)
    run(tmp_path / "without", 4, epochs=2)
    losses = [logged(tmp_path / name, "val/total_loss") for name in ("with", "without")]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_both_stages_say_what_they_count(tiny_config):
    module = LitAugVAE(AugVAE(tiny_config()), TrainVAEConfig(model=tiny_config()))
    assert module.unit == "images" and module.amount([torch.zeros(5, 3, 16, 16), torch.zeros(5)]) == 5
