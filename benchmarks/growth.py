"""How cost grows: with the image, the codes, the batch, the vocabulary, and the samples of a dataset.

    python benchmarks/run.py growth [--device cuda]

Time and memory of ours alone. The exponent of a power law through neighbouring points says how they grow (1 is linear).
Listing a dataset is measured on names from a generator, as `walk` gives them, and on up to `files` empty files; the
loader's memory is that of its batches after a pass.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import Case, Row, Step, against, measured, peak_bytes, race, row, seconds
from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.config import PRESETS, AugVAEConfig, BiARTConfig
from latent_verse.data.folders import EXTENSIONS, walk
from latent_verse.data.images import PathList
from latent_verse.data.modules import EpochBatches

SIZES = {
    "toy": {
        "pixels": (16, 32),
        "width": {"hidden_dim": 32, "num_res_blocks": 1, "z_channels": 16, "codebook_dim": 8, "num_tokens": 24},
        "codes": (16, 64),
        "batch": (1, 2),
        "vocabulary": (64, 256),
        "preset": {"n_layer": 1, "n_head": 2, "n_embd": 16},
        "fixed": {"text_vocab": 40, "text_len": 4},
        "samples": (10**2, 10**3),
        "files": 10**2,
        "loader_batches": 10,
        "repeats": 1,
    },
    "cpu": {
        "pixels": (32, 64, 128, 256),
        "width": {"hidden_dim": 32, "num_res_blocks": 1, "z_channels": 32, "codebook_dim": 32, "num_tokens": 512},
        "codes": (64, 256, 1024),
        "batch": (1, 2, 4, 8),
        "vocabulary": (2**10, 2**12, 2**14, 2**16),
        "preset": PRESETS["tiny"],
        "fixed": {"text_vocab": 4096, "text_len": 32},
        "samples": tuple(10**i for i in range(2, 8)),
        "files": 10**4,
        "loader_batches": 2000,
        "repeats": 3,
    },
    "cuda": {
        "pixels": (64, 128, 256, 512),
        "width": {},
        "codes": (64, 256, 1024, 4096),
        "batch": (1, 4, 16, 64),
        "vocabulary": (2**10, 2**12, 2**14, 2**16),
        "preset": PRESETS["12x768"],
        "fixed": {"text_len": 64},
        "samples": tuple(10**i for i in range(2, 7)),
        "files": 10**4,
        "loader_batches": 500,
        "repeats": 3,
    },
}


def cases(device: str, size: str) -> list[Case]:
    """The points of each law, in order of their x; then datasets."""
    s, found = SIZES[size], []
    for law, values, make in (
        ("image (px, forward)", s["pixels"], lambda x: _forward(s, x, 1, device)),
        ("codes (training step)", s["codes"], lambda x: _step(s, device, image_len=x)),
        ("batch (training step)", s["batch"], lambda x: _step(s, device, batch=x)),
        ("vocabulary (training step)", s["vocabulary"], lambda x: _step(s, device, image_vocab=x)),
    ):
        before: list[tuple[float, float]] = []  # (x, seconds) of the points measured in this process
        for x in values:
            name = f"{law.split(' (')[0]} {x}"
            found.append(Case(name, partial(_point, name, law, x, make, before, device, s["repeats"])))
    for samples in s["samples"]:
        name = f"dataset of {samples} samples, listed"
        found.append(Case(name, partial(_listing, name, samples)))
    name = f"folder of {s['files']} files, walked"
    found.append(Case(name, partial(_files, name, s["files"])))
    name = f"loader process over {s['samples'][-2]} samples, {s['loader_batches']} batches of 64"
    return [*found, Case(name, partial(_loader, name, s["samples"][-2], s["loader_batches"]))]


def _point(
    name: str, law: str, x: float, make: Callable[[float], Step], before: list, device: str, repeats: int
) -> Iterator[Row]:
    ours, results = measured(make(x), device, repeats), {}
    if before:
        last_x, taken = before[-1]
        results["exponent"] = math.log(ours["seconds"] / taken) / math.log(x / last_x)
    before.append((x, ours["seconds"]))
    point = {"name": f"growth: {law}", "series": "ours", "x": x}
    yield row("growth", name, ours, [], unit="call", figures=results, law=point)


def _forward(s: dict, pixels: int, batch: int, device: str):
    config = AugVAEConfig(**s["width"], resolution=pixels, ch_mult=(1, 2, 2), attn_resolutions=(pixels // 4,))
    with torch.device(device):
        model = AugVAE(config).eval().to(memory_format=torch.channels_last)
    x_BCHW = torch.rand(batch, 3, pixels, pixels, device=device) * 2 - 1

    @torch.no_grad()
    def run():
        return model(x_BCHW)

    return run


def _step(s: dict, device: str, batch: int = 2, image_len: int | None = None, image_vocab: int | None = None):
    from benchmarks.biart import our_step, sequences_of

    sizes = {**s["preset"], **s["fixed"], "image_len": image_len or s["codes"][-2]}
    sizes["image_vocab"] = image_vocab or s["vocabulary"][1]
    with torch.device(device):
        model = BiART(BiARTConfig(**sizes))
    return our_step(model, sequences_of(model, batch, device), bf16=device == "cuda", compile=False)


def _listing(name: str, samples: int) -> Iterator[Row]:
    """Names of `samples` files into a PathList, and a first batch of a shuffled epoch."""
    held: dict[str, object] = {}

    def build():
        held["paths"] = PathList("/data", (f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(samples)))

    taken = seconds(build, "cpu")
    paths = held["paths"]
    stored = len(paths._blob) + paths._ends.nbytes
    batches = EpochBatches(samples, min(8, samples), 0, 1, seed=0)

    def first_batch():
        held["batch"] = [paths[i] for _, i in next(iter(batches))]

    order = peak_bytes(first_batch, "cpu")
    start = seconds(first_batch, "cpu")
    peers = []
    if samples <= 10**5:
        names = [paths[i] for i in range(samples)]
        size = sys.getsizeof(names) + sum(map(sys.getsizeof, names))
        peers = [
            {"name": "a list of str", "seconds": None, "ratio": None, "bytes": size, "memory_ratio": size / stored}
        ]
    yield row(
        "growth",
        name,
        {"seconds": taken, "bytes": stored},
        peers,
        unit="listing",
        same=len(held["batch"]) == min(8, samples),
        figures={"bytes_per_sample": stored / samples, "epoch_order_bytes": order, "first_batch_s": start},
        law={"name": "growth: samples (listing)", "series": "ours", "x": samples},
    )


class _Lengths(Dataset):
    """The length of each path: a dataset that costs nothing but its list."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> int:
        return len(self.paths[i])


