"""Codes ahead of training: the frozen AugVAE encodes a dataset once, and training reads the codes.

A folder of codes holds codes-00000.tar, ... (WebDataset: `<name>.npy`, codes (crops, N) in uint16 or uint32, and
`<name>.json`, {"captions": [...], "ids": [[...], ...]}), the tokenizer, and codes.json: the fingerprints of AugVAE and
tokenizer, sizes and counts. codes.json is written last. Until then unfinished.json says which shards are complete;
rerunning an interrupted command resumes it after them.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latent_verse.config.settings import differences, expand, expand_paths
from latent_verse.data import DataError
from latent_verse.data.captions import CAPTION_SEED, CROP_SEED, CaptionList, EncodedCaption, PairDataset
from latent_verse.data.images import SkipLog
from latent_verse.data.shapes import Scene, ShapesDataset, World
from latent_verse.data.shards import Ending, Header
from latent_verse.data.text import Tokenizer
from latent_verse.data.transforms import UnreadableImage, mix_seed, to_unit_range
from latent_verse.files import parse_json, read_json_object, replacing, write_json
from latent_verse.progress import progress_bar

FORMAT = "latent_verse/codes"
META, UNFINISHED, TOKENIZER = "codes.json", "unfinished.json", "tokenizer"
STORED_IDS = 4096  # of a caption at most: training tokenizes anew what has more than it takes
SHAPES_CAPTIONS = 8  # of each scene, as the grammar samples them: frequent ones more than once

Work = tuple[str, Callable[[], Tensor | None], list[str]]  # name, loader of its crops (c, 3, R, R) uint8, captions


def smallest_type(count: int) -> type:
    """The unsigned integer that holds 0 to count - 1."""
    return np.uint16 if count <= 2**16 else np.uint32


def work_of(dataset: PairDataset | ShapesDataset, crops: int, shard_size: int) -> list[Iterator[Work]]:
    """What each shard of codes holds: `shard_size` items of a map-style dataset opened without augmentation.

    Crop 0 is the centre crop, as in evaluation; crop k is the random one that training sees in epoch k.
    """
    augmented = copy.copy(dataset)
    augmented.train = True

    def load(i: int) -> Tensor | None:
        items = [dataset[(0, i)]]
        if items[0] is None:
            return None
        items += [augmented[(k, i)] for k in range(1, crops)]
        return torch.stack([image for image, _ in items])

    def part(start: int) -> Iterator[Work]:
        for i in range(start, min(start + shard_size, len(dataset))):
            shapes = isinstance(dataset, ShapesDataset)
            captions = dataset.sample_captions(i, SHAPES_CAPTIONS) if shapes else dataset.captions(i)
            yield f"{i:09d}", partial(load, i), captions

    return [part(start) for start in range(0, len(dataset), shard_size)]


def contents_of(dataset: PairDataset | ShapesDataset) -> str | None:
    """16 hexadecimal digits of the sizes of all images and of all captions; None for generated ones.

    A rerun finds by them that the data has changed, without reading the images.
    """
    if isinstance(dataset, ShapesDataset):
        return None
    digest = hashlib.sha256()
    for i in range(len(dataset)):
        path = dataset.image_path(i)
        size = os.path.getsize(path) if path and os.path.isfile(path) else -1
        digest.update(json.dumps([size, dataset.captions(i)]).encode())
    return digest.hexdigest()[:16]


def extract(
    work: list[Iterator[Work]],
    folder: str | os.PathLike,
    encode: Callable[[Tensor], Tensor],
    tokenizer: Tokenizer,
    plan: dict[str, Any],
    *,
    batch_size: int,
    threads: int,
    total: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the codes of `work`, one shard for each of its parts, or the shards that are missing. Returns codes.json.

    Args:
        encode: float32 (B, 3, R, R) in [-1, 1] -> codes (B, N).
        plan: what the codes are made from and with, which codes.json states. A folder with a different one is refused.
        total: images, for the progress bar.

    Raises:
        DataError: the folder holds codes of a different plan, or something else; or no image can be read.
    """
    folder = Path(folder)
    if (folder / META).is_file():
        return _read_same(folder / META, plan)
    state = {**plan, "shards": {}}
    if (folder / UNFINISHED).is_file():
        state = _read_same(folder / UNFINISHED, plan)
    elif folder.is_dir() and any(not file.name.endswith(".tmp") for file in folder.iterdir()):
        raise DataError(f"extract_codes: {folder} holds something else; it is left alone. Name a new or empty folder.")
    write_json(folder / UNFINISHED, state)
    with replacing(folder / TOKENIZER) as unfinished:
        tokenizer.save(unfinished)
    bar = progress_bar(what=f"codes to {folder}", total=total, unit="image", shown=progress)
    bar.update(sum(shard["pairs"] + shard["skipped"] for shard in state["shards"].values()))
    with bar, ThreadPoolExecutor(max(1, threads)) as pool:
        for number, part in enumerate(work):
            name = f"codes-{number:05d}.tar"
            if name not in state["shards"] or not (folder / name).is_file():
                counts = _write_shard(folder / name, part, encode, tokenizer, plan, batch_size, pool, bar)
                state["shards"][name] = counts
                write_json(folder / UNFINISHED, state)
    for what in ("pairs", "captions", "skipped"):
        state[what] = sum(shard[what] for shard in state["shards"].values())
    if not state["pairs"]:
        raise DataError(f"extract_codes: none of {state['skipped']} images could be read; {folder} stays unfinished.")
    write_json(folder / META, state)
    (folder / UNFINISHED).unlink()
    return state


