"""The data room: folders of pictures, WebDataset shards and made-up pictures as batches for training and evaluation.

    transforms.py   one file's bytes -> RGB -> square crop -> [-1, 1]; which randomness belongs to which sample
    images.py       ImageDataset (one sub-folder per class), ImageDataset2 (any folder), FakeDataset
    shards.py       TrainShards, EvalShards: tar shards, local or streamed, through the webdataset library
    module.py       ImageDataModule: samplers, loaders that resume exactly, transfer to the device (Lightning)

Names are imported on first use, so that `import latent_verse.data` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from latent_verse.config import UserError

_HOME = {
    "ImageDataset": "images",
    "ImageDataset2": "images",
    "FakeDataset": "images",
    "TrainShards": "shards",
    "EvalShards": "shards",
    "ImageDataModule": "module",
    "centre_crop": "transforms",
    "random_crop": "transforms",
    "decode_rgb": "transforms",
    "to_unit_range": "transforms",
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