class _Batches:
    """Random batches of 64, made on request: a list of them would be unshared page by page while it is read."""

    def __init__(self, samples: int, batches: int):
        self.samples, self.batches = samples, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self):
        return (torch.randint(self.samples, (64,)).tolist() for _ in range(self.batches))


def _private_bytes(pid: int) -> int:
    """Memory of a process that it shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def _loader(name: str, samples: int, batches: int) -> Iterator[Row]:
    """What a loader process comes to own while it reads on: nothing of a PathList, its pages of a list of str."""
    made = PathList("/data", (f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(samples)))
    growth, first = {}, min(100, batches // 4)  # the first batches fill the process's own buffers
    for way, paths in (("ours", made), ("a list of str", [made[i] for i in range(samples)])):
        order = _Batches(samples, batches)
        loader = DataLoader(_Lengths(paths), batch_sampler=order, num_workers=1, multiprocessing_context="fork")
        iterator, held = iter(loader), []
        for number, _ in enumerate(iterator):
            if number in (first, batches - 3):
                held.append(_private_bytes(iterator._workers[0].pid))
        growth[way] = held[1] - held[0]
    yield row(
        "growth",
        name,
        {"seconds": None, "bytes": growth["ours"]},
        [{"name": "a list of str", "seconds": None, "ratio": None, "bytes": growth["a list of str"]}],
        unit="growth of its own memory",
        goal="flat: under 4 MiB",
        met=growth["ours"] < 4 * 2**20,
    )


def _files(name: str, count: int) -> Iterator[Row]:
    """Walking a folder of empty files, against os.walk alone."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for i in range(count):
            if i % 1000 == 0:
                (root / f"{i // 1000:04d}").mkdir()
            (root / f"{i // 1000:04d}" / f"{i:08d}.jpg").touch()

        def ours() -> PathList:
            return PathList(folder, walk(folder, EXTENSIONS, Counter()))

        def plain() -> list[str]:
            return sorted(os.path.join(at, f) for at, _, files in os.walk(folder) for f in files)

        taken = race({"ours": ours}, "cpu", 3)["ours"]
        result = row("growth", name, {"seconds": taken, "bytes": None}, [], unit="walk", same=len(ours()) == count)
        result["figures"] = {"files_per_s": count / taken}
        yield result
        against(result, "os.walk and a sorted list", ours, lambda: plain, "cpu", 3)
        yield result
