"""Best, last and backups: whole files, in a folder that may move; a disk that is full."""

from __future__ import annotations

import csv
import errno
import math
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.distributed.fsdp import fully_shard

from latent_verse.checkpoints.ckpt_files import MONITOR, read_ckpt, score_of
from latent_verse.config.train import TrainerConfig, TrainVAEConfig
from latent_verse.files import FileError, InUse, NotWritten, only_writer
from latent_verse.training import backups, runs
from latent_verse.training.backups import Interrupted, RunFolder
from latent_verse.training.divergence import Diverged
from latent_verse.training.runs import Run
from latent_verse.training.trainer import make_trainer
from tests.messages import naming
from tests.two_processes import WORLD, in_two_processes

STEPS = 4  # of an epoch


class Tiny(pl.LightningModule):
    """Validation gives these losses, one after each epoch."""

    unit = "images"

    def __init__(self, losses: list[float]):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.losses = torch.nn.Linear(2, 1), losses

    def configure_model(self):
        if self.device_mesh is not None:
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

    def amount(self, batch):
        return len(batch)

    def validation_step(self, batch, batch_idx):
        if self.losses:
            self.log(MONITOR, self.losses[self.current_epoch], batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint.setdefault("latent_verse", {}).update(kind="augvae")


def fit(folder: Path, losses: list[float], epochs: int | None = None, backup_steps: int = 2, **settings) -> pl.Trainer:
    """Train to the end, from the newest checkpoint of the folder on if there is one."""
    settings = {"gpus": 1, "accelerator": "cpu"} | settings
    epochs = len(losses) if epochs is None else epochs
    t = TrainerConfig(epochs=epochs, logger="csv", refresh_rate=0, backup=True, backup_steps=backup_steps, **settings)
    run = Run(folder, "0")
    trainer = make_trainer(t, RunFolder(run, TrainVAEConfig(trainer=t)))
    data = torch.utils.data.DataLoader(torch.ones(STEPS, 2), batch_size=1)
    saved = runs.states(run)
    trainer.fit(Tiny(losses), data, data, ckpt_path=saved[0] if saved else None, weights_only=True)
    return trainer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("goes", [os.rename, lambda folder, there: shutil.rmtree(folder)], ids=["moved", "removed"])
def test_a_run_folder_that_vanishes_is_made_anew(tmp_path, goes, monkeypatch):
    """So that a rerun resumes from it, nobody else writes there, and what is logged from then on has its header."""
    folder, original = tmp_path / "a", Tiny.training_step
    locked = []

    def training_step(self, batch, batch_idx):
        self.log("train/loss", 1.0)
        if self.global_step == 3:
            goes(folder, tmp_path / "b")
        if self.global_step == 5:
            with pytest.raises(InUse), only_writer(folder, "log_dir"):
                raise AssertionError
            locked.append(True)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Tiny, "training_step", training_step)
    with pytest.warns(UserWarning, match=naming(folder, "moved", "removed")) as warned:
        fit(folder, [3.0, 2.0], log_every_n_steps=1)
    assert locked and len([w for w in warned if "unmounted" in str(w.message)]) == 1
    assert {"run.json", "config.yaml", "checkpoints"} <= set(names(folder)) and ".lock" not in names(folder)
    assert [step for step in steps_logged(folder) if step >= 4] == [4, 5, 6, 7]
    assert runs.states(Run(folder, "0"))[0].name.startswith("last-epoch=1-step=8")


def steps_logged(folder: Path) -> list[int]:
    rows = csv.DictReader((folder / "logs" / "metrics.csv").open())
    return sorted({int(row["step"]) for row in rows if row["train/loss"]})


def stored(file: Path) -> dict:
    return torch.load(file, weights_only=True)


# ------------------------------------------------------------------------------------------------------ best and last


