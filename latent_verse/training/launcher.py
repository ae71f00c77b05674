"""The processes of a training run on one machine: if one of them fails, all end, and one line says why.

Lightning starts them, and kills all, the first one included, within five seconds of another one's failure: it would
say nothing, and could not finish what it writes. torchrun and Slurm watch their processes themselves.
"""

from __future__ import annotations

import datetime
import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher, subprocess_script

from latent_verse.config.program import PARENT, verdict

# how long the processes wait for one that answers no more, while the first one samples or writes, for example
PATIENCE = datetime.timedelta(minutes=30)
# seconds left to the first process, to say why and to save, when another one has failed or was stopped by a signal
AFTER_FAILURE, AFTER_SIGNAL = 5, 50


class Launcher(_SubprocessScriptLauncher):
    """Lightning's, with another watch. Its private methods are pinned by tests/training/test_launcher.py."""

    def launch(self, function: Any, *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        if trainer is not None:  # it would broadcast a SIGTERM to processes that may not listen
            trainer._signal_connector._sigterm_notifier_fn = lambda number, frame: None
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            os.environ[PARENT] = str(os.getpid())
            self._call_children_scripts()
            threading.Thread(target=self._watch, name="watch", daemon=True).start()
        subprocess_script._set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _watch(self) -> None:
        """Wait for a process that fails; then leave the first one, this, some time to end by itself, and end it."""
        while not any(codes := self._codes()):
            if all(code == 0 for code in codes):
                return
            time.sleep(0.5)
        time.sleep(AFTER_SIGNAL if max(code or 0 for code in codes) > 128 else AFTER_FAILURE)
        code = verdict([None, *self._codes()])
        for process in self.procs:
            process.kill()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)

    def _codes(self) -> list[int | None]:
        return [process.poll() for process in self.procs]


class _Watched:
    """A strategy whose processes are started by `Launcher`, if Lightning would start them."""

    def _configure_launcher(self) -> None:
        super()._configure_launcher()  # type: ignore[misc]
        if isinstance(self._launcher, _SubprocessScriptLauncher):
            self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


class WatchedDDP(_Watched, DDPStrategy):
    """A copy of the model in each process."""


class WatchedFSDP(_Watched, ModelParallelStrategy):
    """Parameters, gradients and optimiser sharded over the processes."""