def _write_shard(path: Path, work: Iterator[Work], encode, tokenizer, plan, batch_size, pool, bar) -> dict[str, int]:
    """One tar, which gets its name once it is complete. Returns its counts, and its CRC-32."""
    from webdataset import TarWriter

    counts = {"pairs": 0, "captions": 0, "skipped": 0}
    with replacing(path) as unfinished, TarWriter(str(unfinished), encoder=False, mtime=0) as tar:
        while batch := list(islice(work, batch_size)):
            loaded = list(pool.map(lambda item: _load(item[1]), batch))
            kept = [(name, x, captions) for (name, _, captions), x in zip(batch, loaded, strict=True) if x is not None]
            counts["skipped"] += len(batch) - len(kept)
            if kept:
                x_BCHW = torch.cat([x for _, x, _ in kept])
                codes = torch.cat([encode(to_unit_range(x)) for x in x_BCHW.split(batch_size)])
                codes = codes.cpu().numpy().astype(smallest_type(plan["codebook_size"]))
                codes = codes.reshape(len(kept), -1, codes.shape[-1])
                for (name, _, captions), of_one in zip(kept, codes, strict=True):
                    about = {"captions": captions, "ids": tokenizer.encode_batch(captions, STORED_IDS)}
                    np.save(npy := io.BytesIO(), of_one, allow_pickle=False)
                    tar.write({"__key__": name, "npy": npy.getvalue(), "json": json.dumps(about).encode()})
                    counts["pairs"] += 1
                    counts["captions"] += len(captions)
            bar.update(len(batch))
    with path.open("rb") as file:
        return counts | {"crc32": _Summed(file).read_on()}


def _load(load: Callable[[], Tensor | None]) -> Tensor | None:
    try:
        return load()
    except UnreadableImage:
        return None


def _read_same(path: Path, plan: dict) -> dict[str, Any]:
    """What a file of an earlier extraction holds, which must have had the same plan."""
    found = _read_json(path)
    found["source"] = expand_paths(found.get("source") or "")  # earlier versions recorded paths with `~`
    found.setdefault("contents", plan.get("contents"))  # and no contents
    if lines := "\n  ".join(differences(found, plan)):
        folder = path.parent
        raise DataError(f"extract_codes: {folder} holds codes of different settings; name another:\n  {lines}")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """What codes.json or unfinished.json holds.

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


def is_count(value: object) -> bool:
    """Whether a value read from JSON is 0, 1, 2, ..."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_meta(folder: str | os.PathLike, key: str) -> dict[str, Any]:
    """What codes.json of a folder holds.

    Raises:
        DataError: it is absent, damaged or unfinished; naming the setting `key`.
    """
    folder = Path(expand(folder, True, key))
    if (folder / META).is_file():
        meta = _read_json(folder / META)
        for name in ("pairs", "captions", "crops_per_image", "image_len", "codebook_size", "text_vocab"):
            if not is_count(meta.get(name)) or not meta[name]:
                raise DataError(
                    f"{key}: {folder / META} is damaged: {name} is {meta.get(name)!r:.80}, which is no count."
                )
        for name in ("vae", "tokenizer"):
            if not isinstance(meta.get(name), str):
                raise DataError(f"{key}: {folder / META} is damaged: {name} is {meta.get(name)!r:.80}, no fingerprint.")
        return meta
    if (folder / UNFINISHED).is_file():
        raise DataError(f"{key}: the codes in {folder} are unfinished. Rerun the command that was extracting them.")
    parts = [name for name in ("train", "val") if (folder / name / META).is_file()]
    hint = f" Did you mean {folder / parts[0]}?" if parts else " Make one with train_biart.py --extract_codes."
    raise DataError(f"{key}: {folder} is no folder of codes: it holds no {META}.{hint}")


