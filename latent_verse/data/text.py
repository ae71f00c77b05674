"""Tokenizers: CLIP's byte-pair vocabulary, and a small byte-level BPE trained on the user's own captions.

Both give plain ids, without start, end or padding, which BiART adds (see `biart/sequence.py`).

    tokenizer = ClipTokenizer()                                 # `tokenizer_files.load_tokenizer` loads from a folder
    tokenizer = BPETokenizer.train(captions, vocab_size=2000)
    ids = tokenizer.encode("a red circle")                      # list[int], each in [0, vocab_size)
    tokenizer.decode(ids)                                       # "a red circle"
"""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import regex
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from latent_verse.config import UserError
from latent_verse.config.messages import printable, shown

VOCABULARY_FILE = "tokenizer.json"
META_FILE = "tokenizer_config.json"
TOO_LONG = ("truncate", "error")
NAMED_KNOWN, NAMED_UNKNOWN = 40, 5  # words, in what is told of a text with unknown ones
LONG = 10_000  # characters: a longer caption is tokenized only as far as it is needed, and learnt from no further
BYTES = 256  # a byte-level vocabulary holds every byte, so that no text is unknown

CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"  # in the package open_clip: a header, then one merge per line
CLIP_MERGES = 48_894  # as many of them as CLIP uses
CLIP_SPECIALS = ("<start_of_text>", "<end_of_text>")
# CLIP's words, by `regex` as in open_clip: `tokenizers` has older Unicode tables.
CLIP_WORDS = regex.compile(
    "|".join(CLIP_SPECIALS) + r"|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
WORD_END = "</w>"


class TokenizerError(UserError):
    """A caption, a vocabulary or a tokenizer folder cannot be used. The message says which one and what to do."""


class Tokenizer:
    """What both tokenizers share; a subclass adds `name`, `_ids` and `decode`.

    Attributes:
        vocab_size: ids are in [0, vocab_size).
        fingerprint: 16 hexadecimal digits, the same for the same vocabulary and merges.
        complete: whether every word that its captions had twice is known to be one token.
    """

    name: str
    complete = False

    def __init__(self, bpe: tokenizers.Tokenizer):
        self._bpe = bpe
        self.vocab_size: int = bpe.get_vocab_size()
        model = json.loads(bpe.to_str())["model"]
        ordered = sorted(model["vocab"].items(), key=lambda item: item[1])
        self.fingerprint = hashlib.sha256(json.dumps([ordered, model["merges"]]).encode()).hexdigest()[:16]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one list of ids.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        raise NotImplementedError

    def files(self) -> dict[str, str]:
        """The text of each file of the folder that `save` writes, by its name."""
        meta = {"name": self.name, "vocab_size": self.vocab_size, "fingerprint": self.fingerprint}
        meta |= {"complete": True} if self.complete else {}
        return {META_FILE: json.dumps(meta, indent=2) + "\n"}

    def save(self, folder: str | Path) -> None:
        """Write a folder that `tokenizer_files.load_tokenizer` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.files().items():
            (folder / name).write_bytes(text.encode())

    def encode(self, text: str) -> list[int]:
        """The ids of one caption, of any length; see `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(
        self, texts: Sequence[str], length: int | None = None, too_long: str = "truncate"
    ) -> list[list[int]]:
        """The ids of each caption; none for an empty one.

        Args:
            length: the largest number of ids of a caption; None is no limit.
            too_long: "truncate" cuts longer captions at `length`, never inside a character; "error" refuses them.

        Raises:
            TokenizerError: a caption is too long, not a string, or holds a lone surrogate, which UTF-8 cannot encode.
        """
        return [ids for ids, _ in self.encode_counted(texts, length, too_long)]

    def encode_counted(
        self, texts: Sequence[str], length: int | None = None, too_long: str = "truncate"
    ) -> list[tuple[list[int], int]]:
        """As `encode_batch`, with the number of tokens that each caption has before it is cut.

        Of a caption of more than LONG characters (or 8 x `length`, if that is more) only a beginning that has more than
        `length` tokens is tokenized, up to the end of a word. The number is then that of the beginning.
        """
        if too_long not in TOO_LONG:
            raise TokenizerError(f"too_long is {shown(too_long)}; it must be one of {', '.join(TOO_LONG)}.")
        if length is not None and length < 1:
            raise TokenizerError(f"The length of captions (text_len) is {length}; it must be at least 1.")
        if isinstance(texts, str):
            raise TokenizerError("encode_batch takes a list of captions; for a single one call encode(text).")
        texts = [_checked(text, i) for i, text in enumerate(texts)]
        batch = self._ids(texts) if length is None else self._enough(texts, length)
        found = [(ids, len(ids)) for ids in batch]
        for i, (ids, count) in enumerate(found):
            if length is None or count <= length:
                continue
            if too_long == "error":
                raise TokenizerError(
                    f"Caption {i}, {shown(texts[i])}, is {count} tokens long and the limit text_len is "
                    f"{length}. Shorten it, set text_too_long: truncate, or train with text_len: {count} or more."
                )
            found[i] = self._cut(ids, length), count
        return found

    def _enough(self, texts: list[str], length: int) -> list[list[int]]:
        """All ids of each caption, or of a very long one those of a beginning that has more than `length`."""
        most = max(LONG, 8 * length)
        batch = self._ids([beginning(text, most) for text in texts])
        for i, text in enumerate(texts):
            end = most
            while len(text) > end and len(batch[i]) <= length:  # long tokens, or spaces, HTML entities and the like
                end *= 4
                [batch[i]] = self._ids([beginning(text, end)])
        return batch

    def _cut(self, ids: list[int], length: int) -> list[int]:
        """The first `length` ids, without the last few (up to three) if they are a part of a character."""
        cut = ids[:length]
        whole = self.decode(ids)
        for stop in range(length, max(length - 4, 0), -1):
            if whole.startswith(self.decode(cut[:stop])):
                return cut[:stop]
        return cut

    def unknown_words(self, text: str) -> list[str]:
        """The words of a text that its captions had at most once; none where the vocabulary is not `complete`."""
        return []

    def known_words(self) -> list[str]:
        """Words that its captions had, the first to be learnt first; none where the vocabulary is not `complete`."""
        return []

    def about_unknown_words(self, texts: Iterable[str]) -> str:
        """What to tell of the unknown words of texts; "" if there are none."""
        unknown = list(dict.fromkeys(printable(word) for text in texts for word in self.unknown_words(text)))
        if not unknown:
            return ""
        known, more = self.known_words(), ["and others"] if len(unknown) > NAMED_UNKNOWN else []
        words = ", ".join(map(printable, known[:NAMED_KNOWN])) + (" ..." if len(known) > NAMED_KNOWN else "")
        seen = f"the captions of the model's training had them at most once; it knows: {words}"
        return f"unknown words: {', '.join(unknown[:NAMED_UNKNOWN] + more)} ({seen})"

    def decode_batch(self, batch: Iterable[Sequence[int]]) -> list[str]:
        """The text of each list of ids."""
        return [self.decode(ids) for ids in batch]

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise TokenizerError(
                    f"Token id {i} is not one of the {self.vocab_size} of the tokenizer {self.name!r}. "
                    "Remove padding and other specials before decoding."
                )
        return ids

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, fingerprint={self.fingerprint!r})"


class ClipTokenizer(Tokenizer):
    """CLIP's vocabulary of 49,408 (Radford et al., 2021), read from the installed package open_clip.

    Text is cleaned and split as by open_clip: ftfy, HTML entities, one space between words, lower case. `decode` adds a
    space after every word and mark: "It's 3.5" comes back as "it 's 3 . 5".

    Raises:
        TokenizerError: open_clip is not installed.
    """

    name = "clip"

    def __init__(self):
        lines = gzip.decompress(_clip_vocabulary().read_bytes()).decode("utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines[1 : CLIP_MERGES + 1]]
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = [*letters, *(letter + WORD_END for letter in letters), *("".join(merge) for merge in merges)]
        vocabulary = {token: i for i, token in enumerate([*tokens, *CLIP_SPECIALS])}
        bpe = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=WORD_END))
        bpe.add_special_tokens(list(CLIP_SPECIALS))
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        bpe.decoder = decoders.ByteLevel()
        super().__init__(bpe)

    def normalise(self, text: str) -> str:
        """The text as it is tokenized."""
        import ftfy  # takes 80 ms

        return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()

    def _ids(self, texts):
        words = [" ".join(CLIP_WORDS.findall(self.normalise(text))) for text in texts]
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(words)]

    def decode(self, ids: Sequence[int]) -> str:
        """The cleaned text, without CLIP's own start and end of text."""
        return self._bpe.decode(self._check_ids(ids)).replace(WORD_END, " ").strip()


class BPETokenizer(Tokenizer):
    """Byte-level BPE, made by `train`, or loaded.

    Text is normalised: lower case, Unicode NFC, one space between words, none at the ends. After that the round trip is
    exact for any Unicode text, because every byte has an id.
    """

    name = "bpe"

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learn merges from captions, for at most `vocab_size` ids: fewer if no more pairs occur twice.

        A caption counts up to LONG characters.

        Raises:
            TokenizerError: `vocab_size` is below 256, or no caption holds any text.
        """
        if vocab_size < BYTES:
            raise TokenizerError(f"vocab_size is {vocab_size}; it must be at least {BYTES}, one id for every byte.")
        if isinstance(captions, str):
            raise TokenizerError("train takes a list of captions, and was given a single string.")
        captions = [beginning(text, LONG) for i, text in enumerate(captions) if _checked(text, i).strip()]
        if not captions:
            raise TokenizerError("There is no caption to train a tokenizer on: the list is empty or all are blank.")
        bpe = byte_level()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, show_progress=False, initial_alphabet=alphabet
        )
        bpe.train_from_iterator(captions, trainer)
        tokenizer = cls(bpe)
        tokenizer.complete = tokenizer.vocab_size < vocab_size  # nothing was left to merge
        return tokenizer

    def normalise(self, text: str) -> str:
        """The text as it is tokenized, and as `decode(encode(text))` returns it."""
        return self._bpe.normalizer.normalize_str(text)

    def _ids(self, texts):
        # The library puts its prefix space before an empty text too.
        return [e.ids if text.strip() else [] for text, e in zip(texts, self._bpe.encode_batch(texts), strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """The normalised text; bytes that form no character become U+FFFD."""
        return self._bpe.decode(self._check_ids(ids)).removeprefix(" ")

    def unknown_words(self, text: str) -> list[str]:
        """Words, with a letter in them, that are not one token: training merges those that occur twice."""
        if not self.complete:
            return []
        words = [word for word, _ in self._bpe.pre_tokenizer.pre_tokenize_str(self.normalise(text))]
        plain = {word: self._bpe.decoder.decode([word]).strip() for word in words}
        return [plain[w] for w in words if self._bpe.token_to_id(w) is None and any(map(str.isalpha, plain[w]))]

    def known_words(self) -> list[str]:
        """The tokens that begin a word and that no merge continues: all are words, if not all words."""
        if not self.complete:
            return []
        model = json.loads(self._bpe.to_str())["model"]
        parts = {left for left, _ in model["merges"]}
        whole = (token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in parts)
        words = [self._bpe.decoder.decode([token]) for token in whole]
        return [word.strip() for word in words if re.fullmatch(r" \w+", word)]

    def files(self) -> dict[str, str]:
        return super().files() | {VOCABULARY_FILE: self._bpe.to_str(pretty=True)}


def byte_level() -> tokenizers.Tokenizer:
    """BPETokenizer's normalisation and splitting, without a vocabulary."""
    bpe = tokenizers.Tokenizer(models.BPE())
    one_space = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
    bpe.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.NFC(), one_space, normalizers.Strip()])
    # The prefix space gives a word the same tokens wherever it stands; decode removes it.
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _clip_vocabulary() -> Path:
    """CLIP's merges in the package open_clip, which is found but not imported: that takes 8 to 14 s."""
    package = importlib.util.find_spec("open_clip")
    for folder in (package and package.submodule_search_locations) or []:
        if (Path(folder) / CLIP_VOCABULARY).is_file():
            return Path(folder) / CLIP_VOCABULARY
    raise TokenizerError(f"The clip tokenizer needs {CLIP_VOCABULARY} of open_clip_torch: pip install open_clip_torch.")


def beginning(text: str, most: int) -> str:
    """The first `most` characters, up to the end of a word if there is one; all of a text that is not longer."""
    if len(text) <= most:
        return text
    words = text[:most].rsplit(maxsplit=1)
    return words[0] if len(words) > 1 else text[:most]


def _checked(text: str, i: int) -> str:
    if not isinstance(text, str):
        raise TokenizerError(f"Caption {i} is {shown(text)}, a {type(text).__name__}; captions are strings.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"Caption {i}, {shown(text)}, holds a lone surrogate at character {error.start}, which is not text. "
            "Read its file as UTF-8 or remove it."
        ) from error
    return text
