"""The rules of caption files: what is text and what is empty, ids, quotes in tables; one bad caption among many."""

from __future__ import annotations

import json
import logging

import pytest
from PIL import Image

from latent_verse.config import UserError
from latent_verse.data import DataError, caption_files
from latent_verse.data.caption_files import (
    caption_lines,
    clean,
    coco_number,
    identifier,
    read_captions_json,
    table_rows,
)
from latent_verse.data.captions import CocoCaptions, KarpathyCaptions, PairFolder, TableCaptions
from latent_verse.data.pairs import captions_of
from latent_verse.files import reading
from tests.messages import naming

R = 8


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    return path


@pytest.fixture
def images(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (R, R)).save(tmp_path / name)
    return tmp_path


def rows(path):
    return [(image, captions) for _, image, captions in table_rows(str(path), "train_captions")]


# ---------------------------------------------------------------------------------------------------------------- text


def test_a_caption_of_null_makes_way_for_captions(tmp_path):
    given = [{"image": "a.jpg", "caption": None, "captions": ["a", "b"]}, {"image": "b.jpg", "text": "c"}]
    given += [
        {"captions": None, "image": "c.jpg", "caption": None},
        {"image": "d.jpg", "caption": "d", "captions": "e"},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    assert rows(tmp_path / "t.jsonl") == [
        *[("a.jpg", ["a", "b"]), ("b.jpg", ["c"]), ("c.jpg", [None]), ("d.jpg", ["d"])]
    ]


@pytest.mark.parametrize("end", ["csv", "tsv"])
def test_an_open_quote_holds_no_more_than_a_row(tmp_path, end, monkeypatch):
    """Lines of two characters, of a field that has no end, took 100 bytes each."""
    monkeypatch.setattr(caption_files, "ROW_LINES", 1000)
    separator = "," if end == "csv" else "\t"
    inside = "\n".join("ab" for _ in range(990))
    good = f'image{separator}caption\na.jpg{separator}"{inside}"\n'
    (tmp_path / f"t.{end}").write_text(good)
    assert rows(tmp_path / f"t.{end}") == [("a.jpg", [inside])]
    (tmp_path / f"t.{end}").write_text(good + f'b.jpg{separator}"' + "ab\n" * 5000)
    with pytest.raises(DataError, match=naming("train_captions", f"t.{end} line")):
        rows(tmp_path / f"t.{end}")


@pytest.mark.parametrize("text", ["", " \t", "\u3000\u2003", "\u200b", "\ufeff\u200e\u2060", "\x1b\x07", "\u2028"])
def test_what_shows_nothing_is_an_empty_caption(text):
    assert clean(text) == ""


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("  a \u3000 b\u2028c ", "a b c"),
        ("\u200fשלום", "\u200fשלום"),
        ("👩\u200d🏫", "👩\u200d🏫"),
        ("\U000e0fff unassigned", "\U000e0fff unassigned"),
        ("a" + "\u0301" * 10_000, "a" + "\u0301" * 10_000),
        ("bell\x07", "bell\x07"),
    ],
)
def test_what_shows_something_is_kept(text, kept):
    assert clean(text) == kept


@pytest.mark.parametrize("text", ["a\0b", "a \ud83d"])
def test_nul_and_lone_surrogates_are_no_text(text):
    with pytest.raises(DataError, match=naming("not text")):
        clean(text)


LINES = "\ufeffone\u2028two\x85three\r\n\r\nfour\rfive\n"
CAPTIONS = ["one two three", "four five"]


def test_every_source_reads_text_by_one_rule(images):
    """A byte order mark is no text, and lines end at newlines only."""
    assert caption_lines(str(write(images / "a.txt", LINES))) == CAPTIONS
    assert captions_of({"txt": LINES.encode()}) == [" ".join(CAPTIONS)]
    assert captions_of({"json": b"\xef\xbb\xbf" + json.dumps({"captions": CAPTIONS}).encode()}) == CAPTIONS
    table = "\ufeffimage,caption\r\na.png,one\u2028two\x85three\na.png,four\vfive\n"
    for name, text in (("t.csv", table), ("t.tsv", table.replace(",", "\t"))):
        assert rows(write(images / name, text)) == [("a.png", ["one\u2028two\x85three"]), ("a.png", ["four\vfive"])]
    line = json.dumps({"image": "a.png", "caption": "one\u2028two"}, ensure_ascii=False)
    assert rows(write(images / "t.jsonl", f"\ufeff{line}\r\n\n")) == [("a.png", ["one\u2028two"])]
    assert read_captions_json(write(images / "x.json", "\ufeff[1]"), "train_captions")[0] == [1]


