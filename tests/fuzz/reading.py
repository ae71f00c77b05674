"""Images and pairs, read as training, evaluation and generation read them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch

from latent_verse.commands.generate import one_line_errors  # as every program reports errors
from latent_verse.config.evaluate import EvalDataConfig
from latent_verse.config.train import ImageDataConfig, PairDataConfig
from latent_verse.data.datasets import open_images, open_pairs
from latent_verse.data.pairs import CaptionEncoder, all_captions
from latent_verse.data.shards import EvalShards, Shards, TrainShards
from latent_verse.data.text import BPETokenizer, Tokenizer
from latent_verse.evaluation.pairs import Pairs
from tests.fuzz.cases import Case

RESOLUTION = 16
SAMPLES = 40  # read of a stream


def checked(image, resolution: int = RESOLUTION) -> None:
    """What every image that is read has to be."""
    assert image.dtype == torch.uint8, image.dtype
    assert tuple(image.shape) == (3, resolution, resolution), image.shape


def read_all_images(config: ImageDataConfig) -> None:
    """Every image of both splits that a dataset opens, in two epochs of training."""
    for split, dataset in open_images(config, RESOLUTION, seed=1).items():
        for item in _items(dataset, train=split == "train"):
            if item is not None:
                checked(item[0])
                assert isinstance(item[1], int), item[1]


def read_all_pairs(config: PairDataConfig, tokenizer: Tokenizer | None = None) -> None:
    """Every image and caption, and a tokenizer that is trained on the captions and encodes them."""
    opened = open_pairs(config, RESOLUTION, seed=1)
    tokenizer = tokenizer or BPETokenizer.train(all_captions(opened["train"]), 300)
    encode = CaptionEncoder(tokenizer, 8, "truncate", tokenizer.vocab_size)
    for split, dataset in opened.items():
        for item in _items(dataset, train=split == "train"):
            if item is not None:
                checked(item[0])
                assert encode([item[1]]).shape == (1, 8)
                assert item[1].strip() and "\n" not in item[1], repr(item[1])


def _items(dataset, train: bool) -> Iterator:
    if isinstance(dataset, Shards):
        yield from TrainShards(dataset, 3, 4) if train else islice(EvalShards(dataset, 4), SAMPLES)
        return
    for epoch in range(2 if train else 1):
        for i in range(min(len(dataset), SAMPLES)):
            yield dataset[(epoch, i)]


def loader_case(read, replayed: str) -> Case:
    """A case of a function of the library, whose errors are printed as a command prints them."""
    return Case(one_line_errors(lambda: read() or 0), replayed)


def read_for_evaluation(config: EvalDataConfig) -> None:
    """The pairs as eval_biart.py reads them."""
    pairs = Pairs(config, RESOLUTION, seed=1)
    for sample in pairs.sample(SAMPLES, seed=1):
        if (image := pairs.image(sample.index)) is not None:
            checked(image)
        pairs.identity(sample.index)
    pairs.image_ids()
    assert pairs.about(pairs.sample(4, 1), 1)["sha256"]
