"""Every dataset by name, and the settings it reads. `data/datasets.py` holds, under the same names, what opens them.

`needs` and `reads` name settings of a dataset's section. "dir" and "captions" stand for one setting of each split:
`train_dir`, `val_dir` and `test_dir`; `train_captions`, `val_captions` and `test_captions`. A dataset that needs
neither is generated: it is there without any file. `setting_of` gives the full name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from latent_verse.config.settings import ConfigError

SPLIT_SETTINGS = ("dir", "captions")


class Layout(NamedTuple):
    """What a dataset asks of the settings."""

    needs: tuple[str, ...] = ()  # settings that have to be given; val or test is there if its own are given
    reads: tuple[str, ...] = ()  # further settings that have an effect
    captions_file: str = "the captions file"  # what the setting `captions` names, for messages
    all_splits: bool = False  # one file or folder may hold all splits: settings of `val` default to those of `train`

    @property
    def generated(self) -> bool:
        """Whether nothing is read from disk."""
        return not self.needs

    def has_effect(self, name: str) -> bool:
        """Whether the dataset reads a setting, under the name that it has in `needs` and `reads`."""
        return name in self.needs or name in self.reads


IMAGE_DATASETS = {
    "imagefolder": Layout(needs=("dir",), reads=("resize_ratio",)),
    "flat": Layout(needs=("dir",), reads=("resize_ratio",)),
    "webdataset": Layout(needs=("dir",), reads=("resize_ratio", "dataset_size", "shuffle_buffer")),
    "fake": Layout(reads=("dataset_size",)),
}

PAIR_DATASETS = {
    "pairs": Layout(needs=("dir",), reads=("resize_ratio",)),
    "coco": Layout(needs=("dir",), reads=("captions", "resize_ratio")),
    "karpathy": Layout(("dir", "captions"), ("resize_ratio",), "Karpathy's dataset_coco.json", all_splits=True),
    "table": Layout(("captions",), ("resize_ratio",), "the .csv, .tsv or .jsonl with image paths and captions"),
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


def check_files(layouts: Mapping[str, Layout], data: Any, split: str) -> None:
    """Refuse a split without the files that its dataset needs, and a captions file that the dataset does not read.

    Raises:
        ConfigError: naming the setting and the remedy.
    """
    layout = layouts[data.dataset]
    if layout.generated:
        return
    for need in layout.needs:
        if not getattr(data, setting_of(split, need)):
            what = layout.captions_file if need == "captions" else f"the {split} images"
            missing = f"{setting_of(split, need)} is not given; dataset {data.dataset} needs it: {what}"
            raise ConfigError(f"{missing}. For a smoke test try --fake_data.")
    for name in (setting_of(part, "captions") for part in (split, "val")):
        if getattr(data, name, None) and not layout.has_effect("captions"):
            readers = " or ".join(other for other, its in layouts.items() if its.has_effect("captions"))
            raise ConfigError(f"{name} has no effect with dataset {data.dataset}: choose {readers}.")
