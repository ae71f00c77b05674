"""ImageDataModule: from the data settings to batches on the device, the same ones again after a resume.

Batches travel as uint8 (a quarter of the bytes through workers, pinned memory and the bus) and become float [-1, 1] on
the device. A batch is `[images (B, 3, R, R), labels (B,)]`.

Training: TrainLoader is sized and stateful, so Lightning saves and restores it with its checkpoints, mid-epoch too. Its
state says how far the epoch has come, counted over all ranks; everything else follows from (seed, epoch). So
rank 0's state, the one that Lightning saves, is every rank's state, and does not depend on the number of workers.

Evaluation: every sample exactly once, no padded duplicates, and the same number of batches on every rank, else
collectives would hang. A rank that has run out gives batches of no images (B = 0); a single rank never does.

The trainer must be built with `use_distributed_sampler=False`: ranks are split here.
"""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from latent_verse.data import DataError
from latent_verse.data.images import FakeDataset, ImageDataset, ImageDataset2, MapImages, SkipLog
from latent_verse.data.transforms import Collate, sample_generator, to_unit_range

log = logging.getLogger(__name__)

FAKE_TRAIN, FAKE_VAL = 512, 64  # fake samples where dataset_size is not given
MAX_WORKERS = 16  # per process; more rarely helps and costs memory


class EpochBatches:
    """Batches of (epoch, index) for one rank: a permutation drawn from (seed, epoch), the last partial batch dropped.

    The ranks' batches of one step lie side by side in the permutation, so `k` steps use the same samples however they
    are split over ranks.
    """

    slots = 0  # the order depends on no number of workers or ranks

    def __init__(self, samples: int, batch_size: int, rank: int, world: int, seed: int):
        self.samples, self.batch_size, self.rank, self.world, self.seed = samples, batch_size, rank, world, seed
        self.epoch = self.first = 0

    def start_at(self, epoch: int, batch: int) -> None:
        self.epoch, self.first = epoch, batch

    def __len__(self) -> int:
        return self.samples // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = torch.randperm(self.samples, generator=sample_generator(self.seed, epoch))
        for step in range(self.first, len(self)):
            start = (step * self.world + self.rank) * self.batch_size
            yield [(epoch, index) for index in order[start : start + self.batch_size].tolist()]


class EvalBatches:
    """Batches of indices for one rank: rank, rank + world, ...; empty ones where other ranks still have samples."""

    def __init__(self, samples: int, batch_size: int, rank: int, world: int):
        self.mine, self.batch_size = range(rank, samples, world), batch_size
        self.steps = math.ceil(math.ceil(samples / world) / batch_size)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            yield list(self.mine[step * self.batch_size : (step + 1) * self.batch_size])


