"""What is logged: means over processes, and each step once, whatever interrupts the run."""

from __future__ import annotations

import csv
import os
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.checkpoints.ckpt_files import read_ckpt
from latent_verse.config.train import TrainBiARTConfig, TrainerConfig, TrainVAEConfig
from latent_verse.training import logs
from latent_verse.training.augvae import LitAugVAE
from latent_verse.training.backups import Backup, Interrupted, RunFolder
from latent_verse.training.biart import LitBiART
from latent_verse.training.logs import CSVLogger, TensorBoardLogger
from latent_verse.training.runs import Run
from latent_verse.training.trainer import make_trainer
from tests.biart.tiny_biart import CONFIG
from tests.messages import naming
from tests.two_processes import WORLD, in_two_processes


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def test_a_row_is_on_the_disk_at_once_and_columns_may_come_later(tmp_path):
    log = CSVLogger(tmp_path / "logs")
    log.log_metrics({"a": 1.5}, 0)
    assert rows(tmp_path / "logs") == [{"a": "1.5", "step": "0"}]
    log.log_metrics({"a": 2.0, "b": float("nan")}, 1)
    log.log_metrics({"b": 0.25}, 1)
    found = [{"a": "1.5", "step": "0"}, {"a": "2.0", "b": "nan", "step": "1"}, {"b": "0.25", "step": "1"}]
    assert rows(tmp_path / "logs") == found


@pytest.mark.parametrize("cut", ["", "9.9,3", "9"])
def test_a_resumed_run_continues_the_file_of_an_interrupted_one(tmp_path, cut):
    log = CSVLogger(tmp_path)
    for step in range(4):
        log.log_metrics({"a": float(step), **({"b": 1.0} if step == 0 else {})}, step)
    with log.file.open("a") as file:
        file.write(cut)  # of a process killed while it wrote
    log = CSVLogger(tmp_path, first_step=2)
    log.log_metrics({"a": 20.0}, 2)
    log.log_metrics({"a": 30.0, "c": 1.0}, 3)
    assert [(row["step"], row["a"]) for row in rows(tmp_path)] == [
        ("0", "0.0"),
        ("1", "1.0"),
        ("2", "20.0"),
        ("3", "30.0"),
    ]
    assert rows(tmp_path)[0]["b"] == "1.0"
    CSVLogger(tmp_path).log_metrics({"a": 0.5}, 0)  # a run that starts anew in its folder
    assert rows(tmp_path) == [{"a": "0.5", "step": "0"}]


@pytest.fixture
def no_room():
    """A context in which nothing can be written, as on a full disk."""

    @contextmanager
    def inside():
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    resource = pytest.importorskip("resource")
    return inside


def test_rows_wait_while_the_disk_is_full(tmp_path, no_room):
    log = CSVLogger(tmp_path / "logs")
    log.log_metrics({"a": 0.0}, 0)
    with pytest.warns(UserWarning, match=naming(log.file, "too large")) as said, no_room():
        log.log_metrics({"a": 1.0}, 1)
        log.log_metrics({"a": 2.0}, 2)
    assert len(said) == 1
    log.log_metrics({"a": 3.0}, 3)
    assert [row["a"] for row in rows(tmp_path / "logs")] == ["0.0", "1.0", "2.0", "3.0"]
    with pytest.warns(UserWarning, match=naming(log.file, "too large")), no_room():
        log.log_metrics({"a": 4.0, "b": 1.0}, 4)  # a new column: the file is written anew
        CSVLogger(tmp_path / "new").log_metrics({"a": 0.0}, 0)
    log.log_metrics({"a": 5.0}, 5)
    found = [(row["a"], row.get("b")) for row in rows(tmp_path / "logs")]
    assert found[3:] == [("3.0", None), ("4.0", "1.0"), ("5.0", None)]
    with pytest.warns(UserWarning, match=naming(log.file, "lost")) as said, no_room():
        log.log_metrics({"a": 6.0}, 6)
        log.finalize("success")
    assert len(said) == 2
    log.finalize("success")
    assert rows(tmp_path / "logs")[-1]["a"] == "6.0"