@pytest.mark.parametrize(
    ("name", "data", "facts"),
    [
        ("t.csv", b"image,caption\na.png,ok\nb.png,B\xe4r\n", ["line 3", "byte 30"]),
        ("t.tsv", b"image\tcaption\na.png\tok\nb.png\tB\xe4r\n", ["line 3", "byte 30"]),
        ("t.jsonl", b'{"image": "a.png", "caption": "ok"}\n{"image": "b.png", "caption": "B\xe4r"}', ["line 2"]),
        ("t.jsonl", b'{"image": "a.png", "caption": "ok"}\n' + b"[" * 100_000, ["line 2", "JSON"]),
    ],
)
def test_a_damaged_table_is_one_line_with_the_place(images, name, data, facts):
    with pytest.raises(UserError, match=naming("val_captions", images / name, *facts)) as caught:
        TableCaptions(write(images / name, data), R, captions_key="val_captions")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b'{"images": [{"id": 1}\xe9', b"[" * 100_000, b'{"images": [' + b"9" * 5000 + b"]}"])
def test_a_damaged_json_file_is_one_line(images, data):
    file = write(images / "captions.json", data)
    for kind in (CocoCaptions, KarpathyCaptions):
        with pytest.raises(UserError, match=naming("val_captions", file)) as caught:
            kind(file, images, R, key="val_dir")
        assert "\n" not in str(caught.value)


def test_sizes_are_bounded_before_memory_is_taken(images, monkeypatch):
    with open(images / "a.txt", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=naming(images / "a.txt", caption_files.TEXT_BYTES)):
        caption_lines(str(images / "a.txt"))
    with open(images / "a.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=naming("train_captions", images / "a.json", reading.JSON_BYTES)):
        read_captions_json(images / "a.json", "train_captions")
    monkeypatch.setattr(reading, "LINE_BYTES", 100)
    for name in ("t.csv", "t.tsv", "t.jsonl"):
        table = write(images / name, "image,caption\n".replace(",", "\t" if name == "t.tsv" else ",") + "x" * 101)
        if name == "t.jsonl":
            table = write(images / name, '{"image": "a", "caption": ""}\n' + "x" * 101)
        with pytest.raises(UserError, match=naming("train_captions", table, "line 2", 100)):
            rows(table)


# ------------------------------------------------------------------------------------------- one bad caption among many


def test_a_bad_text_of_a_folder_is_left_out_logged_and_counted(images, caplog):
    write(images / "a.txt", "fine")
    for data in (b"B\xe4r", b"\xff\xfea\0", b"a\0 \0b\0"):  # latin-1, UTF-16 with and without a mark
        write(images / "b.txt", data)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            dataset = PairFolder(images, R)
        assert len(dataset) == 1 and dataset.captions(0) == ["fine"]
        described = dataset.describe()
        assert described["unreadable texts"] == described["images without a .txt"] == 1
        assert sum(str(images / "b.txt") in record.message for record in caplog.records) == 2  # itself, and the count


def test_a_second_text_of_an_image_is_counted(images):
    write(images / "a.txt", "one")
    write(images / "a.TXT", "two")
    dataset = PairFolder(images, R)
    assert dataset.captions(0) == ["two"] and dataset.describe()["second texts of an image"] == 1


@pytest.mark.parametrize("bad", ["\ud83d half", "nul \0"])
def test_a_caption_that_is_not_text_is_left_out_and_counted(images, bad, caplog):
    table = [{"image": f"{i}.png", "caption": text} for i, text in zip("abc", ("one", bad, "two"), strict=True)]
    coco = {"images": [{"id": i, "file_name": row["image"]} for i, row in enumerate(table)]}
    coco["annotations"] = [{"image_id": i, "caption": row["caption"]} for i, row in enumerate(table)]
    sentences = [{"filename": row["image"], "split": "train", "sentences": [{"raw": row["caption"]}]} for row in table]
    opened = [
        TableCaptions(write(images / "t.jsonl", "\n".join(map(json.dumps, table))), R),
        CocoCaptions(write(images / "coco.json", json.dumps(coco)), images, R),
        KarpathyCaptions(write(images / "k.json", json.dumps({"images": sentences})), images, R),
    ]
    for dataset in opened:
        assert [dataset.captions(i) for i in range(len(dataset))] == [["one"], ["two"]]
        assert dataset.describe()["captions that are not text"] == 1
    assert caplog.text.count("b.png") == 3


# -------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("line", "caption"),
    [
        ('"big dog', '"big dog'),
        ('"big" dog', '"big" dog'),
        ('a 5" screen', 'a 5" screen'),
        ('"""', '"""'),
        ('"a ""big"" dog"', 'a "big" dog'),  # as other programs quote
        ("a, b", "a, b"),
    ],
)
@pytest.mark.parametrize("after", ["b.png\tcat\n", "b.png\tcat", "", "\n", 'b.png\t"small cat"\nc.png\tx "y"\n'])
def test_a_tsv_takes_open_quotes_literally_and_swallows_nothing(tmp_path, line, caption, after):
    table = write(tmp_path / "t.tsv", f"image\tcaption\na.png\t{line}\n{after}")
    rest = [row.split("\t") for row in after.split("\n") if row]
    assert rows(table) == [("a.png", [caption])] + [
        (image, [text.strip('"') if text[0] == '"' else text]) for image, text in rest
    ]


