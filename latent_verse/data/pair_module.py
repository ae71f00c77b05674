"""PairDataModule: from the data settings to batches of pictures or codes with token ids, the same after a resume.

The loaders, their order and their exact resume are module.py's; a batch is
`[pictures float (B, 3, R, R) in [-1, 1], or codes int32 (B, N); ids (B, L) int64, filled with -1]`.
"""

from __future__ import annotations

import logging
import os
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from latent_verse.data import DataError
from latent_verse.data.images import SkipLog
from latent_verse.data.module import EpochBatches, EvalBatches, EvalLoader, ImageDataModule, TrainLoader
from latent_verse.data.pairs import (
    NO_TOKEN,
    PairCollate,
    PairEvalShards,
    PairTrainShards,
    check_captions,
    describe_shards,
    open_pairs,
    source_of,
)
from latent_verse.data.shapes import Scene, World
from latent_verse.data.shards import SKIP_SLOTS, count_images, find_shards, is_remote
from latent_verse.data.transforms import to_unit_range

log = logging.getLogger(__name__)


class Examples(NamedTuple):
    """A few pairs to look at: pictures (n, 3, R, R) in [-1, 1] or codes (n, N), captions, and the truth of shapes."""

    x: Tensor
    captions: list[str]
    world: World | None
    scenes: list[Scene]


class PairDataModule(ImageDataModule):
    """Loaders for training and validation. `tokenize_with` comes between `setup`, which finds the captions that a
    tokenizer may be trained on, and the loaders.

    Raises DataError, in `setup`, for data that cannot be used, and when the train loader is made, for fewer samples
    than one batch on each rank.
    """

    def __init__(self, data: Any, resolution: int, seed: int = 0):
        pl.LightningDataModule.__init__(self)  # ImageDataModule's own would check for layouts of pictures
        self.data, self.resolution, self.seed = data, resolution, seed
        self._sets: dict[str, Any] = {}  # split -> dataset, or list of shards
        self._skipped: dict[str, SkipLog] = {}
        self._collate: PairCollate | None = None

    def tokenize_with(self, tokenizer: Any, text_len: int, too_long: str) -> None:
        """Say how captions become ids; before any loader is asked for."""
        codes = getattr(next(iter(self._sets.values())), "meta", None)
        shape = (codes["image_len"],) if codes else (3, self.resolution, self.resolution)
        self._collate = PairCollate(tokenizer, text_len, too_long, shape)

    def dataset(self, split: str) -> Any:
        """The dataset of a split that `setup` has opened (a list of shards for webdataset); None if there is none."""
        return self._sets.get(split)

    def caption_ids(self, captions: list[str], pad: int) -> Tensor:
        """Captions as the loaders give them, ids (B, L), but filled with `pad`."""
        text_BL = self._collate.ids(captions)
        return text_BL.masked_fill(text_BL == NO_TOKEN, pad)

    def examples(self, count: int) -> Examples:
        """The first `count` validation pairs, the same on every rank; fewer where there are fewer."""
        dataset = self._sets.get("val")
        if isinstance(dataset, list):
            items = iter(PairEvalShards(dataset, self.resolution, count, as_uint8=True, skipped=SkipLog(SKIP_SLOTS)))
        else:
            items = (dataset[(0, i)] for i in range(len(dataset or ())))
        kept = []
        for item in items:
            if len(kept) == count:
                break
            if item is not None:
                kept.append(item)
        if not kept:
            where = describe_shards(dataset) if isinstance(dataset, list) else source_of(self.data, "val")
            raise DataError(
                f"val_dir: no pair of {where} can be used, caption and picture; the log says why. Give others, "
                "or none to train without validation."
            )
        world = getattr(dataset, "world", None)
        x = torch.stack([x if torch.is_tensor(x) else torch.from_numpy(x.astype("int64")) for x, _ in kept])
        scenes = [dataset.scene(i) for i in range(len(kept))] if world else []
        return Examples(to_unit_range(x) if x.dtype == torch.uint8 else x, [str(c) for _, c in kept], world, scenes)

    # ------------------------------------------------------------------------------------------- what the loaders need

    def _source(self, split: str, required: bool = False) -> str | None:
        source = source_of(self.data, split)
        if not source and split != "val" and required:
            raise DataError(f"{split}_dir is not set. Give --{split}_dir, or --fake_data for a smoke test.")
        return source or None

    def _open(self, split: str) -> Any:
        if self.data.dataset == "webdataset":
            self._skipped[split] = SkipLog(SKIP_SLOTS)
            shards = find_shards(self._source(split), f"{split}_dir")
            check_captions(shards, f"{split}_dir")
            return shards
        if self.data.dataset_size and self.data.dataset not in ("shapes", "fake"):
            log.warning("dataset_size has no effect with dataset %s: all its pairs are used.", self.data.dataset)
        dataset = open_pairs(self.data, split, self.resolution, self.seed)
        self._skipped[split] = getattr(dataset, "skipped", None) or SkipLog(1)
        return dataset

    def _samples(self, split: str) -> int | None:
        dataset = self._sets.get(split)
        if dataset is None or not isinstance(dataset, list):
            return None if dataset is None else len(dataset)
        if split == "train" and self.data.dataset_size:
            return self.data.dataset_size
        return None if any(map(is_remote, dataset)) else sum(map(count_images, dataset))

    def train_dataloader(self) -> TrainLoader:
        self.setup("fit")
        dataset, batch_size, (rank, world) = self._sets["train"], self.data.batch_size, self._rank_and_world()
        samples, workers = self._samples("train"), self._workers()
        if samples is None:
            raise DataError("the number of pairs in remote shards is not known: give --dataset_size N, for an epoch.")
        steps = samples // (batch_size * world)
        if not steps:
            raise DataError(
                f"{samples} training pairs are fewer than one batch on each process: batch_size {batch_size} x "
                f"{world} processes = {batch_size * world}. Lower batch_size, or give more data."
            )
        if not isinstance(dataset, list):
            source = EpochBatches(samples, batch_size, rank, world, self.seed)
            return TrainLoader(self._loader(dataset, batch_sampler=source), source, steps, batch_size * world, slots=0)
        source = PairTrainShards(
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

    def _eval_loader(self, split: str, stage: str) -> EvalLoader:
        self.setup(stage)
        dataset, batch_size, (rank, world) = self._sets[split], self.data.batch_size, self._rank_and_world()
        if not isinstance(dataset, list):
            batches = EvalBatches(len(dataset), batch_size, rank, world)
            return EvalLoader(self._loader(dataset, batch_sampler=batches), len(batches), world)
        source = PairEvalShards(
            dataset, self.resolution, batch_size, rank=rank, world=world, as_uint8=True, skipped=self._skipped[split]
        )
        loader = self._loader(source, batch_size=batch_size)
        return EvalLoader(loader, source.steps(self._workers()), world)

    def _loader(self, dataset: Any, **batching: Any) -> DataLoader:
        if self._collate is None:
            raise RuntimeError("tokenize_with has to be called before a loader is asked for")
        if self._workers():
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads of `tokenizers` do not survive a fork
        loader = super()._loader(dataset, **batching)
        loader.collate_fn = self._collate
        return loader
