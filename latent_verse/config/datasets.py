"""Every dataset by name, and the settings it reads. `data/datasets.py` holds, under the same names, what opens them.

`needs` and `reads` name settings of a dataset's section. "dir" and "captions" stand for one setting of each split:
`train_dir`, `val_dir` and `test_dir`; `train_captions`, `val_captions` and `test_captions`. A dataset that needs
neither is generated: it is there without any file. `setting_of` gives the full name.
"""

from __future__ import annotations

from typing import NamedTuple

SPLIT_SETTINGS = ("dir", "captions")


class Layout(NamedTuple):
    """What a dataset asks of the settings.

    Attributes:
        needs: settings that have to be given; a validation or test split is there if its own are given.
        reads: further settings that have an effect; those in no `needs` or `reads` of a dataset have none on it.
        all_splits: one file or folder may hold all splits, so the settings of `val` default to those of `train`.
    """

    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    all_splits: bool = False

    @property
    def generated(self) -> bool:
        """Whether nothing is read from disk."""
        return not self.needs


IMAGE_DATASETS = {
    "imagefolder": Layout(needs=("dir",), reads=("resize_ratio",)),
    "flat": Layout(needs=("dir",), reads=("resize_ratio",)),
    "webdataset": Layout(needs=("dir",), reads=("resize_ratio", "dataset_size", "shuffle_buffer")),
    "fake": Layout(reads=("dataset_size",)),
}

PAIR_DATASETS = {
    "pairs": Layout(needs=("dir",), reads=("resize_ratio",)),
    "coco": Layout(needs=("dir",), reads=("captions", "resize_ratio")),
    "karpathy": Layout(needs=("dir", "captions"), reads=("resize_ratio",), all_splits=True),
    "table": Layout(needs=("captions",), reads=("resize_ratio",)),
    "webdataset": Layout(needs=("dir",), reads=("resize_ratio", "dataset_size", "shuffle_buffer")),
    "codes": Layout(needs=("dir",)),
    "shapes": Layout(reads=("world", "dataset_size", "val_size")),
    "fake": Layout(reads=("dataset_size", "val_size")),
}

# what eval_biart.py can read: images with captions, each with an index
EVAL_DATASETS = tuple(name for name in PAIR_DATASETS if name not in ("webdataset", "codes"))


def setting_of(split: str, name: str) -> str:
    """The setting that `name` of `needs` or `reads` means for a split: ("val", "dir") -> "val_dir"."""
    return f"{split}_{name}" if name in SPLIT_SETTINGS else name
