"""JPEG to training image on one core: images/s of several decoders and resizers against plain PIL + torchvision v1.

    python benchmarks/data.py [--dir FOLDER] [--resolution 256] [--images 200] [--json FILE]
    python benchmarks/run.py data [--device cuda]

Every implementation gets the same bytes and crops the same squares. "plain" is what training scripts commonly do: PIL,
v1 transforms, ToTensor, Normalize. The rest stop at uint8, as `latent_verse.data` does (the device makes the floats),
except where float is named. Time is the process's CPU time with one thread, which other programs do not lengthen.
Implementations are timed alternately, and the best round is reported. The last columns are the largest difference from
the plain image, in 1/255, and whether it stays within 2. Without --dir, images of 500 x 375 and 640 x 480 are
generated.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import functional as v1
from torchvision.transforms.v2 import functional as v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import Case, Row, peer, row
from latent_verse.data.decoding import decode_rgb
from latent_verse.data.transforms import centre_crop, crop_box, random_crop, sample_generator, to_unit_range

RATIO = 0.75
BILINEAR = Image.Resampling.BILINEAR


@functools.cache
def made_images(number: int) -> list[bytes]:
    """JPEGs with photograph-like spectra: noise summed over scales."""
    rng = np.random.default_rng(0)
    files = []
    for i in range(number):
        width, height = [(500, 375), (640, 480)][i % 2]
        image = np.zeros((height, width, 3))
        for scale in (4, 16, 64, 256):
            small = Image.fromarray(rng.integers(0, 255, (scale, scale, 3), dtype=np.uint8))
            image += np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=float) / scale**0.5
        file = io.BytesIO()
        Image.fromarray((image / image.max() * 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def read_images(folder: str, number: int) -> list[bytes]:
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[:number]
    if not paths:
        raise SystemExit(f"--dir: no .jpg or .jpeg below {folder}")
    return [path.read_bytes() for path in paths]


def box(width: int, height: int, i: int) -> tuple[int, int, int]:
    return crop_box(height, width, RATIO, sample_generator(0, i))


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def open_rgb(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def tv_decode(data: bytes) -> Tensor:
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def normalised(image: Image.Image) -> Tensor:
    return v1.normalize(v1.to_tensor(image), [0.5] * 3, [0.5] * 3)


def train_ways(res: int) -> dict[str, Callable[[bytes, int], Tensor]]:
    def plain(data, i):
        image = open_rgb(data)
        top, left, side = box(*image.size, i)
        return normalised(v1.resized_crop(image, top, left, side, side, [res, res], antialias=True))

    def pil(data, i):
        image = open_rgb(data)
        top, left, side = box(*image.size, i)
        return from_pil(image.crop((left, top, left + side, top + side)).resize((res, res), BILINEAR))

    def pil_draft(data, i):  # libjpeg decodes at 1/2, 1/4 or 1/8 where that is still large enough
        image = Image.open(io.BytesIO(data))
        top, left, side = box(*image.size, i)
        width = image.size[0]
        image.draft("RGB", (image.size[0] * res // side, image.size[1] * res // side))
        image = image.convert("RGB")
        k = image.size[0] / width
        corner = (min((left + side) * k, image.size[0]), min((top + side) * k, image.size[1]))
        return from_pil(image.resize((res, res), BILINEAR, box=(left * k, top * k, *corner)))

    def pil_gap(data, i):
        image = open_rgb(data)
        top, left, side = box(*image.size, i)
        square = image.crop((left, top, left + side, top + side))
        return from_pil(square.resize((res, res), BILINEAR, reducing_gap=2.0))

    def tv_v2(data, i):
        image = tv_decode(data)
        top, left, side = box(image.shape[2], image.shape[1], i)
        return v2.resized_crop(image, top, left, side, side, [res, res], antialias=True)

    def ours(data, i):
        return random_crop(decode_rgb(data), res, RATIO, sample_generator(0, i))

    return {
        "plain: PIL + v1, float": plain,
        "PIL, uint8": pil,
        "PIL draft, uint8": pil_draft,
        "PIL reducing_gap, uint8": pil_gap,
        "torchvision decode + v2, uint8": tv_v2,
        "latent_verse, uint8": ours,
        "latent_verse, float": lambda data, i: to_unit_range(ours(data, i)),
    }


def eval_ways(res: int) -> dict[str, Callable[[bytes, int], Tensor]]:
    def plain(data, i):
        return normalised(v1.center_crop(v1.resize(open_rgb(data), [res], antialias=True), [res]))

    def tv_v2(data, i):
        return v2.center_crop(v2.resize(tv_decode(data), [res], antialias=True), [res])

    return {
        "plain: PIL + v1, float": plain,
        "torchvision decode + v2, uint8": tv_v2,
        "latent_verse, uint8": lambda data, i: centre_crop(decode_rgb(data), res),
    }


def pixels(x: Tensor) -> Tensor:
    return x.int() if x.dtype == torch.uint8 else ((x + 1) * 127.5).round().int()


def measure(ways: dict[str, Callable], files: list[bytes], rounds: int) -> list[dict]:
    plain = next(iter(ways.values()))
    gaps = dict.fromkeys(ways, 0)
    for i, data in enumerate(files):
        reference = pixels(plain(data, i))
        for name, way in ways.items():
            gaps[name] = max(gaps[name], (pixels(way(data, i)) - reference).abs().max().item())
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            for i, data in enumerate(files):
                way(data, i)
            best[name] = min(best[name], time.process_time() - start)
    slowest = best[next(iter(ways))]
    return [
        {
            "way": name,
            "images_per_s": len(files) / best[name],
            "ratio": slowest / best[name],
            "max_difference": gaps[name],
        }
        for name in ways
    ]


# ------------------------------------------------------------------------------------------- as an area of run.py

SIZES = {
    "toy": {"images": 4, "resolution": 32, "rounds": 1, "batch": 2, "steps": 2},
    "cpu": {"images": 40, "resolution": 256, "rounds": 3, "batch": 8, "steps": 6},
    "cuda": {"images": 40, "resolution": 256, "rounds": 3, "batch": 8, "steps": 60},
}
PLAIN, OURS = "plain: PIL + v1, float", "latent_verse, uint8"


@contextmanager
def one_thread() -> Iterator[None]:
    """One core inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def measured_ways(task: str, images: int, resolution: int, rounds: int) -> dict[str, dict]:
    """way -> its results on one core."""
    ways = train_ways(resolution) if task == "train" else eval_ways(resolution)
    with one_thread():
        return {r["way"]: r for r in measure(ways, made_images(images), rounds)}


