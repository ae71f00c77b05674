"""Tokenizers: round trips, limits, any Unicode, files that are missing or changed."""

import importlib.util
import pickle
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from latent_verse.data import text as text_module
from latent_verse.data.text import BPETokenizer, ClipTokenizer, TokenizerError
from latent_verse.data.tokenizer_files import load_tokenizer
from tests.messages import naming

CAPTIONS = ["a red circle left of a blue square", "a green triangle above a red circle", "a blue circle", ""] * 5
# Decomposed and composed accents, scripts of several bytes a letter, joined emoji, a NUL, right-to-left, CJK.
UNICODE = ["Cafe\u0301 Élan", "日本語の猫", "👩‍👩‍👧 🏳️‍🌈 naïve", "שלום", "a\x00b", "ǅ ﬁ ß", "  two \n words\t"]


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(CAPTIONS, vocab_size=320)


@pytest.fixture(scope="module")
def clip():
    return ClipTokenizer()


@pytest.mark.parametrize("text", CAPTIONS[:4] + UNICODE)
def test_bpe_round_trip_is_exact_after_normalisation(bpe, text):
    ids = bpe.encode(text)
    assert all(0 <= i < bpe.vocab_size for i in ids)
    assert bpe.decode(ids) == bpe.normalise(text)
    assert bpe.normalise(bpe.normalise(text)) == bpe.normalise(text)


def test_bpe_normalisation_is_what_it_says(bpe):
    assert bpe.normalise("  A  Red\nCafe\u0301 ") == "a red café"
    assert bpe.encode("A RED circle") == bpe.encode(" a red   circle ")
    assert bpe.encode("") == bpe.encode("  \n") == []
    assert bpe.decode([]) == ""


def test_bpe_learns_words(bpe):
    assert len(bpe.encode("a red circle left of a blue square")) == 8
    assert bpe.encode("circle") == bpe.encode("red circle")[-1:]  # the same token at the start of a caption


def test_words_that_captions_never_had_are_known_from_the_vocabulary(bpe, clip):
    assert bpe.unknown_words("A red CIRCLE, left of a blue square.") == []  # marks are no words
    assert bpe.unknown_words("a cat on a blue sofa, naïve 3") == ["cat", "on", "sofa", "naïve"]
    assert bpe.unknown_words("circles") == ["circles"] and bpe.unknown_words("") == bpe.unknown_words(" \n") == []
    assert {"red", "blue", "green", "circle", "square", "triangle", "left", "above"} <= {*bpe.known_words()}
    assert not {"a", "le", "cir"} & {*bpe.known_words()}  # merges continue them: most such are no words
    assert clip.unknown_words("zyzzyva") == clip.known_words() == []


def test_a_vocabulary_that_had_no_room_for_all_words_does_not_tell(bpe, tmp_path):
    full = BPETokenizer.train(CAPTIONS, vocab_size=280)
    assert bpe.complete and not full.complete and len(full.encode("triangle")) > 1
    assert full.unknown_words("a cat and a triangle") == full.known_words() == []
    for tokenizer in (full, bpe):
        tokenizer.save(tmp_path / "tokenizer")
        assert load_tokenizer(tmp_path / "tokenizer").complete == tokenizer.complete
    meta = tmp_path / "tokenizer" / "tokenizer_config.json"
    meta.write_text(meta.read_text().replace(',\n  "complete": true', ""))  # of an earlier version
    assert not load_tokenizer(tmp_path / "tokenizer").complete


def test_what_is_told_of_unknown_words(bpe, clip):
    said = bpe.about_unknown_words(["a cat", "a red \x1bdog", "a red circle"])
    assert naming("cat", "dog", "red", "square").search(said) and "\x1b" not in said and "\n" not in said
    assert said.count("cat") == 1 and said.index("cat") < said.index("dog")
    assert bpe.about_unknown_words(CAPTIONS) == bpe.about_unknown_words([]) == ""
    assert clip.about_unknown_words(["zyzzyva"]) == ""
    many = bpe.about_unknown_words([" ".join(f"{letter}{letter}x" for letter in "abcdefghijklm")])
    assert naming("aax", "eex", "others").search(many) and "ffx" not in many


def test_bpe_training_is_repeatable_and_bounded(bpe):
    again = BPETokenizer.train(CAPTIONS, vocab_size=320)
    assert again.fingerprint == bpe.fingerprint
    assert bpe.vocab_size <= 320
    assert BPETokenizer.train(CAPTIONS, vocab_size=270).fingerprint != bpe.fingerprint
    assert BPETokenizer.train(CAPTIONS, vocab_size=270).vocab_size == 270