def ignore_sigterm(worker: int) -> None:
    """For loader processes: Slurm signals them too, and one that dies would end the run before it has saved.

    They end when the training process shuts them down, or is gone.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Loader:
    """Holds a DataLoader. Lightning looks for `_iterator` to end its workers when it is done with them.

    Left to the garbage collector, which may close their queues first, each would be waited for in vain for 5 seconds.
    """

    def __init__(self, loader: DataLoader):
        self._loader = loader

    @property
    def _iterator(self) -> Any:
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._loader._iterator = value


class TrainLoader(_Loader):
    """A DataLoader that knows its epoch, has a length and continues where its state says.

    Written here rather than taken from torchdata, whose StatefulDataLoader keeps the state of each worker process, and
    so can resume only with the same number of them; here two counts say everything. `source` is what decides the
    order, EpochBatches or TrainShards: its `start_at(epoch, batch)` is called before each pass.
    """

    def __init__(self, loader: DataLoader, source: Any, steps: int, global_batch: int, slots: int):
        super().__init__(loader)
        self._source, self._steps = source, steps
        self._global_batch, self._slots = global_batch, slots
        self.epoch, self.done = 0, 0  # batches handed out in this epoch
        self._resume = False

    @property
    def sampler(self) -> TrainLoader:
        return self  # Lightning calls `loader.sampler.set_epoch` before each epoch

    def __len__(self) -> int:
        return self._steps

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next. A restored position in this very epoch is kept."""
        if epoch != self.epoch:
            self.epoch, self.done, self._resume = epoch, 0, False

    def __iter__(self) -> Iterator[list[Tensor]]:
        # Runs at the first `next`, after set_epoch: Lightning makes the iterator first and names the epoch afterwards.
        if self.done >= self._steps:  # a pass is complete, and nobody named the next epoch
            self.epoch, self.done = self.epoch + 1, 0
        elif not self._resume:
            self.done = 0
        self._resume = False
        self._source.start_at(self.epoch, self.done)
        for batch in self._loader:
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, the samples all ranks have used in it, and what their order depends on."""
        return {"epoch": self.epoch, "samples": self.done * self._global_batch, "slots": self._slots}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if state["slots"] != self._slots:
            log.warning(
                "The order of webdataset samples depends on ranks x workers: %d in the checkpoint, %d now. "
                "This epoch continues with other samples; set --num_workers as before for an exact resume.",
                state["slots"],
                self._slots,
            )
        self.epoch, self.done = state["epoch"], min(state["samples"] // self._global_batch, self._steps)
        self._resume = True


class EvalLoader(_Loader):
    """A DataLoader for evaluation. On a single rank it passes over batches whose samples were all unreadable."""

    def __init__(self, loader: DataLoader, steps: int | None, world: int):
        self._loader, self._steps, self._world = loader, steps, world

    def __len__(self) -> int:
        if self._steps is None:
            raise TypeError("the number of samples in remote shards is not known before they are read")
        return self._steps

    def __iter__(self) -> Iterator[list[Tensor]]:
        for batch in self._loader:
            if len(batch[0]) or self._world > 1:
                yield batch


class ImageDataModule(pl.LightningDataModule):
    """Loaders for training, validation and test from the data settings (`config.DataConfig`, or what has its fields).

    `seed` decides the order and the crops. Raises DataError, in `setup`, for data that cannot be used, and when the
    train loader is made, for fewer samples than one batch on each rank.
    """

    def __init__(self, data: Any, resolution: int, seed: int = 0):
        super().__init__()
        if data.dataset not in ("imagefolder", "flat", "webdataset", "fake"):
            raise DataError(f"dataset is {data.dataset!r}; choose imagefolder, flat, webdataset or fake.")
        if data.batch_size < 1:
            raise DataError(f"batch_size is {data.batch_size}; it must be at least 1.")
        self.data, self.resolution, self.seed = data, resolution, seed
        self._sets: dict[str, Any] = {}  # split -> dataset, or list of shards
        self._skipped: dict[str, SkipLog] = {}

    def setup(self, stage: str | None = None) -> None:
        """Finds and checks the data of `stage` (all of it without one). What is there already stays as it is."""
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), None: ("train", "val", "test")}
        for split in splits.get(stage, ()):
            if split not in self._sets and self._source(split, required=stage is not None):
                self._sets[split] = self._open(split)

    def _source(self, split: str, required: bool = False) -> str | None:
        """The folder of `split`; test falls back to val. DataError where a required one is not set."""
        if self.data.dataset == "fake":
            return "fake"
        source = getattr(self.data, f"{split}_dir")
        if not source and split == "test":
            source = self.data.val_dir
        if not source and split != "val" and required:
            raise DataError(f"{split}_dir is not set. Give --{split}_dir FOLDER, or --fake_data for a smoke test.")
        return source or None

    def _open(self, split: str) -> Any:
        source, train = self._source(split), split == "train"
        key = split if split != "test" or self.data.test_dir else "val"
        options = {"train": train, "seed": self.seed, "as_uint8": True}
        if self.data.dataset == "fake":
            length = (self.data.dataset_size or FAKE_TRAIN) if train else FAKE_VAL
            dataset: Any = FakeDataset(length, self.resolution, **options)
        elif self.data.dataset == "webdataset":
            from latent_verse.data.shards import SKIP_SLOTS, find_shards

            self._skipped[split] = SkipLog(SKIP_SLOTS)
            return find_shards(source, f"{key}_dir")
        else:
            if self.data.dataset_size:
                log.warning("dataset_size has no effect with dataset %s: all its images are used.", self.data.dataset)
            kind = ImageDataset if self.data.dataset == "imagefolder" else ImageDataset2
            dataset = kind(source, self.resolution, resize_ratio=self.data.resize_ratio, key=f"{key}_dir", **options)
        self._skipped[split] = dataset.skipped
        return dataset

    @property
    def has_val(self) -> bool:
        """Whether there is anything to validate on."""
        return self._source("val") is not None

    def _samples(self, split: str) -> int | None:
        """Samples in `split`: those of an epoch in training; None if not known."""
        dataset = self._sets.get(split)
        if dataset is None or isinstance(dataset, MapImages):
            return None if dataset is None else len(dataset)
        from latent_verse.data.shards import count_images, is_remote

        if split == "train" and self.data.dataset_size:
            return self.data.dataset_size
        return None if any(map(is_remote, dataset)) else sum(map(count_images, dataset))

    def describe(self) -> dict[str, Any]:
        """Counts for the log: samples of each split (None: not known or not used), and files skipped by this rank."""
        counts = {split: self._samples(split) for split in ("train", "val", "test")}
        return {"dataset": self.data.dataset, **counts, "skipped": self.skipped, "workers": self._workers()}

    @property
    def skipped(self) -> int:
        """Unreadable files that this rank has passed over so far, each counted once."""
        return sum({id(skips): skips.count for skips in self._skipped.values()}.values())

    def train_dataloader(self) -> TrainLoader:
        self.setup("fit")
        dataset, batch_size, (rank, world) = self._sets["train"], self.data.batch_size, self._rank_and_world()
        samples, workers = self._samples("train"), self._workers()
        if samples is None:
            raise DataError(
                "the number of samples in remote shards is not known before they are read. "
                "Give --dataset_size N, the training samples of one epoch."
            )
        steps = samples // (batch_size * world)
        if not steps:
            raise DataError(
                f"{samples} training samples are fewer than one batch on each process: batch_size {batch_size} x "
                f"{world} processes = {batch_size * world}. Lower batch_size"
                f"{f' to {samples // world} or less' if samples >= world else ''}, or give more data."
            )
        if isinstance(dataset, MapImages):
            source = EpochBatches(samples, batch_size, rank, world, self.seed)
            loader = self._loader(dataset, batch_sampler=source)
            return TrainLoader(loader, source, steps, batch_size * world, slots=0)
        from latent_verse.data.shards import TrainShards

        source = TrainShards(
            dataset,
            self.resolution,
            steps,
            batch_size,
            resize_ratio=self.data.resize_ratio,
            seed=self.seed,
            shuffle_buffer=self.data.shuffle_buffer,
            rank=rank,
            world=world,
            as_uint8=True,
            skipped=self._skipped["train"],
        )
        loader = self._loader(source, batch_size=batch_size, drop_last=True)
        return TrainLoader(loader, source, steps, batch_size * world, slots=world * max(1, workers))

    def val_dataloader(self) -> EvalLoader | list:
        if not self.has_val:
            log.info("No val_dir: training without validation.")
            return []
        return self._eval_loader("val", "validate")

    def test_dataloader(self) -> EvalLoader:
        if self.data.dataset != "fake" and not self.data.test_dir and self.data.val_dir:
            log.info("No test_dir: testing on val_dir, %s.", self.data.val_dir)
        return self._eval_loader("test", "test")

    def _eval_loader(self, split: str, stage: str) -> EvalLoader:
        self.setup(stage)
        dataset, batch_size, (rank, world) = self._sets[split], self.data.batch_size, self._rank_and_world()
        if isinstance(dataset, MapImages):
            batches = EvalBatches(len(dataset), batch_size, rank, world)
            return EvalLoader(self._loader(dataset, batch_sampler=batches), len(batches), world)
        from latent_verse.data.shards import EvalShards

        source = EvalShards(
            dataset, self.resolution, batch_size, rank=rank, world=world, as_uint8=True, skipped=self._skipped[split]
        )
        loader = self._loader(source, batch_size=batch_size)
        return EvalLoader(loader, source.steps(self._workers()), world)

    def _loader(self, dataset: Any, **batching: Any) -> DataLoader:
        workers = self._workers()
        if workers:
            batching |= {"prefetch_factor": self.data.prefetch_factor, "persistent_workers": True}
            batching |= {"worker_init_fn": ignore_sigterm}
        return DataLoader(
            dataset,
            num_workers=workers,
            collate_fn=Collate(self.resolution),
            pin_memory=torch.cuda.is_available(),
            # DataLoader draws a seed for each pass; from the global generator that would shift the model's dropout
            generator=torch.Generator(),
            **batching,
        )

    def _workers(self) -> int:
        """num_workers, or this process's share of the cores it may use, at most 16."""
        if self.data.num_workers is not None:
            return self.data.num_workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = self.trainer.num_devices if self.trainer else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return max(1, min(MAX_WORKERS, cores // max(1, processes)))

    def _rank_and_world(self) -> tuple[int, int]:
        """Of the process group if there is one, else of the trainer, else of the launcher's environment."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """uint8 -> float in [-1, 1], on the device."""
        images, labels = batch
        return [to_unit_range(images) if images.dtype == torch.uint8 else images, labels]
