"""Mistakes in what eval_biart.py is given: found before the work where they can be, and no results are lost."""

from __future__ import annotations

import json
import shutil

import pytest

from latent_verse.commands import eval_biart
from latent_verse.evaluation.pairs import ordered
from tests.messages import naming
from tests.tiny_lverse import make_lverse

pytestmark = pytest.mark.usefixtures("one_thread", "no_caches")


def test_a_late_mistake_loses_no_results(bundle, pairs, tmp_path, capsys):
    classes = tmp_path / "classes"
    files = [classes / "red" / "p000.png", classes / "red" / "p001.png"]
    files[0].parent.mkdir(parents=True)
    for file in files:
        shutil.copy(pairs / file.name, file)
    files[ordered(["red/p000.png", "red/p001.png"], 0)[0]].write_bytes(b"no image")  # the one that is taken
    flags = ["--model", bundle, "--test_dir", pairs, "--tasks", "likelihood", "zero_shot", "--classes_dir", classes]
    flags += ["--class_pictures", 1]
    argv = [*map(str, flags), "--gpus", "0", "--log_dir", str(tmp_path / "runs"), "--name", "run"]
    assert eval_biart.main(argv) == 2
    assert naming("classes_dir", "can be read").search(capsys.readouterr().err)
    out = json.loads((tmp_path / "runs" / "run" / "metrics.json").read_text())
    assert out["tasks"] == ["likelihood"] and "likelihood/text_given_image/bits_per_token" in out["figures"]


def test_what_a_late_task_needs_is_checked_first(tiny_augvae, pairs, tmp_path, capsys):
    make_lverse(tiny_augvae(single_level=4), reference_dropout=0.0).save_pretrained(tmp_path / "bundle")
    flags = ["--model", tmp_path / "bundle", "--test_dir", pairs, "--prior_weight", 1, "--gpus", 0]
    assert eval_biart.main([*map(str, flags), "--log_dir", str(tmp_path / "runs")]) == 2
    captured = capsys.readouterr()
    assert naming("prior_weight", 1, "reference_dropout").search(captured.err) and "likelihood ..." not in captured.out


@pytest.mark.parametrize("classes", ["absent", "bare", "named"])
def test_class_folders_and_their_names_are_checked_first(classes, bundle, pairs, tmp_path, capsys):
    (tmp_path / "bare").mkdir()
    shutil.copytree(pairs, tmp_path / "named" / "red")
    (tmp_path / "names.txt").write_text("blue\tsky\n")
    flags = ["--model", bundle, "--test_dir", pairs, "--classes_dir", tmp_path / classes, "--gpus", 0]
    names = ["--class_names", tmp_path / "names.txt"] if classes == "named" else []
    assert eval_biart.main([*map(str, [*flags, *names]), "--log_dir", str(tmp_path / "runs")]) == 2
    captured = capsys.readouterr()
    facts = ("class_names", tmp_path / "names.txt", "red") if names else ("classes_dir", tmp_path / classes)
    assert naming(*facts).search(captured.err) and "..." not in captured.out


def test_shapes_of_another_size_than_the_model_are_refused(bundle, tmp_path, capsys):
    argv = ["--model", bundle, "--dataset", "shapes", "--gpus", 0, "--log_dir", tmp_path / "runs"]
    assert eval_biart.main([*map(str, argv)]) == 2
    assert naming("world", "small", 32, 16).search(capsys.readouterr().err)


@pytest.mark.parametrize(
    "flags", ["--model nowhere/bundle", "--generated_dir nowhere/images", "--captions_file nowhere/captions.json"]
)
def test_what_is_to_be_evaluated_is_not_there(tmp_path, capsys, flags):
    assert eval_biart.main([*flags.split(), "--fake_data", "--gpus", "0", "--log_dir", str(tmp_path / "runs")]) == 2
    assert naming(flags.split()[1]).search(capsys.readouterr().err)
