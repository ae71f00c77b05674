"""Codes that were written ahead of training (codes_writer.py), as training reads them.

A folder of codes holds codes-00000.tar, ... (WebDataset: `<name>.npy`, codes (crops, N) in uint16 or uint32, and
`<name>.json`, {"captions": [...], "ids": [[...], ...]}), the tokenizer, and codes.json: the fingerprints of AugVAE and
tokenizer, sizes and counts.
"""

from __future__ import annotations

import io
import math
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from latent_verse.config.messages import reason, shown
from latent_verse.config.settings import expand, is_count
from latent_verse.data import DataError
from latent_verse.data.captions import CAPTION_SEED, CROP_SEED, CaptionList, EncodedCaption
from latent_verse.data.images import SkipLog
from latent_verse.data.shapes import PRESETS, SPLITS, Scene, ShapesDataset, World
from latent_verse.data.tars import Crc32, FailAtEnd, Header
from latent_verse.data.transforms import mix_seed
from latent_verse.files import parse_json, read_json_object

FORMAT = "latent_verse/codes"
META, UNFINISHED, TOKENIZER = "codes.json", "unfinished.json", "tokenizer"
MOST = 1 << 32  # codes or tokens that are told apart
STORED_IDS = 4096  # of a caption at most: training tokenizes anew what has more than it takes


def smallest_type(count: int) -> type:
    """The unsigned integer that holds 0 to count - 1."""
    return np.uint16 if count <= 2**16 else np.uint32


def read_counts(path: Path) -> dict[str, Any]:
    """What codes.json or unfinished.json holds, of which the counts of each shard are checked.

    Raises:
        DataError: it holds something else.
    """
    content = read_json_object(path)
    if content.get("format") != FORMAT:
        raise DataError(f"{path} does not describe codes of this program.")
    shards = content.get("shards")
    counts = shards.values() if isinstance(shards, dict) else [None]
    named = ("pairs", "captions", "skipped")
    whole = all(isinstance(of_one, dict) and all(is_count(of_one.get(what)) for what in named) for of_one in counts)
    if not whole or any(os.path.basename(name) != name for name in shards):
        raise DataError(f"{path} is damaged: `shards` has to give the counts of each shard. Extract the codes again.")
    return content


def read_meta(folder: str | os.PathLike, key: str) -> dict[str, Any]:
    """What codes.json of a folder holds.

    Raises:
        DataError: it is absent, damaged or unfinished; naming the setting `key`.
    """
    folder = Path(expand(folder, True, key))
    if (folder / META).is_file():
        meta = read_counts(folder / META)
        for name in ("pairs", "captions", "crops_per_image", "image_len", "codebook_size", "text_vocab"):
            if not is_count(meta.get(name)) or not meta[name]:
                raise DataError(f"{key}: {folder / META} is damaged: {name} is {shown(meta.get(name))}, not a count.")
        for name in ("codebook_size", "text_vocab"):
            if meta[name] > MOST:
                raise DataError(
                    f"{key}: {folder / META} is damaged: {name} is {meta[name]}; at most {MOST} are stored."
                )
        for name in ("vae", "tokenizer"):
            if not isinstance(meta.get(name), str):
                raise DataError(
                    f"{key}: {folder / META} is damaged: {name} is {shown(meta.get(name))}, not a fingerprint."
                )
        return meta
    if (folder / UNFINISHED).is_file():
        raise DataError(f"{key}: the codes in {folder} are unfinished. Rerun the command that was extracting them.")
    parts = [name for name in ("train", "val") if (folder / name / META).is_file()]
    hint = f" Did you mean {folder / parts[0]}?" if parts else " Make one with train_biart.py --extract_codes."
    raise DataError(f"{key}: {folder} is not a folder of codes: it holds no {META}.{hint}")