def test_a_line_after_an_open_quote_in_a_tsv_is_a_row_of_its_own(tmp_path):
    table = write(tmp_path / "t.tsv", 'image\tcaption\na.png\t"big dog\nno row\n')
    with pytest.raises(DataError, match=naming("train_captions", table, "line 3", 1, 2)):
        rows(table)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ('a.png,"big dog\nb.png,cat\nc.png,"x"\n', ["line 2", "quote"]),
        ('a.png,"big dog\nb.png,cat\nc.png,a ""\n', ["line 2", "quote"]),
        ('a.png,"big dog\nb.png,cat\nc.png,a "\n', ["line 2", "quote"]),  # this one closes: csv would swallow two rows
        ('a.png,cat\nb.png,"big dog\n', ["line 3", "quote"]),
        ('a.png,"one\nsee b.png,two\nthree"\n', ["line 2", "line 3", "in one line"]),  # a caption that looks like rows
        ('a.png,"big" dog\n', ["line 2", "expected after"]),
        ("a.png,b\rb.png,c\n", ["line 2"]),
        ("a.png,b\n\na.png\n", ["line 4", 1, 2]),
        ("a.png,b\na.png,b,c\n", ["line 3", 3, 2]),
    ],
)
def test_a_csv_with_open_quotes_or_other_faults_names_the_line(tmp_path, text, facts):
    table = write(tmp_path / "t.csv", "image,caption\n" + text)
    with pytest.raises(DataError, match=naming("train_captions", table, *facts)):
        rows(table)


def test_a_quoted_field_may_have_line_breaks_and_commas(tmp_path):
    table = write(tmp_path / "t.csv", 'image,caption\na.png,"one,\ntwo, three\n""four"""\n\n  \nb.png,x\n')
    assert rows(table) == [("a.png", ['one,\ntwo, three\n"four"']), ("b.png", ["x"])]


def test_a_long_caption_is_no_fault(tmp_path):
    text = "word " * 100_000  # csv's own limit is 131,072 characters
    for name, between in (("t.csv", ","), ("t.tsv", "\t")):
        for quote in ("", '"'):
            table = write(tmp_path / name, f"image{between}caption\na.png{between}{quote}{text}{quote}\n")
            assert rows(table) == [("a.png", [text])]


