"""The images and captions that an evaluation reads, and the fixed sample of captions that it generates images for.

The sample depends on the seed and the images' names alone, not on the order of files, the machine or the version of a
random number generator. Images are ordered by SHA-256 of "<seed>/<name>"; each pass over them takes one more caption of
every image, in the order of SHA-256 of "<seed>/<name>/<number>". So the first 30,000 captions of COCO's validation set
are of 30,000 different images.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from latent_verse.config.evaluate import EvalDataConfig
from latent_verse.config.train import PairDataConfig
from latent_verse.data.caption_files import coco_number, identifier
from latent_verse.data.datasets import PAIRS, Given, Split

GENERATED_SIZES = {"shapes": 256, "fake": 32}  # pairs where test_size does not say
RULE = "images by SHA-256 of seed/name, one caption each by SHA-256 of seed/name/number; then the next captions"


@dataclass(frozen=True)
class Sample:
    """One caption of the fixed sample: of image `index`."""

    index: int
    caption: str


class Pairs:
    """A dataset of pairs as evaluation sees it: images by number, all captions of each, and names that never change.

    Attributes:
        names: of each image: its file's name, with the folders that distinguish it from others; a number if made up.
        ids: of each image, in the captions file; empty if they do not identify all images.
        made_up: whether there are no files.
        left_out: how many images and captions the data has that cannot be used, by reason.
        unreadable: numbers of images that could not be read; complete once all have been asked for.
    """

    def __init__(self, data: EvalDataConfig, resolution: int, seed: int):
        self.unreadable: set[int] = set()
        self.dataset = PAIRS[data.dataset](
            Split(
                name=data.split if data.dataset == "shapes" else "test",
                data=PairDataConfig(dataset=data.dataset, world=data.world),
                resolution=resolution,
                seed=seed,
                augment=False,
                folder=Given("test_dir", data.test_dir),
                captions=Given("test_captions", data.test_captions),
                size=data.test_size or GENERATED_SIZES.get(data.dataset),
            )
        )
        self.world = self.dataset.world if data.dataset == "shapes" else None
        paths = [self.dataset.image_path(i) for i in range(len(self.dataset))]
        self.made_up = made = None in paths
        known = getattr(self.dataset, "ids", {})
        ids = [known.get(path) for path in paths]
        self.ids = ids if None not in ids and len(set(map(identifier, ids))) == len(ids) else []
        root = None if made else os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        self.names = [str(i) if made else os.path.relpath(os.path.abspath(path), root) for i, path in enumerate(paths)]
        self.source = self.dataset.describe()["source"]
        self.left_out = {what: n for what, n in getattr(self.dataset, "left_out", {}).items() if n}

    def __len__(self) -> int:
        return len(self.names)

    def image(self, i: int) -> Tensor | None:
        """Image i as uint8 (3, R, R), resized and cropped as everywhere in evaluation; None if it cannot be read."""
        item = self.dataset[(0, i)]
        if item is None:
            self.unreadable.add(i)
            return None
        return item[0]

    def identity(self, i: int) -> str:
        """What distinguishes image i from another one of its name: the name and the size of its file."""
        path = self.dataset.image_path(i)
        return f"{self.names[i]} {os.path.getsize(path)}" if path and os.path.isfile(path) else self.names[i]

    def captions(self, i: int) -> list[str]:
        """All captions of image i."""
        return [str(caption) for caption in self.dataset.captions(i)]

    def image_ids(self) -> list[int | str]:
        """The captions file's ids, or those in COCO's file names; else the names, or numbers for made-up images."""
        if self.ids:
            return self.ids
        numbers = [coco_number(name) for name in self.names]
        if None not in numbers and len(set(numbers)) == len(numbers):
            return numbers
        return [int(name) for name in self.names] if self.made_up else self.names

    def sample(self, count: int, seed: int) -> list[Sample]:
        """The first `count` captions of the fixed sample, or all there are."""
        return list(itertools.islice(self._in_order(seed), count))

    def _in_order(self, seed: int) -> Iterator[Sample]:
        captions = {}
        for i in ordered(self.names, seed):
            texts = self.captions(i)
            captions[i] = [texts[n] for n in ordered([f"{self.names[i]}/{n}" for n in range(len(texts))], seed)]
            yield from (Sample(i, text) for text in captions[i][:1])
        for turn in range(1, max(map(len, captions.values()), default=0)):
            yield from (Sample(i, texts[turn]) for i, texts in captions.items() if turn < len(texts))

    def about(self, chosen: list[Sample], seed: int) -> dict[str, int | str]:
        """The sample as metrics.json describes it, with a hash of its names and captions."""
        lines = "\n".join(json.dumps([self.names[s.index], s.caption], ensure_ascii=False) for s in chosen)
        digest = hashlib.sha256(lines.encode("utf-8", "replace")).hexdigest()[:16]
        images = len({s.index for s in chosen})
        return {"captions": len(chosen), "pictures": images, "seed": seed, "rule": RULE, "sha256": digest}


def ordered(names: Sequence[str], seed: int) -> list[int]:
    """The numbers of names in the order of the fixed sample."""
    keys = [hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest() for name in names]
    return sorted(range(len(names)), key=keys.__getitem__)
