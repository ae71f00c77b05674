"""Every dataset of both stages by name, and what opens a split of it. The settings they need: config/datasets.py.

    open_images(config.data, resolution, seed)     {"train": dataset, "val": dataset}, val where it is given
    open_pairs(config.data, resolution, seed)      the same with captions

A dataset is `Shards`, or is read by index: a `MapDataset`. To add one, write its class, add a function that opens a
split of it to IMAGES or PAIRS, and its name with the settings it needs to config/datasets.py (docs/extending.md).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from latent_verse.config.datasets import IMAGE_DATASETS, PAIR_DATASETS, Layout, setting_of
from latent_verse.config.train import ImageDataConfig, PairDataConfig
from latent_verse.data import DataError
from latent_verse.data.captions import CocoCaptions, FakePairs, KarpathyCaptions, PairFolder, TableCaptions
from latent_verse.data.codes import CodesDataset
from latent_verse.data.images import FakeDataset, FlatImages, ImageDataset, SkipLog
from latent_verse.data.pairs import PairShards
from latent_verse.data.shapes import ShapesDataset, World
from latent_verse.data.shards import Shards

log = logging.getLogger(__name__)

FAKE_TRAIN, FAKE_VAL = 512, 64  # images or pairs where the settings do not say
SHAPES_TRAIN, SHAPES_VAL = 10_000, 256
KARPATHY_SPLITS = {"train": "train+restval", "val": "val", "test": "test"}


class MapDataset(Protocol):
    """A dataset read by index. `dataset[(epoch, i)]` is (image, label), or of pairs (image or codes, caption).

    What it shows must follow from (seed, epoch, i) alone, so that a resumed run sees the same. In evaluation an item
    that cannot be read is None. Datasets of pairs also have `captions(i)`, all captions of item i, `image_path(i)`,
    its file or None, and `describe()`, whose "source" says where the pairs come from.

    Attributes:
        shape: of one image, (3, R, R) uint8, or of one image's codes, (N,).
        skipped: counts the unreadable files.
    """

    shape: tuple[int, ...]
    skipped: SkipLog

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any] | None: ...


class Given(NamedTuple):
    """A setting's name, for error messages, and its value."""

    setting: str
    value: str | None


@dataclass(frozen=True)
class Split:
    """What a dataset is told of the split to open.

    Attributes:
        name: train, val or test; for shapes also heldout.
        data: the settings of the section `data`.
        augment: random crops, and new scenes of shapes in each epoch.
        size: images or pairs of a generated dataset, or of an epoch of shards; None where the settings do not say.
    """

    name: str
    data: ImageDataConfig
    resolution: int
    seed: int
    augment: bool
    folder: Given
    captions: Given
    size: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What all datasets of images take."""
        return {"train": self.augment, "seed": self.seed, "as_uint8": True}

    @property
    def files(self) -> dict[str, Any]:
        """What those take that read image files."""
        return {"resolution": self.resolution, "resize_ratio": self.data.resize_ratio, **self.options}

    @property
    def stream(self) -> dict[str, Any]:
        """What tar shards take."""
        crops = {"resize_ratio": self.data.resize_ratio, "seed": self.seed, "shuffle_buffer": self.data.shuffle_buffer}
        size = self.size if self.name == "train" else None
        return {"resolution": self.resolution, "size": size, "key": self.folder.setting, **crops}

    @property
    def fake_size(self) -> int:
        """Images of a fake dataset."""
        return self.size or (FAKE_TRAIN if self.name == "train" else FAKE_VAL)


# ---------------------------------------------------------------------------------------------------------- the tables


def open_coco(split: Split) -> CocoCaptions:
    """The captions file that is given, or the one that COCO puts beside the folder of images."""
    folder, captions = split.folder.value, split.captions.value
    if not captions:
        place = Path(os.path.expanduser(folder))
        captions = place.parent / "annotations" / f"captions_{place.name}.json"  # beside train2017/
        if not captions.is_file():
            raise DataError(
                f"{split.captions.setting} is not given, and {captions}, where COCO puts the captions of {folder}, "
                "does not exist."
            )
    return CocoCaptions(captions, folder, key=split.captions.setting, **split.files)


def open_karpathy(split: Split) -> KarpathyCaptions:
    """A split of Karpathy's file, which holds them all."""
    name, (setting, file) = KARPATHY_SPLITS[split.name], split.captions
    return KarpathyCaptions(file, split.folder.value, split=name, key=setting, **split.files)


def open_shapes(split: Split) -> ShapesDataset:
    """A split of the shapes world that the settings name; DataError where its images have another resolution."""
    world = World.preset(split.data.world)
    if world.image_size != split.resolution:
        raise DataError(
            f"world: {world.name} has images of {world.image_size} px, but {split.resolution} px are asked for (the "
            "AugVAE's, or fid_resolution). Choose the world whose images the AugVAE was trained on."
        )
    size = split.size or (SHAPES_TRAIN if split.name == "train" else SHAPES_VAL)
    return ShapesDataset(world, split.name, size, split.seed, fresh=split.augment, as_uint8=True)


