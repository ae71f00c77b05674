"""Which checkpoint of a run is taken, and what happens when it is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latent_verse.checkpoints import ckpt_files
from latent_verse.checkpoints.augvae import load_augvae
from latent_verse.checkpoints.ckpt_files import CheckpointError, find_checkpoint, read_ckpt
from tests.messages import naming
from tests.small_checkpoints import WEIGHT, changed, flip, one_line, own_ckpt, put


def run_of(tiny_augvae, folder: Path, scores: dict[str, float | None], steps: dict[str, int]) -> Path:
    """A run folder with checkpoints of these names."""
    for i, (name, step) in enumerate(steps.items()):
        model = tiny_augvae(seed=i)
        file = own_ckpt(model, folder / "checkpoints" / f"{name}.ckpt", global_step=step)
        if scores.get(name) is not None:
            changed(file, put("latent_verse", "score", value={"val/total_loss": scores[name]}))
    return folder


def test_the_best_is_that_of_the_smallest_stored_score(tiny_augvae, tmp_path):
    """A run that was copied and continued has several; names and steps say nothing of the score."""
    scores = {"best-epoch=9-step=9": 0.5, "best-epoch=3-step=3": 0.2, "best-epoch=5-step=5-v1": 0.1}
    steps = {"best-epoch=9-step=9": 9, "best-epoch=3-step=3": 3, "best-epoch=5-step=5-v1": 5, "last-epoch=9-step=9": 9}
    run = run_of(tiny_augvae, tmp_path, scores, steps)
    assert find_checkpoint(run).name == "best-epoch=5-step=5-v1.ckpt"
    (run / "checkpoints" / "best-epoch=5-step=5-v1.ckpt").unlink()
    assert find_checkpoint(run).name == "best-epoch=3-step=3.ckpt"


def test_older_files_have_the_score_in_the_state_of_modelcheckpoint(tiny_augvae, tmp_path):
    run = run_of(tiny_augvae, tmp_path, {}, {"best-epoch=9-step=9": 9, "best-epoch=3-step=3": 3})
    assert find_checkpoint(run).name == "best-epoch=9-step=9.ckpt"  # nothing else is known: the newest by step
    for name, score in (("best-epoch=9-step=9", 0.5), ("best-epoch=3-step=3", 0.2)):
        states = {
            "ModelCheckpoint{'monitor': 'val/total_loss'}": {
                "monitor": "val/total_loss",
                "current_score": torch.tensor(score),
            },
            "ModelCheckpoint{'monitor': None}": {"monitor": None, "current_score": None},
        }
        changed(run / "checkpoints" / f"{name}.ckpt", put("callbacks", value=states))
    assert find_checkpoint(run).name == "best-epoch=3-step=3.ckpt"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "NaN"])
@pytest.mark.parametrize("name", ["best-epoch=5-step=5", "best-epoch=5-step=5-v1"])
def test_a_damaged_best_yields_to_the_next_with_one_warning(tiny_augvae, tmp_path, damage, name):
    scores = {name: 0.1, "best-epoch=3-step=3": 0.2}
    run = run_of(tiny_augvae, tmp_path, scores, {name: 5, "best-epoch=3-step=3": 3, "last-epoch=9-step=9": 9})
    file = run / "checkpoints" / f"{name}.ckpt"
    damaged(file, damage)
    with pytest.warns(UserWarning, match=naming(file, "best-epoch=3-step=3.ckpt")) as said:
        model = load_augvae(run)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    expected = tiny_augvae(seed=1)
    assert torch.equal(model.quantizer.embedding.weight, expected.quantizer.embedding.weight)
    damaged(run / "checkpoints" / "best-epoch=3-step=3.ckpt", damage)
    with pytest.warns(UserWarning, match=naming("last-epoch=9-step=9.ckpt")):
        assert find_checkpoint(run).name == "last-epoch=9-step=9.ckpt"
    damaged(run / "checkpoints" / "last-epoch=9-step=9.ckpt", damage)
    with pytest.raises(CheckpointError, match=naming(file)) as error:
        load_augvae(run)
    assert "\n" not in str(error.value)


def damaged(file: Path, how: str) -> None:
    whole = file.read_bytes()
    if how == "cut":  # as a copy that was interrupted
        file.write_bytes(whole[: len(whole) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "NaN":
        changed(file, put("state_dict", WEIGHT, value=torch.full((32,), torch.nan)))
    else:
        flip(file, len(whole) // 2)


def test_a_damaged_file_that_was_named_names_whole_ones_beside_it(tiny_augvae, tmp_path):
    run = run_of(tiny_augvae, tmp_path, {}, {"best-epoch=3-step=3": 3, "last-epoch=9-step=9": 9, "last-step=1": 1})
    for name in ("best-epoch=3-step=3.ckpt", "last-step=1.ckpt"):
        damaged(run / "checkpoints" / name, "cut")
    named = run / "checkpoints" / "best-epoch=3-step=3.ckpt"
    message = one_line(load_augvae, named, "last-epoch=9-step=9.ckpt")
    assert "last-step=1.ckpt" not in message


def test_a_copy_by_another_name_is_read(tiny_augvae, tmp_path):
    run = run_of(tiny_augvae, tmp_path, {}, {"last-epoch=9-step=9": 9})
    file = run / "checkpoints" / "last-epoch=9-step=9.ckpt"
    file.rename(file.with_name("last-epoch=9-step=9 (copy).ckpt"))
    assert find_checkpoint(run).name == "last-epoch=9-step=9 (copy).ckpt"


def test_files_that_are_known_to_be_whole_are_remembered_up_to_a_number(tiny_augvae, tmp_path, monkeypatch):
    """What they say of themselves holds a tokenizer."""
    monkeypatch.setattr(ckpt_files, "_whole", {})
    monkeypatch.setattr(ckpt_files, "KNOWN", 2)
    files = [own_ckpt(tiny_augvae(), tmp_path / f"{i}.ckpt") for i in range(4)]
    for file in files:
        read_ckpt(file)
    assert len(ckpt_files._whole) == 2
    monkeypatch.setattr(ckpt_files, "_content", lambda file: pytest.fail("it was read again"))
    assert all(ckpt_files.described(file)["kind"] == "augvae" for file in files[2:])