def cases(device: str, size: str) -> list[Case]:
    """Decoding and cropping on one core; then layouts and the loader beside a step (see loading.py)."""
    from benchmarks import loading

    s, found = SIZES[size], []
    of_images = (s["images"], s["resolution"], s["rounds"])
    for task in ("train", "evaluate"):
        name = f"JPEG to {s['resolution']} px, {task}, one core"
        found.append(Case(name, functools.partial(_jpegs, name, task, *of_images)))
    return found + loading.cases(device, size, s)


def _jpegs(name: str, task: str, *of_images: int) -> Iterator[Row]:
    rows = measured_ways(task, *of_images)
    ours, plain = (1 / rows[way]["images_per_s"] for way in (OURS, PLAIN))
    yield row(
        "data",
        name,
        {"seconds": ours, "bytes": None},
        [
            peer(way, ours, 1 / r["images_per_s"]) | {"max_difference": r["max_difference"]}
            for way, r in rows.items()
            if way not in (OURS, "latent_verse, float")
        ],
        unit="image (CPU time)",
        same=rows[OURS]["max_difference"] <= 2,
        goal=">= 1.5x the original's pipeline",
        met=plain / ours >= 1.5,
        figures={"images_per_s": 1 / ours, "max_difference": rows[OURS]["max_difference"]},
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", help="folder of JPEGs, searched recursively (default: generated images)")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the table to this file as well")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    files = read_images(args.dir, args.images) if args.dir else made_images(args.images)
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": Image.__version__}
    result = {"images": len(files), "source": args.dir or "made", "resolution": args.resolution, **versions, "rows": []}
    print(f"{len(files)} JPEGs ({result['source']}) to {args.resolution} px, one core, {versions}")
    print(f"{'':6} {'way':32} {'images/s':>9} {'ratio':>6} {'max diff':>9}  within 2/255")
    for task, ways in (("train", train_ways(args.resolution)), ("eval", eval_ways(args.resolution))):
        for m in measure(ways, files, args.rounds):
            result["rows"].append({"task": task, **m})
            print(
                f"{task:6} {m['way']:32} {m['images_per_s']:9.0f} {m['ratio']:6.2f} {m['max_difference']:9d}  "
                f"{'yes' if m['max_difference'] <= 2 else 'no'}"
            )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