IMAGES: dict[str, Callable[[Split], MapDataset | Shards]] = {
    "imagefolder": lambda s: ImageDataset(s.folder.value, key=s.folder.setting, **s.files),
    "flat": lambda s: FlatImages(s.folder.value, key=s.folder.setting, **s.files),
    "webdataset": lambda s: Shards(s.folder.value, **s.stream),
    "fake": lambda s: FakeDataset(s.fake_size, s.resolution, **s.options),
}

PAIRS: dict[str, Callable[[Split], MapDataset | PairShards]] = {
    "pairs": lambda s: PairFolder(s.folder.value, key=s.folder.setting, **s.files),
    "coco": open_coco,
    "karpathy": open_karpathy,
    "table": lambda s: TableCaptions(s.captions.value, key=s.captions.setting, **s.files),
    "webdataset": lambda s: PairShards(s.folder.value, **s.stream),
    "codes": lambda s: CodesDataset(s.folder.value, s.augment, s.seed, s.folder.setting),
    "shapes": open_shapes,
    "fake": lambda s: FakePairs(s.fake_size, s.resolution, **s.options),
}


# ------------------------------------------------------------------------------------------------------------- opening


def open_images(
    data: ImageDataConfig, resolution: int, seed: int = 0, splits: Sequence[str] = ("train", "val")
) -> dict[str, MapDataset | Shards]:
    """The datasets of images that the settings name, by split; without val where it is not given.

    Args:
        splits: of train, val and test; test falls back to the settings of val.

    Raises:
        DataError: a dataset is missing, empty or unreadable; the message names the setting and the file.
    """
    return _open(IMAGES, IMAGE_DATASETS, data, resolution, seed, splits, None)


def open_pairs(
    data: PairDataConfig,
    resolution: int,
    seed: int = 0,
    splits: Sequence[str] = ("train", "val"),
    augment: bool | None = None,
) -> dict[str, MapDataset | PairShards]:
    """The datasets of pairs that the settings name, by split; without val where it is not given.

    Args:
        augment: random crops, and new scenes of shapes in each epoch; by default for train only.

    Raises:
        DataError: as `open_images`.
    """
    return _open(PAIRS, PAIR_DATASETS, data, resolution, seed, splits, augment)


def source_of(data: PairDataConfig, split: str) -> str:
    """What the settings say holds the pairs of a split: a folder, a file, or the name of a generated dataset."""
    needs = PAIR_DATASETS[data.dataset].needs
    return _given(data, PAIR_DATASETS[data.dataset], split, needs[0]).value if needs else data.dataset


def _open(
    openers: Mapping[str, Callable[[Split], Any]],
    layouts: Mapping[str, Layout],
    data: ImageDataConfig,
    resolution: int,
    seed: int,
    splits: Sequence[str],
    augment: bool | None,
) -> dict[str, Any]:
    if data.dataset not in openers:
        raise DataError(f"dataset is {data.dataset!r}; choose {', '.join(openers)}.")
    layout = layouts[data.dataset]
    if data.dataset_size and "dataset_size" not in layout.reads:
        log.warning("dataset_size has no effect with dataset %s: all of it is used.", data.dataset)
    opened = {}
    for name in splits:
        missing = [need for need in layout.needs if not _given(data, layout, name, need).value]
        if missing and name != "val":
            key = setting_of(name, missing[0])
            raise DataError(f"{key} is not set. Give --{key}, or --fake_data for a smoke test.")
        if missing:
            continue
        folder, captions = (_given(data, layout, name, what) for what in ("dir", "captions"))
        if name == "test" and folder.setting == "val_dir" and not layout.generated:
            log.info("No test_dir: testing on val_dir, %s.", folder.value)
        train = name == "train"
        opened[name] = openers[data.dataset](
            Split(
                name=name,
                data=data,
                resolution=resolution,
                seed=seed,
                augment=train if augment is None else augment,
                folder=folder,
                captions=captions,
                size=data.dataset_size if train else getattr(data, "val_size", None),
            )
        )
    return opened


def _given(data: ImageDataConfig, layout: Layout, split: str, what: str) -> Given:
    """The setting that says where the `what` of a split is: its own, or the first one given that it falls back to."""
    splits = [split, *(["val"] if split == "test" else []), *(["train"] if layout.all_splits else [])]
    settings = [setting_of(name, what) for name in splits]
    first = next((name for name in settings if getattr(data, name, None)), settings[0])
    return Given(first, getattr(data, first, None))
