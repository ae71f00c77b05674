"""What is logged: means over all processes, and the files of them, which lose nothing when a run is interrupted."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning import loggers
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from latent_verse.files import FileError, append, read_text, write_text
from latent_verse.training.runs import LOST, WAITS


class CSVLogger(loggers.Logger):
    """<folder>/metrics.csv: a row for each time that something is logged, on the disk at once.

    Lightning's CSVLogger overwrites the file of an interrupted run. A resumed run appends to this one, so that each
    step is there once: rows of `first_step` and later, which it computes again, are removed. Steps count from 0.
    """

    def __init__(self, folder: Path, first_step: int = 0):
        super().__init__()
        self.folder, self.first_step = folder, first_step
        self._columns: list[str] | None = None  # None before the first row
        self._waiting: list[dict[str, Any]] = []  # rows that are not on the disk yet

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return self.folder.name

    @property
    def log_dir(self) -> str:
        return str(self.folder)

    @property
    def file(self) -> Path:
        return self.folder / "metrics.csv"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write a row. If the disk is full it waits for the next one."""
        self._waiting.append({**metrics, "step": step})
        try:
            self._write()
        except FileError as error:
            if len(self._waiting) == 1:
                rank_zero_warn(WAITS.format(error))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what waits still; a warning says so if it is lost."""
        try:
            self._write()
        except FileError as error:
            rank_zero_warn(LOST.format(error))

    def _write(self) -> None:
        """Write the rows that wait.

        Raises:
            FileError: they cannot be written, or joined with those that the file has.
        """
        if not self._waiting:
            return
        rows, columns = self._waiting, self._columns
        if columns is not None and set().union(*rows) <= set(columns) and self.file.exists():  # else somebody moved it
            append(self.file, as_text(rows, columns).encode())
        else:
            before = [row for row in self._rows() if columns is not None or int(row["step"]) < self.first_step]
            rows = before + rows
            columns = sorted(set().union(*rows))
            write_text(self.file, ",".join(columns) + "\n" + as_text(rows, columns))
        self._columns, self._waiting = columns, []

    def _rows(self) -> list[dict[str, Any]]:
        """The rows of the file; a last one that a killed process did not end is left out.

        Raises:
            FileError: it is not a CSV file in UTF-8.
        """
        text = read_text(self.file) if self.file.exists() else ""
        try:
            found = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
        except csv.Error as error:
            raise FileError(f"{self.file} is not a CSV file ({error}). Repair it, or move it away.") from error
        rows = [{key: value for key, value in row.items() if key and value} for row in found]
        rows = [row for row in rows if row.get("step", "").isdecimal()]
        if len(rows) < len(found):
            rank_zero_warn(f"{self.file}: rows without a step are left out: {len(found) - len(rows)} of {len(found)}.")
        return rows


class TensorBoardLogger(loggers.TensorBoardLogger):
    """Lightning's, but what cannot be written, on a full disk for example, waits: see `event_files`."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer. It is made when something is logged: importing TensorBoard takes a second."""
        if self._experiment is None:
            from latent_verse.training.event_files import EventWriter

            self._experiment = EventWriter(self.log_dir, **self._kwargs)
        return self._experiment

    @rank_zero_only
    def save(self) -> None:
        with suppress(OSError):  # of hparams.yaml, an empty file: what it would hold is in config.yaml
            super().save()


def as_text(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Lines of a CSV file."""
    out = io.StringIO()
    csv.DictWriter(out, columns, lineterminator="\n").writerows(rows)
    return out.getvalue()


def is_logged(trainer: pl.Trainer, made: bool = False) -> bool:
    """Whether Lightning logs the training step that is being computed, or the last one that was `made`."""
    step = trainer.global_step + (not made)
    return step % trainer.log_every_n_steps == 0 or step == trainer.max_steps


def over_processes(
    trainer: pl.Trainer, means: Mapping[str, Tensor], sums: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Values of one training step, of any shapes -> their `means` and `sums` over all processes, in one all-reduce.

    At steps that are logged only, since all processes wait for each other; at others they are this process's own.
    """
    values = {name: value.detach() for name, value in {**means, **(sums or {})}.items()}
    if trainer.world_size == 1 or not is_logged(trainer):
        return values
    flat = torch.cat([value.float().flatten() for value in values.values()])
    dist.all_reduce(flat)
    parts = zip(values.items(), flat.split([value.numel() for value in values.values()]), strict=True)
    total = {name: part.view(value.shape) for (name, value), part in parts}
    return total | {name: total[name] / trainer.world_size for name in means}
