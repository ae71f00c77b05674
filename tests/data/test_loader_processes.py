"""Loader processes: how many there are, and that a run ends with one line whatever becomes of them."""

import dataclasses
import errno
import multiprocessing
import os
import resource
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader

from latent_verse.config.program import one_line_errors
from latent_verse.config.train import ImageDataConfig
from latent_verse.data import DataError, ImageDataModule, loader_processes, open_images
from tests.messages import naming


def module(**settings):
    """A data module of generated images."""
    data = ImageDataConfig(**{"dataset": "fake", "batch_size": 4, "num_workers": 0, **settings})
    return ImageDataModule(open_images(data, 8), data)


def test_lightning_ends_the_workers_of_a_finished_loader():
    """Both libraries keep the running iterator as `_iterator`, which is private to them: see `Loader`."""
    for loader in (module(num_workers=1).train_dataloader(), module(num_workers=1).val_dataloader()):
        combined = CombinedLoader(loader)
        next(iter(combined))
        (worker,) = loader._iterator._workers
        assert worker.is_alive()
        combined.reset()
        assert loader._iterator is None and not worker.is_alive()


def test_workers_default_to_this_process_s_share(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert module(num_workers=None).workers == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert module(num_workers=None).workers == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)), raising=False)
    assert module(num_workers=None).workers == 16
    assert module(num_workers=0).workers == 0


class Failing:
    """A dataset of four items in place of images, of which the third is what `fail` makes of it."""

    shape, source = (3, 8, 8), "here"

    def __init__(self, fail):
        self.fail = fail

    def __len__(self):
        return 4

    def __getitem__(self, key):
        if key[1] == 2:
            self.fail()
        return torch.zeros(3, 8, 8, dtype=torch.uint8), 0


def ends_with(fail, **settings):
    """What a pass over `Failing` raises in this process; every loader process is gone afterwards."""
    data = ImageDataModule({"train": Failing(fail)}, ImageDataConfig(**{"batch_size": 1, "num_workers": 2, **settings}))
    loader = data.train_dataloader()
    before = set(multiprocessing.active_children())
    with pytest.raises(Exception) as raised:
        list(loader)
    workers = set(multiprocessing.active_children()) - before
    data.on_exception(raised.value)
    for worker in workers:
        worker.join(20)
        assert not worker.is_alive()
    return raised.value


def raises(error):
    def fail():
        raise error

    return fail


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [DataError("x.png: look at it"), OSError(28, "No space left on device", "/x")])
def test_an_error_of_a_loader_process_arrives_as_it_was(error, workers):
    found = ends_with(raises(error), num_workers=workers)
    assert type(found) is type(error) and str(found) == str(error)


@pytest.mark.timeout(120)
def test_a_fault_of_ours_in_a_loader_process_shows_where_it_was():
    assert naming("in fail", "ours").search(str(ends_with(raises(ZeroDivisionError("ours")))))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS], ids=lambda n: n.name)
def test_a_loader_process_that_is_killed_ends_the_pass(number, capsys):
    found = ends_with(lambda: os.kill(os.getpid(), number))
    assert isinstance(found, RuntimeError) and one_line_errors(raises(found))() == 1
    facts = ("/dev/shm",) if number == signal.SIGBUS else ("--num_workers 0",)
    assert naming("--num_workers", *facts).search(capsys.readouterr().err)


class Nothing(pl.LightningModule):
    """Trains nothing."""

    def training_step(self, batch, number):
        return None

    def configure_optimizers(self):
        return None


@pytest.mark.timeout(120)
def test_a_killed_loader_process_is_noticed_after_a_training(monkeypatch):
    """torch sets its handler once in a process. A Trainer within which it did puts back what was there before."""
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)  # a new process
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(max_epochs=1, accelerator="cpu", **quiet).fit(Nothing(), datamodule=module(num_workers=1))
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    assert isinstance(ends_with(lambda: os.kill(os.getpid(), signal.SIGKILL)), RuntimeError)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("spare", [0, 1, 2])  # three may be enough
def test_a_batch_that_cannot_be_shared_ends_the_pass(spare, capfd):
    """Python's queue would print it, drop the batch and leave this process waiting; its sharer would print for ever."""

    def few_files():
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, 4096))

    found = ends_with(few_files)
    assert one_line_errors(raises(found))() == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and naming("ulimit -n", "--num_workers").search(said)


