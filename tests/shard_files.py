"""Small tar shards, and what a dataset makes of them."""

import functools
import io
import tarfile

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from latent_verse.data import EvalShards, Shards, TrainShards
from latent_verse.data.tars import count_images
from latent_verse.data.transforms import Collate


@functools.cache
def image_bytes(i, kind="JPEG"):
    file = io.BytesIO()
    colour = np.random.default_rng(i).integers(0, 255, (1, 1, 3))
    Image.fromarray(np.broadcast_to(colour, (12, 18, 3)).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_shards(folder, sizes):
    """Shard k holds sizes[k] samples; labels count on over all shards, so a label names a sample."""
    folder.mkdir(parents=True, exist_ok=True)
    label = 0
    for k, size in enumerate(sizes):
        members = []
        for _ in range(size):
            suffix, kind = [("jpg", "JPEG"), ("PNG", "PNG"), ("webp", "WEBP")][label % 3]
            members.append((f"{label:04d}.{suffix}", image_bytes(label, kind)))
            members.append((f"{label:04d}.cls", str(label).encode()))
            label += 1
        write_tar(folder / f"{k:03d}.tar", members)
    return [str(folder / f"{k:03d}.tar") for k in range(len(sizes))]


def evaluate(shards, batch_size=2, rank=0, world=1):
    return EvalShards(Shards(shards, 8), batch_size, rank, world)


def loader(dataset, workers, **options):
    return DataLoader(
        dataset,
        dataset.batch_size,
        num_workers=workers,
        collate_fn=Collate((3, 8, 8)),
        persistent_workers=workers > 0,
        **options,
    )


def labels(batches):
    return [batch[1].tolist() for batch in batches]


def flat(batches):
    return [label for batch in batches for label in batch]


def seen(path):
    """(labels read, parts and samples skipped, samples counted) of a shard, by file and by pipe."""
    found = []
    for source in (str(path), f"pipe:cat {path}"):
        shards = Shards(source, 8, allow_pipe=True)
        read = [item[1] for item in EvalShards(shards, 1) if item is not None]
        found.append((read, shards.skipped.count))
    assert found[0] == found[1]
    return *found[0], count_images(str(path))


def train(shards, steps=4, world=1, rank=0, batch_size=2, seed=0, buffer=8):
    return TrainShards(Shards(shards, 8, seed=seed, shuffle_buffer=buffer), steps, batch_size, rank, world)


def run(dataset, workers, epoch=0, first=0):
    dataset.start_at(epoch, first)
    return labels(loader(dataset, workers, drop_last=True))