@pytest.mark.parametrize(
    ("name", "text", "facts"),
    [
        ("t.csv", "image;caption\na.png;x\n", ["image;caption", "semicolons"]),
        ("t.csv", "image\tcaption\na.png\tx\n", ["tabs", "commas"]),
        ("t.tsv", "image,caption\na.png,x\n", ["commas", "tabs"]),
        ("t.csv", "a.png,a red dog\n", ["a.png, a red dog", "first line"]),
        ("t.csv", "image,caption,Caption\na.png,x,y\n", ["line 1", 2, "caption"]),
        ("t.jsonl", '{"image": 5, "caption": "x"}', ["line 1", 5, "path"]),
        ("t.jsonl", '{"image": ["a.png"], "caption": "x"}', ["line 1", "['a.png']", "path"]),
        ("t.jsonl", '{"image": "a.png", "caption": {"en": "x"}}', ["a.png", {"en": "x"}]),
        ("t.csv", "image,caption\nsub\\a.png,x\n", ["/ between folders"]),
        ("t.jsonl", '{"image": "a\\u0000.png", "caption": "x"}', [1, "missing image files"]),
        ("t.jsonl", '{"image": "\\ud800/a.png", "caption": "x"}', [1, "missing image files"]),
    ],
)
def test_table_faults_are_named(images, name, text, facts):
    with pytest.raises(UserError, match=naming("train_captions", images / name, *facts)) as caught:
        TableCaptions(write(images / name, text), R)
    assert "\n" not in str(caught.value)


def test_image_paths_may_be_absolute_below_home_or_above_the_table(images, monkeypatch):
    monkeypatch.setenv("HOME", str(images))
    (images / "tables").mkdir()
    names = ["~/a.png", "../b.png", images / "c.png"]
    table = write(images / "tables" / "t.csv", "Image,CAPTION\n" + "".join(f"{name},x\n" for name in names))
    assert len(TableCaptions(table, R)) == 3


# ----------------------------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize(
    ("value", "found"),
    [
        *((same, 139) for same in (139, "139", 139.0)),
        ("000000000139", "000000000139"),
        (2**80, 2**80),
        (str(2**80), 2**80),
        ("-3", -3),
        ("²", "²"),
        ("9" * 5000, "9" * 5000),
        *((value, None) for value in (True, 1.5, float("nan"), float("inf"), None, [1], {"a": 1})),
    ],
)
def test_equal_ids_are_equal(value, found):
    assert identifier(value) == found and type(identifier(value)) is type(found)


def test_the_number_in_a_name_like_cocos():
    names = ["000000000139", "val/COCO_val2014_000000000139.jpg", "139.jpg", "x000000000139.jpg"]
    assert [coco_number(name) for name in names] == [139, 139, None, None]


def coco(folder, images, annotations):
    content = {"images": [{"id": i, "file_name": name} for i, name in images]}
    content["annotations"] = [{"image_id": i, "caption": text} for i, text in annotations]
    return write(folder / "captions.json", json.dumps(content))


def test_an_id_is_the_same_as_int_and_as_text(images):
    file = coco(images, [(1, "a.png"), ("2", "b.png"), (2**70, "c.png")], [("1", "one"), (2, "two"), (2**70, "three")])
    dataset = CocoCaptions(file, images, R, train=False)
    assert [dataset.captions(i) for i in range(3)] == [["one"], ["two"], ["three"]]
    assert [dataset.ids[str(images / f"{name}.png")] for name in "abc"] == [1, "2", 2**70]  # as the file has them


@pytest.mark.parametrize("other", [7, "7", 7.0])
def test_two_images_of_one_id_are_an_error(images, other):
    file = coco(images, [(7, "a.png"), (other, "b.png")], [(7, "whose?")])
    with pytest.raises(DataError, match=naming("val_captions", file, 7, images / "a.png", images / "b.png")):
        CocoCaptions(file, images, R, key="val_dir")


