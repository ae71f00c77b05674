"""Part of the area data: the CPU time of each layout's samples, and whether the loader keeps up with training."""

from __future__ import annotations

import itertools
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from benchmarks.data import PLAIN, made_images, measured_ways, one_thread
from benchmarks.measure import Case, Row, absent, peer, row
from latent_verse.config.train import ImageDataConfig
from latent_verse.data.datasets import open_images
from latent_verse.data.images import ImageDataset
from latent_verse.data.modules import ImageDataModule


def class_folders(files: list[bytes], root: Path) -> Path:
    """The ImageFolder layout: two classes."""
    for i, data in enumerate(files):
        path = root / f"class{i % 2}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def tar_shard(files: list[bytes], root: Path) -> Path:
    """One WebDataset shard."""
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "000.tar", "w") as tar:
        for i, data in enumerate(files):
            member = tarfile.TarInfo(f"{i:06d}.jpg")
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    return root


def codes_shard(items: int, codes: int, root: Path) -> Path:
    """A folder of codes as `data.codes_writer.extract` leaves it, with random codes."""
    from latent_verse.data.codes import FORMAT, META

    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with tarfile.open(root / "codes-00000.tar", "w") as tar:
        for i in range(items):
            array = BytesIO()
            np.save(array, rng.integers(0, 8192, (1, codes), dtype=np.uint16))
            about = json.dumps({"captions": ["a photo"], "ids": [[1, 2]]}).encode()
            for kind, data in (("json", about), ("npy", array.getvalue())):
                member = tarfile.TarInfo(f"{i:09d}.{kind}")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    meta = {"format": FORMAT, "pairs": items, "crops_per_image": 1, "image_len": codes, "codebook_size": 8192}
    counts = {"pairs": items, "captions": items, "skipped": 0}
    meta |= {"text_vocab": 100, "shards": {"codes-00000.tar": counts}, "captions": items, "vae": "", "tokenizer": ""}
    (root / META).write_text(json.dumps(meta))
    return root


def cpu_seconds(run, rounds: int = 3) -> float:
    """The least CPU time of this process for one call."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


def of_folders(files: list[bytes], resolution: int, root: Path) -> Callable[[], list]:
    """A pass over training samples of class folders."""
    images = ImageDataset(class_folders(files, root), resolution, as_uint8=True)
    return lambda: [images[(0, i)] for i in range(len(images))]


def of_shards(files: list[bytes], resolution: int, root: Path) -> Callable[[], list]:
    """The same of a tar shard. ImportError without webdataset."""
    tar_shard(files, root)
    settings = {"dataset": "webdataset", "web_dataset": True, "train_dir": str(root), "dataset_size": len(files)}
    config = ImageDataConfig(**settings, batch_size=1, num_workers=0)
    module = ImageDataModule(open_images(config, resolution), config)
    return lambda: list(itertools.islice(module.train_dataloader(), len(files)))


def of_codes(files: list[bytes], resolution: int, root: Path) -> Callable[[], list]:
    """The same of a shard of codes."""
    from latent_verse.data.codes import CodesDataset

    codes = CodesDataset(codes_shard(max(64, len(files)), 1024, root))
    return lambda: [codes[(0, i)] for i in range(len(codes))]


def cases(device: str, size: str, s: dict) -> list[Case]:
    """The layouts, and AugVAE fed from JPEGs."""
    found = []
    for layout, make in (("class folders", of_folders), ("tar shards", of_shards), ("codes", of_codes)):
        name = f"{layout}, training samples, one core"
        found.append(Case(name, partial(_layout, name, make, s)))
    shape = {"toy": "toy", "cpu": "tiny", "cuda": "released"}[size]
    workers = min(os.cpu_count() or 1, 16) if device == "cuda" else 1
    name = f"AugVAE ({shape}) fed from JPEGs, batch {s['batch']}, {workers} loader processes"
    return [*found, Case(name, partial(_beside_a_step, name, device, shape, workers, s))]


def _layout(name: str, make: Callable, s: dict) -> Iterator[Row]:
    """CPU time of a training sample, against the plain pipeline's."""
    plain = 1 / measured_ways("train", s["images"], s["resolution"], s["rounds"])[PLAIN]["images_per_s"]
    with tempfile.TemporaryDirectory() as folder, one_thread():
        try:
            run = make(made_images(s["images"]), s["resolution"], Path(folder))
        except ImportError as error:
            yield row("data", name, {}, [absent("ours", error)], unit="sample")
            return
        each = cpu_seconds(run) / len(run())
    yield row(
        "data",
        name,
        {"seconds": each, "bytes": None},
        [peer("plain: PIL + v1, float", each, plain)],
        unit="sample (CPU time)",
        goal=">= 1.5x the original's pipeline",
        met=plain / each >= 1.5,
        figures={"samples_per_s": 1 / each},
    )


def _beside_a_step(name: str, device: str, shape: str, workers: int, s: dict) -> Iterator[Row]:
    """The share of a training loop that waits for the loader: AugVAE's step, fed from class folders of JPEGs."""
    from benchmarks import augvae

    files = made_images(s["images"])
    with tempfile.TemporaryDirectory() as folder:
        module = augvae.lit(shape, compile=False, device=device)
        resolution = module.model.config.resolution
        enough = files * (1 + s["batch"] * (s["steps"] + 4) // len(files))
        config = ImageDataConfig(
            dataset="imagefolder",
            train_dir=str(class_folders(enough, Path(folder))),
            batch_size=s["batch"],
            num_workers=workers,
        )
        data = ImageDataModule(open_images(config, resolution), config)
        batches, waited, begin = iter(data.train_dataloader()), 0.0, 0.0
        x_BCHW = torch.zeros(s["batch"], 3, resolution, resolution, device=device)
        step = augvae.our_step(module, x_BCHW, "bf16" if device == "cuda" else "32", True)
        for number in range(s["steps"] + 2):
            start = time.perf_counter()
            if number == 2:  # the workers have started and the step is compiled
                begin, waited = start, 0.0
            batch = next(batches)
            waited += time.perf_counter() - start
            x_BCHW.copy_(data.on_after_batch_transfer([t.to(device, non_blocking=True) for t in batch], 0)[0])
            step()
            if device == "cuda":
                torch.cuda.synchronize()
        whole = time.perf_counter() - begin
        del batches
    yield row(
        "data",
        name,
        {"seconds": whole / s["steps"], "bytes": None},
        [],
        unit="training step",
        goal="the step never waits: idle share under 5 %",
        met=waited / whole < 0.05,
        figures={"idle_share": waited / whole, "images_per_s": s["steps"] * s["batch"] / whole},
    )
