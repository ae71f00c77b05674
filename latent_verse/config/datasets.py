"""Every dataset by name, and the settings it reads. `data/datasets.py` holds, under the same names, what opens them.

`needs` and `reads` name settings of a dataset's section. "dir", "captions" and "size" stand for one setting of each
split, such as `val_dir`; that of train's size is `dataset_size`, which all datasets read. A dataset that needs none is
generated: it is there without any file. `setting_of` gives the full name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from latent_verse.config.messages import ConfigError, shown
from latent_verse.config.settings import URL, Settings

SPLIT_SETTINGS = ("dir", "captions", "size")


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
    "webdataset": Layout(needs=("dir",), reads=("resize_ratio", "shuffle_buffer")),
    "fake": Layout(),
}

PAIR_DATASETS = {
    "pairs": Layout(needs=("dir",), reads=("resize_ratio",)),
    "coco": Layout(needs=("dir",), reads=("captions", "resize_ratio")),
    "karpathy": Layout(("dir", "captions"), ("resize_ratio",), "Karpathy's dataset_coco.json", all_splits=True),
    "table": Layout(("captions",), ("resize_ratio",), "the .csv, .tsv or .jsonl with image paths and captions"),
    "webdataset": Layout(needs=("dir",), reads=("resize_ratio", "shuffle_buffer")),
    "codes": Layout(needs=("dir",)),
    "shapes": Layout(reads=("world", "split", "size")),
    "fake": Layout(reads=("size",)),
}

# what eval_biart.py can read: images with captions, each with an index
EVAL_DATASETS = tuple(name for name in PAIR_DATASETS if name not in ("webdataset", "codes"))


def setting_of(split: str, name: str) -> str:
    """The setting that `name` of `needs` or `reads` means for a split: ("val", "dir") -> "val_dir"."""
    return f"{split}_{name}" if name in SPLIT_SETTINGS else name


def check_files(layouts: Mapping[str, Layout], data: Settings, split: str) -> None:
    """Refuse a split without the files that its dataset needs.

    Raises:
        ConfigError: naming the setting and the remedy.
    """
    given = vars(data)
    layout = layouts[given["dataset"]]
    for need in layout.needs:
        if not given[setting_of(split, need)]:
            what = layout.captions_file if need == "captions" else f"the images of the {split} split"
            missing = f"{setting_of(split, need)} is not given; dataset {given['dataset']} needs it: {what}"
            raise ConfigError(f"{missing}. For a smoke test try --fake_data.")


def check_local(data: Settings, dataset: str, *names: str) -> None:
    """Refuse a URL in the settings of these names where the dataset reads files: it would be taken for a folder.

    Raises:
        ConfigError: naming the setting and the dataset.
    """
    if dataset == "webdataset" or (dataset in PAIR_DATASETS and PAIR_DATASETS[dataset].generated):
        return
    for name in names:
        value = getattr(data, name)
        if value and URL.match(value):
            remedy = "Give a path on this machine, or tar shards with --dataset webdataset"
            raise ConfigError(f"{name}: {shown(value)} is a URL, which dataset {dataset} cannot read. {remedy}.")


def check_effects(layouts: Mapping[str, Layout], data: Settings, split: str, names: Iterable[str]) -> None:
    """Refuse a setting of `names`, as `needs` and `reads` call them, that is not its default and that is not read.

    Raises:
        ConfigError: naming the setting and the datasets that read it.
    """
    given, defaults = vars(data), vars(type(data)())
    dataset = given["dataset"]
    for name in names:
        full = setting_of(split, name)
        if given[full] != defaults[full] and not layouts[dataset].has_effect(name):
            readers = ", ".join(other for other, its in layouts.items() if its.has_effect(name))
            raise ConfigError(f"{full} has no effect with dataset {dataset}; datasets that read it: {readers}.")
