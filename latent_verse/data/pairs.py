"""Image-text pairs of every layout, opened from the settings, and batched: pictures or codes with token ids.

    open_pairs(data, "train", resolution, seed)    any map-style layout: items are (picture or codes, caption)
    PairTrainShards, PairEvalShards                tar shards as img2dataset writes them, streamed
    PairCollate                                    items -> [pictures (B, 3, R, R) uint8 or codes (B, N), ids (B, L)]

Captions are tokenized in collation, which is the loader's worker processes.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_verse.data import DataError
from latent_verse.data.captions import (
    CAPTION_DRAW,
    CROP_DRAW,
    CocoCaptions,
    FakePairs,
    KarpathyCaptions,
    PairFolder,
    TableCaptions,
)
from latent_verse.data.codes import CodesDataset, Work
from latent_verse.data.images import SkipLog
from latent_verse.data.shapes import ShapesDataset, World
from latent_verse.data.shards import SKIP_SLOTS, EvalShards, TrainShards, is_remote, read_shards
from latent_verse.data.shards import _decode as decode_image
from latent_verse.data.transforms import UnreadableImage, centre_crop, mix_seed, random_crop, sample_generator

FAKE_TRAIN, FAKE_VAL = 512, 64  # pairs where the settings do not say
SHAPES_TRAIN, SHAPES_VAL = 10_000, 256
SHAPES_SPLITS = {"train": "train", "val": "val", "test": "val"}
KARPATHY_SPLITS = {"train": "train+restval", "val": "val", "test": "test"}
NO_TOKEN = -1  # fills captions: which id pads is the transformer's affair
TOKENIZER_CAPTIONS = 500_000  # a vocabulary learns nothing from more


def source_of(data: Any, split: str) -> str | None:
    """What holds the pairs of `split` (train, val or test, which falls back to val); None where it is not given."""
    if data.dataset in ("fake", "shapes"):
        return data.dataset
    folder = getattr(data, f"{split}_dir") or (data.val_dir if split == "test" else None)
    captions = data.train_captions if split == "train" else data.val_captions
    if data.dataset == "karpathy":  # one file and one folder may hold all splits
        return folder or data.train_dir
    return captions if data.dataset == "table" else folder


def open_pairs(data: Any, split: str, resolution: int, seed: int, augment: bool | None = None) -> Any:
    """The map-style dataset of a split: `dataset[(epoch, i)]` is (uint8 (3, R, R) or codes (N,), caption), or None.

    Args:
        data: `config_biart.PairDataConfig`, or what has its fields; any layout but webdataset.
        augment: random crops, and new scenes in each epoch; default for train only.

    Raises:
        DataError: naming the setting and the file.
    """
    train = split == "train"
    augment = train if augment is None else augment
    given = "train" if train else "test" if split == "test" and data.test_dir else "val"
    source, captions = source_of(data, split), f"{'train' if train else 'val'}_captions"
    options = {"train": augment, "seed": seed, "as_uint8": True}
    if data.dataset == "fake":
        size = (data.dataset_size or FAKE_TRAIN) if train else data.val_size or FAKE_VAL
        return FakePairs(size, resolution, **options)
    if data.dataset == "shapes":
        world = World.preset(data.world)
        if world.image_size != resolution:
            raise DataError(
                f"world: {data.world} draws pictures of {world.image_size} px, but the AugVAE takes {resolution} px. "
                "Train the AugVAE on pictures of this world, or choose the other world."
            )
        size = (data.dataset_size or SHAPES_TRAIN) if train else data.val_size or SHAPES_VAL
        return ShapesDataset(world, SHAPES_SPLITS[split], size, seed, fresh=augment, as_uint8=True)
    if data.dataset == "codes":
        return CodesDataset(source, augment, seed, f"{given}_dir")
    options["resize_ratio"] = data.resize_ratio
    if data.dataset == "pairs":
        return PairFolder(source, resolution, key=f"{given}_dir", **options)
    if data.dataset == "table":
        return TableCaptions(source, resolution, key=captions, **options)
    file = getattr(data, captions)
    if data.dataset == "karpathy":
        file, key = file or data.train_captions, captions if file else "train_captions"
        try:
            return KarpathyCaptions(file, source, resolution, KARPATHY_SPLITS[split], key=key, **options)
        except DataError as error:
            if "'restval'" not in str(error):
                raise
            return KarpathyCaptions(file, source, resolution, "train", key=key, **options)  # Flickr's have no restval
    return CocoCaptions(file or _coco_file(source, captions), source, resolution, key=captions, **options)


def _coco_file(folder: str, key: str) -> str:
    """annotations/captions_train2017.json beside train2017/, where COCO puts it."""
    path = Path(os.path.expanduser(folder))
    file = path.parent / "annotations" / f"captions_{path.name}.json"
    if not file.is_file():
        raise DataError(f"{key} is not given, and {file}, where COCO puts the captions of {folder}, does not exist.")
    return str(file)


def all_captions(dataset: Any) -> Iterator[str]:
    """The captions of a map-style dataset, or of a list of shards, to train a tokenizer on; of a large one, a part."""
    of_each: Iterable[list[str]]
    if isinstance(dataset, list):
        of_each = (captions_of(raw) for raw in read_shards(dataset, SkipLog(1)))
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


class PairCollate:
    """(picture or codes, caption) items -> [uint8 (B, 3, R, R) or int32 (B, N), ids (B, L) filled with NO_TOKEN].

    None, an unreadable evaluation item, is left out; B may be 0.

    Args:
        shape: of one picture or of one's codes, for batches of none.
        too_long: what becomes of captions with more than `text_len` tokens: "truncate", or "error" (TokenizerError).
    """

    def __init__(self, tokenizer: Any, text_len: int, too_long: str, shape: tuple[int, ...]):
        self.tokenizer, self.text_len, self.too_long, self.shape = tokenizer, text_len, too_long, shape

    def __call__(self, items: list[tuple[Any, str] | None]) -> list[Tensor]:
        kept = [item for item in items if item is not None]
        text_BL = self.ids([caption for _, caption in kept])
        if len(self.shape) == 1:
            codes = np.stack([x for x, _ in kept]) if kept else np.empty((0, *self.shape))
            return [torch.from_numpy(codes.astype(np.int32)), text_BL]
        if not kept:
            return [torch.empty(0, *self.shape, dtype=torch.uint8), text_BL]
        # pictures lie in memory as HWC, as decoders leave them: stacked so, it is one copy each
        return [torch.stack([x.permute(1, 2, 0) for x, _ in kept]).permute(0, 3, 1, 2), text_BL]

    def ids(self, captions: list[str]) -> Tensor:
        """Captions -> ids (B, L) int64. Those that codes.py has tokenized are taken as they are, unless too long."""
        ids = [getattr(caption, "ids", None) for caption in captions]
        new = [i for i, known in enumerate(ids) if known is None or len(known) > self.text_len]
        encoded = self.tokenizer.encode_batch([str(captions[i]) for i in new], self.text_len, self.too_long)
        for i, tokens in zip(new, encoded, strict=True):
            ids[i] = tokens
        text_BL = torch.full((len(ids), self.text_len), NO_TOKEN, dtype=torch.long)
        for row, tokens in enumerate(ids):
            text_BL[row, : len(tokens)] = torch.as_tensor(tokens, dtype=torch.long)
        return text_BL


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


CAPTION_REMEDY = "They have no caption: put one beside each picture, as name.txt or under `caption` in name.json."


class NoCaption(UnreadableImage):
    """A sample of tar shards without a caption."""

    remedy = CAPTION_REMEDY


def check_captions(shards: list[str], key: str) -> None:
    """Refuse shards whose samples all have no caption. Reads up to the first that has one; remote shards not at all.

    Raises:
        DataError: naming the setting `key` and the shards.
    """
    if any(map(is_remote, shards)):
        return
    samples = 0
    for raw in read_shards(shards, SkipLog(1)):
        if captions_of(raw):
            return
        samples += 1
    if samples:
        raise DataError(
            f"{key}: none of the {samples} samples in {describe_shards(shards)} can be used. {CAPTION_REMEDY}"
        )


def describe_shards(shards: list[str]) -> str:
    """The first shard, and how many more."""
    return shards[0] + (f" and {len(shards) - 1} more" if len(shards) > 1 else "")


def decode_pair(raw: dict) -> tuple[Tensor, tuple[int, list[str]]]:
    """(uint8 (3, H, W), (hash of the name, captions)); UnreadableImage also for a sample without a caption."""
    captions = captions_of(raw)
    if not captions:
        raise NoCaption("no caption: neither a .txt nor a .json with `caption`")
    return decode_image(raw)[0], (zlib.crc32(raw["__key__"].encode()), captions)


class PairTrainShards(TrainShards):
    """Shuffled (picture, caption) items; the caption of several is drawn by (seed, epoch, name of the sample)."""

    decode = staticmethod(decode_pair)

    def __iter__(self) -> Iterator[tuple[Tensor, str]]:
        epoch = int(self._start[0])
        for image, (name, captions) in super().__iter__():
            yield image, captions[mix_seed(self.seed, epoch, name, CAPTION_DRAW) % len(captions)]


class PairEvalShards(EvalShards):
    """Each (picture, first caption) once over ranks x workers."""

    decode = staticmethod(decode_pair)

    def _sample(self, raw: dict) -> tuple[Tensor, str] | None:
        sample = super()._sample(raw)
        return sample and (sample[0], sample[1][1][0])


def work_of_shards(
    shards: list[str], resolution: int, crops: int, resize_ratio: float, seed: int
) -> list[Callable[[], Iterator[Work]]]:
    """What codes.extract does with tar shards: one shard of codes for each. Crop 0 is the centre crop."""

    def load(raw: dict) -> Tensor:
        image, (name, _) = decode_pair(raw)
        pictures = [centre_crop(image, resolution)]
        for k in range(1, crops):
            pictures.append(random_crop(image, resolution, resize_ratio, sample_generator(seed, k, name, CROP_DRAW)))
        return torch.stack(pictures)

    def part(shard: str) -> Iterator[Work]:
        for raw in read_shards([shard], SkipLog(SKIP_SLOTS)):
            yield raw["__key__"], lambda raw=raw: load(raw), captions_of(raw)

    return [lambda shard=shard: part(shard) for shard in shards]
