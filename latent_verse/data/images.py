"""Datasets of images that are read by index: folders, and generated images for smoke tests.

All give `(image, label)`: the image float32 (3, R, R) in [-1, 1], or uint8 with `as_uint8=True`; the label an int, -1
where the layout has none. What index i shows in epoch e is a pure function of (seed, e, i), so a resumed run sees the
same crops whatever the number of workers. Samplers therefore ask for `dataset[(epoch, index)]`, and worker processes
need no state. A plain `dataset[index]` means epoch `dataset.epoch` (0 until changed).

Each unreadable file is logged once and counted over all workers (`dataset.skipped.count`). In training the next
readable sample stands in for it. In evaluation the item is None, which collation drops.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latent_verse.config import printable
from latent_verse.config.messages import counted
from latent_verse.data import DataError
from latent_verse.data.decoding import UnreadableImage, read_rgb
from latent_verse.data.folders import EXTENSIONS, check_folder, extension_of, is_hidden, is_kind, nothing_found, walk
from latent_verse.data.transforms import centre_crop, random_crop, sample_generator, to_unit_range

log = logging.getLogger(__name__)

OUTSIDE = "outside of class folders"  # images that a folder of class folders holds itself
MAX_SKIPS = 1000  # unreadable samples in a row; more means that the storage is broken, not a file


class SkipLog:
    """Which samples were unreadable: one byte for each in memory that all worker processes share."""

    def __init__(self, slots: int):
        self._flags = torch.zeros(slots, dtype=torch.uint8).share_memory_()

    def add(self, slot: int, name: str, reason: object) -> None:
        """Count and log sample number `slot`, unless that was done before."""
        slot %= len(self._flags)
        if not self._flags[slot]:
            self._flags[slot] = 1
            log.warning("skipped unreadable %s (%s)", printable(name)[:1000], printable(reason)[:1000])

    @property
    def count(self) -> int:
        """Unreadable samples so far."""
        return int(self._flags.sum())


class Strings:
    """Strings as one block of bytes: workers would copy a list page by page, as its reference counts change."""

    def __init__(self, strings: Iterable[str]):
        blob, ends = bytearray(), array("q", [0])
        for text in strings:
            blob += text.encode("utf-8", "surrogatepass")  # names of files may hold lone surrogates
            ends.append(len(blob))
        self._blob, self._ends = bytes(blob), np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        return self._blob[self._ends[i] : self._ends[i + 1]].decode("utf-8", "surrogatepass")


class PathList(Strings):
    """Paths below `root`."""

    def __init__(self, root: str, names: Iterable[str]):
        super().__init__(names)
        self.root = root

    def __getitem__(self, i: int) -> str:
        return os.path.join(self.root, super().__getitem__(i))


class MapImages(Dataset):
    """What all map-style datasets of images share: epochs, crops and the handling of unreadable samples.

    A subclass gives `__len__`, `image`, `name`, `target` and `skipped`, a SkipLog of as many slots as it has images.
    R is `resolution`, and `shape` that of one image, (3, R, R).

    Args:
        train: random crops, and another image in place of an unreadable one.
        resize_ratio: the smallest share of the area that a random crop takes, above 0 and up to 1.
        as_uint8: uint8 in [0, 255] rather than float32 in [-1, 1].
        key: the setting that error messages mention.
    """

    crop_seed: tuple[int, ...] = ()  # keeps the randomness of a sample's crop apart from that of its other choices
    unit = "image"  # what an item is called
    skipped: SkipLog

    def __init__(
        self,
        resolution: int,
        train: bool = True,
        resize_ratio: float = 0.75,
        seed: int = 0,
        as_uint8: bool = False,
        key: str = "train_dir",
    ):
        self.resolution, self.shape = resolution, (3, resolution, resolution)
        self.train, self.resize_ratio = train, resize_ratio
        self.seed, self.as_uint8, self.key = seed, as_uint8, key
        self.epoch = 0
        self.others: Counter[str] = Counter()  # files that are not read, by extension

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int | str] | None:
        epoch, index = key if isinstance(key, tuple) else (self.epoch, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} in a dataset of {len(self)}")
        image, used = self._load_readable(index)
        if image is None:
            return None
        if self.train:
            generator = sample_generator(self.seed, epoch, index, *self.crop_seed)
            image = random_crop(image, self.resolution, self.resize_ratio, generator)
        else:
            image = centre_crop(image, self.resolution)
        return (image if self.as_uint8 else to_unit_range(image)), self.target(used, epoch, index)

    def _load_readable(self, index: int) -> tuple[Tensor | None, int]:
        """The sample and its index; for an unreadable one, in training the next readable one, in evaluation None."""
        tries = min(len(self), MAX_SKIPS) if self.train else 1
        for step in range(tries):
            used = (index + step) % len(self)
            try:
                return self.image(used), used
            except UnreadableImage as error:
                self.skipped.add(used, self.name(used), error)
        if self.train:
            raise DataError(
                f"{tries} images in a row cannot be read, from {self.name(index)} on. "
                "Is the storage still mounted? The log names each file and the reason."
            )
        return None, index

    def image(self, index: int) -> Tensor:
        """The whole image as uint8 (3, H, W).

        Raises:
            UnreadableImage: its file is absent or damaged.
        """
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What messages call the image."""
        raise NotImplementedError

    def target(self, used: int, epoch: int, index: int) -> int | str:
        """What comes with image `used`, which stands in for `index` where that is unreadable: a label or a caption."""
        raise NotImplementedError


