"""Captions as ids, made in collation and so in the loader's worker processes, and pairs in tar shards, streamed."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from latent_verse.config import UserError
from latent_verse.config.messages import shown
from latent_verse.data import DataError
from latent_verse.data.caption_files import clean
from latent_verse.data.captions import CAPTION_SEED, CROP_SEED, EncodedCaption, PairDataset
from latent_verse.data.codes import STORED_IDS, CodesDataset
from latent_verse.data.codes_writer import Work
from latent_verse.data.decoding import UnreadableImage
from latent_verse.data.images import SkipLog
from latent_verse.data.shapes import ShapesDataset
from latent_verse.data.shards import SKIP_SLOTS, Shards, read_shards
from latent_verse.data.text import Tokenizer
from latent_verse.data.transforms import centre_crop, mix_seed, random_crop, sample_generator
from latent_verse.files import decode_text, parse_json

CAPTIONS = "__captions__"  # of a raw sample, once they are read; no member can have this name
TOKENIZER_CAPTIONS = 500_000  # a vocabulary learns nothing from more


def all_captions(dataset: PairData) -> Iterator[str]:
    """The captions to train a tokenizer on: all of a dataset, or of a large one those of evenly spaced items."""
    of_each: Iterable[list[str]]
    if isinstance(dataset, PairShards):
        of_each = (captions_of(raw) for raw in read_shards(dataset.shards, SkipLog(1)))
    else:
        about = len(dataset) * max(1, len(dataset.captions(0)))  # captions in all
        step = -(-about // TOKENIZER_CAPTIONS)
        of_each = (dataset.captions(i) for i in range(0, len(dataset), step))
    seen = 0
    for captions in of_each:
        yield from captions
        seen += len(captions)
        if seen >= TOKENIZER_CAPTIONS:
            return


def text_of(caption: str | EncodedCaption) -> str:
    """The text of a caption, whether or not it was tokenized ahead of training."""
    return caption.text if isinstance(caption, EncodedCaption) else caption


@dataclass(frozen=True)
class CaptionEncoder:
    """Captions -> ids (B, L) int64, filled with `pad`."""

    tokenizer: Tokenizer
    text_len: int  # L
    too_long: str  # what is done with captions of more tokens: "truncate", or "error"
    pad: int  # BiART's id of padding, `biart.sequence.Vocabulary.pad`

    def __call__(self, captions: Sequence[str | EncodedCaption]) -> Tensor:
        """The ids that an EncodedCaption brings are used as they are, unless there are too many.

        Raises:
            TokenizerError: a caption cannot be encoded, or is too long and `too_long` is "error".
        """
        ids = [caption.ids if isinstance(caption, EncodedCaption) else None for caption in captions]
        whole = min(self.text_len, STORED_IDS - 4)  # ids that were cut when they were stored are no more than 3 fewer
        new = [i for i, known in enumerate(ids) if known is None or len(known) > whole]
        encoded = self.tokenizer.encode_batch([text_of(captions[i]) for i in new], self.text_len, self.too_long)
        for i, tokens in zip(new, encoded, strict=True):
            ids[i] = tokens
        text_BL = torch.full((len(ids), self.text_len), self.pad, dtype=torch.long)
        for row, tokens in enumerate(ids):
            text_BL[row, : len(tokens)] = torch.as_tensor(tokens, dtype=torch.long)
        return text_BL


class NoCaption(UnreadableImage):
    """A sample of tar shards without a caption, or with one that cannot be read."""

    remedy = "Put a caption beside each image, as name.txt or under `caption` in name.json."


def read_captions(raw: dict) -> list[str]:
    """The captions of a raw sample: its .txt unless blank, else `caption` (or `captions`, a list) in its .json.

    Raises:
        NoCaption: it has none, or its text cannot be read by the rules of files/reading.py; with the reason.
    """
    try:
        text = clean(decode_text(raw.get("txt", b""), "its .txt"))
        if text:
            return [text]
        about = parse_json(decode_text(raw.get("json", b"{}"), "its .json"), "its .json")
        found = (about.get("captions") or about.get("caption") or []) if isinstance(about, dict) else []
        found = found if isinstance(found, list) else [found]
        texts = [clean(text) for text in found if isinstance(text, str)]
    except UserError as error:
        raise NoCaption(f"its caption cannot be read: {error}") from error
    if not any(texts):
        why = f"the caption in its .json is {shown(found)}" if found else "neither a .txt nor a .json with `caption`"
        raise NoCaption(f"no caption: {why}")
    return [text for text in texts if text]


def captions_of(raw: dict) -> list[str]:
    """As `read_captions`; none where there is no caption."""
    try:
        return read_captions(raw)
    except NoCaption:
        return []


class PairShards(Shards):
    """Tar shards whose samples have captions: items are (image, caption). Arguments are those of Shards.

    Which of several captions training shows follows from (seed, epoch, sample's name); evaluation shows the first.

    Raises:
        DataError: a shard is missing, or no sample of local shards has a caption.
    """

    unit = "pair"

    def __init__(self, source: str, resolution: int, *args, key: str = "train_dir", **options):
        super().__init__(source, resolution, *args, key=key, **options)
        if self.remote:
            return
        samples, reason = 0, None
        for raw in read_shards(self.shards, SkipLog(1)):  # up to the first one that has a caption
            try:
                read_captions(raw)
                return
            except NoCaption as error:
                samples, reason = samples + 1, reason or f"The first, {raw['__key__']}: {str(error).rstrip('.')}."
        if samples:
            none = f"none of the {samples} samples in {self.describe()['source']} can be used"
            raise DataError(f"{key}: {none}. {reason} {NoCaption.remedy}")

    def decode(self, raw: dict) -> Tensor:
        raw[CAPTIONS] = read_captions(raw)
        return super().decode(raw)

    def target(self, raw: dict, epoch: int | None = None) -> str:
        captions = raw.get(CAPTIONS) or read_captions(raw)
        chosen = 0 if epoch is None else mix_seed(self.seed, epoch, _number(raw), CAPTION_SEED)
        return captions[chosen % len(captions)]


PairData = PairDataset | CodesDataset | ShapesDataset | PairShards  # what has captions


def _number(raw: dict) -> int:
    """What distinguishes a sample's randomness from that of others: a hash of its name."""
    return zlib.crc32(raw["__key__"].encode("utf-8", "surrogateescape"))  # names in tars are any bytes


def work_of_shards(source: PairShards, crops: int) -> list[Iterator[Work]]:
    """As `codes_writer.work_of`, for tar shards: one shard of codes for each of them."""

    def load(raw: dict) -> Tensor | None:
        try:
            image = source.decode(raw)
        except UnreadableImage as error:
            source.skipped.add(_number(raw), f"{raw['__key__']} in {raw['__url__']}", error)
            return None
        images = [centre_crop(image, source.resolution)]
        for k in range(1, crops):
            rng = sample_generator(source.seed, k, _number(raw), CROP_SEED)
            images.append(random_crop(image, source.resolution, source.resize_ratio, rng))
        return torch.stack(images)

    def part(shard: str) -> Iterator[Work]:
        for raw in read_shards([shard], SkipLog(SKIP_SLOTS)):
            yield raw["__key__"], partial(load, raw), captions_of(raw)

    return [part(shard) for shard in source.shards]