def test_the_lowest_loss_and_the_last_weights_are_kept_and_say_their_loss(tmp_path):
    fit(tmp_path / "run", [3.0, 1.0, 2.0])
    kept = tmp_path / "run" / "checkpoints"
    assert names(kept) == ["best-epoch=1-step=8.ckpt", "last-epoch=2-step=12.ckpt"]
    scores = {name: stored(kept / name)["latent_verse"] for name in names(kept)}
    assert scores["best-epoch=1-step=8.ckpt"] == {"kind": "augvae", "score": {MONITOR: 1.0}}
    assert scores["last-epoch=2-step=12.ckpt"]["score"] == {MONITOR: 2.0}
    for backup in (tmp_path / "run" / "backups").iterdir():  # within an epoch, the loss is not known
        assert stored(backup)["latent_verse"]["score"] is None


def test_without_validation_there_is_only_the_last(tmp_path):
    fit(tmp_path / "run", [], epochs=2)
    (last,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert last.name == "last-epoch=1-step=8.ckpt" and stored(last)["latent_verse"]["score"] is None


@pytest.mark.parametrize("wrong", [math.nan, -math.inf, math.inf])
def test_weights_whose_loss_is_not_finite_are_never_the_best(tmp_path, wrong):
    with pytest.warns(UserWarning, match=naming(MONITOR, "step 12")):
        fit(tmp_path / "run", [wrong, 2.0, wrong])
    kept = tmp_path / "run" / "checkpoints"
    assert names(kept) == ["best-epoch=1-step=8.ckpt", "last-epoch=2-step=12.ckpt"]
    assert stored(kept / names(kept)[1])["latent_verse"]["score"] is None


def test_a_run_without_any_finite_validation_fails(tmp_path):
    with pytest.warns(UserWarning, match="step 4"), pytest.raises(Diverged, match=naming(MONITOR, "step 8")):
        fit(tmp_path / "run", [math.nan, math.inf])
    assert names(tmp_path / "run" / "checkpoints") == ["last-epoch=1-step=8.ckpt"]


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_folder_that_was_moved_or_copied_is_resumed_there(tmp_path, how):
    straight, parts, elsewhere = fit(tmp_path / "straight", [2.0, 1.0, 3.0]), tmp_path / "parts", tmp_path / "a" / "b"
    fit(parts, [2.0, 1.0])
    before = {path: path.read_bytes() for path in parts.rglob("*.ckpt")} if how == "copied" else {}
    elsewhere.parent.mkdir()
    (shutil.move if how == "moved" else shutil.copytree)(parts, elsewhere)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        resumed = fit(elsewhere, [2.0, 1.0, 3.0])
    assert not [w for w in said if naming("checkpoint").search(str(w.message).lower())]
    assert resumed.global_step == 12 and torch.equal(resumed.model.layer.weight, straight.model.layer.weight)
    assert names(elsewhere / "checkpoints") == names(tmp_path / "straight" / "checkpoints")
    assert names(elsewhere / "checkpoints") == ["best-epoch=1-step=8.ckpt", "last-epoch=2-step=12.ckpt"]
    assert {path: path.read_bytes() for path in parts.rglob("*.ckpt")} == before  # nothing in the old place
    assert parts.exists() == (how == "copied")


def test_the_last_that_a_run_was_resumed_from_goes(tmp_path):
    for epochs in (1, 2, 3):
        fit(tmp_path / "run", [1.0, 2.0, 3.0], epochs)
        last = [name for name in names(tmp_path / "run" / "checkpoints") if name.startswith("last")]
        assert last == [f"last-epoch={epochs - 1}-step={4 * epochs}.ckpt"]


def test_a_step_that_is_saved_again_replaces_its_file(tmp_path):
    fit(tmp_path / "run", [1.0])
    kept = tmp_path / "run" / "checkpoints"
    for file in kept.iterdir():
        file.write_bytes(b"half a file, of a process that was killed")
    (kept / "best-epoch=0-step=4-v1.ckpt").write_bytes(b"of an earlier version")
    (kept / "last-epoch=0-step=4-v1.ckpt").write_bytes(b"of an earlier version")
    (kept / "last-epoch=0-step=4.ckpt").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "states", lambda run: [run.folder / "backups" / "step=2.ckpt"])
        fit(tmp_path / "run", [1.0])
    assert names(kept) == ["best-epoch=0-step=4.ckpt", "last-epoch=0-step=4.ckpt"]
    assert all(stored(file)["global_step"] == 4 for file in kept.iterdir())