def check_codes(
    meta: dict[str, Any], vae_fingerprint: str, tokenizer_fingerprint: str, sizes: dict[str, int], key: str
) -> None:
    """Check that codes and ids are those of the AugVAE and the tokenizer with these fingerprints and `sizes`.

    Args:
        sizes: image_len, codebook_size and text_vocab.

    Raises:
        DataError: they are not; naming the setting `key` and what differs.
    """
    if meta["vae"] != vae_fingerprint:
        raise DataError(
            f"{key}: these codes were made by the AugVAE {meta['vae']}, but vae_path is {vae_fingerprint}. "
            "Give the AugVAE they were made with, or extract them again."
        )
    if meta["tokenizer"] != tokenizer_fingerprint:
        raise DataError(
            f"{key}: these captions were tokenized by {meta['tokenizer']}, but the run's tokenizer is "
            f"{tokenizer_fingerprint}. Extract train_dir and val_dir by one command, with the tokenizer of the run "
            "(and its --pretrained_path, if it has one)."
        )
    for name, size in sizes.items():
        if meta[name] != size:
            remedy = "Copy it again, or extract the codes again."
            raise DataError(f"{key}: {META} is damaged: {name} is {meta[name]}, but the model has {size}. {remedy}")


def _check_captions(about: object, vocabulary: int) -> dict[str, list]:
    """The captions of a pair and their ids.

    Raises:
        ValueError: they are something else.
    """
    captions, ids = (about.get("captions"), about.get("ids")) if isinstance(about, dict) else (None, None)
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
        raise ValueError("its captions are not a list of texts")
    if not isinstance(ids, list) or len(ids) != len(captions) or not all(isinstance(row, list) for row in ids):
        raise ValueError("there are not as many lists of ids as captions")
    if not all(
        {*map(type, row)} <= {int} and 0 <= min(row, default=0) <= max(row, default=0) < vocabulary for row in ids
    ):
        raise ValueError(f"its ids are not numbers below {vocabulary}")
    return about


