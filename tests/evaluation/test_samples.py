"""Images on disk: the same however they are shared, batched or interrupted; the fixed sample; any folder in."""

from __future__ import annotations

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from latent_verse.commands import generate
from latent_verse.config import ConfigError, SamplingSettings, UserError
from latent_verse.config.evaluate import EvalDataConfig
from latent_verse.data import DataError
from latent_verse.evaluation import samples
from latent_verse.evaluation.pairs import Pairs, ordered
from latent_verse.metrics.processes import Ranks
from tests.messages import naming
from tests.stand_ins import write_pairs
from tests.tiny_lverse import make_lverse
from tests.two_processes import in_two_processes

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a red circle", "two small blue squares", "a red circle", "a red", "a blue circle"]


@pytest.fixture
def model(tiny_augvae):
    return make_lverse(tiny_augvae(single_level=4))


def generated(model, folder, ranks=None, batch_size=2, **changes):
    options = {"candidates": 2, "seed": 3, "batch_size": batch_size, "sampling": SamplingSettings()} | changes
    samples.generate(model, TEXTS, folder, ranks or Ranks(), **options)
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted(folder.glob("*.png"))}


def same(a: dict, b: dict) -> bool:
    """Equal but for rounding: another batch may round a pixel the other way."""
    return a.keys() == b.keys() and all(np.abs(a[name] - b[name]).max() <= 1 for name in a)


class Counting:
    """A model that stops after so many calls, as a run that is killed."""

    def __init__(self, model, stop_after=None):
        self.model, self.calls, self.stop_after = model, [], stop_after
        self.fingerprints, self.encode_texts = model.fingerprints, model.encode_texts

    def sample_scored(self, texts, *args, **kwargs):
        if self.stop_after is not None and len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(list(texts))
        return self.model.sample_scored(texts, *args, **kwargs)


def test_images_carry_their_text_and_score_and_an_index_lists_them(model, tmp_path):
    found = generated(model, tmp_path)
    assert list(found) == [f"{i:06d}_{j:02d}.png" for i in range(5) for j in range(2)]
    groups = samples.read_groups(tmp_path)
    assert [group.text for group in groups] == TEXTS and all(len(group.files) == 2 for group in groups)
    image = Image.open(groups[1].files[1])
    assert image.text["text"] == TEXTS[1] and float(image.text["log_p"]) == groups[1].log_p[1]
    [[low, high]] = [sorted(groups[1].log_p)]
    assert low < high < 0


def test_a_new_folder_is_made_without_a_word(model, tmp_path, caplog):
    generated(model, tmp_path / "new")
    assert caplog.messages == []


def test_scores_are_those_of_the_codes_that_were_sampled(model):
    images, log_p = model.sample_scored(TEXTS[:2], 3, seed=5)
    assert log_p.shape == (2, 3) and [len(row) for row in images] == [3, 3]
    assert [[np.asarray(p).tolist() for p in row] for row in images] == [
        [np.asarray(p).tolist() for p in row] for row in model.text_to_image(TEXTS[:2], 3, seed=5)
    ]
    best = model.text_to_image(TEXTS[:2], 1, rerank=3, seed=5)  # what re-ranking in the pipeline takes
    for row, values, [chosen] in zip(images, log_p, best, strict=True):
        assert np.array_equal(np.asarray(row[int(values.argmax())]), np.asarray(chosen))


def test_the_batch_changes_nothing_and_the_same_text_gives_new_images(model, tmp_path):
    one, all_at_once = generated(model, tmp_path / "a", batch_size=1), generated(model, tmp_path / "b", batch_size=9)
    assert same(one, all_at_once)
    assert not np.array_equal(one["000000_00.png"], one["000002_00.png"])
    assert not np.array_equal(one["000000_00.png"], one["000000_01.png"])
    other = generated(model, tmp_path / "c", seed=4)
    assert not np.array_equal(one["000001_00.png"], other["000001_00.png"])