def check_codes(meta: dict[str, Any], vae_fingerprint: str, tokenizer_fingerprint: str, key: str) -> None:
    """Check that codes and ids are those of the AugVAE and the tokenizer with these fingerprints.

    Raises:
        DataError: they are not; naming the setting `key` and both fingerprints.
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


class _Summed:
    """A file that is read once, and the CRC-32 of what was read of it."""

    def __init__(self, file: BinaryIO):
        self.file, self.sum = file, 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.sum = zlib.crc32(data, self.sum)
        return data

    def read_on(self) -> int:
        """The CRC-32 of the whole file, once the rest is read."""
        while self.read(1 << 20):
            pass
        return self.sum


def _check_captions(about: object, vocabulary: int) -> dict[str, list]:
    """The captions of a pair and their ids.

    Raises:
        ValueError: they are something else.
    """
    captions, ids = (about.get("captions"), about.get("ids")) if isinstance(about, dict) else (None, None)
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
        raise ValueError("its captions are no list of texts")
    if not isinstance(ids, list) or len(ids) != len(captions) or not all(isinstance(row, list) for row in ids):
        raise ValueError("there are not as many lists of ids as captions")
    if not all(
        {*map(type, row)} <= {int} and 0 <= min(row, default=0) <= max(row, default=0) < vocabulary for row in ids
    ):
        raise ValueError(f"its ids are no numbers below {vocabulary}")
    return about


class CodesDataset(Dataset):
    """A folder of codes in memory, as compact arrays: `dataset[(epoch, i)]` is (codes (N,), EncodedCaption).

    Crop and caption follow from (seed, epoch, i), epoch 0 for a plain index; without `train` it is the centre crop.

    Raises:
        DataError: the folder holds no complete codes; naming the setting `key`.
    """

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
        self._shapes: ShapesDataset | None = None
        if about := self.meta.get("shapes"):
            world = World.preset(about["world"])
            if about.get("fingerprint") != world.fingerprint:
                raise DataError(
                    f"{key}: {self.folder} holds codes of another version of the {world.name} shapes world "
                    f"({about.get('fingerprint')}, now {world.fingerprint}). Extract them again."
                )
            self._shapes = ShapesDataset(world, about["split"], len(self), about["seed"])

    def _size(self, shard: str, key: str) -> int:
        """The bytes of a shard. Raises DataError where it is no file."""
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
                    summed = _Summed(file)
                    for codes, about in self._pairs_of(summed, os.fstat(file.fileno()).st_size):
                        if done >= shape[0] or codes.shape != shape[1:]:
                            raise ValueError(f"it holds other codes than {META} says")
                        done += 1
                        yield codes, about
                    same = counts.get("crc32") in (None, summed.read_on())  # earlier versions gave none
            except Exception as error:  # of damaged bytes, tarfile and numpy raise nearly anything
                said = " ".join(str(error).split())[:200]
                raise DataError(f"{where} cannot be read: {said}. {remedy}") from error
            if done - before != counts["pairs"]:
                raise DataError(f"{where} holds {done - before} pairs, {META} says {counts['pairs']}. {remedy}")
            if not same:
                raise DataError(f"{where} is not as it was written: its checksum is another. {remedy}")

    def _pairs_of(self, shard: _Summed, size: int) -> Iterator[tuple[np.ndarray, dict]]:
        """The pairs of a shard of so many bytes. Raises nearly anything where it is damaged."""
        with tarfile.open(fileobj=Ending(shard), mode="r|", tarinfo=Header) as tar:
            about = None
            for member in tar:
                tar.members = []  # else tarfile keeps them all
                if not member.isreg() or member.size > size:
                    raise ValueError(f"{member.name} is no file, or larger than the shard")
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
