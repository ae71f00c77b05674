"""Part of the area data: the CPU time of each layout's samples, and whether the loader keeps up with training."""

from __future__ import annotations

import itertools
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import Row, absent, peer, row
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
    """A folder of codes as `data.codes.extract` leaves it, with random codes."""
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
    meta |= {"text_vocab": 100, "shards": {"codes-00000.tar": {}}}
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


def layouts(files: list[bytes], resolution: int, plain: float) -> Iterator[Row]:
    """CPU time of a training sample from class folders, tar shards and codes, against the plain pipeline's `plain`."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images = ImageDataset(class_folders(files, root / "images"), resolution, as_uint8=True)
        ways = {"class folders": lambda: [images[(0, i)] for i in range(len(images))]}
        errors = {}
        try:
            from latent_verse.data.shards import EvalShards  # noqa: F401

            tar_shard(files, root / "shards")
            config = ImageDataConfig(
                dataset="webdataset",
                web_dataset=True,
                train_dir=str(root / "shards"),
                dataset_size=len(files),
                batch_size=1,
                num_workers=0,
            )
            module = ImageDataModule(open_images(config, resolution), config)
            ways["tar shards"] = lambda: list(itertools.islice(module.train_dataloader(), len(files)))
        except ImportError as error:
            errors["tar shards"] = error
        from latent_verse.data.codes import CodesDataset

        codes = CodesDataset(codes_shard(max(64, len(files)), 1024, root / "codes"))
        ways["codes"] = lambda: [codes[(0, i)] for i in range(len(codes))]
        for name, run in ways.items():
            each = cpu_seconds(run) / (len(codes) if name == "codes" else len(files))
            yield row(
                "data",
                f"{name}, training samples, one core",
                {"seconds": each, "bytes": None},
                [peer("plain: PIL + v1, float", each, plain)],
                unit="sample (CPU time)",
                goal=">= 1.5x the original's pipeline",
                met=plain / each >= 1.5,
                figures={"samples_per_s": 1 / each},
            )
        for name, error in errors.items():
            yield row("data", f"{name}, training samples, one core", {}, [absent("ours", error)], unit="sample")


def beside_a_step(device: str, size: str, files: list[bytes], s: dict) -> Iterator[Row]:
    """The share of a training loop that waits for the loader: AugVAE's step, fed from class folders of JPEGs."""
    from benchmarks import augvae

    shape = {"toy": "toy", "cpu": "tiny", "cuda": "released"}[size]
    with tempfile.TemporaryDirectory() as folder:
        module = augvae.lit(shape, compile=False, device=device)
        resolution = module.model.config.resolution
        enough = files * (1 + s["batch"] * (s["steps"] + 4) // len(files))
        config = ImageDataConfig(
            dataset="imagefolder",
            train_dir=str(class_folders(enough, Path(folder))),
            batch_size=s["batch"],
            num_workers=min(os.cpu_count() or 1, 16) if device == "cuda" else 1,
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
        f"AugVAE ({shape}) fed from JPEGs, batch {s['batch']}, {config.num_workers} loader processes",
        {"seconds": whole / s["steps"], "bytes": None},
        [],
        unit="training step",
        goal="the step never waits: idle share under 5 %",
        met=waited / whole < 0.05,
        figures={"idle_share": waited / whole, "images_per_s": s["steps"] * s["batch"] / whole},
    )
