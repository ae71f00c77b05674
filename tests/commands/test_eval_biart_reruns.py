"""What lies in the folder of an eval_biart.py run already: resumed, kept, or in use."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from latent_verse.commands import eval_biart
from latent_verse.files import only_writer
from latent_verse.inference.pipeline import LVerse
from tests.eval_biart_runs import run
from tests.messages import naming

pytestmark = pytest.mark.usefixtures("one_thread", "no_caches")


def test_a_rerun_resumes_and_keeps_its_reference(bundle, pairs, tmp_path, stand_ins, monkeypatch):
    flags = ["--model", bundle, "--test_dir", pairs, "--tasks", "generation", "--reference_stats", tmp_path / "ref.npz"]
    first = run(tmp_path, *flags)
    folder = tmp_path / "runs" / "run"
    (folder / "samples" / "000002_00.png").unlink()
    generated = []
    original = LVerse.sample_scored
    monkeypatch.setattr(
        LVerse, "sample_scored", lambda self, texts, *a, **k: generated.append(texts) or original(self, texts, *a, **k)
    )
    monkeypatch.setattr(
        "latent_verse.metrics.image_quality.save_reference", lambda *a: pytest.fail("the reference is there already")
    )
    again = run(tmp_path, *flags)
    assert [len(texts) for texts in generated] == [1]
    for name, record in first["figures"].items():
        assert again["figures"][name]["value"] == pytest.approx(record["value"], rel=1e-4, abs=1e-4), name
    other = run(tmp_path, *flags, name="other-run")  # the cached statistics serve another run
    assert other["figures"]["generation/fid_4"]["value"] == pytest.approx(first["figures"]["generation/fid_4"]["value"])


def test_a_cached_reference_of_other_images_or_fewer_features_is_refused(bundle, pairs, tmp_path, stand_ins, capsys):
    flags = ["--generated_dir", pairs, "--test_dir", pairs, "--fid_resolution", 16, "--is_splits", 1]
    flags += ["--reference_stats", tmp_path / "ref.npz", "--prc_pictures", 6]
    f = run(tmp_path, *flags)["figures"]
    assert f["generation/precision"]["samples"] == f["generation/precision"]["references"] == 6
    argv = [*map(str, flags), "--gpus", "0", "--log_dir", str(tmp_path / "runs")]
    assert eval_biart.main([*argv, "--prc_pictures", "9"]) == 2
    assert naming(tmp_path / "ref.npz", "prc_pictures", 6, 9).search(capsys.readouterr().err)
    Image.new("RGB", (20, 20)).save(pairs / "p004.png")  # another image under the same name
    assert eval_biart.main(argv) == 2
    assert naming(tmp_path / "ref.npz", "files").search(capsys.readouterr().err)


def test_results_of_different_settings_are_kept(bundle, pairs, tmp_path, capsys):
    flags = ["--model", bundle, "--test_dir", pairs, "--tasks", "likelihood"]
    first = run(tmp_path, *flags)
    assert run(tmp_path, *flags)["figures"] == first["figures"]
    folder = tmp_path / "runs" / "run"
    assert not (folder / "metrics-1.json").exists()
    for number in (1, 2):
        run(tmp_path, *flags, "--likelihood_pairs", number + 1)
        assert f"metrics-{number}.json" in capsys.readouterr().out
    assert json.loads((folder / "metrics-1.json").read_text())["figures"] == first["figures"]
    names = ("metrics{}.json", "index{}.html", "config{}.yaml")
    assert {p.name for p in folder.iterdir()} == {name.format(end) for name in names for end in ("", "-1", "-2")}


def test_runs_of_other_tasks_and_of_fake_data_have_their_own_folders(bundle, pairs, tmp_path):
    argv = ["--model", bundle, "--test_dir", pairs, "--gpus", 0, "--log_dir", tmp_path / "runs", "--tasks"]
    assert eval_biart.main([*map(str, argv), "likelihood"]) == 0
    assert eval_biart.main([*map(str, argv), "retrieval", "--retrieval_pictures", "2"]) == 0
    fake = ["--model", bundle, "--fake_data", "--gpus", 0, "--log_dir", tmp_path / "runs", "--tasks", "likelihood"]
    assert eval_biart.main([*map(str, fake)]) == 0
    stem = tmp_path.name  # of the folder that the bundle lies in
    expected = {f"eval-{stem}-likelihood", f"eval-{stem}-retrieval", f"eval-fake-{stem}-likelihood"}
    assert {folder.name for folder in (tmp_path / "runs").iterdir()} == expected


def test_the_folder_is_tried_and_held_before_the_model_is_loaded(tmp_path, capsys):
    (tmp_path / "file").touch()
    runs, absent = tmp_path / "runs", ["--model", "absent", "--test_dir", "absent", "--gpus", "0"]
    with only_writer(runs / "held", "log_dir"):
        for flags, facts in (
            (["--log_dir", runs, "--name", "held"], ["log_dir", runs / "held", os.getpid()]),
            (["--log_dir", tmp_path / "file" / "runs"], ["log_dir", "file is not a folder"]),
            (["--log_dir", runs, "--name", "a" * 300], ["name", "a" * 79 + "..."]),
            (
                ["--log_dir", runs, "--reference_stats", tmp_path / "file" / "a.npz"],
                ["reference_stats", "not a folder"],
            ),
        ):
            assert eval_biart.main([*absent, *map(str, flags)]) == 2
            said = capsys.readouterr().err
            assert naming(*facts).search(said) and said.count("\n") == 1, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