@pytest.mark.parametrize("captions", [[], ["", "  \n"]])
def test_bpe_refuses_to_train_on_nothing(captions):
    with pytest.raises(TokenizerError, match=naming("caption", "tokenizer")):
        BPETokenizer.train(captions, vocab_size=300)


def test_bpe_refuses_a_vocabulary_below_the_bytes():
    with pytest.raises(TokenizerError, match=naming("vocab_size", 100, 256)):
        BPETokenizer.train(CAPTIONS, vocab_size=100)


def any_captions(count, seed=0):
    """Captions of every kind that people write, and of some that they do not."""
    rng = random.Random(seed)
    words = "a photo of the small brown dog's two cats, sitting near an Eiffel-tower; we're they'll I'd don't".split()
    entities = ["&amp;", "&lt;b&gt;", "&#39;", "&amp;amp;", "&eacute;", "&nbsp;", "&notanentity;", "&#x1F600;"]
    unicode = [*UNICODE[:6], "naïve", "ΑΒΓ ς", "İstanbul", "ＨＥＬＬＯ", "“quoted”", "Ã©", "\u200d", "it’s", "'ſ"]
    odd = ["\x00", "\x1b[31m", "\t\n", "\x7f", "\u2028", "\xa0", "\ufeff", "</w>", "<start_of_text>", "<END_OF_TEXT>"]

    def piece():
        kind = rng.randrange(8)
        if kind == 0:
            return f"{rng.random() * 10 ** rng.randrange(6):.{rng.randrange(4)}f}"
        if kind == 1:
            return "".join(rng.choices("abcxyzé日🔴'!-", k=rng.randrange(1, 40)))
        if kind == 2:  # any character at all
            return "".join(chr(rng.randrange(1, 0xD800)) for _ in range(4)) + chr(rng.randrange(0xE000, 0x110000))
        return rng.choice([words, entities, unicode, odd, words][kind - 3])

    some = ["", " ", "a" * 5000, "ab" * 1000, "日" * 700, "!" * 600, "<start_of_text>", "a<end_of_text>!"]
    while len(some) < count:
        some.append(rng.choice(["", " ", " "]).join(piece() for _ in range(rng.randrange(1, 14))))
    return some


@pytest.fixture(scope="module")
def open_clips():
    """open_clip's own tokenizer, from its file: importing the whole package takes long."""
    folder = importlib.util.find_spec("open_clip").submodule_search_locations[0]
    return runpy.run_path(str(Path(folder) / "tokenizer.py"))["SimpleTokenizer"]()


def test_clip_equals_open_clip_on_2000_captions(clip, open_clips):
    captions = any_captions(2000)
    batch = clip.encode_batch(captions)
    assert clip.vocab_size == open_clips.vocab_size
    for caption, ids in zip(captions, batch, strict=True):
        assert ids == open_clips.encode(caption), caption
        kept = [i for i in ids if i not in open_clips.all_special_ids]
        assert clip.decode(ids) == open_clips.decode(kept).strip(), caption


def test_clip_decodes_any_ids_as_open_clip(clip, open_clips):
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(clip.vocab_size - 2) if rng.random() < 0.5 else rng.randrange(512) for _ in range(20)]
        assert clip.decode(ids) == open_clips.decode(ids).strip()


def test_clip_agrees_with_known_ids(clip):
    assert clip.vocab_size == 49408
    assert clip.fingerprint == "e8a9e8ab7a19a355"  # as saved bundles and checkpoints record it
    assert clip.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]  # CLIP's README
    assert clip.encode("") == []


def test_clip_decodes_cleaned_text(clip):
    assert clip.decode(clip.encode("  It's &amp; CAFÉ  3.5! ")) == "it 's & café 3 . 5 !"
    assert clip.normalise("  It's &amp; CAFÉ") == "it's & café"


@pytest.mark.parametrize("text", ["日本語", "👩 🏳️‍🌈", "שלום", "naïve"])
def test_clip_keeps_any_unicode(clip, text):
    assert clip.decode(clip.encode(text)).replace(" ", "") == text.replace(" ", "")


def test_clip_leaves_out_its_own_specials(clip):
    assert clip.decode([49406, *clip.encode("a cat"), 49407]) == "a cat"


def test_clip_does_not_import_open_clip():
    code = "import sys, latent_verse.data.text as t; t.ClipTokenizer(); assert 'open_clip' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_clip_without_open_clip_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TokenizerError, match=naming("clip", "pip install open_clip_torch")):
        ClipTokenizer()


@pytest.mark.parametrize("which", ["bpe", "clip"])
def test_length_truncates_or_refuses(which, request):
    tokenizer = request.getfixturevalue(which)
    text = "a red circle left of a blue square"
    full = tokenizer.encode(text)
    assert tokenizer.encode_batch([text, "", "a"], length=3) == [full[:3], [], tokenizer.encode("a")]
    assert tokenizer.encode_batch([text], length=len(full), too_long="error") == [full]
    facts = ("Caption 1", text, len(full), "text_len", 3, "text_too_long", "truncate")
    with pytest.raises(TokenizerError, match=naming(*facts)):
        tokenizer.encode_batch(["a", text], length=3, too_long="error")


