"""The worked example of a new dataset (docs/extending_data.md) runs as it stands, and evaluation can read it, too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from latent_verse.config.datasets import IMAGE_DATASETS, PAIR_DATASETS
from latent_verse.config.evaluate import EvalDataConfig
from latent_verse.data import DataError
from latent_verse.data.datasets import IMAGES, PAIRS
from latent_verse.evaluation.pairs import Pairs

DOCUMENT = Path(__file__).parents[1] / "docs" / "extending_data.md"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Runs the document's blocks in an empty folder, and takes the dataset out of the tables afterwards."""
    monkeypatch.chdir(tmp_path)
    tables = (IMAGE_DATASETS, PAIR_DATASETS, IMAGES, PAIRS)
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    names: dict = {"__name__": "example"}
    try:
        for number, block in enumerate(blocks):
            exec(compile(block, f"{DOCUMENT.name}, block {number}", "exec"), names)
        yield names
    finally:
        for table in tables:
            table.pop("npz", None)


def test_the_worked_example_runs(example):
    assert len(example["datasets"]["train"]) == 20
    with pytest.raises(DataError, match=r"train_dir: none\.npz does not exist"):
        example["open_images"](example["ImageDataConfig"](dataset="npz", train_dir="none.npz"), 16)


def test_evaluation_reads_the_example(example):
    data = EvalDataConfig(test_dir="birds.npz")
    object.__setattr__(data, "dataset", "npz")  # its choices were listed before the example came into the table
    pairs = Pairs(data, 16, 0)
    assert len(pairs) == 20 and pairs.captions(3) == ["a bird, number 3"]
    assert pairs.picture(3).shape == (3, 16, 16)
