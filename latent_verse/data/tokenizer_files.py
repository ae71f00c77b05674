"""A tokenizer as files of a folder, or within a checkpoint: loaded and packed, and checked to be the one saved."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TypedDict

import tokenizers

from latent_verse.config.messages import reason, shown
from latent_verse.data.text import (
    META_FILE,
    VOCABULARY_FILE,
    BPETokenizer,
    ClipTokenizer,
    Tokenizer,
    TokenizerError,
    byte_level,
)
from latent_verse.files import parse_json, read_text

AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")


class PackedTokenizer(TypedDict):
    """A tokenizer as plain types: its name, its fingerprint, and the text of its files by their names."""

    name: str
    fingerprint: str
    files: dict[str, str]


def load_tokenizer(name_or_dir: str | Path) -> Tokenizer:
    """The tokenizer of this name (`clip`), or of a folder that `save` wrote.

    Raises:
        TokenizerError: it is neither, or the folder is incomplete or has been changed.
        FileError: one of its files cannot be read, or is not JSON in UTF-8.
    """
    if str(name_or_dir) == ClipTokenizer.name:
        return ClipTokenizer()
    folder = Path(name_or_dir)
    if not os.path.isdir(folder):
        name = shown(str(name_or_dir))
        raise TokenizerError(f"There is no tokenizer {name}: give clip, or a folder with {META_FILE}.")
    files = {}
    for name in (META_FILE, VOCABULARY_FILE):
        if os.path.exists(folder / name):
            files[name] = read_text(folder / name)
    return _from_files(files, folder)


def pack_tokenizer(tokenizer: Tokenizer) -> PackedTokenizer:
    """A tokenizer as plain types, for checkpoints."""
    return {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint, "files": tokenizer.files()}


def unpack_tokenizer(packed: PackedTokenizer, where: object = "a checkpoint") -> Tokenizer:
    """The tokenizer that `pack_tokenizer` packed, which `where` holds; see `load_tokenizer`."""
    files = packed.get("files") if isinstance(packed, dict) else None
    if not isinstance(files, dict) or not all(isinstance(text, str) for item in files.items() for text in item):
        raise TokenizerError(f"The tokenizer in {where} is damaged: it does not hold the text of its files.")
    return _from_files(files, where)


def _from_files(files: dict[str, str], where: object) -> Tokenizer:
    """The tokenizer of the folder or checkpoint `where`, whose files have these texts."""
    meta = _json_object(files, META_FILE, where)
    if meta.get("name") == ClipTokenizer.name:
        tokenizer: Tokenizer = ClipTokenizer()
    elif meta.get("name") == BPETokenizer.name:
        tokenizer = _bpe(files, where)
    else:
        name = shown(meta.get("name"))
        raise TokenizerError(f"{_named(META_FILE, where)} names the tokenizer {name}; known are clip and bpe.")
    if tokenizer.fingerprint != meta.get("fingerprint"):
        raise TokenizerError(
            f"The tokenizer in {where} is not the one that was saved: fingerprint {tokenizer.fingerprint}, recorded "
            f"{shown(meta.get('fingerprint'))}. Restore {VOCABULARY_FILE} from the run that trained the model."
        )
    tokenizer.complete = meta.get("complete") is True
    return tokenizer


def _bpe(files: dict[str, str], where: object) -> BPETokenizer:
    """The fingerprint is of vocabulary and merges: what else would change the ids has to be as `train` makes it."""
    content, file = _json_object(files, VOCABULARY_FILE, where), _named(VOCABULARY_FILE, where)
    wanted = json.loads(byte_level().to_str())
    # at some parts of other kinds, and at affixes, the library panics: that is no Exception, and prints a traceback
    model = content.get("model")
    if not isinstance(model, dict) or any(model.get(affix) for affix in AFFIXES):
        raise TokenizerError(f"{file} was changed: it is not a plain BPE model.")
    for part in sorted(wanted.keys() - {"model"}):
        if _kinds(content.get(part)) != _kinds(wanted[part]):
            raise TokenizerError(f"{file} was changed: {part} is not as BPETokenizer writes it.")
    try:
        bpe = tokenizers.Tokenizer.from_str(files[VOCABULARY_FILE])
        found = json.loads(bpe.to_str())
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{file} is not a BPE tokenizer of the tokenizers library: {reason(error)}") from error
    for part in sorted(wanted.keys() - {"model"}):
        if found.get(part) != wanted[part]:
            raise TokenizerError(f"{file} was changed: {part} is not as BPETokenizer writes it.")
    settings = {name: value for name, value in wanted["model"].items() if name not in ("vocab", "merges")}
    if {name: found["model"].get(name) for name in settings} != settings:
        raise TokenizerError(f"{file} was changed: it is not a plain BPE model.")
    if sorted(found["model"]["vocab"].values()) != list(range(len(found["model"]["vocab"]))):
        raise TokenizerError(f"{file} is damaged: its ids are not 0, 1, 2 and so on.")
    if not {*tokenizers.pre_tokenizers.ByteLevel.alphabet()} <= found["model"]["vocab"].keys():
        raise TokenizerError(f"{file} is damaged: its vocabulary lacks some of the 256 bytes that texts are made of.")
    return BPETokenizer(bpe)


def _kinds(part: object) -> list[str]:
    """The kinds of a part of the library's tokenizers and of what is in it, in order."""
    return re.findall(r'"type": "([^"]*)"', json.dumps(part))


def _named(file: str, where: object) -> str:
    return str(where / file) if isinstance(where, Path) else f"{file} in {where}"


def _json_object(files: dict[str, str], name: str, where: object) -> dict[str, object]:
    if name not in files:
        raise TokenizerError(f"{where} holds no {name}; the folder of a tokenizer needs it.")
    content = parse_json(files[name], _named(name, where))
    if not isinstance(content, dict):
        raise TokenizerError(f"{_named(name, where)} holds a {type(content).__name__} where a JSON object is expected.")
    return content