class CodesDataset(Dataset):
    """A folder of codes in memory, as compact arrays: `dataset[(epoch, i)]` is (codes (N,), EncodedCaption).

    Crop and caption follow from (seed, epoch, i), epoch 0 for a plain index; without `train` it is the centre crop.

    Raises:
        DataError: the folder holds no complete codes; naming the setting `key`.
    """

    unit = "pair"

    def __init__(self, folder: str | os.PathLike, train: bool = True, seed: int = 0, key: str = "train_dir"):
        self.meta = read_meta(folder, key)
        self.folder, self.train, self.seed = Path(expand(folder, True, key)), train, seed
        shape = (self.meta["pairs"], self.meta["crops_per_image"], self.meta["image_len"])
        self.shape = shape[2:]  # of one item
        kind = np.dtype(smallest_type(self.meta["codebook_size"]))
        declared, there = math.prod(shape) * kind.itemsize, sum(self._size(name, key) for name in self.meta["shards"])
        if declared > there:  # before memory is taken
            raise DataError(
                f"{key}: {self.folder / META} declares {shape[0]:,} pairs of {shape[1]} x {shape[2]} codes, but the "
                f"shards hold only {there:,} bytes. Were all copied? Else extract the codes again."
            )
        self._codes = np.empty(shape, kind)
        ids, ends, captions = [], [0], []
        for i, (codes, about) in enumerate(self._samples(key, shape)):
            self._codes[i] = codes
            captions.append(about["captions"])
            for of_one in about["ids"]:
                ids.append(np.array(of_one, dtype=smallest_type(self.meta["text_vocab"])))
                ends.append(ends[-1] + len(of_one))
        if len(captions) != len(self):
            raise DataError(f"{key}: {self.folder} holds {len(captions)} pairs, its {META} says {len(self)}.")
        self._captions, self._ids, self._ends = CaptionList(captions), np.concatenate(ids), np.array(ends, np.int64)
        self.skipped = SkipLog(1)
        self._shapes = self._shapes_of(self.meta["shapes"], key) if self.meta.get("shapes") else None

    def _shapes_of(self, about: Any, key: str) -> ShapesDataset:
        """The scenes that codes.json names. Raises DataError where it is damaged, or names another version's."""
        named = about if isinstance(about, dict) else {}
        preset, split, seed = named.get("world"), named.get("split"), named.get("seed")
        if preset not in [*PRESETS] or split not in SPLITS or not isinstance(seed, int):
            raise DataError(f"{key}: {self.folder / META} is damaged: shapes is {shown(about)}. Extract them again.")
        world = World.preset(preset)
        if named.get("fingerprint") != world.fingerprint:
            raise DataError(
                f"{key}: {self.folder} holds codes of another version of the {world.name} shapes world "
                f"({shown(named.get('fingerprint'))}, now {world.fingerprint}). Extract them again."
            )
        return ShapesDataset(world, split, len(self), seed)

    def _size(self, shard: str, key: str) -> int:
        """The bytes of a shard. Raises DataError where it is not a file."""
        if not (self.folder / shard).is_file():
            raise DataError(f"{key}: shard {self.folder / shard} does not exist. Copy the whole folder.")
        return (self.folder / shard).stat().st_size

    def _samples(self, key: str, shape: tuple[int, int, int]) -> Iterator[tuple[np.ndarray, dict]]:
        """The codes of each pair, with its captions and ids. Raises DataError where a shard is not what was written."""
        done = 0
        for name, counts in self.meta["shards"].items():
            where, before = f"{key}: shard {self.folder / name}", done
            remedy = "Copy it again, or extract the codes again."
            try:
                with open(self.folder / name, "rb") as file:
                    summed = Crc32(file)
                    for codes, about in self._pairs_of(summed, os.fstat(file.fileno()).st_size):
                        if done >= shape[0] or codes.shape != shape[1:]:
                            raise ValueError(f"it holds other codes than {META} says")
                        done += 1
                        yield codes, about
                    same = counts.get("crc32") in (None, summed.of_all())  # earlier versions gave none
            except Exception as error:  # of damaged bytes, tarfile and numpy raise nearly anything
                raise DataError(f"{where} cannot be read: {reason(error)}. {remedy}") from error
            if done - before != counts["pairs"]:
                raise DataError(f"{where} holds {done - before} pairs, {META} says {counts['pairs']}. {remedy}")
            if not same:
                raise DataError(f"{where} is not as it was written: its checksum is another. {remedy}")

    def _pairs_of(self, shard: Crc32, size: int) -> Iterator[tuple[np.ndarray, dict]]:
        """The pairs of a shard of so many bytes. Raises nearly anything where it is damaged."""
        with tarfile.open(fileobj=FailAtEnd(shard), mode="r|", tarinfo=Header) as tar:
            about = None
            for member in tar:
                tar.members = []  # else tarfile keeps them all
                if not member.isreg() or member.size > size:
                    raise ValueError(f"{member.name} is not a file, or larger than the shard")
                data = tar.extractfile(member).read()
                if member.name.endswith(".json"):  # TarWriter sorts: it comes before its .npy
                    about = _check_captions(parse_json(data.decode(), member.name), self.meta["text_vocab"])
                    continue
                codes = np.load(io.BytesIO(data), allow_pickle=False)
                if about is None or codes.dtype.kind != "u" or codes.max(initial=0) >= self.meta["codebook_size"]:
                    raise ValueError(f"{member.name} has no captions, or other codes than {META} says")
                yield codes, about
                about = None

    def __len__(self) -> int:
        return self.meta["pairs"]

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[np.ndarray, EncodedCaption]:
        epoch, i = key if isinstance(key, tuple) else (0, key)
        if not 0 <= i < len(self):
            raise IndexError(f"index {i} in a dataset of {len(self)}")
        crop = mix_seed(self.seed, epoch, i, CROP_SEED) % self._codes.shape[1] if self.train else 0
        captions = self.captions(i)
        number = mix_seed(self.seed, epoch, i, CAPTION_SEED) % len(captions)
        at = self._captions.starts[i] + number
        ids = self._ids[self._ends[at] : self._ends[at + 1]].tolist()
        return self._codes[i, crop], EncodedCaption(captions[number], ids)

    def captions(self, i: int) -> list[str]:
        """All captions of item i."""
        return self._captions[i]

    @property
    def world(self) -> World | None:
        """The shapes world that the images come from, if they do."""
        return self._shapes and self._shapes.world

    def scene(self, i: int) -> Scene:
        """The scene behind item i, where the images come from a shapes world."""
        return self._shapes.scene(i)

    def describe(self) -> dict[str, str | int]:
        return {"source": str(self.folder), "pairs": len(self), "captions": int(self._captions.starts[-1])}
