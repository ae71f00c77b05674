"""Tokenizers in files: what is loaded is what was saved, or it is refused."""

from __future__ import annotations

import json

import pytest

from latent_verse.data.text import BPETokenizer, ClipTokenizer, TokenizerError
from latent_verse.data.tokenizer_files import load_tokenizer, pack_tokenizer, unpack_tokenizer
from latent_verse.files import FileError
from tests.messages import naming

TEXTS = ["a red circle left of a blue square", "", "Cafe\u0301 Élan", "日本語の猫", "a\x00b", "  two \n words\t"]


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(["a red circle left of a blue square", "a blue circle"] * 5, vocab_size=320)


@pytest.fixture(scope="module")
def clip():
    return ClipTokenizer()


@pytest.mark.parametrize("which", ["bpe", "clip"])
def test_save_and_load_give_the_same_tokenizer(which, request, tmp_path):
    tokenizer = request.getfixturevalue(which)
    tokenizer.save(tmp_path / "run")
    loaded = load_tokenizer(tmp_path / "run")
    assert type(loaded) is type(tokenizer)
    assert (loaded.name, loaded.vocab_size, loaded.fingerprint) == (which, tokenizer.vocab_size, tokenizer.fingerprint)
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert loaded.decode_batch(loaded.encode_batch(TEXTS)) == tokenizer.decode_batch(tokenizer.encode_batch(TEXTS))
    unpacked = unpack_tokenizer(pack_tokenizer(tokenizer), "a.ckpt")
    assert unpacked.fingerprint == tokenizer.fingerprint


def test_load_by_name(clip):
    assert load_tokenizer("clip").fingerprint == clip.fingerprint


def test_load_errors_name_the_file(bpe, tmp_path):
    with pytest.raises(TokenizerError, match=naming("clpi", "clip", "tokenizer_config.json")):
        load_tokenizer("clpi")
    with pytest.raises(TokenizerError, match=naming(tmp_path, "tokenizer_config.json")):
        load_tokenizer(tmp_path)
    bpe.save(tmp_path)
    vocabulary = tmp_path / "tokenizer.json"
    whole = vocabulary.read_text()
    vocabulary.write_text(whole[:100])
    with pytest.raises(FileError, match=naming(vocabulary, "JSON")):
        load_tokenizer(tmp_path)
    vocabulary.write_text("{}")
    with pytest.raises(TokenizerError, match=naming(vocabulary, "BPE")):
        load_tokenizer(tmp_path)
    vocabulary.unlink()
    with pytest.raises(TokenizerError, match=naming(tmp_path, "tokenizer.json")):
        load_tokenizer(tmp_path)
    BPETokenizer.train(["other words other words"], 300).save(tmp_path / "other")
    vocabulary.write_text((tmp_path / "other" / "tokenizer.json").read_text())
    with pytest.raises(TokenizerError, match=naming(tmp_path, "fingerprint", bpe.fingerprint)):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"name": "word"}))
    with pytest.raises(TokenizerError, match=naming(tmp_path / "tokenizer_config.json", "word", "clip", "bpe")):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("packed", [None, [], {}, {"files": None}, {"files": {"tokenizer_config.json": 1}}])
def test_a_damaged_tokenizer_of_a_checkpoint_is_refused(packed):
    with pytest.raises(TokenizerError, match=naming("a.ckpt", "damaged")):
        unpack_tokenizer(packed, "a.ckpt")


@pytest.mark.parametrize("name", [["x"] * 10**5, "x" * 10**5, None, 1])
def test_an_odd_name_of_a_tokenizer_is_one_short_line(name):
    files = {"tokenizer_config.json": json.dumps({"name": name})}
    with pytest.raises(TokenizerError, match=naming("a.ckpt", "clip", "bpe")) as caught:
        unpack_tokenizer({"files": files}, "a.ckpt")
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["normalizer"], {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        (["normalizer", "normalizers", 0], {"type": "Precompiled", "precompiled_charsmap": ""}),
        (["pre_tokenizer", "type"], "Whitespace"),
        (["post_processor"], {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
        (["model", "continuing_subword_prefix"], "##"),
        (["model", "end_of_word_suffix"], "é"),
        (["model", "dropout"], 0.5),
        (["model", "merges"], [["zz", "q"]]),
        (["model"], None),
        (["model", "vocab"], {}),
        (["model"], {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}),
    ],
)
def test_a_vocabulary_of_another_kind_is_refused_before_the_library_panics(bpe, place, value, capfd):
    """Rust's panics are no Exception, and print a traceback of their own."""
    packed = pack_tokenizer(bpe)
    content = json.loads(packed["files"]["tokenizer.json"])
    inside = content
    for step in place[:-1]:
        inside = inside[step]
    inside[place[-1]] = value
    packed["files"]["tokenizer.json"] = json.dumps(content)
    with pytest.raises(TokenizerError, match=naming("tokenizer.json", "a.ckpt")):
        unpack_tokenizer(packed, "a.ckpt")
    assert capfd.readouterr() == ("", "")