def test_the_best_of_an_earlier_version_is_known_by_what_lightning_stored(tmp_path):
    """Its callback's state; a run that resumes from it keeps it until there is a better one, and then deletes it."""
    old = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(tmp_path / "run" / "checkpoints", "best-{epoch}-{step}", monitor=MONITOR),
            ModelCheckpoint(tmp_path / "run" / "checkpoints", "last-{epoch}-{step}", every_n_epochs=1),
        ],
    )
    data = torch.utils.data.DataLoader(torch.ones(STEPS, 2), batch_size=1)
    old.fit(Tiny([2.0]), data, data)
    kept = tmp_path / "run" / "checkpoints"
    assert score_of(read_ckpt(kept / "best-epoch=0-step=4.ckpt")) == 2.0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", ".*callbacks used to create.*")  # as quiet_lightning does
        fit(tmp_path / "run", [2.0, 3.0])
    assert not [w for w in said if "dirpath" in str(w.message)]
    assert names(kept) == ["best-epoch=0-step=4.ckpt", "last-epoch=1-step=8.ckpt"]
    fit(tmp_path / "run", [2.0, 3.0, 1.0])
    assert names(kept) == ["best-epoch=2-step=12.ckpt", "last-epoch=2-step=12.ckpt"]


@pytest.mark.parametrize(
    "content", [b"", {"state_dict": {}}, {"state_dict": {}, "latent_verse": "a"}, {"state_dict": {}, "callbacks": []}]
)
def test_a_best_file_that_says_nothing_yields_to_any_other(tmp_path, content):
    kept = tmp_path / "run" / "checkpoints"
    kept.mkdir(parents=True)
    file = kept / "best-epoch=7-step=99.ckpt"
    torch.save(content, file) if content else file.touch()
    fit(tmp_path / "run", [2.0])
    assert names(kept) == ["best-epoch=0-step=4.ckpt", "last-epoch=0-step=4.ckpt"]


# ------------------------------------------------------------------------------------------------------------ backups


def test_two_backups_are_kept_none_of_a_later_step_than_the_newest(tmp_path):
    fit(tmp_path / "run", [1.0, 1.0], backup_steps=1)
    backups = tmp_path / "run" / "backups"
    assert names(backups) == ["step=6.ckpt", "step=7.ckpt"]
    (backups / "step=999.ckpt").write_bytes(b"damaged")  # so that an earlier one was resumed from
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "states", lambda run: [backups / "step=6.ckpt"])
        fit(tmp_path / "run", [1.0, 1.0], backup_steps=1)
    assert names(backups) == ["step=6.ckpt", "step=7.ckpt"]


class FullDisk:
    """In place of torch.save: there is room for only a part of those checkpoints whose number is in `fails`."""

    def __init__(self, monkeypatch, fails):
        self.count, self.fails, self.save = 0, fails, torch.save
        monkeypatch.setattr(torch, "save", self)

    def __call__(self, content, file, **how) -> None:
        is_checkpoint = isinstance(content, dict) and "state_dict" in content
        self.count += is_checkpoint
        if is_checkpoint and self.count in self.fails:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.save(content, file, **how)


def unfinished(folder: Path) -> list[Path]:
    return list(folder.rglob(".*.tmp"))


# one epoch with backup_steps 1 writes: steps 1, 2, 3, best, last


def test_a_backup_that_fails_is_a_warning_and_the_old_ones_stay(tmp_path, monkeypatch):
    FullDisk(monkeypatch, {3})
    place = tmp_path / "run" / "backups"
    with pytest.warns(UserWarning, match=naming("step=3.ckpt", place, "No space left", "free", "continues")) as said:
        trainer = fit(tmp_path / "run", [1.0], backup_steps=1)
    (message,) = [str(w.message) for w in said if "step=3" in str(w.message)]
    assert "\n" not in message
    assert trainer.global_step == STEPS and names(place) == ["step=1.ckpt", "step=2.ckpt"]
    assert not unfinished(tmp_path)