def test_an_image_that_is_listed_twice_is_one_and_counted(images, caplog):
    file = coco(images, [(1, "a.png"), (1, "a.png"), (2, "a.png")], [(1, "one"), (2, "two")])
    dataset = CocoCaptions(file, images, R)
    assert len(dataset) == 1 and dataset.captions(0) == ["one", "two"]
    assert dataset.describe()["second entries of an image"] == 2 and "second entries" in caplog.text
    entry = {"filename": "a.png", "split": "train", "sentences": [{"raw": "one"}]}
    file = write(images / "k.json", json.dumps({"images": [entry, {**entry, "sentences": [{"raw": "two"}]}]}))
    dataset = KarpathyCaptions(file, images, R)
    assert len(dataset) == 1 and dataset.captions(0) == ["one", "two"]
    assert dataset.describe()["second entries of an image"] == 1


def test_an_image_is_one_however_its_path_is_written(images):
    """In every kind of list: a.png, ./a.png, x/../a.png, an absolute path."""
    paths = ["a.png", "./a.png", "x/../a.png", f"../{images.name}/a.png", f"{images}/a.png"]
    pairs = list(enumerate(paths))
    table = write(images / "t.jsonl", "\n".join(json.dumps({"image": p, "caption": f"c{i}"}) for i, p in pairs))
    many = coco(images, pairs, [(i, f"c{i}") for i, _ in pairs]).rename(images / "many.json")
    one = coco(images, [(7, p) for p in paths], [(7, f"c{i}") for i, _ in pairs])
    found = [{"filename": p, "split": "train", "sentences": [{"raw": f"c{i}"}]} for i, p in pairs]
    karpathy = write(images / "k.json", json.dumps({"images": found}))
    for dataset in (
        TableCaptions(table, R),
        *(CocoCaptions(file, images, R) for file in (one, many)),
        KarpathyCaptions(karpathy, images, R),
    ):
        assert len(dataset) == 1 and dataset.captions(0) == [f"c{i}" for i, _ in pairs]
        assert dataset.image_path(0) == f"{images}/a.png"
    nameless = TableCaptions(write(images / "t.csv", "image,caption\na.png,x\na.png/,y\nx/..,z\n"), R)
    assert len(nameless) == 1 and nameless.describe()["missing image files"] == 2


@pytest.mark.parametrize("value", [True, 1.5, None, [1], {"a": 1}])
def test_ids_of_another_kind_name_the_entry(images, value):
    with pytest.raises(DataError, match=naming("train_captions", "images[1]", "id", value, "int", "str")):
        CocoCaptions(coco(images, [(1, "a.png"), (value, "b.png")], [(1, "x")]), images, R)
    with pytest.raises(DataError, match=naming("train_captions", "annotations[1]", "image_id", value, "int", "str")):
        CocoCaptions(coco(images, [(1, "a.png")], [(1, "x"), (value, "y")]), images, R)


def test_a_repeated_cocoid_is_said_and_one_of_another_kind_refused(images, caplog):
    def open_with(*ids):
        found = [
            {"filename": f"{name}.png", "split": "val", "sentences": [{"raw": "x"}], "cocoid": i}
            for name, i in zip("abc", ids, strict=False)
        ]
        file = write(images / "k.json", json.dumps({"images": found}))
        return KarpathyCaptions(file, images, R, split="val", train=False, key="val_dir")

    open_with(1, 2, None)
    assert not caplog.records
    open_with(1, "1")
    assert naming(images / "a.png", images / "b.png", 1).search(caplog.text)
    with pytest.raises(DataError, match=naming("val_captions", images / "b.png", [1])):
        open_with(1, [1])


def test_the_setting_at_fault_is_named(images):
    """The captions file and the folder of images are given by two settings."""
    file = coco(images, [(1, "a.png")], [(1, "x")])
    for kind in (CocoCaptions, KarpathyCaptions):
        with pytest.raises(DataError, match=naming("test_captions", images / "none.json")):
            kind(images / "none.json", images, R, key="test_dir")
        with pytest.raises(DataError, match=naming("val_dir", images / "none")):
            kind(file, images / "none", R, key="val_dir", captions_key="train_captions")
    with pytest.raises(DataError, match=naming("train_captions", images / "none.csv")):
        TableCaptions(images / "none.csv", R)
