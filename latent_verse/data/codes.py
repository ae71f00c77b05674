"""Codes ahead of training: the frozen AugVAE encodes a dataset once, and training reads the codes.

A folder of codes holds codes-00000.tar, ... (WebDataset: `<name>.npy`, codes (crops, N) in uint16 or uint32, and
`<name>.json`, {"captions": [...], "ids": [[...], ...]}), the tokenizer, and codes.json: the fingerprints of AugVAE and
tokenizer, sizes and counts. codes.json is written last. Until then unfinished.json says which shards are complete;
rerunning an interrupted command resumes it after them.
"""

from __future__ import annotations

import copy
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latent_verse.config.settings import expand, expand_paths
from latent_verse.data import DataError
from latent_verse.data.captions import CAPTION_SEED, CROP_SEED, CaptionList, EncodedCaption, PairDataset
from latent_verse.data.images import SkipLog
from latent_verse.data.shapes import Scene, ShapesDataset, World
from latent_verse.data.text import Tokenizer
from latent_verse.data.transforms import UnreadableImage, mix_seed, to_unit_range
from latent_verse.files import differences, replacing, write_json
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
            if name not in state["shards"]:
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
    """One tar, which gets its name once it is complete. Returns its counts."""
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
    return counts


def _load(load: Callable[[], Tensor | None]) -> Tensor | None:
    try:
        return load()
    except UnreadableImage:
        return None


def _read_same(path: Path, plan: dict) -> dict[str, Any]:
    """What a file of an earlier extraction holds, which must have had the same plan."""
    found = _read_json(path)
    found["source"] = expand_paths(found.get("source") or "")  # earlier versions recorded paths with `~`
    if lines := "\n  ".join(differences(found, plan)):
        folder = path.parent
        raise DataError(f"extract_codes: {folder} holds codes of different settings:\n  {lines}\nName another folder.")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """What codes.json or unfinished.json holds."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}. Extract the codes again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path} does not describe codes of this program.")
    return content


def read_meta(folder: str | os.PathLike, key: str) -> dict[str, Any]:
    """What codes.json of a folder holds.

    Raises:
        DataError: it is absent, damaged or unfinished; naming the setting `key`.
    """
    folder = Path(expand(folder, True, key))
    if (folder / META).is_file():
        return _read_json(folder / META)
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
        self._codes = np.empty(shape, smallest_type(self.meta["codebook_size"]))
        ids, ends, captions = [], [0], []
        for i, (codes, about) in enumerate(self._samples(key)):
            if i >= len(self) or codes.shape != shape[1:] or codes.max() >= self.meta["codebook_size"]:
                raise DataError(f"{key}: {self.folder} holds codes other than its {META} says. Extract them again.")
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

    def _samples(self, key: str) -> Iterator[tuple[np.ndarray, dict]]:
        for name in self.meta["shards"]:
            try:
                with tarfile.open(self.folder / name) as tar:
                    about = None
                    for member in tar:
                        data = tar.extractfile(member).read()
                        if member.name.endswith(".json"):  # TarWriter sorts: it comes before its .npy
                            about = json.loads(data)
                        else:
                            yield np.load(io.BytesIO(data), allow_pickle=False), about
                        tar.members = []  # else tarfile keeps them all
            except (OSError, tarfile.TarError, ValueError, EOFError) as error:
                raise DataError(f"{key}: shard {self.folder / name} cannot be read: {error}") from error

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
