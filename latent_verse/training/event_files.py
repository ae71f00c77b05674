"""TensorBoard's event files, which wait while the disk is full.

TensorBoard's own writer raises, in its thread and in the next step of training, and takes no more events.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.event_file_writer import EventFileWriter, _AsyncWriter
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

from latent_verse.files import FileError, append
from latent_verse.training.runs import LOST, WAITS

_numbers = itertools.count()  # of this process's event files


class EventWriter(SummaryWriter):
    """PyTorch's writer, to an event file that waits."""

    def _get_file_writer(self) -> FileWriter:
        if self.file_writer is None:
            self.file_writer = _FileWriter(self.log_dir, self.max_queue, self.flush_secs, self.filename_suffix)
            self.all_writers = {self.log_dir: self.file_writer}
            if self.purge_step is not None:
                start = SessionLog(status=SessionLog.START)
                self.file_writer.add_event(Event(step=self.purge_step, session_log=start))
                self.purge_step = None
        return self.file_writer


class _FileWriter(FileWriter):
    def __init__(self, *arguments: Any):
        self.event_writer = _EventFileWriter(*arguments)


class _EventFileWriter(EventFileWriter):
    """As TensorBoard's, which opens the file itself."""

    def __init__(self, folder: str, max_queue: int, flush_secs: int, suffix: str):
        self._logdir = folder
        parts = (f"{time.time():010.0f}", socket.gethostname(), str(os.getpid()), str(next(_numbers)))
        self.file = WaitingFile(Path(folder) / f"events.out.tfevents.{'.'.join(parts)}{suffix}")
        self._async_writer = _AsyncWriter(RecordWriter(self.file), max_queue, flush_secs)
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.flush()


class WaitingFile:
    """What is written to it is in the file from the next `flush` on that finds room for it."""

    def __init__(self, path: Path):
        self.path, self.closed = path, False
        self._waiting = bytearray()
        self._warned = False
        self._lock = threading.Lock()  # TensorBoard's thread and the main one may flush at once

    def write(self, data: bytes) -> None:
        with self._lock:
            self._waiting += data

    def flush(self) -> None:
        self._flush(WAITS)

    def close(self) -> None:
        self._warned = False
        self._flush(LOST)
        self.closed = True

    def _flush(self, otherwise: str) -> None:
        with self._lock:
            if not self._waiting:
                return
            try:
                append(self.path, bytes(self._waiting))
            except FileError as error:
                if not self._warned:
                    rank_zero_warn(otherwise.format(error))
                self._warned = True
            else:
                self._waiting.clear()
                self._warned = False
