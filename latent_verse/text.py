"""Tokenizers: CLIP's byte-pair vocabulary, and a small byte-level BPE trained on the user's own captions.

Both give plain ids, without start, end or padding: BiART adds its own specials after `vocab_size` (see
`biart/sequence.py`). An empty caption is an empty list of ids.

    tokenizer = load_tokenizer("clip")                          # or the folder of a run or bundle
    tokenizer = BPETokenizer.train(captions, vocab_size=2000)
    ids = tokenizer.encode("a red circle")                      # list[int], each in [0, vocab_size)
    tokenizer.decode(ids)                                       # "a red circle"
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from latent_verse.config import UserError

VOCABULARY_FILE = "tokenizer.json"
META_FILE = "tokenizer_config.json"
TOO_LONG = ("truncate", "error")
BYTES = 256  # a byte-level vocabulary holds every byte, so that no text is unknown


class TokenizerError(UserError):
    """A caption, a vocabulary or a tokenizer folder cannot be used. The message says which and what to do."""


class Tokenizer:
    """What both tokenizers share. A subclass gives `name`, `vocab_size`, `fingerprint`, `_ids`, `decode` and `save`."""

    name: str
    vocab_size: int  # ids are in [0, vocab_size)
    fingerprint: str  # 16 hexadecimal digits: the same vocabulary and merges give the same ones

    def _ids(self, texts: list[str]) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """The ids of one caption, as many as it takes."""
        return self.encode_batch([text])[0]

    def encode_batch(
        self, texts: Sequence[str], length: int | None = None, too_long: str = "truncate"
    ) -> list[list[int]]:
        """The ids of each caption, at most `length` of them where it is given. Never padded.

        too_long: "truncate" cuts at `length`, never inside a character; "error" raises TokenizerError, which names
        the caption. TokenizerError also for what is not text, and for lone surrogates, which no UTF-8 file can hold.
        """
        if too_long not in TOO_LONG:
            raise TokenizerError(f"too_long is {too_long!r}; it must be one of {', '.join(TOO_LONG)}.")
        if length is not None and length < 1:
            raise TokenizerError(f"The length of captions (text_len) is {length}; it must be at least 1.")
        if isinstance(texts, str):
            raise TokenizerError("encode_batch takes a list of captions; for a single one call encode(text).")
        texts = [_checked(text, i) for i, text in enumerate(texts)]
        batch = self._ids(texts)
        if length is None:
            return batch
        for i, ids in enumerate(batch):
            if len(ids) <= length:
                continue
            if too_long == "error":
                raise TokenizerError(
                    f"Caption {i}, {_shortened(texts[i])}, is {len(ids)} tokens long and the limit text_len is "
                    f"{length}. Shorten it, set text_too_long: truncate, or train with text_len: {len(ids)} or more."
                )
            batch[i] = self._cut(ids, length)
        return batch

    def _cut(self, ids: list[int], length: int) -> list[int]:
        """The first `length` ids, less the up to three that hold the first bytes of a character cut in two."""
        cut = ids[:length]
        whole = self.decode(ids)
        for stop in range(length, max(length - 4, 0), -1):
            if whole.startswith(self.decode(cut[:stop])):
                return cut[:stop]
        return cut

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

    def _save_meta(self, folder: str | Path) -> Path:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        meta = {"name": self.name, "vocab_size": self.vocab_size, "fingerprint": self.fingerprint}
        (folder / META_FILE).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        return folder

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, fingerprint={self.fingerprint!r})"


class ClipTokenizer(Tokenizer):
    """CLIP's vocabulary of 49,408 (Radford et al., 2021), as open_clip cleans and splits: ftfy, HTML entities, one
    space between words, lower case. `decode` gives that cleaned text with a space after every word and mark:
    "It's 3.5" comes back as "it 's 3 . 5". It reads open_clip's vocabulary from the installed package, offline.
    """

    name = "clip"

    def __init__(self):
        self._clip = _open_clip_tokenizer().SimpleTokenizer()
        self.vocab_size = self._clip.vocab_size
        self.fingerprint = _digest(self._clip.encoder, list(self._clip.bpe_ranks))

    def __reduce__(self):  # worker processes build it anew: its module was loaded by path and cannot be pickled
        return ClipTokenizer, ()

    def normalise(self, text: str) -> str:
        """The text as it is tokenized."""
        return self._clip.clean_fn(text)

    def _ids(self, texts):
        return [self._clip.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Cleaned text. CLIP's own start and end of text, which no caption holds, are left out."""
        ids = self._check_ids(ids)
        return self._clip.decode([i for i in ids if i not in self._clip.all_special_ids]).strip()

    def save(self, folder: str | Path) -> None:
        """Write the name and fingerprint; the vocabulary is open_clip's, and `load_tokenizer` checks it is the same."""
        self._save_meta(folder)


