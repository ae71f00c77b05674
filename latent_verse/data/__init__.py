"""From files on disk to batches for training and evaluation.

What opens data, and what batches it:
    datasets.py         every dataset by name, for both stages: open_images, open_pairs
    modules.py          ImageDataModule, PairDataModule: order, exact resume, ranks, transfer to the device (Lightning)
    loader_processes.py the processes that load: how they start, end and report a failure
Images:
    decoding.py         one file's bytes -> RGB: formats, bounds, what is refused
    transforms.py       RGB -> square crop -> [-1, 1] -> batches; which randomness belongs to which sample
    folders.py          walking folders: which files count, and what is said of the others
    jpeg_scans.py       whether a JPEG is whole
    images.py           ImageDataset (one sub-folder per class), FlatImages (any folder), FakeDataset
    shards.py           Shards: tar shards, local or streamed, through the webdataset library
    shard_names.py      which shards a setting names: folders, patterns, lists, URLs
    tars.py             reading tar files that may be damaged, or made to do harm
Images with captions:
    captions.py         PairFolder, CocoCaptions, KarpathyCaptions, TableCaptions, FakePairs
    caption_files.py    reading the text, JSON and tables that hold captions
    codes.py            CodesDataset: codes that were written ahead of training
    codes_writer.py     writing them
    pairs.py            PairShards; captions become ids
    text.py             the tokenizers of captions: CLIP's, and a BPE trained on the data
The shapes world, generated images whose captions can be checked:
    shapes/world.py     World: scenes, splits, and what is true of them
    shapes/drawing.py   what a world is made of: settings, objects and their pixels
    shapes/grammar.py   the grammar of captions: writing and parsing
    shapes/reader.py    from an image back to its scene
    shapes/dataset.py   ShapesDataset, and writing its pairs to files

Names are imported on first use, so that `import latent_verse.data` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from latent_verse.config import UserError

_HOME = {
    **dict.fromkeys(("ImageDataset", "FlatImages", "ImageDataset2", "FakeDataset"), "images"),
    **dict.fromkeys(("Shards", "TrainShards", "EvalShards"), "shards"),
    **dict.fromkeys(("open_images", "open_pairs"), "datasets"),
    **dict.fromkeys(("ImageDataModule", "PairDataModule"), "modules"),
    **dict.fromkeys(("centre_crop", "random_crop", "to_unit_range"), "transforms"),
    "decode_rgb": "decoding",
}

__all__ = ["DataError", *_HOME]


class DataError(UserError):
    """The data cannot be used: a folder or shard is missing, empty, unreadable or too small. Says what to do."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
