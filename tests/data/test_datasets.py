"""Datasets by name: the table of needs and the table of what opens them agree, and splits fall back as documented."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from latent_verse.config.datasets import EVAL_DATASETS, IMAGE_DATASETS, PAIR_DATASETS, setting_of
from latent_verse.config.evaluate import EvalDataConfig
from latent_verse.config.train import ImageDataConfig, PairDataConfig
from latent_verse.data import DataError
from latent_verse.data.datasets import IMAGES, PAIRS, open_pairs, source_of
from latent_verse.evaluation.pairs import Pairs
from tests.messages import naming

R = 8
STAGES = [(IMAGE_DATASETS, IMAGES, ImageDataConfig), (PAIR_DATASETS, PAIRS, PairDataConfig)]


@pytest.mark.parametrize(("layouts", "openers", "config"), STAGES, ids=["images", "pairs"])
def test_every_dataset_has_its_needs_and_what_opens_it(layouts, openers, config):
    assert tuple(layouts) == tuple(openers) == tuple(config.__dataclass_fields__["dataset"].metadata["choices"])
    settings = {*config.__dataclass_fields__, *EvalDataConfig.__dataclass_fields__}
    for layout in layouts.values():
        assert {setting_of("test", name) for name in (*layout.needs, *layout.reads)} <= settings


@pytest.mark.parametrize("name", PAIR_DATASETS)
def test_a_needed_setting_that_is_absent_is_named(name):
    needs = PAIR_DATASETS[name].needs
    if needs:
        with pytest.raises(DataError, match=naming(setting_of("train", needs[0]), "--fake_data")):
            open_pairs(PairDataConfig(dataset=name), R)


@pytest.fixture
def karpathy(tmp_path):
    """Writes Karpathy's file with one image in each of the given splits: karpathy("train", "val") -> settings."""

    def write(*splits):
        images = []
        for i, split in enumerate(splits):
            Image.new("RGB", (R, R)).save(tmp_path / f"{i}.png")
            images.append({"filename": f"{i}.png", "split": split, "sentences": [{"raw": split}]})
        (tmp_path / "dataset.json").write_text(json.dumps({"images": images}))
        return {"dataset": "karpathy", "train_dir": str(tmp_path), "train_captions": str(tmp_path / "dataset.json")}

    return write


@pytest.mark.parametrize("more", [(), ("restval",)])
def test_restval_is_trained_on_where_there_is_one(karpathy, more):
    data = PairDataConfig(**karpathy("train", "val", *more))
    opened = open_pairs(data, R)
    captions = {split: [dataset.captions(i)[0] for i in range(len(dataset))] for split, dataset in opened.items()}
    assert captions == {"train": ["train", *more], "val": ["val"]}
    assert source_of(data, "val") == data.train_dir  # the file and the folder hold all splits


def test_a_split_that_karpathys_file_lacks_is_named_with_its_setting(karpathy):
    given = karpathy("restval", "val")
    with pytest.raises(DataError, match=naming("train_captions", given["train_captions"], "'train'", "restval (1)")):
        open_pairs(PairDataConfig(**given), R)
    given = {"test_captions": given["train_captions"], "test_dir": given["train_dir"]}
    with pytest.raises(DataError, match=naming("test_captions", given["test_captions"], "'test'", "val (1)")):
        Pairs(EvalDataConfig(dataset="karpathy", **given), R, 0)


@pytest.mark.parametrize("name", [name for name in EVAL_DATASETS if PAIR_DATASETS[name].needs])
def test_evaluation_names_its_own_settings(tmp_path, name):
    place = tmp_path / "images"
    place.mkdir()
    data = EvalDataConfig(dataset=name, test_dir=str(place), test_captions=str(tmp_path / "none.json"))
    with pytest.raises(DataError, match=r"test_(dir|captions)") as error:
        Pairs(data, R, 0)
    assert not re.search("train_|val_", str(error.value))