@pytest.mark.parametrize("which", ["bpe", "clip"])
def test_truncation_never_halves_a_character(which, request):
    tokenizer = request.getfixturevalue(which)
    for length in range(1, 12):
        text = tokenizer.decode(tokenizer.encode_batch(["a 日本語 🦄🦄"], length=length)[0])
        assert "\ufffd" not in text
        assert len(tokenizer.encode_batch(["a 日本語 🦄🦄"], length=length)[0]) <= length


@pytest.mark.parametrize("which", ["bpe", "clip"])
def test_bad_input_is_named(which, request):
    tokenizer = request.getfixturevalue(which)
    with pytest.raises(TokenizerError, match=naming("Caption 1", None)):
        tokenizer.encode_batch(["a", None])
    with pytest.raises(TokenizerError, match=naming("Caption 0", "surrogate", 2)):
        tokenizer.encode("a \ud800")
    with pytest.raises(TokenizerError, match=naming("list", "encode")):
        tokenizer.encode_batch("a red circle")
    with pytest.raises(TokenizerError, match=naming("text_len", 0, 1)):
        tokenizer.encode_batch(["a"], length=0)
    with pytest.raises(TokenizerError, match=naming("too_long", "cut", "truncate", "error")):
        tokenizer.encode_batch(["a"], length=2, too_long="cut")
    for bad in (tokenizer.vocab_size, -1):
        with pytest.raises(TokenizerError, match=naming(bad, tokenizer.vocab_size, tokenizer.name)):
            tokenizer.decode([bad])


@pytest.mark.parametrize("which", ["bpe", "clip"])
def test_worker_processes_can_have_it(which, request):
    tokenizer = request.getfixturevalue(which)
    copy = pickle.loads(pickle.dumps(tokenizer))
    texts = ["a red circle", *UNICODE]
    assert copy.fingerprint == tokenizer.fingerprint and copy.encode_batch(texts) == tokenizer.encode_batch(texts)


# ------------------------------------------------------------------------------------------------------- long captions


@pytest.fixture
def tokenized(monkeypatch):
    """The longest text that a tokenizer was given, in characters."""
    seen = []
    for kind in (text_module.BPETokenizer, text_module.ClipTokenizer):
        ids = kind._ids
        monkeypatch.setattr(kind, "_ids", lambda self, texts, ids=ids: seen.extend(map(len, texts)) or ids(self, texts))
    return seen


@pytest.mark.parametrize("which", ["bpe", "clip"])
def test_a_very_long_caption_is_tokenized_only_as_far_as_it_is_needed(which, request, tokenized):
    tokenizer = request.getfixturevalue(which)
    long = "a red circle above two blue squares, " * 30_000  # 1.1 million characters
    short = long[:5000]
    [(ids, count), (of_short, count_of_short)] = tokenizer.encode_counted([long, short], 24)
    assert ids == of_short == tokenizer.encode_batch([short])[0][:24]
    assert max(tokenized) <= text_module.LONG and count > 24
    assert count_of_short == len(tokenizer.encode(short))  # exact for ordinary ones
    with pytest.raises(TokenizerError, match=naming("text_len", 24, count)):
        tokenizer.encode_batch([long], 24, "error")
    assert len(tokenizer.encode(long[:50_000])) > 10_000  # without a limit, all of it


@pytest.mark.parametrize("which", ["bpe", "clip"])
def test_what_comes_late_in_a_long_caption_counts_where_it_is_needed(which, request):
    """Spaces give no tokens: the caption is not too long, however many characters it has."""
    tokenizer = request.getfixturevalue(which)
    caption = "a red circle" + " \u3000" * 100_000 + " and a blue square"
    [ids] = tokenizer.encode_batch([caption], 12, "error")
    assert ids == tokenizer.encode(caption) and tokenizer.decode(ids).endswith("blue square")


def test_a_cut_never_falls_into_a_word_if_there_is_another():
    assert text_module.beginning("one two three", 9) == "one two" and text_module.beginning("one two", 7) == "one two"
    assert text_module.beginning("onetwothree", 6) == "onetwo" and text_module.beginning("   ", 2) == "  "


def test_bpe_learns_from_the_beginning_of_a_very_long_caption():
    words = "a red circle and a blue square " * 400
    assert len(words) > text_module.LONG
    one = BPETokenizer.train([words], 300)
    assert one.fingerprint == BPETokenizer.train([words + "zebra crossing " * 10_000], 300).fingerprint