@pytest.mark.parametrize(
    ("damage", "facts"),
    [
        (lambda text: text.replace("step", "stop"), ("step", "3 of 3")),
        (lambda text: text.replace(",1\n", ",x1\n"), ("step", "1 of 3")),
        (lambda text: text + ",,,3\n", ("step", "1 of 4")),
        (lambda text: text + "1.0,1,2,3\n", ()),
        (lambda text: text + "\0" * 200_000 + "\n", ("move",)),
        (lambda text: text + "\udcff\n", ("UTF-8",)),
    ],
)
def test_a_damaged_file_of_rows_ends_no_run(tmp_path, damage, facts, recwarn, request):
    before = csv.field_size_limit(1 << 17)  # Python's own: reading captions raises it for the whole process
    request.addfinalizer(lambda: csv.field_size_limit(before))
    log = CSVLogger(tmp_path)
    for step in range(3):
        log.log_metrics({"a": float(step)}, step)
    log.file.write_bytes(damage(log.file.read_text()).encode("utf-8", "surrogateescape"))
    log = CSVLogger(tmp_path, first_step=3)
    log.log_metrics({"a": 3.0}, 3)
    log.log_metrics({"a": 4.0}, 4)
    assert len(recwarn) == bool(facts)
    assert not facts or naming(log.file, *facts).search(str(recwarn[0].message))
    if "move" in facts or "UTF-8" in facts:
        log.file.unlink()
    log.log_metrics({"a": 5.0}, 5)
    assert [row["a"] for row in rows(tmp_path)][-3:] == ["3.0", "4.0", "5.0"]


def run(module, folder: Path, batches: list, start_from: Path | None = None, more=(), **settings):
    """Train on these batches, each time an epoch, as the programs do."""
    t = replace(module.config.trainer, gpus=0, refresh_rate=0, num_sanity_val_steps=0, **settings)
    first_step = read_ckpt(start_from)["global_step"] if start_from else 0
    made = make_trainer(t, RunFolder(Run(folder, "0"), module.config), more, first_step)
    made.fit(module, Batches(batches), ckpt_path=start_from, weights_only=True)
    return made


class Batches(torch.utils.data.DataLoader):
    """A loader that resumes where it was."""

    def __init__(self, batches):
        super().__init__(batches, batch_size=None)
        self.done = 0

    def __iter__(self):
        for number in range(self.done % len(self.dataset), len(self.dataset)):
            self.done = number + 1
            yield self.dataset[number]

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.done = state["done"]


def biart(**trainer) -> tuple[LitBiART, list]:
    torch.manual_seed(0)
    module = LitBiART(BiART(CONFIG), torch.nn.Identity(), TrainBiARTConfig(trainer=TrainerConfig(**trainer)), {})
    batches = [
        [torch.randint(0, CONFIG.image_vocab, (2, CONFIG.image_len)), torch.randint(0, 5, (2, CONFIG.text_len))]
        for _ in range(6)
    ]
    return module, batches


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "logs"))
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_events_wait_while_the_disk_is_full(tmp_path, no_room, capfd):
    """TensorBoard's thread ends no run, nor says more than one line; nothing is lost once there is room."""
    with pytest.warns(UserWarning, match=naming("events", "too large")) as said, no_room():
        log = TensorBoardLogger(tmp_path, name="", version="logs", purge_step=0)
        for step in range(40):  # more than TensorBoard's queue holds
            log.log_metrics({"a": float(step)}, step)
            log.save()
    assert len(said) == 1
    log.log_metrics({"a": 40.0}, 40)
    log.save()
    assert events(tmp_path)["a"] == [(step, float(step)) for step in range(41)]
    with pytest.warns(UserWarning, match=naming("events", "lost")) as said, no_room():
        log.log_metrics({"a": 41.0}, 41)
        log.finalize("success")
    assert len(said) == 2 and not capfd.readouterr().err
    assert len(events(tmp_path)["a"]) == 41


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
@pytest.mark.parametrize("signal", [True, False])
def test_an_interrupted_run_logs_what_an_uninterrupted_one_does(tmp_path, logger, every, signal):
    """Stopped by a signal at step 3, or killed at step 5 with a backup of step 3: each step is there once."""
    settings = {"epochs": 2, "logger": logger, "log_every_n_steps": every}
    module, batches = biart()
    run(module, tmp_path / "straight", batches, **settings)

    class Stop(Backup):
        def on_train_batch_end(self, trainer, module, *rest):
            self.told_to_stop = signal and trainer.global_step == 3
            super().on_train_batch_end(trainer, module, *rest)
            if not signal and trainer.global_step == 3:
                self.save(trainer)
            if not signal and trainer.global_step == 5:
                raise MemoryError("killed")

    module, _ = biart()
    folder = RunFolder(Run(tmp_path / "cut", "0"), module.config)
    with pytest.raises(Interrupted if signal else MemoryError):
        run(module, tmp_path / "cut", batches, more=[Stop(folder, None)], **settings)
    module, _ = biart()
    if logger == "tensorboard":  # it orders its files by the second in their names, in which no real run resumes
        time.sleep(1.1)
    run(module, tmp_path / "cut", batches, tmp_path / "cut" / "backups" / "step=3.ckpt", **settings)
    read = events if logger == "tensorboard" else lambda folder: {"": rows(folder / "logs")}
    straight, cut = read(tmp_path / "straight"), read(tmp_path / "cut")
    for found in (straight, cut):
        for tag in [tag for tag in found if "per_second" in tag]:
            found[tag] = [step for step, _ in found[tag]]  # a time
    for row in [*straight.get("", []), *cut.get("", [])]:
        row.pop("train/tokens_per_second", None)
    assert cut == straight and len(straight) >= 1
    if logger == "csv":
        logged = [row["step"] for row in straight[""] if "train/total_loss" in row]
        assert logged == [str(step) for step in range(every - 1, 12, every)]


