"""The processes of a DataLoader: how many, how they start and end, how they report a failure, the memory they need.

They end with the process that started them, whatever ends it: `WorkerInit`, `Loader.kill`. What torch and Python keep
private is used here by name; tests/data/test_loader_processes.py pins those names.
"""

from __future__ import annotations

import atexit
import errno
import math
import multiprocessing.queues
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from latent_verse.config import UserError
from latent_verse.config.program import SIGNALS, die_with
from latent_verse.data import DataError

MAX_WORKERS = 16  # per process; more rarely helps and costs memory
SHARED = "/dev/shm"  # where Linux keeps shared memory
PATIENCE = 1800  # seconds without a batch after which a run ends: a disk or network that answers no more


def worker_count(num_workers: int | None, processes: int | None = None) -> int:
    """`num_workers`, or one of `processes` equal shares of the cores (default: the launcher's number), at most 16."""
    if num_workers is not None:
        return num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = processes or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(MAX_WORKERS, cores // max(1, processes)))


def check_shared_memory(workers: int, processes: int, batch_bytes: int) -> None:
    """Refuse, before it hangs or dies, what /dev/shm cannot hold: all batches are there while training pauses.

    Args:
        workers: loader processes of each of `processes` on this machine.
        batch_bytes: of all batches that one loader process has made ahead.

    Raises:
        DataError: it has too little space for the batches of this machine's loader processes.
    """
    if not os.path.isdir(SHARED):
        return
    disk = os.statvfs(SHARED)
    free, of_one = disk.f_bavail * disk.f_frsize, batch_bytes * processes
    if free < workers * of_one:
        fits = free // of_one
        raise DataError(
            f"{SHARED} has {free / 2**20:.1f} MB free, but {workers * processes} loader processes pass batches of "
            f"{workers * of_one / 2**20:.1f} MB through it. Give --num_workers {fits}{' or fewer' * (fits > 0)}, "
            "a smaller --batch_size or --prefetch_factor, or more shared memory to a container (--shm-size)."
        )


class WorkerFailure(ExceptionWrapper):
    """How a loader process hands over what it failed with: mistakes in the data and faults of the machine as they are.

    torch's own way makes a new exception, whose message holds the whole traceback. So it stays for faults of ours.
    """

    def __init__(self, exc_info: Any = None, where: str = "in background"):
        super().__init__(exc_info, where)
        error = (exc_info or sys.exc_info())[1]
        self.error = error if isinstance(error, (UserError, OSError, MemoryError)) else None

    def reraise(self) -> None:
        if self.error is not None:
            raise self.error
        super().reraise()


def _hand_over_failure(queue: Any, error: Exception, item: Any) -> None:
    """Answer a batch that could not be sent, for lack of shared memory or open files, with the reason.

    Python only prints it, and the training process would wait for that batch for ever.
    """
    if not isinstance(item, tuple):  # it was being sent already
        _end_with(type(error), error, None)
    queue.put((item[0], WorkerFailure((type(error), error, error.__traceback__))))


def _end_with(kind: type[BaseException], error: BaseException, traceback: object) -> None:
    """End a loader process whose thread that shares batches has failed: it would try, and print, for ever.

    The exit code is the number of the operating system's error, which program.py names. torch gives it as text.
    """
    os._exit(getattr(error, "errno", None) or (errno.EMFILE if "Too many open files" in str(error) else 1))


class WorkerInit:
    """For loader processes: they end with the process that started them, and hand over what they fail with.

    They ignore signals: Slurm and a terminal signal them as well, and if one died the run would end before it has
    saved. So that they cannot outlive the training process, even if that is killed, the kernel kills them with it.
    tests/data/test_loader_processes.py pins the private names of Python and torch.
    """

    def __init__(self) -> None:
        self.parent = os.getpid()

    def __call__(self, worker: int) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        die_with(self.parent)
        torch.utils.data._utils.worker.ExceptionWrapper = WorkerFailure
        multiprocessing.queues.Queue._on_queue_feeder_error = _hand_over_failure
        sys.excepthook = _end_with


def _notice_deaths() -> None:
    """Let torch's handler of SIGCHLD, which notices that a loader process has died, be there.

    torch sets it once in a process. A Trainer, at its end, puts back what was there before it began.
    """
    handling = torch.utils.data._utils.signal_handling
    if hasattr(signal, "SIGCHLD"):
        present = signal.getsignal(signal.SIGCHLD)
        handling._SIGCHLD_handler_set = getattr(present, "__module__", None) == handling.__name__
        handling._set_SIGCHLD_handler()


LOADERS: weakref.WeakSet[Loader] = weakref.WeakSet()  # of this process


@atexit.register
def _kill_all() -> None:
    """Python would tell those that still run to end, which they ignore, and wait for ever."""
    for loader in LOADERS:
        loader.kill()


class Loader:
    """Holds a DataLoader, whose workers Lightning ends through its `_iterator` when it is done with them.

    Otherwise the garbage collector would end them. It may close their queues first and then wait 5 seconds for each.
    `_iterator` is private to torch and Lightning; the tests check that both still use it this way.
    """

    def __init__(self, loader: DataLoader):
        self._loader = loader
        self._asked = math.inf  # when the batch was asked for that is waited for
        self._frozen = False
        LOADERS.add(self)

    @property
    def _iterator(self) -> Iterator[list[Tensor]] | None:
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: Iterator[list[Tensor]] | None) -> None:
        self._loader._iterator = value

    def batches(self) -> Iterator[list[Tensor]]:
        """The batches of a pass.

        Raises:
            OSError: a process ended with the number of this error, and torch knows only that it has ended.
        """
        over = threading.Event()
        if self._loader.num_workers:
            _notice_deaths()
            threading.Thread(target=self._watch, args=(over,), daemon=True).start()
        try:
            batches = iter(self._loader)
            while True:
                self._asked = time.monotonic()
                batch = next(batches, None)
                self._asked = math.inf
                if batch is None:
                    return
                yield batch
        except (RuntimeError, EOFError, ConnectionError) as error:
            if self._frozen:
                raise RuntimeError(f"DataLoader timed out after {PATIENCE} seconds") from error
            for worker in getattr(self._iterator, "_workers", []):
                worker.join(0.2)
                if worker.exitcode != 1 and worker.exitcode in errno.errorcode:
                    raise OSError(worker.exitcode, os.strerror(worker.exitcode)) from error
            raise
        finally:
            over.set()

    def _watch(self, over: threading.Event) -> None:
        """Kill processes that are frozen.

        torch's own timeout ends with the announcement of a batch. The process that made it then has to hand over its
        memory, for which torch waits without end.
        """
        while not over.wait(PATIENCE / 20):
            if time.monotonic() - self._asked > 1.1 * PATIENCE:
                self._frozen = True
                self.kill()
                return

    def kill(self) -> None:
        """Kill the processes at once. torch would ask each one to end and wait 10 seconds for it, and Python for ever.

        torch's own shutdown is marked as done: a process that was killed may hold a lock that it would wait for.
        """
        iterator = self._loader._iterator
        workers = getattr(iterator, "_workers", [])
        if not workers or iterator._shutdown:
            return
        iterator._shutdown = True
        torch.utils.data._utils.signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
        if hasattr(iterator, "_pin_memory_thread"):
            iterator._pin_memory_thread_done_event.set()
        for worker in workers:
            worker.kill()