class BPETokenizer(Tokenizer):
    """Byte-level BPE. Normalised to lower case, Unicode NFC, one space between words, none at the ends; after that
    the round trip is exact for any Unicode text, since every byte has an id.
    """

    name = "bpe"

    def __init__(self, tokenizer):
        """tokenizer: a `tokenizers.Tokenizer`, from `train` or `load_tokenizer`."""
        self._bpe = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()
        model = json.loads(tokenizer.to_str())["model"]
        self.fingerprint = _digest(model["vocab"], model["merges"])

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learn merges from captions (each a string; empty ones are skipped). The result has at most `vocab_size` ids:
        fewer where the captions hold no more pairs that occur twice. TokenizerError where there is no text at all.
        """
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

        if vocab_size < BYTES:
            raise TokenizerError(
                f"vocab_size is {vocab_size}; a byte-level vocabulary needs at least {BYTES}, one id for every byte."
            )
        if isinstance(captions, str):
            raise TokenizerError("train takes a list of captions, and was given a single string.")
        captions = [_checked(text, i) for i, text in enumerate(captions)]
        captions = [text for text in captions if text.strip()]
        if not captions:
            raise TokenizerError("There is no caption to train a tokenizer on: the list is empty or all are blank.")
        bpe = Tokenizer(models.BPE())
        one_space = normalizers.Replace(Regex(r"\s+"), " ")
        bpe.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), normalizers.NFC(), one_space, normalizers.Strip()]
        )
        # The prefix space makes a word one and the same token wherever it stands; decode takes it off again.
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        bpe.train_from_iterator(captions, trainer)
        return cls(bpe)

    def normalise(self, text: str) -> str:
        """The text as it is tokenized, and as `decode(encode(text))` gives it back."""
        return self._bpe.normalizer.normalize_str(text)

    def _ids(self, texts):
        # The library puts its prefix space before an empty text too.
        return [e.ids if text.strip() else [] for text, e in zip(texts, self._bpe.encode_batch(texts), strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """The normalised text; bytes that form no character become U+FFFD."""
        return self._bpe.decode(self._check_ids(ids)).removeprefix(" ")

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json (the format of the `tokenizers` library) and the name and fingerprint beside it."""
        folder = self._save_meta(folder)
        self._bpe.save(str(folder / VOCABULARY_FILE))


def load_tokenizer(name_or_dir: str | Path) -> ClipTokenizer | BPETokenizer:
    """`clip`, or a folder that `save` wrote. TokenizerError where it is neither, incomplete or changed since."""
    if str(name_or_dir) == ClipTokenizer.name:
        return ClipTokenizer()
    folder = Path(name_or_dir)
    if not folder.is_dir():
        raise TokenizerError(f"There is no tokenizer {str(name_or_dir)!r}: give clip, or a folder with {META_FILE}.")
    meta = _read_json(folder / META_FILE)
    if meta.get("name") == ClipTokenizer.name:
        tokenizer = ClipTokenizer()
    elif meta.get("name") == BPETokenizer.name:
        tokenizer = _load_bpe(folder / VOCABULARY_FILE)
    else:
        raise TokenizerError(f"{folder / META_FILE} names the tokenizer {meta.get('name')!r}; known are clip and bpe.")
    if tokenizer.fingerprint != meta.get("fingerprint"):
        raise TokenizerError(
            f"The tokenizer in {folder} is not the one that was saved: fingerprint {tokenizer.fingerprint}, recorded "
            f"{meta.get('fingerprint')}. Restore {VOCABULARY_FILE} from the run that trained the model."
        )
    return tokenizer


def pack_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer as plain types, for checkpoints: its name, fingerprint and files."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files = {file.name: file.read_text(encoding="utf-8") for file in Path(folder).iterdir()}
    return {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint, "files": files}


def unpack_tokenizer(packed: dict[str, Any]) -> Tokenizer:
    """Undo `pack_tokenizer`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in packed["files"].items():
            (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
        return load_tokenizer(folder)


def _load_bpe(path: Path) -> BPETokenizer:
    from tokenizers import Tokenizer

    _read_json(path)  # for an error that names the file
    try:
        return BPETokenizer(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path} is not a BPE tokenizer of the tokenizers library: {error}") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TokenizerError(f"{path.parent} holds no {path.name}; the folder of a tokenizer needs it.") from None
    except ValueError as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds a {type(content).__name__} where a JSON object is expected.")
    return content


@lru_cache(maxsize=1)
def _open_clip_tokenizer():
    """open_clip/tokenizer.py as a module of its own: importing the package takes 8 to 14 s, this file 1 s."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise TokenizerError("The clip tokenizer needs the package open_clip_torch: pip install open_clip_torch.")
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _digest(vocabulary: dict[str, int], merges: list) -> str:
    pairs = sorted(vocabulary.items(), key=lambda item: item[1])
    text = json.dumps([pairs, [list(merge) if not isinstance(merge, str) else merge for merge in merges]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _checked(text: str, i: int) -> str:
    if not isinstance(text, str):
        raise TokenizerError(f"Caption {i} is {text!r}, a {type(text).__name__}; captions are strings.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"Caption {i}, {_shortened(text)}, holds a lone surrogate at character {error.start}, which is not text. "
            "Read its file as UTF-8 or remove it."
        ) from error
    return text


def _shortened(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