# ---------------------------------------------------------------------------------------------------- several processes


def in_part(rank: int, folder: str, vae: AugVAE, stage: str, strategy: str) -> dict:
    """Three steps on this process's half of each batch; what rank 0 logs is in the folder."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "0", "LOCAL_WORLD_SIZE": str(WORLD), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    counted = {"all_reduce": 0}
    reduce = dist.all_reduce

    def all_reduce(*args, **kwargs):
        counted["all_reduce"] += 1
        return reduce(*args, **kwargs)

    module, batches = parts(vae, stage, slice(rank * 2, rank * 2 + 2))
    original = logs.over_processes
    at_step = []

    def over_processes(*args):
        before = counted["all_reduce"]
        found = original(*args)
        at_step.append(counted["all_reduce"] - before)
        return found

    dist.all_reduce = all_reduce  # in a process of its own
    for name in ("augvae", "biart"):
        __import__(f"latent_verse.training.{name}", fromlist=["x"]).over_processes = over_processes
    t = TrainerConfig(gpus=WORLD, accelerator="cpu", epochs=1, log_every_n_steps=2, logger="csv", refresh_rate=0,
                      strategy=strategy)  # fmt: skip
    trainer = make_trainer(t, RunFolder(Run(Path(folder), "0"), module.config))
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return {"at_step": at_step}


def parts(vae: AugVAE, stage: str, part: slice) -> tuple:
    """A module, and three batches of 4, or a part of each: images, or codes with captions of different lengths."""
    torch.manual_seed(0)
    t = TrainerConfig()
    if stage == "augvae":
        config = TrainVAEConfig(model=vae.config, trainer=t)
        config = replace(config, optim=replace(config.optim, learning_rate=1e-6 * (part.stop - part.start)))
        images = torch.rand(4, 4, 3, 16, 16) * torch.tensor([0.1, 0.3, 0.6, 1.0])[:, None, None, None]
        return LitAugVAE(vae, config), [[x[part]] for x in images]
    config = TrainBiARTConfig(trainer=t)
    config = replace(config, loss=replace(config.loss, reference_dropout=0.0))
    module = LitBiART(BiART(CONFIG), torch.nn.Identity(), config, {})
    text = torch.randint(0, CONFIG.text_vocab, (4, 4, CONFIG.text_len))
    for row, length in enumerate((1, 2, 3, CONFIG.text_len)):
        text[:, row, length:] = module.model.vocab.pad
    order = torch.tensor([0, 2, 1, 3])  # each half has its first row text to image, as the whole its first two
    codes = torch.randint(0, CONFIG.image_vocab, (4, 4, CONFIG.image_len))
    whole = part.stop - part.start == 4
    return module, [
        [c[order] if whole else c[part], t[order] if whole else t[part]] for c, t in zip(codes, text, strict=True)
    ]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize(
    ("stage", "strategy"),
    [("augvae", "ddp"), ("biart", "ddp"), pytest.param("biart", "fsdp", marks=pytest.mark.slow)],
)
def test_two_processes_log_what_one_does_on_the_joined_batch(tiny_augvae, tmp_path, stage, strategy):
    """Losses, and perplexity, within 1e-5; by one all-reduce at the steps that are logged."""
    for found in in_two_processes(tmp_path, in_part, tmp_path / "two", tiny_augvae(), stage, strategy):
        assert [count for count in found["at_step"] if count] == [1, 1]
    module, batches = parts(tiny_augvae(), stage, slice(0, 4))
    run(module, tmp_path / "one", batches, epochs=1, log_every_n_steps=2, logger="csv")
    one, two = rows(tmp_path / "one" / "logs"), rows(tmp_path / "two" / "logs")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    compared = 0
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"train/tokens_per_second", "train/images_per_second", "step", "epoch"}:
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-5, abs=1e-5), (key, a["step"])
            compared += key.startswith("train/")
    assert compared >= 8 and sum("train/grad_norm" in row for row in two) == 2


def test_nothing_is_exchanged_by_one_process_or_at_a_step_that_is_not_logged(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", None)  # would fail
    value = {"a": torch.ones((), requires_grad=True)}
    for world, step in ((1, 9), (2, 8)):
        trainer = SimpleNamespace(world_size=world, global_step=step, log_every_n_steps=10, max_steps=-1)
        found = logs.over_processes(trainer, value)
        assert not found["a"].requires_grad and found["a"] == 1
    assert logs.is_logged(SimpleNamespace(global_step=4, log_every_n_steps=10, max_steps=5))
    assert not logs.is_logged(SimpleNamespace(global_step=4, log_every_n_steps=10, max_steps=6))
