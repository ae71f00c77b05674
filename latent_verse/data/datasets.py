"""Every dataset of both stages by name, and what opens a split of it. The settings they need: config/datasets.py.

To add one, write its class, add a function that opens a split of it to IMAGES or PAIRS, and its name with the settings
it needs to config/datasets.py (docs/extending.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from latent_verse.config.datasets import IMAGE_DATASETS, PAIR_DATASETS, Layout, setting_of
from latent_verse.config.messages import counted
from latent_verse.config.train import ImageDataConfig, PairDataConfig
from latent_verse.data import DataError
from latent_verse.data.captions import CocoCaptions, FakePairs, KarpathyCaptions, PairFolder, TableCaptions
from latent_verse.data.codes import CodesDataset
from latent_verse.data.folders import describe_found
from latent_verse.data.images import FakeDataset, FlatImages, ImageDataset, MapImages
from latent_verse.data.pairs import PairData, PairShards
from latent_verse.data.shapes import ShapesDataset, World
from latent_verse.data.shards import Shards

log = logging.getLogger(__name__)

# Read by index: `dataset[(epoch, i)]` is (image, label), or of pairs (image or codes, caption). The others are Shards.
MapDataset = MapImages | CodesDataset | ShapesDataset
Opened = TypeVar("Opened")


class Given(NamedTuple):
    """A setting's name, for error messages, and its value."""

    setting: str
    value: str | None


@dataclass(frozen=True)
class Split:
    """The split to open."""

    name: str  # train, val or test; for shapes also heldout
    data: ImageDataConfig  # the settings of the section `data`
    resolution: int
    seed: int
    augment: bool  # random crops, and new scenes of shapes in each epoch
    folder: Given
    captions: Given
    size: int | None = None  # images of a generated dataset or of an epoch of shards; None if the settings do not say

    def size_or(self, train: int, other: int) -> int:
        """`size`, or if the settings do not say, `train` for the training split and `other` for the others."""
        return self.size or (train if self.name == "train" else other)

    @property
    def files(self) -> dict[str, Any]:
        """The arguments of every dataset of image files."""
        crops = {"resize_ratio": self.data.resize_ratio, "train": self.augment, "seed": self.seed}
        return {"resolution": self.resolution, "as_uint8": True, **crops}

    @property
    def stream(self) -> dict[str, Any]:
        """The arguments of tar shards."""
        crops = {"resize_ratio": self.data.resize_ratio, "seed": self.seed, "shuffle_buffer": self.data.shuffle_buffer}
        size = self.size if self.name == "train" else None
        source = {"key": self.folder.setting, "allow_pipe": self.data.allow_pipe}
        return {"resolution": self.resolution, "size": size, **source, **crops}


def open_coco(split: Split) -> CocoCaptions:
    """The captions file that is given, or the one that COCO puts beside the folder of images."""
    folder, captions = split.folder.value, split.captions.value
    if not captions:
        place = Path(folder)
        captions = place.parent / "annotations" / f"captions_{place.name}.json"  # beside train2017/
        if not captions.is_file():
            raise DataError(f"{split.captions.setting} is not given, and COCO's own {captions} does not exist.")
    return CocoCaptions(captions, folder, key=split.folder.setting, captions_key=split.captions.setting, **split.files)


def open_karpathy(split: Split) -> KarpathyCaptions:
    """A split of Karpathy's file, which holds them all."""
    name = "train+restval" if split.name == "train" else split.name
    keys = {"key": split.folder.setting, "captions_key": split.captions.setting}
    return KarpathyCaptions(split.captions.value, split.folder.value, split=name, **keys, **split.files)


def open_shapes(split: Split) -> ShapesDataset:
    """A split of the shapes world that the settings name."""
    world = World.preset(split.data.world)
    if world.image_size != split.resolution:
        raise DataError(
            f"world: {world.name} has images of {world.image_size} px, but {split.resolution} px are asked for (the "
            "AugVAE's, or fid_resolution). Choose the world whose images the AugVAE was trained on."
        )
    size = split.size_or(10_000, 256)
    return ShapesDataset(world, split.name, size, split.seed, fresh=split.augment, as_uint8=True)


def open_fake(split: Split, kind: Callable[..., Opened]) -> Opened:
    """Generated images, or pairs of them."""
    return kind(split.size_or(512, 64), split.resolution, split.augment, seed=split.seed, as_uint8=True)