def test_an_interrupted_run_resumes_and_gives_what_an_uninterrupted_one_does(model, tmp_path):
    whole = generated(model, tmp_path / "whole")
    stopped = Counting(model, stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        generated(stopped, tmp_path / "run")
    done = {p.name for p in (tmp_path / "run").glob("*.png")}
    assert 0 < len(done) < 10 and not (tmp_path / "run" / samples.INDEX).exists()
    before = {name: (tmp_path / "run" / name).stat().st_mtime_ns for name in done}
    resumed = Counting(model)
    assert same(whole, generated(resumed, tmp_path / "run"))
    assert sum(map(len, resumed.calls)) == 5 - len(done) // 2
    assert all((tmp_path / "run" / name).stat().st_mtime_ns == before[name] for name in done)
    again = Counting(model)
    generated(again, tmp_path / "run")
    assert not again.calls


def test_half_a_caption_is_generated_again(model, tmp_path):
    whole = generated(model, tmp_path)
    (tmp_path / "000003_01.png").unlink()
    counting = Counting(model)
    assert same(whole, generated(counting, tmp_path)) and counting.calls == [[TEXTS[3]]]


def part(rank: int, model, folder) -> dict[str, torch.Tensor]:
    found = generated(model, folder, Ranks(rank, 2))
    return {name: torch.from_numpy(x) for name, x in found.items()}


def test_two_processes_generate_what_one_does(model, tmp_path):
    whole = generated(model, tmp_path / "one")
    (tmp_path / "results").mkdir()
    first, second = in_two_processes(tmp_path / "results", part, model, tmp_path / "two")
    assert first.keys() == second.keys() == whole.keys()
    assert same(whole, {name: x.numpy() for name, x in first.items()})
    assert (tmp_path / "two" / samples.INDEX).read_text().count("\n") == 10
    assert len(samples.read_groups(tmp_path / "two")) == 5


def test_a_folder_of_different_settings_is_refused(model, tmp_path):
    generated(model, tmp_path)
    with pytest.raises(ConfigError, match=naming(tmp_path, "seed", 3, 4, "--generated_dir")):
        generated(model, tmp_path, seed=4)
    with pytest.raises(ConfigError, match=naming(tmp_path, "candidates", 2, 3)):
        generated(model, tmp_path, candidates=3)
    with torch.no_grad():
        model.biart.ln_f.bias.add_(1)
    del model.fingerprints
    with pytest.raises(ConfigError, match=naming(tmp_path, "model")):
        generated(model, tmp_path)
    (tmp_path / samples.ABOUT).unlink()
    with pytest.raises(ConfigError, match=naming(tmp_path, "--name")):
        generated(model, tmp_path)


# ------------------------------------------------------------------------------------------------- any system's folder


def test_what_generate_writes_is_read(model, tmp_path):
    model.save_pretrained(tmp_path / "bundle")
    argv = ["--model", tmp_path / "bundle", "--text", *TEXTS[:2], "--num", 3, "--out", tmp_path / "out", "--gpus", 0]
    assert generate.main([*map(str, argv)]) == 0
    groups = samples.read_groups(tmp_path / "out")
    assert [(group.text, [f.name for f in group.files]) for group in groups] == [
        (text, [f"{i:04d}_{j:02d}.png" for j in range(3)]) for i, text in enumerate(TEXTS[:2])
    ]
    assert groups[0].log_p == [None] * 3
    (tmp_path / "out" / samples.INDEX).unlink()  # the text is in the files too; grid.png is no sample
    alone = samples.read_groups(tmp_path / "out")
    assert [group.text for group in alone] == [TEXTS[0]] * 3 + [TEXTS[1]] * 3


def test_plain_folders_take_captions_from_beside(tmp_path):
    write_pairs(tmp_path, 3)
    (tmp_path / "p001.txt").unlink()
    groups = samples.read_groups(tmp_path)
    assert [group.text for group in groups] == ["a red circle number 0", None, "a green circle number 2"]


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ("", ["empty"]),
        ("{", ["line 1", "JSON"]),
        ("[" * 100_000, ["line 1", "JSON"]),
        ("7", ["line 1", "file"]),
        ('{"text": "x"}', ["line 1", "file"]),
        ('{"file": "gone.png", "text": "x"}', ["line 1", "gone.png"]),
        ('{"file": "p000.png"}\n{"file": "p001.png"}\n{"file": "p002.png", "number": 1}', [[1, 2]]),
        ('{"file": "p000.png", "number": 1}\n{"file": "p001.png", "number": 1}', ["None", "0, 1"]),
        ('{"file": "p000.png", "text": "a"}\n{"file": "p001.png", "text": "b", "number": 1}', ["b", "0, 1"]),
        ('{"file": "p000.png"}\n{"file": "./p000.png"}', ["line 2", "line 1", "p000.png"]),
        ('{"file": "../outside.png"}', ["line 1", "../outside.png"]),
        ('{"file": "x/../../outside.png"}', ["line 1", "x/../../outside.png"]),
        ('{"file": "/etc/passwd"}', ["line 1", "/etc/passwd"]),
        ('{"file": "p000.png\\u0000"}', ["line 1", "file"]),
        ('{"file": "p000.png", "text": ["a", "b"]}', ["line 1", "text"]),
        ('{"file": "p000.png", "number": "0"}', ["line 1", "number", "'0'"]),
        ('{"file": "p000.png", "number": 0.5}', ["line 1", "number", 0.5]),
        ('{"file": "p000.png", "number": -1}', ["line 1", "number"]),
        ('{"file": "p000.png", "log_p": NaN}', ["line 1", "log_p", "nan"]),
        ('{"file": "p000.png", "log_p": "-3"}', ["line 1", "log_p"]),
        ('{"file": "p000.png", "log_p": 1' + "0" * 400 + "}", ["line 1", "log_p"]),
        ('{"file": "' + "a" * 100_000 + '"}', ["line 1", "exist"]),
        ('{"file": "p000.png", "text": "a\\u0000b"}', ["line 1", "not text"]),
        ('{"file": "p000.png", "log_p": -3}\n{"file": "p001.png"}', ["log_p"]),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, content, facts):
    write_pairs(tmp_path, 3)
    (tmp_path / samples.INDEX).write_text(content)
    with pytest.raises(UserError, match=naming("generated_dir", tmp_path / samples.INDEX, *facts)):
        samples.read_groups(tmp_path)