class ImageFiles(MapImages):
    """Datasets whose images are files, the `paths`."""

    paths: PathList

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Tensor:
        return read_rgb(self.paths[index])

    def name(self, index: int) -> str:
        return self.paths[index]

    def _hold_paths(self, paths: PathList, source: str) -> None:
        """Keep the paths. At least one must be readable; where all is well, only one file is read."""
        self.paths, self.skipped = paths, SkipLog(len(paths))
        reason: object = None
        for index in range(len(self)):
            try:
                self.image(index)
                return
            except UnreadableImage as error:
                reason = reason or error
        raise DataError(
            f"{self.key}: {counted(len(self), 'image')} in {source}, of which none can be read. "
            f"The first, {self.paths[0]}: {reason}. Check how the files were copied or unpacked."
        )


class FlatImages(ImageFiles):
    """Every image below `root`, at any depth; labels are -1. Arguments after `root` are those of MapImages.

    Raises:
        DataError: the folder is missing, holds no image, or none that can be read.
    """

    def __init__(self, root: str | os.PathLike, resolution: int, *args, **options):
        super().__init__(resolution, *args, **options)
        root = check_folder(root, self.key)
        paths = PathList(root, walk(root, EXTENSIONS, self.others))
        if not len(paths):
            raise DataError(f"{self.key}: no image below {root}: {nothing_found(self.others)}")
        self._hold_paths(paths, root)

    def target(self, used: int, epoch: int, index: int) -> int:
        return -1


ImageDataset2 = FlatImages  # the original's name


class ImageDataset(ImageFiles):
    """ImageFolder layout: `root/<class>/**/<image>`; the label is the class folder's rank in sorted order.

    `classes` lists the folder names, `class_to_idx` maps them to labels. Arguments are those of FlatImages.

    Raises:
        DataError: as FlatImages, and where the images lie in no class folder.
    """

    def __init__(self, root: str | os.PathLike, resolution: int, *args, **options):
        super().__init__(resolution, *args, **options)
        root = check_folder(root, self.key)
        with os.scandir(root) as entries:
            inside = [(e.name, is_kind(e.is_dir)) for e in entries if not is_hidden(e.name)]
        self.classes = sorted(name for name, is_folder in inside if is_folder)
        self.class_to_idx = {name: i for i, name in enumerate(self.classes)}
        for name in (name for name, is_folder in inside if not is_folder):
            self.others[OUTSIDE if name.lower().endswith(EXTENSIONS) else extension_of(name)] += 1
        labels = array("i")

        def names() -> Iterator[str]:
            for label, name in enumerate(self.classes):
                for path in walk(os.path.join(root, name), EXTENSIONS, self.others):
                    labels.append(label)
                    yield f"{name}/{path}"

        paths = PathList(root, names())
        self.labels = np.array(labels, dtype=np.int32)
        if not len(paths):
            others = Counter()
            loose = sum(1 for _ in walk(root, EXTENSIONS, others))
            hint = f"{counted(loose, 'image')} in the folder itself."
            if self.key != "classes_dir":  # of a classification
                hint += " For a folder without classes use --dataset flat."
            raise DataError(
                f"{self.key}: no image in the {len(self.classes)} class folders (<class>/<image>) of {root}: "
                f"{hint if loose else nothing_found(others)}"
            )
        self._hold_paths(paths, root)

    def target(self, used: int, epoch: int, index: int) -> int:
        return int(self.labels[used])


class FakeDataset(MapImages):
    """Generated images (a colour gradient, a few shapes, a little noise), the same for the same (seed, index).

    Unlike plain noise, a network can learn them within seconds. Labels are 0 to 9. Nothing is read from disk.
    """

    def __init__(self, length: int, resolution: int, train: bool = True, seed: int = 0, as_uint8: bool = False):
        super().__init__(resolution, train, seed=seed, as_uint8=as_uint8)
        self.length, self.skipped = length, SkipLog(1)

    def __len__(self) -> int:
        return self.length

    def image(self, index: int) -> Tensor:
        rng = sample_generator(self.seed, int(self.train), index)
        side = self.resolution
        y_HW, x_HW = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
        one, two = torch.rand(2, 3, 1, 1, generator=rng)
        tilt = torch.rand((), generator=rng)
        image = torch.lerp(one, two, (tilt * x_HW + (1 - tilt) * y_HW)[None])
        for kind in range(4):
            (cy, cx, size), colour = torch.rand(3, generator=rng), torch.rand(3, 1, generator=rng)
            dy, dx, radius = (y_HW - cy).abs(), (x_HW - cx).abs(), 0.08 + 0.17 * size
            inside = torch.maximum(dy, dx) < radius if kind % 2 else dy**2 + dx**2 < radius**2
            image[:, inside] = colour
        image = image + 0.01 * torch.randn(image.shape, generator=rng)
        return (image.clamp(0, 1) * 255).round().to(torch.uint8)

    def target(self, used: int, epoch: int, index: int) -> int:
        return used % 10

    def name(self, index: int) -> str:
        return f"fake image {index}"
