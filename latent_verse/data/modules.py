"""ImageDataModule and PairDataModule: from datasets to batches on the device, the same ones again after a resume.

Images travel as uint8 (a quarter of the bytes) and become float [-1, 1] on the device.

Training: TrainLoader has a length and a state, which Lightning saves and restores with its checkpoints, also in the
middle of an epoch. The state says how far the epoch has come, counted over all ranks; everything else follows from
(seed, epoch). So the state of rank 0, which Lightning saves, is that of every rank, for any number of workers.

Evaluation: every sample comes exactly once. Every rank has the same number of batches, since collectives would hang
otherwise: a rank that has no samples left gives empty batches (B = 0). A single rank never does.

Build the trainer with `use_distributed_sampler=False`: samples are split over ranks here.

Loader processes end with this one, whatever ends it: loader_processes.py, `ImageDataModule.on_exception`.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latent_verse.config.train import ImageDataConfig, PairDataConfig
from latent_verse.data import DataError, loader_processes
from latent_verse.data.datasets import MapDataset
from latent_verse.data.loader_processes import Loader, WorkerInit, check_shared_memory, worker_count
from latent_verse.data.pairs import CaptionEncoder, PairData, text_of
from latent_verse.data.shapes import Scene, World
from latent_verse.data.shards import EvalShards, Shards, TrainShards
from latent_verse.data.transforms import Collate, labels, sample_generator, to_unit_range

log = logging.getLogger(__name__)


class EpochBatches:
    """Batches of (pass, index) for one rank: permutations of all samples, one after another, cut into epochs of `size`.

    The permutation of a pass follows from (seed, pass). By default an epoch is a pass. In an epoch of more samples than
    there are, each comes again in a later pass, and so with another crop. No batch is partial.
    The ranks' batches of a step lie side by side, so `k` steps use the same samples for any number of ranks.
    """

    def __init__(self, samples: int, batch_size: int, rank: int, world: int, seed: int, size: int | None = None):
        self.samples, self.batch_size, self.rank, self.world, self.seed = samples, batch_size, rank, world, seed
        self.size = size or samples
        self.epoch = self.first = 0

    def start_at(self, epoch: int, batch: int) -> None:
        self.epoch, self.first = epoch, batch

    def __len__(self) -> int:
        return self.size // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first, current, order = self.epoch * self.size, -1, torch.empty(0, dtype=torch.int64)
        for step in range(self.first, len(self)):
            batch: list[tuple[int, int]] = []
            start = first + (step * self.world + self.rank) * self.batch_size
            while len(batch) < self.batch_size:  # it may reach into the next pass
                this_pass, place = divmod(start + len(batch), self.samples)
                if this_pass != current:
                    generator = sample_generator(self.seed, this_pass)
                    current, order = this_pass, torch.randperm(self.samples, generator=generator)
                indices = order[place : place + self.batch_size - len(batch)].tolist()
                batch += [(this_pass, index) for index in indices]
            yield batch


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


AnyLoader = TypeVar("AnyLoader", bound=Loader)


class TrainLoader(Loader):
    """A DataLoader that has a length and continues where its state says: two counts, for any number of workers.

    `source` decides the order: `start_at(epoch, batch)` is called before each pass.
    """

    def __init__(
        self, loader: DataLoader, source: EpochBatches | TrainShards, steps: int, global_batch: int, slots: int
    ):
        super().__init__(loader)
        self._source, self._steps, self._global_batch, self._slots = source, steps, global_batch, slots
        self.epoch, self.done = 0, 0  # `done`: batches given in this epoch
        self._resume = False

    @property
    def sampler(self) -> TrainLoader:
        return self  # Lightning calls `loader.sampler.set_epoch` before each epoch

    def __len__(self) -> int:
        return self._steps

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next. A restored position in this epoch is kept."""
        if epoch != self.epoch:
            self.epoch, self.done, self._resume = epoch, 0, False

    def __iter__(self) -> Iterator[list[Tensor]]:
        # Runs at the first `next`, after set_epoch: Lightning makes the iterator first and sets the epoch afterwards.
        if self.done >= self._steps:  # a pass is complete, and nobody has set the next epoch
            self.epoch, self.done = self.epoch + 1, 0
        elif not self._resume:
            self.done = 0
        self._resume = False
        self._source.start_at(self.epoch, self.done)
        for batch in self.batches():
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, the samples all ranks have used in it, and what their order depends on."""
        return {"epoch": self.epoch, "samples": self.done * self._global_batch, "slots": self._slots}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken."""
        if state["slots"] != self._slots:
            log.warning(
                "The order of webdataset samples depends on ranks x workers: %d in the checkpoint, %d now. "
                "This epoch continues with different samples; for an exact resume set --num_workers as before.",
                state["slots"],
                self._slots,
            )
        self.epoch, self.done = state["epoch"], min(state["samples"] // self._global_batch, self._steps)
        self._resume = True


class EvalLoader(Loader):
    """A DataLoader for evaluation. On a single rank it skips batches whose samples were all unreadable."""

    def __init__(self, loader: DataLoader, steps: int | None, world: int):
        super().__init__(loader)
        self._steps, self._world = steps, world

    def __len__(self) -> int:
        if self._steps is None:
            raise TypeError("the number of samples in remote shards is not known before they are read")
        return self._steps

    def __iter__(self) -> Iterator[list[Tensor]]:
        for batch in self.batches():
            if len(batch[0]) or self._world > 1:
                yield batch


class ImageDataModule(pl.LightningDataModule):
    """Loaders of images: batches are `[images (B, 3, R, R), labels (B,)]`.

    Args:
        datasets: by split, as `datasets.open_images` gives them. Without "val" there is no validation.
        seed: of the order.
        targets: makes a tensor of what comes with the images.
    """

    def __init__(
        self,
        datasets: Mapping[str, MapDataset | Shards],
        data: ImageDataConfig,
        seed: int = 0,
        targets: Callable[[list], Tensor] = labels,
    ):
        super().__init__()
        self.datasets, self.data, self.seed = dict(datasets), data, seed
        self.collate = Collate(next(iter(self.datasets.values())).shape, targets)
        self._loaders: list[Loader] = []

    def on_exception(self, exception: BaseException) -> None:
        """Kill the loader processes of a run that has failed or was stopped."""
        for loader in self._loaders:
            loader.kill()

    @property
    def has_val(self) -> bool:
        """Whether there is anything to validate on."""
        return "val" in self.datasets

    @property
    def workers(self) -> int:
        """Loader processes of this training process."""
        return worker_count(self.data.num_workers, self.trainer.num_devices if self.trainer else None)

    @property
    def skipped(self) -> int:
        """Unreadable files that this rank has skipped so far, each counted once."""
        return sum(dataset.skipped.count for dataset in self.datasets.values())

    def samples(self, split: str) -> int | None:
        """Samples of a split; None if there is no such split, or their number is unknown."""
        dataset = self.datasets.get(split)
        if dataset is None or isinstance(dataset, Shards):
            return dataset and dataset.samples
        return len(dataset)

    def train_dataloader(self) -> TrainLoader:
        """This rank's batches of an epoch: of `dataset_size` samples, or of all.

        Raises:
            DataError: fewer samples than one batch on each process, or their number is not known.
        """
        dataset, batch_size, (rank, world) = self.datasets["train"], self.data.batch_size, self._rank_and_world()
        samples = self.samples("train")
        if samples is None:
            raise DataError(
                "remote shards have no known size: give --dataset_size N, the training samples of an epoch."
            )
        size = self.data.dataset_size or samples
        steps = size // (batch_size * world)
        if not steps:
            more = "raise dataset_size" if self.data.dataset_size else "give more data"
            raise DataError(
                f"{size} training samples are fewer than one batch on each process: batch_size {batch_size} x "
                f"{world} processes = {batch_size * world}. Lower batch_size"
                f"{f' to {size // world} or less' if size >= world else ''}, or {more}."
            )
        if isinstance(dataset, Shards):
            source = TrainShards(dataset, steps, batch_size, rank, world)
            loader, slots = self._loader(source, batch_size=batch_size, drop_last=True), world * max(1, self.workers)
        else:
            source = EpochBatches(samples, batch_size, rank, world, self.seed, size)
            loader, slots = self._loader(dataset, batch_sampler=source), 0  # the order does not depend on workers
        return self._kept(TrainLoader(loader, source, steps, batch_size * world, slots))

    def val_dataloader(self) -> EvalLoader | list:
        """This rank's batches of validation; an empty list without validation data."""
        if not self.has_val:
            log.info("No val_dir: training without validation.")
            return []
        return self._eval_loader("val")

    def test_dataloader(self) -> EvalLoader:
        """This rank's batches of the test split."""
        return self._eval_loader("test")

    def _eval_loader(self, split: str) -> EvalLoader:
        dataset, batch_size, (rank, world) = self.datasets[split], self.data.batch_size, self._rank_and_world()
        if isinstance(dataset, Shards):
            source = EvalShards(dataset, batch_size, rank, world)
            loader = self._loader(source, batch_size=batch_size)
            return self._kept(EvalLoader(loader, source.steps(self.workers), world))
        batches = EvalBatches(len(dataset), batch_size, rank, world)
        return self._kept(EvalLoader(self._loader(dataset, batch_sampler=batches), len(batches), world))

    def _kept(self, loader: AnyLoader) -> AnyLoader:
        self._loaders.append(loader)
        return loader

    def _loader(self, dataset: Dataset, **batching: Any) -> DataLoader:
        workers = self.workers
        if workers:
            item = math.prod(self.collate.shape) * (
                1 if len(self.collate.shape) > 1 else 4
            )  # uint8 images, int32 codes
            here = self.trainer.num_devices if self.trainer else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            check_shared_memory(workers, here, self.data.prefetch_factor * self.data.batch_size * item)
            batching |= {"prefetch_factor": self.data.prefetch_factor, "persistent_workers": True}
            batching |= {"worker_init_fn": WorkerInit(), "timeout": loader_processes.PATIENCE}
        return DataLoader(
            dataset,
            num_workers=workers,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
            # each pass takes a seed; from the global generator that would shift the model's dropout
            generator=torch.Generator(),
            **batching,
        )

    def _rank_and_world(self) -> tuple[int, int]:
        """Of the process group if there is one, else of the trainer, else of the launcher's environment."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        """uint8 -> float in [-1, 1], on the device."""
        x, others = batch
        return [to_unit_range(x) if x.dtype == torch.uint8 else x, others]


class Examples(NamedTuple):
    """A few pairs to look at."""

    x: Tensor  # images (n, 3, R, R) in [-1, 1], or codes (n, N)
    captions: list[str]
    text_BL: Tensor  # the captions' ids, padded as in training
    world: World | None  # the shapes world they come from, if they do
    scenes: list[Scene]  # the truth behind each image of shapes


class PairDataModule(ImageDataModule):
    """Loaders of pairs: batches are `[images (B, 3, R, R) or codes int32 (B, N), ids (B, L)]`.

    Args:
        datasets: by split, as `datasets.open_pairs` gives them.
        encode: captions -> ids; its tokenizer may have been trained on `datasets["train"]`.
    """

    def __init__(self, datasets: Mapping[str, PairData], data: PairDataConfig, seed: int, encode: CaptionEncoder):
        super().__init__(datasets, data, seed, encode)
        if self.workers:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads of `tokenizers` do not survive a fork

    def examples(self, count: int) -> Examples:
        """The first `count` validation pairs, the same on every rank; fewer where there are fewer.

        Raises:
            DataError: none of them can be used.
        """
        dataset = self.datasets["val"]
        if isinstance(dataset, Shards):
            items = iter(EvalShards(dataset, count))
        else:
            items = (dataset[(0, i)] for i in range(len(dataset)))
        kept = list(itertools.islice((item for item in items if item is not None), count))
        if not kept:
            raise DataError(
                f"val_dir: no pair of {dataset.describe()['source']} can be used, caption and image; the log says why. "
                "Give others, or none to train without validation."
            )
        x, text_BL = self.on_after_batch_transfer(self.collate(kept), 0)
        world = getattr(dataset, "world", None)
        scenes = [dataset.scene(i) for i in range(len(kept))] if world else []
        return Examples(x, [text_of(caption) for _, caption in kept], text_BL, world, scenes)
