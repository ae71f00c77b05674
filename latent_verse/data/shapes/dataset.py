"""Pairs of the shapes world as a dataset, and as files."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latent_verse.data import DataError
from latent_verse.data.images import SkipLog
from latent_verse.data.shapes.drawing import Scene
from latent_verse.data.shapes.world import World
from latent_verse.data.transforms import to_unit_range


class ShapesDataset(Dataset):
    """Pairs of one split of a world: item i of epoch e is (image, caption), a pure function of (seed, e, i).

    An index is i, which means epoch `self.epoch`, or (e, i), which samplers ask for. Each epoch has new captions, and
    with `fresh` also new scenes, which makes the split practically endless. Images are uint8 (3, H, W) with `as_uint8`,
    else float32 in [-1, 1]; H = W = world.image_size. In val and heldout no scene comes twice.

    Raises:
        DataError: the split has fewer scenes than `size`.
    """

    unit = "pair"

    def __init__(
        self,
        world: World,
        split: str = "train",
        size: int = 10_000,
        seed: int = 0,
        fresh: bool = False,
        as_uint8: bool = False,
    ):
        if size < 1:
            raise DataError(f"size is {size}; it must be at least 1.")
        self.world, self.split, self.size, self.seed = world, split, size, seed
        self.fresh, self.as_uint8 = fresh, as_uint8
        self.shape, self.skipped = (3, world.image_size, world.image_size), SkipLog(1)
        self.epoch = 0
        self._indices = range(size) if split == "train" or fresh else self._distinct()

    def _distinct(self) -> list[int]:
        """The first indices that give `size` scenes, none of them twice."""
        indices, seen = [], set()
        for index in itertools.count():
            key = self.world.key(self.world.scene(f"{self.seed}/0/{index}", self.split))
            if key not in seen:
                seen.add(key)
                indices.append(index)
            if len(indices) == self.size:
                return indices
            if index > 20 * (len(indices) + 10):
                raise DataError(
                    f"dataset_size is {self.size}, and the {self.split} split of the {self.world.name} shapes world "
                    f"has about {len(indices)} different scenes. Ask for fewer."
                )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, str]:
        epoch, i = key if isinstance(key, tuple) else (self.epoch, key)
        scene = self.scene((epoch, i))
        image = torch.from_numpy(np.array(self.world.render(scene))).permute(2, 0, 1).contiguous()
        caption = self.world.caption(scene, random.Random(f"{self.seed}/{epoch}/{i}"))
        return (image if self.as_uint8 else to_unit_range(image)), caption

    def scene(self, key: int | tuple[int, int]) -> Scene:
        """The scene of an item: the truth that answers are compared with."""
        epoch, i = key if isinstance(key, tuple) else (self.epoch, key)
        if not 0 <= i < self.size:
            raise IndexError(f"index {i} in a dataset of {self.size}")
        return self.world.scene(f"{self.seed}/{epoch if self.fresh else 0}/{self._indices[i]}", self.split)

    def captions(self, i: int, count: int = 5) -> list[str]:
        """Up to `count` different true captions of item i, as references; the same in every epoch."""
        return list(dict.fromkeys(self.sample_captions(i, 4 * count)))[:count]

    def sample_captions(self, i: int, count: int) -> list[str]:
        """`count` true captions of item i as the grammar samples them, frequent ones more than once."""
        scene, rng = self.scene(i), random.Random(f"{self.seed}/references/{i}")
        return [self.world.caption(scene, rng) for _ in range(count)]

    def image_path(self, i: int) -> None:
        """None: the images are generated."""

    def describe(self) -> dict[str, str | int]:
        return {"source": f"shapes {self.world.name} {self.split}", "pairs": self.size}


def write_pairs(
    world: World, folder: str | Path, count: int, split: str = "train", seed: int = 0, captions: int = 1
) -> None:
    """Write a pair folder: 00000.png, and 00000.txt with `captions` true captions, one per line, which may repeat."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dataset = ShapesDataset(world, split, count, seed)
    digits = max(5, len(str(count - 1)))
    for i in range(count):
        world.render(dataset.scene(i)).save(folder / f"{i:0{digits}d}.png")
        text = "\n".join(dataset.sample_captions(i, captions))
        (folder / f"{i:0{digits}d}.txt").write_text(text + "\n", encoding="utf-8")