def test_a_signal_whose_save_fails_still_says_that_it_stopped_the_run(tmp_path, monkeypatch):
    FullDisk(monkeypatch, {2})
    trained = Tiny.on_train_batch_end

    def signalled(self, *args):
        if self.trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        trained(self, *args)

    monkeypatch.setattr(Tiny, "on_train_batch_end", signalled)
    newest = tmp_path / "run" / "backups" / "step=1.ckpt"
    with pytest.raises(Interrupted, match=naming("SIGTERM", "step 2", "No space left", newest)) as stopped:
        fit(tmp_path / "run", [1.0], backup_steps=1)
    assert stopped.value.exit_code == 128 + signal.SIGTERM


@pytest.mark.parametrize(("fails", "kind"), [(4, "best"), (5, "last")])
def test_a_run_whose_last_save_fails_says_so_and_fails(tmp_path, monkeypatch, fails, kind):
    FullDisk(monkeypatch, {fails})
    with (
        pytest.warns(UserWarning, match=naming(kind, "continues")),
        pytest.raises(
            NotWritten, match=naming("step 4", kind, tmp_path / "run" / "checkpoints", "No space left", "free")
        ),
    ):
        fit(tmp_path / "run", [1.0], backup_steps=1)
    kept = names(tmp_path / "run" / "checkpoints")
    assert len(kept) == 1 and not kept[0].startswith(kind) and not unfinished(tmp_path)


def test_a_run_goes_on_after_a_failed_save_and_makes_up_for_it(tmp_path, monkeypatch):
    FullDisk(monkeypatch, {4, 5})
    with pytest.warns(UserWarning, match="continues"):
        fit(tmp_path / "run", [2.0, 3.0], backup_steps=1)  # the first one is lost, so the second one is the best
    kept = tmp_path / "run" / "checkpoints"
    assert names(kept) == ["best-epoch=1-step=8.ckpt", "last-epoch=1-step=8.ckpt"]


def save_in_two(rank: int, folder: Path, strategy: str, fails: set[int]) -> dict:
    """A run as one of two processes of torchrun, of which the first cannot write some checkpoints."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "0", "LOCAL_WORLD_SIZE": str(WORLD), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    error = ""
    with pytest.MonkeyPatch.context() as patch:
        writes = FullDisk(patch, fails)
        try:
            fit(folder / f"only of rank {rank}", [1.0], backup_steps=1, gpus=WORLD, strategy=strategy)
        except FileError as refused:
            error = str(refused)
    return {"error": error, "writes": writes.count}


def stop_in_two(rank: int, folder: Path) -> int | None:
    """The step at which a run of two processes ends, of which the second gets a signal in step 30."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "0", "LOCAL_WORLD_SIZE": str(WORLD), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}

    def signalled(module, batch, batch_idx):
        if rank == 1 and batch_idx == 30:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "STEPS", 2 * backups.MOST_STEPS + 100)
        patch.setattr(Tiny, "on_train_batch_start", signalled)
        try:
            fit(folder / "run", [1.0], backup_steps=10_000, log_every_n_steps=10_000, gpus=WORLD)
        except backups.Interrupted as stopped:
            return int(str(stopped).split("step=")[1].split(".ckpt")[0])
    return None


def test_a_signal_to_one_of_two_processes_stops_both_whatever_is_logged(tmp_path):
    first, second = in_two_processes(tmp_path, stop_in_two, tmp_path)
    assert first is not None and first == second and 31 <= first <= 31 + backups.MOST_STEPS
    assert names(tmp_path / "run" / "backups") == [f"step={first}.ckpt"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_what_the_first_process_cannot_write_is_known_to_all_and_none_waits(tmp_path, strategy):
    first, second = in_two_processes(tmp_path, save_in_two, tmp_path, strategy, {1, 5})
    assert first["error"] == second["error"] and naming("step 4", "last", "No space left").search(first["error"])
    assert first["writes"] == 5 and second["writes"] == 0
    folder = tmp_path / "only of rank 0"  # the first process decides where the run writes
    assert names(folder / "backups") == ["step=2.ckpt", "step=3.ckpt"]
    assert names(folder / "checkpoints") == ["best-epoch=0-step=4.ckpt"]
    assert not (tmp_path / "only of rank 1").exists() and not unfinished(tmp_path)