def test_the_images_of_a_caption_are_those_with_its_text(tmp_path):
    """Whatever the order of the lines; a text that comes again, as in `generate`, begins another group."""
    write_pairs(tmp_path, 6)
    lines = [("red", 0), ("blue", 1), ("blue", 0), ("red", 1), ("red", 0), ("red", 1)]
    rows = [{"file": f"p{i:03d}.png", "text": t, "number": n, "log_p": -i} for i, (t, n) in enumerate(lines)]
    (tmp_path / samples.INDEX).write_text("\n".join(map(json.dumps, rows)))
    group = lambda text, *numbers: samples.Group(  # noqa: E731
        text, [tmp_path / f"p{i:03d}.png" for i in numbers], [-float(i) for i in numbers]
    )
    assert samples.read_groups(tmp_path) == [group("red", 0, 3), group("blue", 2, 1), group("red", 4, 5)]


def test_texts_that_show_nothing_are_none(tmp_path):
    write_pairs(tmp_path, 3)
    for i, text in enumerate(["", "\u200b", " \u00a0"]):
        (tmp_path / f"p{i:03d}.txt").write_text(f"{text}\n", encoding="utf-8")
    assert [group.text for group in samples.read_groups(tmp_path)] == [None, None, None]
    rows = [{"file": f"p{i:03d}.png", "text": text} for i, text in enumerate(["", "\u200b", " \u00a0"])]
    (tmp_path / samples.INDEX).write_text("\n".join(map(json.dumps, rows)))
    assert [group.text for group in samples.read_groups(tmp_path)] == [None, None, None]
    (tmp_path / samples.INDEX).unlink()
    (tmp_path / "p001.txt").write_bytes(b"a\0b")
    with pytest.raises(DataError, match=naming(tmp_path / "p001.txt", "line 1")):
        samples.read_groups(tmp_path)