IMAGES: dict[str, Callable[[Split], MapDataset | Shards]] = {
    "imagefolder": lambda s: ImageDataset(s.folder.value, key=s.folder.setting, **s.files),
    "flat": lambda s: FlatImages(s.folder.value, key=s.folder.setting, **s.files),
    "webdataset": lambda s: Shards(s.folder.value, **s.stream),
    "fake": lambda s: open_fake(s, FakeDataset),
}

PAIRS: dict[str, Callable[[Split], PairData]] = {
    "pairs": lambda s: PairFolder(s.folder.value, key=s.folder.setting, **s.files),
    "coco": open_coco,
    "karpathy": open_karpathy,
    "table": lambda s: TableCaptions(s.captions.value, captions_key=s.captions.setting, **s.files),
    "webdataset": lambda s: PairShards(s.folder.value, **s.stream),
    "codes": lambda s: CodesDataset(s.folder.value, s.augment, s.seed, s.folder.setting),
    "shapes": open_shapes,
    "fake": lambda s: open_fake(s, FakePairs),
}


def open_images(
    data: ImageDataConfig, resolution: int, seed: int = 0, splits: Sequence[str] = ("train", "val")
) -> dict[str, MapDataset | Shards]:
    """The datasets of images that the settings name, by split; without val where it is not given.

    Args:
        splits: of train, val and test; test falls back to the settings of val.

    Raises:
        DataError: a dataset is missing, empty or unreadable; the message names the setting and the file.
    """
    return _open(IMAGES, IMAGE_DATASETS, data, resolution, seed, splits)


def open_pairs(
    data: PairDataConfig,
    resolution: int,
    seed: int = 0,
    splits: Sequence[str] = ("train", "val"),
    augment: bool | None = None,
) -> dict[str, PairData]:
    """The same with captions.

    Args:
        augment: random crops, and new scenes of shapes in each epoch; by default for train only.
    """
    return _open(PAIRS, PAIR_DATASETS, data, resolution, seed, splits, augment)


def how_many(dataset: MapDataset | PairData | Shards) -> str:
    """What a split holds, in words, and what lies beside it that is not read: `43 images (6 .heic, 1 .svg not read)`.

    Pairs are counted as pairs, and shards whose samples nobody has counted as shards: `3 shards`.

    Raises:
        DataError: a local shard holds no image, or cannot be read.
    """
    if not isinstance(dataset, Shards):
        return describe_found(len(dataset), dataset.unit, getattr(dataset, "others", {}))
    shards = counted(len(dataset.shards), "shard")
    if dataset.samples is None:
        return shards
    return f"{describe_found(dataset.samples, dataset.unit, dataset.others)} in {shards}"


def source_of(data: PairDataConfig, split: str) -> str:
    """What the settings say holds the pairs of a split: a folder, a file, or the name of a generated dataset."""
    layout = PAIR_DATASETS[data.dataset]
    return _given(data, layout, split, layout.needs[0]).value if layout.needs else data.dataset


def _open(
    openers: Mapping[str, Callable[[Split], Opened]],
    layouts: Mapping[str, Layout],
    data: ImageDataConfig,
    resolution: int,
    seed: int,
    splits: Sequence[str],
    augment: bool | None = None,
) -> dict[str, Opened]:
    if data.dataset not in openers:
        raise DataError(f"dataset is {data.dataset!r}; choose {', '.join(openers)}.")
    layout = layouts[data.dataset]
    opened: dict[str, Opened] = {}
    for name in splits:
        if missing := [need for need in layout.needs if not _given(data, layout, name, need).value]:
            if name == "val":
                continue
            key = setting_of(name, missing[0])
            raise DataError(f"{key} is not set. Give --{key}, or --fake_data for a smoke test.")
        folder, captions = (_given(data, layout, name, what) for what in ("dir", "captions"))
        if name == "test" and folder.setting == "val_dir" and not layout.generated:
            log.info("No test_dir: testing on val_dir, %s.", folder.value)
        train = name == "train"
        size = data.dataset_size if train else getattr(data, "val_size", None)
        split = Split(name, data, resolution, seed, train if augment is None else augment, folder, captions, size)
        opened[name] = openers[data.dataset](split)
    return opened


def _given(data: ImageDataConfig, layout: Layout, split: str, what: str) -> Given:
    """The setting that names the `what` of a split: its own, or the first one given that it falls back to."""
    splits = [split, *(["val"] if split == "test" else []), *(["train"] if layout.all_splits else [])]
    settings = [setting_of(name, what) for name in splits]
    first = next((name for name in settings if getattr(data, name, None)), settings[0])
    return Given(first, getattr(data, first, None))
