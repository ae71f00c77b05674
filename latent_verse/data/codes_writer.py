"""Writing codes ahead of training: the frozen AugVAE encodes a dataset once, and codes.py reads what it gives.

codes.json is written last. Until then unfinished.json says which shards are complete; rerunning an interrupted command
resumes it after them.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_verse.config.messages import differences
from latent_verse.config.settings import expand_paths
from latent_verse.data import DataError
from latent_verse.data.captions import PairDataset
from latent_verse.data.codes import META, STORED_IDS, TOKENIZER, UNFINISHED, read_counts, smallest_type
from latent_verse.data.decoding import UnreadableImage
from latent_verse.data.shapes import ShapesDataset
from latent_verse.data.tars import Crc32
from latent_verse.data.text import Tokenizer
from latent_verse.data.transforms import to_unit_range
from latent_verse.files import replacing, write_json
from latent_verse.progress import progress_bar

SHAPES_CAPTIONS = 8  # of each scene, as the grammar samples them: frequent ones more than once

Work = tuple[str, Callable[[], Tensor | None], list[str]]  # name, loader of its crops (c, 3, R, R) uint8, captions


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
    done = sum(shard["pairs"] + shard["skipped"] for shard in state["shards"].values())
    bar = progress_bar(what=f"codes to {folder}", total=total, unit="image", done=done, shown=progress)
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
    with replacing(path) as unfinished, open(unfinished, "wb") as file:
        summed = Crc32(file)
        with TarWriter(summed, encoder=False, mtime=0) as tar:
            while batch := list(islice(work, batch_size)):
                loaded = list(pool.map(lambda item: _load(item[1]), batch))
                kept = [
                    (name, x, captions) for (name, _, captions), x in zip(batch, loaded, strict=True) if x is not None
                ]
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
    return counts | {"crc32": summed.sum}


def _load(load: Callable[[], Tensor | None]) -> Tensor | None:
    try:
        return load()
    except UnreadableImage:
        return None


def _read_same(path: Path, plan: dict) -> dict[str, Any]:
    """What a file of an earlier extraction holds, which must have had the same plan."""
    found = read_counts(path)
    found["source"] = expand_paths(found.get("source") or "")  # earlier versions recorded paths with `~`
    found.setdefault("contents", plan.get("contents"))  # and no contents
    if lines := "\n  ".join(differences(found, plan)):
        folder = path.parent
        raise DataError(f"extract_codes: {folder} holds codes of different settings; name another:\n  {lines}")
    return found
