"""Records of metrics, two runs side by side, and the cases that the page shows."""

from __future__ import annotations

import json
import re

import pytest

from latent_verse.commands import eval_biart
from latent_verse.evaluation.page import choose, write
from latent_verse.evaluation.records import Records, compare, four_digits
from tests.messages import naming


def test_two_runs_side_by_side(tmp_path, capsys):
    for name, value, samples, own in (("a", 40.0, 100, {"dtype": "float32"}), ("b", 30.0, 50, {})):
        records = Records({"biart": name}, 0)
        records.add("generation/fid_0", value, samples=samples, library="x 1.0", protocol="p")
        records.add("generation/fid_8", 1.0, samples=7, library="x 1.0", protocol="p", **own)
        records.add("captions/cider", 0.5, samples=7, library="x 1.0", protocol="p", drawn=1)
        if name == "a":
            records.add("captions/spice", 0.2, samples=7, library="x 1.0", protocol="p")
        else:
            records.miss("captions/spice", "no Java")
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(records.as_json()))
    assert eval_biart.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b" / "metrics.json")]) == 0
    head, fid, with_dtype, cider, spice = capsys.readouterr().out.splitlines()
    assert head.split() == [str(tmp_path / "a"), str(tmp_path / "b" / "metrics.json"), "difference"]
    assert fid.split()[:4] == ["generation/fid_0", "40", "30", "-10"] and "not comparable: samples 100 and 50" in fid
    assert with_dtype.split() == ["generation/fid_8", "1", "1", "+0"]
    assert cider.split() == ["captions/cider", "0.5", "0.5", "+0"]
    assert spice.split() == ["captions/spice", "0.2", "missing"]
    (tmp_path / "b" / "metrics.json").write_text("{}")
    assert eval_biart.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert naming("compare", tmp_path / "b" / "metrics.json").search(capsys.readouterr().err)
    assert eval_biart.main(["--compare", str(tmp_path / "a"), str(tmp_path / "none")]) == 2
    assert naming("compare", tmp_path / "none").search(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("fid_0", "InceptionV3; against 50 pictures", "InceptionV3; against 50 images"),
        ("cider", "2.5 references a picture; PTB", "2.5 references per image; PTB"),
        ("clip", "cosine of a picture (9 px), mean over pictures", "cosine of an image (9 px), mean over images"),
        ("log_p", "log p(text | the codes it drew)", "log p(text | the codes it sampled)"),
        ("bits", "one caption of the draw a picture", "one sampled caption per image"),
        ("trip", "caption of the picture drawn for a text", "caption of the image sampled for a text"),
    ],
)
def test_a_run_whose_protocol_is_in_older_words_is_comparable(tmp_path, name, old, new):
    for run, protocol in (("old", old), ("new", new)):
        records = Records({}, 0)
        for metric in (name, f"zero_shot/{name}"):  # whose protocol quotes what the user has written
            records.add(metric, 1.0, samples=3, library="x 1.0", protocol=protocol)
        (tmp_path / run).write_text(json.dumps(records.as_json()))
    _, same, quoted = compare(str(tmp_path / "old"), str(tmp_path / "new")).splitlines()
    assert "not comparable" not in same and "not comparable: protocol" in quoted


def test_a_metric_that_is_no_number_is_missing():
    records = Records({}, 0)
    records.add("x", float("nan"), samples=3, library="l 1.0", protocol="p")
    assert not records.values and "nan on 3 samples" in records.missing["x"]


@pytest.mark.parametrize(
    "content",
    [
        '{"figures": {"x": {"value": 1.0}}}',
        '{"figures": {"x": {"protocol": "p"}}}',
        '{"figures": {"zero_shot/x": {"value": "much", "protocol": "p"}}}',
        '{"figures": {"x": {"value": true, "protocol": "p"}}}',
        '{"figures": {"x": {"value": "1_0", "protocol": "p"}}}',
        '{"figures": {"x": {"value": "40.0", "protocol": "p"}}}',
        '{"figures": {"x": {"value": 1e999, "protocol": "p"}}}',
        '{"figures": {"x": {"value": NaN, "protocol": "p"}}}',
        '{"figures": {"x": {"value": null, "protocol": "p"}}}',
        '{"figures": {"x": {"value": [1], "protocol": "p"}}}',
        '{"figures": {"x": {"value": 1, "protocol": 5}}}',
        '{"figures": {"x": {"value": 1, "protocol": "p", "samples": true}}}',
        '{"figures": {"x": {"value": 1, "protocol": "p", "seed": {"a": 1}}}}',
        '{"figures": {"x": {"value": 1, "protocol": "p", "dtype": 32}}}',
        '{"figures": {"x": {"value": 1, "protocol": "p", "drawn": "4"}}}',
        '{"figures": null}',
        '{"figures": {"x": 1.0}}',
        '{"figures": [1.0]}',
        '{"figures": {}, "missing": 3}',
        '{"psnr": 20.0}',
        "[]",
        '{"figures": ',
    ],
)
def test_files_that_hold_no_records_are_named(tmp_path, capsys, content):
    (tmp_path / "good.json").write_text(json.dumps(Records({}, 0).as_json()))
    (tmp_path / "odd.json").write_text(content)
    for pair in (("good", "odd"), ("odd", "good")):
        assert eval_biart.main(["--compare", *(str(tmp_path / f"{name}.json") for name in pair)]) == 2
        said = capsys.readouterr().err
        assert str(tmp_path / "odd.json") in said and said.startswith("error: ") and said.count("\n") == 1
        assert not re.search(r"Error\b|object is|not supported|'NoneType'", said)  # Python's words


