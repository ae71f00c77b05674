"""Image-text pairs as batches, and pairs in tar shards.

    PairShards                      tar shards as img2dataset writes them, streamed
    CaptionEncoder, PairCollate     items -> [images (B, 3, R, R) uint8 or codes (B, N), ids (B, L)]
    all_captions                    what a tokenizer is trained on

Captions are tokenized in collation, which runs in the loader's worker processes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_verse.data import DataError
from latent_verse.data.captions import CAPTION_SEED, CROP_SEED, EncodedCaption
from latent_verse.data.codes import Work
from latent_verse.data.images import SkipLog
from latent_verse.data.shards import (
    SKIP_SLOTS,
    EvalShards,
    Shards,
    TrainShards,
    decode_image,
    is_remote,
    read_shards,
)
from latent_verse.data.text import Tokenizer
from latent_verse.data.transforms import (
    UnreadableImage,
    centre_crop,
    mix_seed,
    random_crop,
    sample_generator,
    stack_images,
)

TOKENIZER_CAPTIONS = 500_000  # a vocabulary learns nothing from more


def all_captions(dataset: Any) -> Iterator[str]:
    """The captions to train a tokenizer on: those of a dataset of pairs, or of a large one evenly spaced ones."""
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
    """Captions -> ids (B, L) int64, filled with `pad`.

    Attributes:
        text_len: L.
        too_long: what is done with captions of more than `text_len` tokens: "truncate", or "error".
        pad: BiART's id of padding, `biart.sequence.Vocabulary.pad`.
    """

    tokenizer: Tokenizer
    text_len: int
    too_long: str
    pad: int

    def __call__(self, captions: Sequence[str | EncodedCaption]) -> Tensor:
        """The ids that an EncodedCaption brings are used as they are, unless there are too many.

        Raises:
            TokenizerError: a caption cannot be encoded, or is too long and `too_long` is "error".
        """
        ids = [caption.ids if isinstance(caption, EncodedCaption) else None for caption in captions]
        new = [i for i, known in enumerate(ids) if known is None or len(known) > self.text_len]
        encoded = self.tokenizer.encode_batch([text_of(captions[i]) for i in new], self.text_len, self.too_long)
        for i, tokens in zip(new, encoded, strict=True):
            ids[i] = tokens
        text_BL = torch.full((len(ids), self.text_len), self.pad, dtype=torch.long)
        for row, tokens in enumerate(ids):
            text_BL[row, : len(tokens)] = torch.as_tensor(tokens, dtype=torch.long)
        return text_BL


class PairCollate:
    """(image or codes, caption) items -> [uint8 (B, 3, R, R) or int32 (B, N), ids (B, L)].

    None, an unreadable evaluation item, is left out; B may be 0.

    Args:
        shape: of one image, (3, R, R), or of one image's codes, (N,).
    """

    def __init__(self, encode: CaptionEncoder, shape: tuple[int, ...]):
        self.encode, self.shape = encode, shape

    def __call__(self, items: list[tuple[Any, str | EncodedCaption] | None]) -> list[Tensor]:
        kept = [item for item in items if item is not None]
        text_BL = self.encode([caption for _, caption in kept])
        if len(self.shape) > 1:
            return [stack_images([image for image, _ in kept], self.shape), text_BL]
        codes = np.stack([x for x, _ in kept]) if kept else np.empty((0, *self.shape))
        return [torch.from_numpy(codes.astype(np.int32)), text_BL]


# --------------------------------------------------------------------------------------------------------- tar shards


def captions_of(raw: dict) -> list[str]:
    """The captions of a raw sample: its .txt unless blank, else `caption` (or `captions`, a list) in its .json."""
    found = raw.get("txt", b"").decode("utf-8", "replace")
    if not found.strip():
        try:
            about = json.loads(raw.get("json", b"{}"))
            found = about.get("captions") or about.get("caption") or []
        except (ValueError, AttributeError):
            found = []
    found = found if isinstance(found, list) else [found]
    texts = [" ".join(text.split()) for text in found if isinstance(text, str)]
    return [text for text in texts if text]


CAPTION_REMEDY = "They have no caption: put one beside each image, as name.txt or under `caption` in name.json."


class NoCaption(UnreadableImage):
    """A sample of tar shards without a caption."""

    remedy = CAPTION_REMEDY


def decode_pair(raw: dict) -> tuple[Tensor, tuple[int, list[str]]]:
    """(uint8 (3, H, W), (hash of the name, captions)); UnreadableImage also for a sample without a caption."""
    captions = captions_of(raw)
    if not captions:
        raise NoCaption("no caption: neither a .txt nor a .json with `caption`")
    return decode_image(raw)[0], (zlib.crc32(raw["__key__"].encode()), captions)


class PairTrainShards(TrainShards):
    """Shuffled (image, caption) items. Which of several captions it is follows from (seed, epoch, sample's name)."""

    decode = staticmethod(decode_pair)

    def __iter__(self) -> Iterator[tuple[Tensor, str]]:
        epoch = int(self._start[0])
        for image, (name, captions) in super().__iter__():
            yield image, captions[mix_seed(self.seed, epoch, name, CAPTION_SEED) % len(captions)]


class PairEvalShards(EvalShards):
    """Each (image, first caption) once over ranks x workers."""

    decode = staticmethod(decode_pair)

    def _sample(self, raw: dict) -> tuple[Tensor, str] | None:
        sample = super()._sample(raw)
        return sample and (sample[0], sample[1][1][0])


class PairShards(Shards):
    """Tar shards whose samples have captions: items are (image, caption).

    Raises:
        DataError: a shard is missing, or no sample of local shards has a caption.
    """

    train_stream, eval_stream = PairTrainShards, PairEvalShards

    def __init__(self, source: str, resolution: int, key: str = "train_dir", **options):
        super().__init__(source, resolution, key=key, **options)
        if not any(map(is_remote, self.shards)):
            self._check_captions(key)

    def _check_captions(self, key: str) -> None:
        """Reads up to the first sample that has a caption; DataError if there is none."""
        samples = 0
        for raw in read_shards(self.shards, SkipLog(1)):
            if captions_of(raw):
                return
            samples += 1
        if samples:
            source = self.describe()["source"]
            raise DataError(f"{key}: none of the {samples} samples in {source} can be used. {CAPTION_REMEDY}")


def work_of_shards(
    shards: list[str], resolution: int, crops: int, resize_ratio: float, seed: int
) -> list[Callable[[], Iterator[Work]]]:
    """What codes.extract does with tar shards: one shard of codes for each. Crop 0 is the centre crop.

    Args:
        resize_ratio, seed: of the random crops 1, 2, ...
    """

    def load(raw: dict) -> Tensor:
        image, (name, _) = decode_pair(raw)
        images = [centre_crop(image, resolution)]
        for k in range(1, crops):
            images.append(random_crop(image, resolution, resize_ratio, sample_generator(seed, k, name, CROP_SEED)))
        return torch.stack(images)

    def part(shard: str) -> Iterator[Work]:
        for raw in read_shards([shard], SkipLog(SKIP_SLOTS)):
            yield raw["__key__"], lambda raw=raw: load(raw), captions_of(raw)

    return [lambda shard=shard: part(shard) for shard in shards]
