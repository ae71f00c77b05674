"""Caption metrics: known values, pycocoevalcap's own on the same words, what is missing without Java; files."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from latent_verse.data import DataError
from latent_verse.files import FileError
from latent_verse.metrics import captions
from latent_verse.metrics.captions import diversity, plain_words, read_captions_file, score
from tests.messages import naming

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java on this machine")
WRITTEN = ["A man rides a horse.", "two dogs play on the grass", "a red bus, isn't it?"]
REFERENCES = [
    ["A man riding a brown horse.", "a person is on a horse"],
    ["Two dogs playing in the grass!", "dogs play"],
    ["a red double-decker bus", "It's a bus"],
]


@pytest.fixture
def no_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


# ------------------------------------------------------------------------------------------------------------- values


def test_the_references_themselves_score_highest(no_java):
    texts = ["a man rides a brown horse", "two dogs play on green grass", "one red bus stands here"]
    out = score(texts, [[text] for text in texts])
    assert out.metrics == pytest.approx(
        {"bleu_1": 1, "bleu_2": 1, "bleu_3": 1, "bleu_4": 1, "rouge_l": 1, "cider": 10}, rel=1e-6
    )
    assert out.each["cider"] == pytest.approx([10, 10, 10])
    strange = score(texts, [["x y z"]] * 3)
    assert strange.metrics["bleu_1"] == pytest.approx(0, abs=1e-6) and strange.metrics["cider"] == 0


def test_bleu_and_rouge_by_hand(no_java):
    out = score(["the cat sat", "b"], [["the cat sat on the mat"], ["b"]])
    # 4 of 4 words match, and 7 are asked for: brevity penalty e^(1 - 7/4)
    assert out.metrics["bleu_1"] == pytest.approx(math.exp(1 - 7 / 4), rel=1e-6)
    assert out.metrics["bleu_2"] == pytest.approx(math.exp(1 - 7 / 4), rel=1e-6)
    recall, precision, beta = 3 / 6, 1.0, 1.2
    rouge = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    assert out.each["rouge_l"] == pytest.approx([rouge, 1])
    assert out.metrics["rouge_l"] == pytest.approx((rouge + 1) / 2)
    clipped = score(["a a a a", "b"], [["a man"], ["b"]])  # a word counts as often as a reference has it
    assert clipped.metrics["bleu_1"] == pytest.approx(2 / 5, rel=1e-6)


def test_cider_by_hand(no_java):
    """Two images of one word each: of the four n-gram lengths one matches, so a quarter of 10."""
    assert score(["x", "y"], [["x"], ["y"]]).each["cider"] == pytest.approx([2.5, 2.5])
    assert score(["x", "y"], [["x", "z"], ["y"]]).each["cider"] == pytest.approx([1.25, 2.5])


def test_cider_needs_several_images(no_java):
    out = score(["a man"], [["a man"]])
    assert "cider" not in out.metrics and naming("one image").search(out.missing["cider"])


@needs_java
@pytest.mark.slow
def test_with_java_all_but_spice_are_the_librarys_own():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    out = score(WRITTEN, REFERENCES)
    res = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(WRITTEN)})
    gts = PTBTokenizer().tokenize({i: [{"caption": t} for t in texts] for i, texts in enumerate(REFERENCES)})
    assert out.tokenizer == captions.PTB and out.words == [res[i][0].split() for i in range(3)]
    expected = dict(zip(captions.BLEU_NAMES, Bleu(4).compute_score(gts, res, verbose=0)[0], strict=True))
    for name, scorer in (("rouge_l", Rouge()), ("cider", Cider()), ("meteor", Meteor())):
        expected[name], each = scorer.compute_score(gts, res)
        assert out.each[name] == pytest.approx(list(each))
    assert out.metrics == pytest.approx(expected)
    assert 0 < out.metrics["meteor"] < 1
    assert set(out.missing) == ({"spice"} if captions.spice_missing() else set())


@needs_java
@pytest.mark.slow
def test_with_java_captions_of_no_words_score_nothing():
    out = score(["", "a dog runs"], [["a red circle"], ["a dog runs"]])
    for name in ("bleu_1", "rouge_l", "cider", "meteor"):
        assert out.each[name][0] == pytest.approx(0, abs=1e-6), name
    assert out.each["meteor"][1] == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------ without Java


def test_without_java_the_others_are_computed_and_the_reason_is_named(no_java):
    out = score(WRITTEN, REFERENCES)
    assert out.metrics.keys() == {*captions.BLEU_NAMES, "rouge_l", "cider"}
    assert out.missing.keys() == {"meteor", "spice"}
    assert naming("java").search(out.missing["meteor"])
    assert out.tokenizer == captions.PLAIN and "in place of PTBTokenizer" in out.tokenizer
    switched_off = score(WRITTEN, REFERENCES, java=False).missing
    assert switched_off.keys() == out.missing.keys()
    assert all(naming("java: false").search(reason) for reason in switched_off.values())


def test_if_java_fails_its_metrics_are_missing(monkeypatch, tmp_path):
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    out = score(WRITTEN, REFERENCES)
    assert out.tokenizer == captions.PLAIN and "failed" in out.missing["meteor"]
    assert out.metrics["bleu_1"] > 0.3


def test_without_the_package_its_name_is_reported(monkeypatch):
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: None)
    out = score(WRITTEN, REFERENCES)
    assert not out.metrics and out.words[0][:2] == ["a", "man"]
    assert "pycocoevalcap" in out.missing["cider"] and "pip install '.[eval]'" in out.missing["cider"]


def test_words_without_java_are_nearly_the_fields():
    assert plain_words("It's red, isn't it? A half-eaten 3.5 inch cake’s top; can't.") == [
        *["it", "'s", "red", "is", "n't", "it", "a", "half-eaten", "3.5", "inch", "cake", "'s", "top", "ca", "n't"]
    ]
    assert plain_words("  ...!  ") == [] and plain_words("зелёный круг") == ["зелёный", "круг"]


def test_what_cannot_be_scored():
    for written, references in (([], []), (["a"], []), (["a", "b"], [["a"], []])):
        with pytest.raises(DataError, match=naming(f"{len(written)} captions", f"{len(references)} images")):
            score(written, references)


def test_diversity_by_hand():
    out = diversity([["a", "red", "bus"], ["a", "red", "dog"], ["a", "red", "bus"]])
    assert out == pytest.approx(
        {
            "distinct_1": 4 / 9,
            "distinct_2": 3 / 6,
            "distinct_3": 2 / 3,
            "vocabulary": 4,
            "words_per_caption": 3,
            "different_captions": 2 / 3,
        }
    )
    assert diversity([[], ["a"]]) == pytest.approx(
        {"distinct_1": 1, "vocabulary": 1, "words_per_caption": 0.5, "different_captions": 1}
    )


# --------------------------------------------------------------------------------------------------------------- files

IDS, NAMES = [42, 7, 9], ["val/COCO_000000000042.jpg", "val/b.jpg", "c.jpg"]


def write(tmp_path, rows, lines=False):
    file = tmp_path / "captions.json"
    file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    return file


def test_captions_are_found_by_id_by_name_and_by_short_name(tmp_path):
    rows = [{"image_id": 7, "caption": "seven"}, {"image_id": 42, "caption": "x"}, {"image_id": 9, "caption": "ü"}]
    assert read_captions_file(write(tmp_path, rows), IDS, NAMES) == ["x", "seven", "ü"]
    rows = [
        {"image": "/elsewhere/val/b.jpg", "captions": ["b", "b2"]},
        {"image": "c.jpg", "captions": ["c"]},
        {"image": "val/COCO_000000000042.jpg", "captions": ["a"]},
    ]
    assert read_captions_file(write(tmp_path, rows, lines=True), IDS, NAMES) == ["a", "b", "c"]
    more = [*rows, {"image": "d.jpg", "captions": ["of another split"]}]
    assert read_captions_file(write(tmp_path, more, lines=True), IDS, NAMES) == ["a", "b", "c"]


def test_what_is_written_is_read_again_and_by_coco(tmp_path, capsys):
    from pycocotools.coco import COCO

    file = tmp_path / "captions.json"
    file.write_text(captions.coco_results(IDS, ["x", "ü", "z"]), encoding="utf-8")
    assert read_captions_file(file, IDS, NAMES) == ["x", "ü", "z"]
    truth = COCO()
    truth.dataset = {"images": [{"id": i} for i in IDS], "annotations": []}
    truth.createIndex()
    assert truth.loadRes(str(file)).imgToAnns[7][0]["caption"] == "ü"


@pytest.mark.parametrize(
    ("rows", "facts"),
    [
        ([{"image_id": 42, "caption": "x"}, {"image_id": 9, "caption": "x"}], ["1 of 3", 7, "caption_pictures"]),
        ([{"image_id": 1, "caption": "x"}], [1, NAMES[0]]),
        ([{"image_id": 42}], ["entry 0", {"image_id": 42}]),
        ([{"image_id": 42, "captions": []}], ["entry 0", {"image_id": 42, "captions": []}]),
        ([{"image_id": 42, "caption": 3}], ["entry 0", 3]),
        (["x"], ["entry 0", "x"]),
    ],
)
def test_files_that_do_not_fit(tmp_path, rows, facts):
    with pytest.raises(DataError, match=naming("captions_file", *facts)):
        read_captions_file(write(tmp_path, rows), IDS, NAMES)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileError, match=naming("captions_file", tmp_path / "none.json")):
        read_captions_file(tmp_path / "none.json", IDS, NAMES)
    (tmp_path / "x.json").write_text("[{")
    with pytest.raises(FileError, match=naming("captions_file", tmp_path / "x.json", "JSON")):
        read_captions_file(tmp_path / "x.json", IDS, NAMES)


@pytest.mark.parametrize(
    "key", [42, "42", 42.0, "000000000042", "COCO_val2014_000000000042.jpg", "x/COCO_000000000042.png"]
)
@pytest.mark.parametrize("field", ["image_id", "image"])
def test_an_id_is_found_in_all_its_forms(tmp_path, key, field):
    rows = [{field: key, "caption": "a"}, {"image_id": "7", "caption": "b"}, {"image": "c.jpg", "caption": "c"}]
    assert read_captions_file(write(tmp_path, rows), IDS, NAMES) == ["a", "b", "c"]
    assert read_captions_file(write(tmp_path, rows), ["42", "7", 9], NAMES) == ["a", "b", "c"]


@pytest.mark.parametrize("key", [[1], {"a": 1}, True, 1.5, None])
def test_an_id_of_another_kind_is_named(tmp_path, key):
    rows = [{"image_id": 1, "caption": "x"}, {"image_id": key, "caption": "x"}]
    with pytest.raises(DataError, match=naming("captions_file", tmp_path / "captions.json", "entry 1", key)):
        read_captions_file(write(tmp_path, rows), [1], ["a.jpg"])


def test_two_captions_of_an_image_are_an_error_unless_they_are_the_same(tmp_path):
    rows = [{"image_id": i, "caption": "x"} for i in IDS]
    assert read_captions_file(write(tmp_path, [*rows, *rows]), IDS, NAMES) == ["x", "x", "x"]
    with pytest.raises(DataError, match=naming("captions_file", "entry 3", "7", "entry 1")):
        read_captions_file(write(tmp_path, [*rows, {"image_id": "7", "caption": "y"}]), IDS, NAMES)


def test_a_name_in_two_folders_needs_its_folder(tmp_path):
    names = ["one/a.jpg", "two/a.jpg", "b.jpg"]
    rows = [{"image": f"/data/{name}", "caption": name} for name in names]
    assert read_captions_file(write(tmp_path, rows), names, names) == names
    rows[1]["image"] = "a.jpg"
    with pytest.raises(DataError, match=naming("captions_file", "entry 1", "a.jpg", "one/a.jpg", "two/a.jpg")):
        read_captions_file(write(tmp_path, rows), names, names)


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        (b"[" * 100_000, ["JSON"]),
        (b'{"image": 1, "caption": ' + b"[" * 100_000, ["line 1", "JSON"]),
        (b'[{"image_id": 42, "caption": "B\xe4r"}]', ["UTF-8", "line 1", "byte 31"]),
        (b'{"image": "c.jpg", "caption": "x"}\n{"image": "B\xe4r"}', ["UTF-8", "line 2"]),
        (b'{"image_id": ' + b"9" * 5000 + b', "caption": "x"}', ["line 1", "JSON"]),
    ],
)
def test_damaged_files_are_one_line(tmp_path, data, facts):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(FileError, match=naming("captions_file", tmp_path / "x.json", *facts)) as caught:
        read_captions_file(tmp_path / "x.json", IDS, NAMES)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_line_of_a_captions_file_ends_at_its_newline_only(tmp_path):
    rows = [{"image_id": i, "caption": f"a\u2028b\x85{i}"} for i in IDS]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for before in ("", "\ufeff", "\n\n"):
        (tmp_path / "x.json").write_text(before + text, encoding="utf-8")
        assert read_captions_file(tmp_path / "x.json", IDS, NAMES) == [row["caption"] for row in rows]


@pytest.mark.slow
def test_of_a_very_long_text_the_beginning_is_scored(no_java, monkeypatch):
    long = "a red bus " * 100_000
    seen = []
    monkeypatch.setattr(captions, "plain_words", lambda text: seen.append(len(text)) or plain_words(text))
    out = score([long, "b"], [[long], ["b"]], java=False)
    assert max(seen) <= 10_000 and out.metrics["rouge_l"] == pytest.approx(1)


def test_an_exact_name_goes_before_the_number_in_it(tmp_path):
    names = ["pic_000000000001.jpg", "pic_000000000002.jpg", "other.jpg"]
    rows = [{"image": f"elsewhere/{name}", "captions": [name]} for name in names]
    assert read_captions_file(write(tmp_path, rows, lines=True), [2, 1, 3], names) == names
    rows[0]["image"] = "pic_000000000001.png"  # its number is the id of pic_000000000002.jpg
    with pytest.raises(DataError, match=naming("captions_file", "1 of 3", 2)):
        read_captions_file(write(tmp_path, rows), [2, 1, 3], names)
    rows[0]["image"] = "COCO_000000000003.png"  # as is the id of other.jpg, whose name holds none
    with pytest.raises(DataError, match=naming("entry 2", "other.jpg", "entry 0")):
        read_captions_file(write(tmp_path, rows), [2, 1, 3], names)


def test_a_name_in_another_folder_is_another_image(tmp_path):
    names = ["a/1.png", "b/1.png", "b2/2.png"]
    rows = [{"image": f"p8/{name}", "caption": name} for name in names]
    assert read_captions_file(write(tmp_path, rows), names, names, [1, 2]) == names[1:]
    assert read_captions_file(write(tmp_path, rows), names[1:], names[1:]) == names[1:]
    del rows[1]
    with pytest.raises(DataError, match=naming("1 of 2", "b/1.png")):
        read_captions_file(write(tmp_path, rows), names[1:], names[1:])
    rows[0] = {"image": "1.png", "caption": "of which?"}
    with pytest.raises(DataError, match=naming("entry 0", "a/1.png", "b/1.png")):
        read_captions_file(write(tmp_path, rows), names, names, [1, 2])


def test_an_entry_must_not_contradict_itself(tmp_path):
    rows = [{"image_id": 1, "captions": "hello"}, {"image_id": 2, "image": "b.jpg", "caption": None, "captions": ["q"]}]
    assert read_captions_file(write(tmp_path, rows), [1, 2], ["a.jpg", "b.jpg"]) == ["hello", "q"]
    for more in ({"image": "b.jpg"}, {"caption": "bye"}):
        with pytest.raises(DataError, match=naming("captions_file", "entry 0", *more)):
            read_captions_file(write(tmp_path, [rows[0] | more, rows[1]]), [1, 2], ["a.jpg", "b.jpg"])
    (tmp_path / "none.json").write_bytes(b"")
    with pytest.raises(DataError, match=naming(tmp_path / "none.json", "empty")):
        read_captions_file(tmp_path / "none.json", [1], ["a.jpg"])


@pytest.mark.parametrize("character", ["\ud800", "\0"])
@pytest.mark.parametrize("field", ["caption", "captions"])
def test_a_caption_that_is_not_text_is_refused(tmp_path, character, field):
    """Java's tokenizer fails at it, and all captions would be scored on other words."""
    caption = f"a {character} man"
    rows = [{"image_id": 139, "caption": "x"}, {"image_id": 7, field: [caption] if field == "captions" else caption}]
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=naming("captions_file", "entry 1", file, ascii(character)[1:-1])):
        read_captions_file(file, [139, 7], ["a.jpg", "b.jpg"])