def test_what_is_wrong_in_a_record_is_named(tmp_path, capsys):
    content = {"figures": {"generation/fid_0": {"value": "1_0", "protocol": "p"}}}
    (tmp_path / "odd.json").write_text(json.dumps(content))
    assert eval_biart.main(["--compare", *[str(tmp_path / "odd.json")] * 2]) == 2
    assert naming("compare", "generation/fid_0", "value", "'1_0'", "number").search(capsys.readouterr().err)


def test_what_earlier_versions_left_out_is_no_mistake(tmp_path):
    (tmp_path / "a.json").write_text('{"figures": {"x": {"value": 3, "protocol": "p", "seed": null}}}')
    assert compare(*[str(tmp_path / "a.json")] * 2).splitlines()[1].split() == ["x", "3", "3", "+0"]


@pytest.mark.parametrize(
    ("scores", "count", "expected"),
    [
        ([5, 1, 4, 2, 3, 0, 6], 2, ([6, 0], [2, 4], [5, 1])),
        ([1, 2, 3], 5, ([2], [1], [0])),
        ([7], 3, ([0], [], [])),
        ([1, 2], 1, ([1], [], [0])),
        ([], 3, ([], [], [])),
        ([None, None, None], 2, (range(2),)),
        ([1, 1, 1, 1, 1, 1], 2, ([0, 1], [2, 3], [5, 4])),
    ],
)
def test_best_median_and_worst(scores, count, expected):
    assert tuple(choose(scores, count).values()) == expected


@pytest.mark.parametrize(
    "data", [b'\xef\xbb\xbf{"figures": {"x": {"value": "B\xe4r"}}}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_damaged_metrics_file_is_one_line(tmp_path, capsys, data):
    (tmp_path / "a.json").write_bytes(data)
    assert eval_biart.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 2
    said = capsys.readouterr().err
    assert naming("compare", tmp_path / "a.json").search(said) and said.count("\n") == 1


def test_a_byte_order_mark_is_no_text_and_what_is_printed_cannot_move_the_cursor(tmp_path, capsys):
    records = Records({}, 0)
    records.add("x", 1.0, samples=3, library="l 1.0", protocol="p")
    content = json.loads(json.dumps(records.as_json()).replace('"x"', '"\\u001b[2Jx"'))
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(content), encoding="utf-8")
    assert eval_biart.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and r"\x1b[2Jx" in printed


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (-31.4159, "-31.42"),
        (0.00081, "8.10e-04"),
        (40504.4, "40504"),
        (1.7e31, "1.70e+31"),
        (-1e7, "-1.00e+07"),
    ],
)
def test_a_value_has_four_digits_whatever_its_size(value, shown):
    assert four_digits(value) == shown


def test_the_page_groups_metrics_by_what_they_tell_and_missing_ones_by_the_reason(tmp_path):
    records = Records({}, 0)
    about = {"samples": 30000, "library": "l 1.0", "protocol": "in one way"}
    records.add("retrieval/text_given_image/r@1", 0.25, unit="share", better="higher", interval=(0.2, 0.30004), **about)
    records.add("generation/fid_0", 37.25, better="lower", **about)
    records.add("shapes/val/reconstruction/all", 1, unit="share", better="higher", **about)
    records.add("reconstruction/psnr", 24.5, unit="dB", better="higher", **about)
    records.add("generation/clip_score", 27.31, unit="of 100", better="higher", **about | {"protocol": "in another"})
    records.add("mine", 3, **about)
    for name in ("generation/precision", "generation/recall"):
        records.miss(name, "needs a file; --download fetches it")
    records.miss("captions/spice", "needs Java")
    write(tmp_path / "index.html", "a title", records, [], {}, "")
    page = re.sub("<wbr>", "", (tmp_path / "index.html").read_text())
    headings = ["Image quality", "Retrieval", "Truth", "Reconstruction", "Other metrics"]
    assert re.findall("<h3>(.*?)</h3>", page) == headings
    sections = re.split("<h3>|<h2", page)[2:]
    cells = [re.findall("<td[^>]*>(.*?)</td>", section) for section in sections]
    assert cells[0][:5] == ["generation/fid_0", "37.25", "", "↓ lower", "30,000"]
    assert cells[0][5:] == ["generation/clip_score", "27.31", "of 100", "↑ higher", "30,000"]
    assert cells[1] == ["retrieval/text_given_image/r@1", "0.25", "share", "↑ higher", "0.2 to 0.3", "30,000"]
    assert cells[2][0] == "shapes/val/reconstruction/all" and cells[3][0] == "reconstruction/psnr"
    assert cells[4] == ["mine", "3", "30,000"]
    assert "<li>fid_0: in one way (l 1.0)</li>" in sections[0] and "<li>clip_score: in another" in sections[0]
    missing = re.findall("<li><b>(.*?)</b>: (.*?)</li>", page)
    assert missing == [
        ("generation/precision, generation/recall", "needs a file; --download fetches it"),
        ("captions/spice", "needs Java"),
    ]


def test_a_page_without_a_metric_says_so(tmp_path):
    write(tmp_path / "index.html", "a title", Records({}, 0), [], {}, "")
    page = (tmp_path / "index.html").read_text()
    assert "No metric could be computed" in page and ">Missing<" not in page and "<h3>" not in page
