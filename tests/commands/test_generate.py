"""generate.py as a user runs it, through main(argv), on a tiny random bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from latent_verse.commands import generate
from latent_verse.config import cli, printable, yaml_files
from latent_verse.config.generate import TASKS, USED, GenerateConfig, GenerateSamplingConfig, WhatConfig, WriteConfig
from latent_verse.data import DataError
from latent_verse.inference import tasks
from latent_verse.inference.pipeline import LVerse
from tests.messages import naming
from tests.tiny_lverse import make_lverse, photo, same

pytestmark = pytest.mark.usefixtures("one_thread")

REPO = Path(__file__).parents[2]
TEXTS = ["a red, round circle", "赤い丸 ${x ???"]


@pytest.fixture
def bundle(tiny_augvae, tmp_path):
    make_lverse(tiny_augvae(single_level=4), text_len=48).save_pretrained(tmp_path / "bundle")
    return str(tmp_path / "bundle")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    photo(seed=1).save(folder / "a.png")
    photo(20, 50, "L", seed=2).save(folder / "deep" / "b.webp")
    return folder


def run(bundle, *argv):
    return generate.main(["--model", bundle, "--gpus", "0", *map(str, argv)])


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


# --------------------------------------------------------------------------------------------------------------- tasks


def test_text_gives_images_with_metadata_an_index_and_a_grid(bundle, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--text", *TEXTS, "--num", 2, "--guidance", 2, "--rerank", 2, "--top_k", 20, "--seed", 7, "--out", out]
    assert run(bundle, *argv) == 0
    assert "4 images written" in capsys.readouterr().out
    names = ["0000_00.png", "0000_01.png", "0001_00.png", "0001_01.png"]
    assert sorted(p.name for p in out.iterdir()) == [*names, "grid.png", "pictures.jsonl"]
    model = LVerse.from_pretrained(bundle, device="cpu")
    expected = model.text_to_image(TEXTS, 2, guidance=2.0, rerank=2, top_k=20, seed=7)
    written = [[Image.open(out / name) for name in names[:2]], [Image.open(out / name) for name in names[2:]]]
    assert same(written, expected, within=0)
    about = written[1][1].text
    assert about["text"] == TEXTS[1] and about["seed"] == "7" and about["number"] == "1"
    settings = {"temperature": 1.0, "top_k": 20, "top_p": None, "guidance": 2.0, "seed": 7, "rerank": 2}
    assert json.loads(about["settings"]) == settings
    assert json.loads(about["model"]) == model.fingerprints
    assert b"tEXt" in (out / names[0]).read_bytes()
    index = lines(out / "pictures.jsonl")
    assert [(entry["file"], entry["text"]) for entry in index] == [(n, TEXTS[i // 2]) for i, n in enumerate(names)]
    assert Image.open(out / "grid.png").width > 2 * 128


def test_images_are_written_in_groups_as_they_are_made(bundle, tmp_path, monkeypatch, capsys):
    """They are the same as in one call, and those that are made are kept if a later group fails."""
    texts = ["a red ring", "a blue square", "a cross"]
    argv = ["--text", *texts, "--num", 2, "--seed", 7]
    assert run(bundle, *argv, "--out", tmp_path / "whole") == 0
    monkeypatch.setattr(tasks, "GROUP", 2)
    assert run(bundle, *argv, "--out", tmp_path / "parts") == 0
    whole, parts = (sorted((tmp_path / name).iterdir()) for name in ("whole", "parts"))
    assert len(whole) == 8 and [p.name for p in whole] == [p.name for p in parts]
    for a, b in zip(whole, parts, strict=True):
        assert a.read_bytes() == b.read_bytes()
    made = LVerse.text_to_image

    def fails_at_last(self, group, *args, **options):
        if group == texts[2:]:
            raise DataError("the last group")
        return made(self, group, *args, **options)

    monkeypatch.setattr(LVerse, "text_to_image", fails_at_last)
    assert run(bundle, *argv, "--out", tmp_path / "stopped") == 2
    assert len(list((tmp_path / "stopped").glob("*.png"))) == 4
    assert [entry["text"] for entry in lines(tmp_path / "stopped" / "pictures.jsonl")] == [
        t for t in texts[:2] for _ in "ab"
    ]


def test_a_text_that_comes_twice_has_new_images(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "GROUP", 1)
    assert run(bundle, "--text", "a", "b", "a", "--seed", 7, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "0000_00.png").read_bytes() != (tmp_path / "out" / "0002_00.png").read_bytes()
    first, second = (Image.open(tmp_path / "out" / name) for name in ("0000_00.png", "0002_00.png"))
    assert first.tobytes() != second.tobytes()


def test_a_run_folder_stands_for_its_bundle(bundle, tmp_path, capsys, caplog):
    shutil.copytree(bundle, tmp_path / "run" / "bundle")
    argv = ["--model", str(tmp_path / "run"), "--text", "a", "--gpus", "0", "--out", str(tmp_path / "out")]
    assert generate.main(argv) == 0
    assert naming(tmp_path / "run", tmp_path / "run" / "bundle").search(caplog.text)


def test_text_file_holds_one_text_a_line(bundle, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("\ufeff" + "\n\n".join(TEXTS) + "\n", encoding="utf-8")
    assert run(bundle, "--text_file", file, "--out", tmp_path / "out", "--temperature", 0) == 0
    assert [entry["text"] for entry in lines(tmp_path / "out" / "pictures.jsonl")] == TEXTS


def test_a_line_of_a_text_file_ends_at_its_newline_only(bundle, tmp_path, capsys):
    file = tmp_path / "texts.txt"
    file.write_bytes("a\u2028b\x85c\r\nd\x0be\n".encode())
    assert run(bundle, "--text_file", file, "--out", tmp_path / "out", "--temperature", 0) == 0
    assert [entry["text"] for entry in lines(tmp_path / "out" / "pictures.jsonl")] == ["a\u2028b\x85c", "d\x0be"]
    file.write_text("\n\u200b\n\u00a0\na\nnul \0\n", encoding="utf-8")
    assert run(bundle, "--text_file", file, "--out", tmp_path / "shown") == 0
    assert [entry["text"] for entry in lines(tmp_path / "shown" / "pictures.jsonl")] == ["a"]
    assert naming("left out", 2, file, "line 2", "visible").search(capsys.readouterr().err)
    file.write_bytes(b"fine\nB\xe4r\n")
    assert run(bundle, "--text_file", file) == 2
    assert naming("text_file", file, "UTF-8", "line 2", "byte 6").search(capsys.readouterr().err)
    with open(file, "wb") as empty:
        empty.truncate(1 << 40)  # no byte of it is read
    assert run(bundle, "--text_file", file) == 2
    assert naming("text_file", file, tasks.TEXT_FILE_BYTES).search(capsys.readouterr().err)


def test_image_gives_captions(bundle, images, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--image", images, images / "a.png", "--out", out, "--num", 2, "--temperature", 0.8, "--seed", 3]
    assert run(bundle, *argv) == 0
    found = lines(out / "captions.jsonl")
    assert [Path(entry["image"]).name for entry in found] == ["a.png", "b.webp", "a.png"]
    model = LVerse.from_pretrained(bundle, device="cpu")
    files = [entry["image"] for entry in found]
    expected = model.image_to_text(files, 2, temperature=0.8, seed=3)
    assert [entry["captions"] for entry in found] == expected
    assert found[0]["settings"]["temperature"] == 0.8 and found[0]["model"] == model.fingerprints
    assert f"{files[1]}: {printable(expected[1][0])}" in capsys.readouterr().out


def test_captions_are_greedy_by_default_or_by_beams(bundle, images, tmp_path):
    model = LVerse.from_pretrained(bundle, device="cpu")
    for argv, settings in (([], {}), (["--beams", 3], {"beams": 3})):
        out = tmp_path / f"out{len(argv)}"
        assert run(bundle, "--image", images / "a.png", "--out", out, *argv) == 0
        (entry,) = lines(out / "captions.jsonl")
        assert [entry["captions"]] == model.image_to_text([images / "a.png"], **settings)


@pytest.mark.parametrize("group", [1024, 1])  # with 1 a group may hold no image at all
def test_unreadable_images_of_a_folder_are_left_out_and_one_named_is_an_error(
    bundle, images, tmp_path, capsys, monkeypatch, group
):
    monkeypatch.setattr(tasks, "GROUP", group)
    (images / "broken.jpg").write_bytes(b"not an image")
    assert run(bundle, "--image", images, "--out", tmp_path / "out") == 0
    assert naming(images / "broken.jpg").search(capsys.readouterr().err)
    assert len(lines(tmp_path / "out" / "captions.jsonl")) == 2
    assert run(bundle, "--image", images / "broken.jpg", "--out", tmp_path / "out2") == 2
    assert naming(images / "broken.jpg").search(capsys.readouterr().err)
    (images / "a.png").unlink()
    (images / "deep" / "b.webp").unlink()
    assert run(bundle, "--image", images, "--out", tmp_path / "out2") == 2
    assert naming(1, images / "broken.jpg").search(capsys.readouterr().err)
    assert not (tmp_path / "out2").exists()


def test_score_prints_a_table(bundle, images, capsys):
    assert run(bundle, "--score", images, *TEXTS) == 0
    rows = capsys.readouterr().out.splitlines()
    model = LVerse.from_pretrained(bundle, device="cpu")
    files = [images / "a.png", images / "deep" / "b.webp"]
    tables = [model.score(files, TEXTS, given=given).flatten() for given in ("image", "text")]
    assert len(rows) == 5 and "log p(text | image)" in rows[0]
    for i, row in enumerate(rows[1:]):
        assert [float(x) for x in row.split()[:2]] == pytest.approx([float(t[i]) for t in tables], abs=2e-3)
        assert row.endswith(TEXTS[i % 2]) and str(files[i // 2]) in row


@pytest.mark.parametrize("texts", [[], ["a red circle"]])
def test_complete_writes_images_and_shows_the_given_one(bundle, images, tmp_path, texts):
    out = tmp_path / "out"
    argv = ["--complete", images / "a.png", "--rows", 2, "--num", 2, "--seed", 1, "--out", out]
    assert run(bundle, *argv, *(["--text", *texts] if texts else [])) == 0
    model = LVerse.from_pretrained(bundle, device="cpu")
    expected = model.complete([images / "a.png"], 2, texts or None, 2, seed=1)
    assert same([[Image.open(out / "0000_00.png"), Image.open(out / "0000_01.png")]], expected, within=0)
    about = Image.open(out / "0000_00.png").text
    assert about["rows"] == "2" and about["completed"].endswith("a.png") and about["text"] == "".join(texts)
    assert Image.open(out / "grid.png").width > 3 * 128


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_are_not_utf8_survive_and_nothing_printed_moves_the_cursor(bundle, tmp_path, monkeypatch, encoding):
    names = [b"lat\xe9.png", "é.png".encode(), b"\x1b[2J.png", b"two\nlines.png"]
    folder = tmp_path / "images"
    folder.mkdir()
    for name in names:
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            photo().save(file, "PNG")
    files = [os.path.join(folder, os.fsdecode(name)) for name in names]
    out = tmp_path / "out"
    for argv in (["--image", folder, "--out", out], ["--score", folder, "a\x1b[2Jb", "é"]):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        assert run(bundle, *argv) == 0
        sys.stdout.flush()
        printed = sys.stdout.buffer.getvalue()
        assert b"lat\\udce9.png" in printed and b"two\\nlines.png" in printed and b"\x1b" not in printed
    assert sorted(entry["image"] for entry in lines(out / "captions.jsonl")) == sorted(files)
    assert all(os.path.exists(entry["image"]) for entry in lines(out / "captions.jsonl"))
    out = tmp_path / "out2"
    assert run(bundle, "--complete", files[0], "--rows", 2, "--out", out) == 0
    sys.stdout.flush()
    assert "\n1 image written" in sys.stdout.buffer.getvalue().decode(encoding)
    assert lines(out / "pictures.jsonl")[0]["completed"] == files[0]
    assert Image.open(out / "0000_00.png").text["completed"].endswith("lat\\udce9.png")


def test_what_cannot_be_printed_is_written(bundle, images, tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with contextlib.suppress(OSError):
        assert run(bundle, "--image", images, "--out", tmp_path / "out") != 0
    assert len(lines(tmp_path / "out" / "captions.jsonl")) == 2


# ------------------------------------------------------------------------------------------------------------- folders


def test_nothing_is_overwritten_without_the_flag(bundle, images, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    argv = ["--text", "a", "--seed", 1, "--out", out]
    assert run(bundle, *argv) == 0  # an empty folder is free
    (out / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for again in (argv, ["--image", images, "--out", out], ["--text", "a", "--out", out / "notes.txt" / "in"]):
        assert run(bundle, *again) == 2
        assert naming("out", out).search(capsys.readouterr().err)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert run(bundle, *argv[:2], "--seed", 2, "--out", out, "--overwrite") == 0
    after = {p.name: p.read_bytes() for p in out.iterdir()}
    assert after["notes.txt"] == b"mine" and after["0000_00.png"] != before["0000_00.png"]
    monkeypatch.chdir(tmp_path)
    for expected in ("generated", "generated-2"):
        assert run(bundle, "--text", "a") == 0
        assert (tmp_path / expected / "0000_00.png").is_file()
    assert len(list(tmp_path.glob("generated*"))) == 2


def test_a_random_seed_is_recorded_and_gives_the_same_images(bundle, tmp_path):
    assert run(bundle, "--text", "a", "--out", tmp_path / "one") == 0
    seed = Image.open(tmp_path / "one" / "0000_00.png").text["seed"]
    assert run(bundle, "--text", "a", "--out", tmp_path / "two", "--seed", seed) == 0
    assert (tmp_path / "one" / "0000_00.png").read_bytes() == (tmp_path / "two" / "0000_00.png").read_bytes()


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("argv", "facts"),
    [
        ([], ["text", "text_file", "image", "score", "complete"]),
        (["--text", "a", "--image", "IMAGES"], ["image", "text"]),
        (["--text", "a", "--text_file", "f"], ["text", "text_file"]),
        (["--text", "a", "--rows", 2], ["rows", "text"]),
        (["--text", "a", "--beams", 2], ["beams", "text"]),
        (["--image", "IMAGES", "--rerank", 2], ["rerank", "image"]),
        (["--score", "IMAGES", "a", "--seed", 2], ["seed", "score"]),
        (["--score", "IMAGES"], ["score", "text"]),
        (["--complete", "IMAGES"], ["complete", "rows"]),
        (["--complete", "IMAGES", "--rows", 4], ["--rows", 4, 1, 3]),
        (["--text", "a", "--gpus", 4], ["gpus", 4]),
        (["--text", "a", "--temprature", 1], ["--temprature", "--temperature"]),
        (["--text", "a", "--temperature", 0, "--num", 3], ["num", "temperature", 0]),
        (["--text", "a", "--top_k", 25], ["top_k", 25, 24]),
        (["--text", "a", "--top_k", "many"], ["top_k", "many"]),
        (["--text", "a " * 99, "--text_too_long", "error"], ["text_len", 48, "text_too_long"]),
        (["--image", "absent.png"], ["absent.png"]),
        (["--image", "EMPTY"], ["EMPTY", ".png"]),
        (["--text_file", "absent.txt"], ["text_file", "absent.txt"]),
        (["--text_file", "BLANK"], ["text_file", "BLANK"]),
        (["--text", ""], ["text", "''", "visible"]),
        (["--text", "a", " "], ["text", "' '", "visible"]),
        (["--text", "\u200b"], ["text", r"'\u200b'", "visible"]),
        (["--text", "a \0"], ["text", r"'a \x00'", "not text"]),
        (["--score", "IMAGES", "a", ""], ["score", "''", "visible"]),
        (["--complete", "IMAGES", "--rows", 2, "--text", " "], ["text", "' '", "visible"]),
        (["--text", "a", "--model", "nowhere"], ["nowhere"]),
        (["--text", "a", "--model", "IMAGES"], ["IMAGES", "config.json"]),
        (["--text"], ["--text"]),
    ],
)
def test_mistakes_are_one_line_and_code_2(bundle, images, tmp_path, capsys, monkeypatch, argv, facts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n\n")
    places = {"IMAGES": images, "EMPTY": tmp_path / "empty", "BLANK": tmp_path / "blank.txt"}
    assert run(bundle, *(places.get(a, a) for a in argv)) == 2
    error = capsys.readouterr().err
    assert naming(*(places.get(fact, fact) for fact in facts)).search(error) and "Traceback" not in error
    assert not list(tmp_path.glob("generated*"))


def test_the_gpu_flag_chooses_the_device(bundle, monkeypatch, capsys):
    """--gpus 1 is cuda or mps, whichever this machine has; --gpus 0 is the CPU."""
    devices = []
    load = lambda model, device, dtype: devices.append(device) or SimpleNamespace()  # noqa: E731
    monkeypatch.setattr(LVerse, "from_pretrained", load)
    config = GenerateConfig(what=WhatConfig(model=bundle))
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=cuda: here)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda here=mps: here)
        tasks.load(config)
        assert devices.pop() == expected
        assert bool(naming("GPU", "CPU").search(capsys.readouterr().err)) == (expected == "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tasks.load(GenerateConfig(what=WhatConfig(model=bundle), write=WriteConfig(gpus=0)))
    assert devices == ["cpu"] and capsys.readouterr().err == ""


def test_a_gpu_samples_in_bfloat16_and_scores_as_stored_unless_a_flag_says_otherwise(
    bundle, images, tmp_path, monkeypatch, capsys
):
    loaded, load = [], LVerse.from_pretrained
    monkeypatch.setattr("latent_verse.inference.placement.sampling_dtype", lambda stored, device: torch.bfloat16)
    monkeypatch.setattr(LVerse, "from_pretrained", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    score = ["--score", images / "a.png", "a red circle", "b"]
    for i, (argv, dtype) in enumerate((
        (["--text", "a"], "bfloat16"),
        (["--text", "a", "--dtype", "float32"], "float32"),
        (["--image", images / "a.png"], "bfloat16"),
        (["--complete", images / "a.png", "--rows", 2, "--dtype", "float16"], "float16"),
        (score, "float32"),
        ([*score, "--dtype", "bfloat16"], "bfloat16"),
    )):  # fmt: skip
        out = [] if "--score" in argv else ["--out", tmp_path / str(i)]
        assert run(bundle, *argv, *out) == 0
        assert loaded.pop().biart.head.weight.dtype == getattr(torch, dtype)
        for file in (tmp_path / str(i)).glob("*.jsonl"):
            assert all(entry.get("dtype", "float32") == dtype for entry in lines(file))
        for file in (tmp_path / str(i)).glob("0*.png"):
            assert Image.open(file).text.get("dtype", "float32") == dtype
    capsys.readouterr()
    assert run(bundle, "--text", "a", "--dtype", "float23") == 2
    assert naming("dtype", "float23", "float32").search(capsys.readouterr().err)


def test_logits_that_are_not_finite_are_one_line_with_the_flag(bundle, tmp_path, monkeypatch, capsys):
    load = LVerse.from_pretrained

    def damaged(*arguments, **options):
        model = load(*arguments, **options)
        model.biart.ln_f.weight.data[0] = float("inf")
        return model

    monkeypatch.setattr(LVerse, "from_pretrained", damaged)
    assert run(bundle, "--text", "a", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert naming("dtype", "float32").search(error) and len(error.splitlines()) == 1


def test_help_is_fast_and_names_every_flag():
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "generate.py", "--help"], cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert time.perf_counter() - begin < 5  # 0.1 s on an idle machine
    for section in (WhatConfig, GenerateSamplingConfig, WriteConfig):
        for f in dataclasses.fields(section):
            assert f"--{f.name}" in done.stdout
    code = "import generate, sys; sys.exit('torch' in sys.modules or 'yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=60).returncode == 0


def test_every_flag_is_used_by_a_task():
    flags = {
        f.name for section in (WhatConfig, GenerateSamplingConfig, WriteConfig) for f in dataclasses.fields(section)
    }
    assert set(USED) == set(TASKS)
    assert flags == set().union(*USED.values()) | {"model", "gpus", "dtype"}


# ---------------------------------------------------------------------------------------------- flags that hold texts


def test_a_yaml_file_gives_settings_and_a_saved_configuration_can_be_read(bundle, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("beams: 1\nwhat:\n  text: [a, b]\nseed: 4\n")
    assert run(bundle, "-c", file, "--out", tmp_path / "out") == 0
    assert len(lines(tmp_path / "out" / "pictures.jsonl")) == 2
    config = GenerateConfig(what=WhatConfig(text=("a, b", "c")))
    file.write_text(yaml_files.to_yaml(config))
    assert cli.parse(GenerateConfig, ["-c", str(file)], "")[0] == config
    assert torch.get_num_threads() == 1


def test_the_folder_is_tried_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for place, fact in ((tmp_path / "file" / "out", "file is not a folder"), (tmp_path / ("a" * 300), 255)):
        assert run("absent", "--text", "a", "--out", place) == 2
        said = capsys.readouterr().err
        assert naming("out", fact).search(said) and "absent" not in said
    for flags in (["--out", tmp_path / "new" / "out"], []):
        assert run("absent", "--text", "a", *flags) == 2
        assert naming("absent").search(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing is left of it