@pytest.mark.timeout(120)
def test_a_frozen_loader_process_does_not_outlive_a_run_that_fails(monkeypatch):
    monkeypatch.setattr(loader_processes, "PATIENCE", 3)
    found = ends_with(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    assert naming("timed out", 3).search(str(found))


def test_what_watches_a_pass_ends_with_it():
    data = ImageDataModule({"train": Failing(lambda: None)}, ImageDataConfig(batch_size=1))
    data.data = dataclasses.replace(data.data, num_workers=1)
    loader = data.train_dataloader()
    assert len(list(loader)) == 4
    left_early = iter(loader)
    next(left_early)
    left_early.close()
    data.on_exception(KeyboardInterrupt())
    end = time.monotonic() + 60
    while any("_watch" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("dies", ["with an error", "without a word"])
def test_what_watches_a_pass_kills_processes_that_hand_over_nothing(monkeypatch, dies):
    """torch waits for their memory without end. Its own timeout has no part in this."""
    monkeypatch.setattr(loader_processes, "PATIENCE", 1)
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_remove_worker_pids", lambda iterator: None)
    killed = threading.Event()
    worker = SimpleNamespace(kill=killed.set, join=lambda seconds: None, exitcode=None)

    class Frozen:
        num_workers = 1
        _iterator = None

        def __iter__(self):
            self._iterator = SimpleNamespace(_workers=[worker], _shutdown=False)
            return self

        def __next__(self):
            assert killed.wait(30)
            raise EOFError if dies == "with an error" else ConnectionResetError("gone")

    with pytest.raises(RuntimeError, match=naming("timed out", 1)):
        next(loader_processes.Loader(Frozen()).batches())


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_to_a_loader_process_alone_changes_nothing(number):
    data = ImageDataModule({"train": Failing(lambda: os.kill(os.getpid(), number))}, ImageDataConfig(batch_size=1))
    data.data = dataclasses.replace(data.data, num_workers=1)
    loader = data.train_dataloader()
    assert len(list(loader)) == 4
    data.on_exception(KeyboardInterrupt())


def test_dev_shm_has_to_hold_the_batches(monkeypatch):
    space = os.statvfs("/")
    monkeypatch.setattr(loader_processes, "SHARED", "/")
    per_worker = 2 * 4 * 3 * 8 * 8

    def free(size):
        found = SimpleNamespace(f_bavail=size, f_frsize=1)
        monkeypatch.setattr(loader_processes.os, "statvfs", lambda path: found if path == "/" else space)

    free(3 * per_worker)
    module(num_workers=3).train_dataloader()
    free(3 * per_worker - 1)
    with pytest.raises(DataError, match=naming("--num_workers 2", "--batch_size", "--shm-size")):
        module(num_workers=3).train_dataloader()
    module(num_workers=0).train_dataloader()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(DataError, match=naming("3 loader processes", "--num_workers 0")):
        module(num_workers=1).train_dataloader()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "error", [RuntimeError("DataLoader worker exited unexpectedly"), EOFError(), ConnectionError()]
)
def test_the_exit_code_of_a_loader_process_says_more_than_torch_does(error, monkeypatch):
    """It is the number of the operating system's error; torch may only have seen that the process is gone."""
    ended = SimpleNamespace(exitcode=errno.EMFILE, join=lambda seconds: None)
    other = SimpleNamespace(exitcode=None, join=lambda seconds: None)

    class Broken(list):
        num_workers = 0
        _iterator = SimpleNamespace(_workers=[other, ended], _shutdown=True)

        def __iter__(self):
            raise error

    with pytest.raises(OSError, match=naming("Too many open files")):
        list(loader_processes.Loader(Broken()).batches())
    Broken._iterator._workers.remove(ended)
    with pytest.raises(type(error)) as raised:
        list(loader_processes.Loader(Broken()).batches())
    assert raised.value is error