def test_lines_of_an_index_end_at_newlines_only(tmp_path):
    write_pairs(tmp_path, 1)
    line = json.dumps({"file": "p000.png", "text": "one\u2028caption", "log_p": -3}, ensure_ascii=False)
    (tmp_path / samples.INDEX).write_text("\ufeff" + line + "\r\n", encoding="utf-8")
    assert samples.read_groups(tmp_path) == [samples.Group("one\u2028caption", [tmp_path / "p000.png"], [-3.0])]


def test_hidden_and_special_files_are_passed_over(tmp_path):
    write_pairs(tmp_path, 2)
    for name in ("._p000.png", ".DS_Store", ".cache/p.png", "__MACOSX/p.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "lost.png").symlink_to("nowhere")
    groups = samples.read_groups(tmp_path)
    assert [group.files[0].name for group in groups] == ["p000.png", "p001.png"]
    assert len(samples.fingerprint_files([group.files[0] for group in groups])) == 16


def test_captions_beside_images_are_read_by_the_rule_of_all_text(tmp_path):
    write_pairs(tmp_path, 2)
    (tmp_path / "p000.txt").write_bytes("\ufeffone\u2028caption\r\nanother".encode())
    assert samples.read_groups(tmp_path)[0].text == "one caption"
    (tmp_path / "p001.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=naming(tmp_path / "p001.txt", "UTF-8", "line 1")):
        samples.read_groups(tmp_path)


def test_files_whose_metadata_cannot_be_read_have_no_caption(tmp_path):
    """Whether their pixels can be read is said when they are needed; names are any bytes."""
    image = Image.new("RGB", (8, 8))
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    samples.save_png(image, tmp_path / "a.png", {"text": "a caption"})
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(data[:60])
    (tmp_path / "c.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    image.save(tmp_path / "d.png", "JPEG")
    shutil.copy(tmp_path / "a.png", odd)
    groups = samples.read_groups(tmp_path)
    assert [group.text for group in groups] == ["a caption", None, None, None, "a caption"]
    assert len(samples.fingerprint_files([group.files[0] for group in groups])) == 16
    for name in ("b.png", "c.png"):
        with pytest.raises(DataError, match=naming(tmp_path / name)):
            samples.read_image(tmp_path / name, 16)


def test_damage_in_a_run_s_own_folder_is_one_line(model, tmp_path):
    generated(model, tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "000000_00.png")
    with pytest.raises(DataError, match=naming(tmp_path / "000000_00.png", "log_p")):
        generated(model, tmp_path)
    (tmp_path / samples.ABOUT).write_text("[")
    with pytest.raises(UserError, match=naming(tmp_path / samples.ABOUT, "JSON")):
        generated(model, tmp_path)


def test_no_images(tmp_path):
    with pytest.raises(DataError, match=naming("generated_dir", tmp_path / "none", "folder")):
        samples.read_groups(tmp_path / "none")
    with pytest.raises(DataError, match=naming("generated_dir", tmp_path, ".png")):
        samples.read_groups(tmp_path)
    (tmp_path / "x.png").write_bytes(b"no")
    with pytest.raises(DataError, match=naming(tmp_path / "x.png")):
        samples.read_image(tmp_path / "x.png", 16)


# -------------------------------------------------------------------------------------------------------- fixed sample


def pairs_of(folder, seed=0) -> Pairs:
    return Pairs(EvalDataConfig(dataset="pairs", test_dir=str(folder)), 16, seed)


def test_the_sample_is_of_different_images_first_and_of_the_names_alone(tmp_path):
    write_pairs(tmp_path / "a", 6, captions=3)
    shutil.copytree(tmp_path / "a", tmp_path / "deep" / "b")
    one, other = pairs_of(tmp_path / "a"), pairs_of(tmp_path / "deep" / "b")
    found = one.sample(8, 0)
    assert found == other.sample(8, 0) and one.about(found, 0) == other.about(found, 0)
    assert len({d.index for d in found[:6]}) == 6 and len({d.index for d in found}) == 6
    assert all(d.caption in one.captions(d.index) for d in found)
    assert one.sample(4, 0) == found[:4]
    assert one.sample(8, 1) != found
    everything = one.sample(10**6, 0)
    assert len(everything) == len(set(everything)) == 18
    assert one.about(found, 0)["captions"] == 8 and one.about(found, 0)["pictures"] == 6


def test_the_sample_is_pinned():
    """Another version, machine or Python must not choose others: by `printf 0/a | sha256sum` and so on."""
    assert ordered(["a", "b", "c", "d"], 0) == [2, 1, 3, 0]


def test_names_and_ids(tmp_path):
    folder = write_pairs(tmp_path, 3)
    for i, name in enumerate(["COCO_val2014_000000000042", "000000000007", "COCO_val2014_000000000100"]):
        for suffix in (".png", ".txt"):
            (folder / f"p{i:03d}{suffix}").rename(folder / f"{name}{suffix}")
    assert sorted(pairs_of(folder).image_ids()) == [7, 42, 100]
    (folder / "000000000007.png").rename(folder / "other.png")
    (folder / "000000000007.txt").rename(folder / "other.txt")
    assert "other.png" in pairs_of(folder).image_ids()
    images = [{"id": 70 + i, "file_name": name.name} for i, name in enumerate(sorted(folder.glob("*.png")))]
    captions = [{"image_id": image["id"], "caption": "a circle"} for image in images]
    (tmp_path / "own.json").write_text(json.dumps({"images": images, "annotations": captions}))
    own = EvalDataConfig(dataset="coco", test_dir=str(folder), test_captions=str(tmp_path / "own.json"))
    assert Pairs(own, 32, 0).image_ids() == [70, 71, 72]
    karpathy = [
        {"filename": i["file_name"], "cocoid": i["id"], "split": "test", "sentences": [{"raw": "a"}]} for i in images
    ]
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": karpathy}))
    own = EvalDataConfig(dataset="karpathy", test_dir=str(folder), test_captions=str(tmp_path / "karpathy.json"))
    assert Pairs(own, 32, 0).image_ids() == [70, 71, 72]
    for cocoid in (70, None):  # two of one id, one without: names tell them apart
        karpathy[1]["cocoid"] = cocoid
        (tmp_path / "karpathy.json").write_text(json.dumps({"images": karpathy}))
        assert Pairs(own, 32, 0).image_ids() == Pairs(own, 32, 0).names
    shapes = Pairs(EvalDataConfig(dataset="shapes", test_size=4), 32, 0)
    assert shapes.image_ids() == [0, 1, 2, 3] and shapes.made_up
    assert shapes.captions(2) and shapes.dataset.scene(2) and shapes.image(2).shape == (3, 32, 32)


def test_settings_are_named_as_eval_biart_names_them(tmp_path):
    write_pairs(tmp_path / "a", 1)
    with pytest.raises(DataError, match=naming("test_captions", "COCO")):
        Pairs(EvalDataConfig(dataset="coco", test_dir=str(tmp_path / "a")), 16, 0)
    with pytest.raises(DataError, match=naming("test_dir", tmp_path / "none")):
        pairs_of(tmp_path / "none")
    with pytest.raises(DataError, match=naming("world", "small", 32, 64)):
        Pairs(EvalDataConfig(dataset="shapes"), 64, 0)


def test_karpathys_test_split_and_several_references(tmp_path):
    write_pairs(tmp_path / "val2014", 4)
    images = []
    for i, split in enumerate(["train", "test", "val", "test"]):
        sentences = [{"raw": f"s{i}{j}"} for j in "ab"]
        images.append({"filename": f"p{i:03d}.png", "filepath": "val2014", "split": split, "sentences": sentences})
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    data = EvalDataConfig(dataset="karpathy", test_dir=str(tmp_path), test_captions=str(tmp_path / "dataset_coco.json"))
    pairs = Pairs(data, 16, 0)
    assert pairs.names == ["p001.png", "p003.png"] and pairs.captions(1) == ["s3a", "s3b"]


def test_random_state_is_left_alone(model, tmp_path):
    torch.manual_seed(1)
    random.seed(1)
    expected = torch.rand(2), random.random()
    torch.manual_seed(1)
    random.seed(1)
    generated(model, tmp_path)
    assert torch.equal(torch.rand(2), expected[0]) and random.random() == expected[1]
