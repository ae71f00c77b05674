"""WebDataset shards: tar files on disk or behind http(s), gs, hf and pipe URLs, streamed by the webdataset library.

One path serves local and remote shards, and every shard is read from front to back. A sample is the run of members that
share a name up to its first dot: one of jpg, jpeg, png, webp, and optionally `cls` (an integer; the label is -1 without
it). Nothing is unpickled. Items are `(image, label)`, the image uint8 (3, R, R).

TrainShards: a slot is one worker of one rank. In each pass the shards are permuted by (seed, epoch, pass), the same on
all ranks, and each slot takes every slots-th one, or all in an order of its own where there are fewer shards than
slots. A slot starts the next pass when its shards are used up, and stops after its share of the epoch, so all ranks
make the same number of steps. Samples are shuffled through a buffer, pass by pass: with even shards none comes twice
before all have come once. Everything follows from (seed, epoch, slot, position), so a run resumes exactly by skipping
positions, which reads but does not decode.

EvalShards: every sample comes exactly once over ranks x workers. Workers split by shard, ranks by position in the
worker's stream: each rank reads all bytes but decodes only its share, and knows how many batches the others make.

A shard that cannot be opened, or has no member, is an error that names it. A member that cannot be decoded, and the
rest of a truncated shard, are logged, counted and skipped.
"""

from __future__ import annotations

import glob
import itertools
import math
import os
import random
import tarfile
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from latent_verse.config.settings import split_shards
from latent_verse.data import DataError
from latent_verse.data.images import EXTENSIONS, MAX_SKIPS, SkipLog, describe_files, walk
from latent_verse.data.transforms import (
    UnreadableImage,
    centre_crop,
    decode_rgb,
    mix_seed,
    random_crop,
    sample_generator,
)

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
TARS = (".tar", ".tgz", ".tar.gz")
SKIP_SLOTS = 1 << 16  # a stream has no index, so a hash of its name distinguishes an unreadable sample


def is_remote(shard: str) -> bool:
    """Whether a shard is a URL or a pipe: nothing is known of it before it is read."""
    return shard.startswith("pipe:") or ("://" in shard and not shard.startswith("file:"))


def find_shards(source: str | os.PathLike | Sequence[str], key: str = "train_dir") -> list[str]:
    """The shards that `source` names: a folder of tars, a brace or * pattern, a comma list, a .txt of them, a URL.

    Raises:
        DataError: a local shard is no file; naming the setting `key` and the first one missing.
    """
    shards = _expand(source, key)
    missing = [shard for shard in shards if not is_remote(shard) and not os.path.isfile(shard)]
    if missing:
        raise DataError(
            f"{key}: {len(missing)} of {len(shards)} shards do not exist, the first is {missing[0]}. "
            f"Check the pattern {source!r}: it must name existing tar files, or be a folder that holds them."
        )
    return shards


def _expand(source: str | os.PathLike | Sequence[str], key: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    if not isinstance(source, (str, os.PathLike)):
        return [shard for part in source for shard in _expand(part, key)]
    source = os.fspath(source).strip()
    if source.startswith("pipe:"):
        return expand_urls(source)
    parts = [part.strip() for part in split_shards(source)]
    if len(parts) > 1 and not os.path.exists(source):
        return [shard for part in parts if part for shard in _expand(part, key)]
    path = os.path.expanduser(source.removeprefix("file://"))
    if os.path.isdir(path):
        others: Counter = Counter()
        shards = [os.path.join(path, name) for name in walk(path, TARS, others)]
        if not shards:
            images = any(others[extension] for extension in EXTENSIONS)
            hint = " For a folder of images use --dataset imagefolder or flat." if images else ""
            raise DataError(f"{key}: no shard ({' '.join(TARS)}) below {path}, {describe_files(others)}.{hint}")
        return shards
    if path.endswith(".txt") and os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip() and not line.startswith("#")]
        if not lines:
            raise DataError(f"{key}: {path} lists no shard. Put one path or URL on each line.")
        return [shard for line in lines for shard in _expand(line, key)]
    if is_remote(source):
        return expand_urls(source)
    if "*" in path:
        found = sorted(glob.glob(path))
        if not found:
            raise DataError(f"{key}: no file matches {path}. Check the folder and the pattern.")
        return found
    return expand_urls(path)


def count_images(shard: str) -> int:
    """Samples with an image in a local shard, from its headers alone; cached while the file stays the same."""
    info = os.stat(shard)
    return _count_images(shard, info.st_size, info.st_mtime_ns)


@cache
def _count_images(shard: str, size: int, changed: int) -> int:
    from webdataset.tariterators import group_by_keys

    def headers() -> Iterator[dict]:
        try:
            with tarfile.open(shard) as tar:
                for member in tar:
                    if member.isreg() and not member.name.startswith("__"):
                        yield {"fname": member.name, "data": b"", "__url__": shard}
                    tar.members = []  # else tarfile keeps them all
        except (tarfile.TarError, OSError, EOFError, zlib.error):
            return  # reading the samples reports it

    return sum(_image_key(sample) is not None for sample in group_by_keys(headers(), handler=lambda error: True))


def _image_key(raw: dict) -> str | None:
    return next((key for key in IMAGE_KEYS if key in raw), None)


def read_shards(shards: Iterable[str], skipped: SkipLog) -> Iterator[dict]:
    """Undecoded samples that hold an image: dicts with `__key__`, `__url__` and the bytes of each member.

    Raises:
        DataError: a shard cannot be opened, or nothing in it can be read.
    """
    from webdataset.gopen import gopen
    from webdataset.tariterators import group_by_keys, tar_file_expander

    for shard in shards:
        errors: list[Exception] = []
        seen = 0

        def note(error: Exception, errors: list = errors) -> bool:
            errors.append(error)
            return True  # so webdataset continues

        try:
            stream = gopen(shard)
        except Exception as error:
            raise DataError(f"shard {shard} cannot be opened: {error}") from error
        try:
            files = tar_file_expander([{"url": shard, "stream": stream}], handler=note)
            for raw in group_by_keys(files, handler=note):
                seen += 1
                if _image_key(raw):
                    yield raw
        finally:
            try:
                stream.close()
            except OSError as error:  # a pipe's exit status; SIGPIPE and curl's 23 only say that we closed it first
                if getattr(stream, "status", None) not in (-13, 141, 23):
                    errors.append(error)
        if errors and not seen:
            raise DataError(f"shard {shard} cannot be read: {errors[-1]}. Is it a complete tar file?") from errors[-1]
        if errors:
            skipped.add(zlib.crc32(shard.encode()), f"part of shard {shard}", errors[0])


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


class Shards:
    """The tar shards of a split, and what is in a sample; TrainShards and EvalShards stream them.

    Args:
        source: what names the shards, as in `find_shards`.
        resize_ratio, seed: of training's crops, as in images.MapImages.
        size: samples of a training epoch; None counts those in the shards, which remote ones do not allow.
        key: the setting that error messages mention.

    Attributes:
        shape: of one image, (3, R, R).
        skipped: counts what was unreadable in all streams.

    Raises:
        DataError: a shard is missing.
    """

    def __init__(
        self,
        source: str | os.PathLike | Sequence[str],
        resolution: int,
        resize_ratio: float = 0.75,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        size: int | None = None,
        key: str = "train_dir",
    ):
        self.shards = find_shards(source, key)
        self.resolution, self.shape, self.size = resolution, (3, resolution, resolution), size
        self.resize_ratio, self.seed, self.shuffle_buffer = resize_ratio, seed, shuffle_buffer
        self.skipped = SkipLog(SKIP_SLOTS)

    @property
    def remote(self) -> bool:
        """Whether some shards are remote."""
        return any(map(is_remote, self.shards))

    @property
    def samples(self) -> int | None:
        """Samples of an epoch; None where they are neither given nor to be counted."""
        return self.size or (None if self.remote else sum(map(count_images, self.shards)))

    def decode(self, raw: dict) -> Tensor:
        """The whole image of a sample, uint8 (3, H, W).

        Raises:
            UnreadableImage: it is damaged.
        """
        return decode_rgb(raw[_image_key(raw)])

    def target(self, raw: dict, epoch: int | None = None) -> int | str:
        """What comes with the image, in training in epoch `epoch`: its label, -1 where .cls holds no number."""
        try:
            return int(raw.get("cls", b"-1"))
        except ValueError:
            return -1

    def describe(self) -> dict[str, str | int | None]:
        """Where the samples come from and how many there are."""
        more = f" and {len(self.shards) - 1} more" if len(self.shards) > 1 else ""
        return {"source": self.shards[0] + more, "samples": self.samples}


class _Stream(IterableDataset):
    """A rank's samples. A DataLoader of the same batch size must batch them."""

    def __init__(self, source: Shards, batch_size: int, rank: int = 0, world: int = 1):
        self.source, self.batch_size, self.rank, self.world = source, batch_size, rank, world

    def _note_unreadable(self, raw: dict, error: Exception) -> None:
        name = f"{raw['__key__']} in {raw['__url__']}"
        self.source.skipped.add(zlib.crc32(name.encode()), name, error)


class TrainShards(_Stream):
    """Shuffled training samples: each rank gives `steps` x `batch_size` of them an epoch, split over its workers.

    Raises:
        DataError: while iterating, a shard or too many samples in a row cannot be read.
    """

    def __init__(self, source: Shards, steps: int, batch_size: int, rank: int = 0, world: int = 1):
        super().__init__(source, batch_size, rank, world)
        self.steps = steps
        self._start = torch.zeros(2, dtype=torch.int64).share_memory_()  # epoch, batch

    def start_at(self, epoch: int, batch: int) -> None:
        """Say where the next iteration begins. It reaches persistent workers through shared memory."""
        self._start[0], self._start[1] = epoch, batch

    def __iter__(self) -> Iterator[tuple[Tensor, int | str]]:
        worker, workers = _worker()
        epoch, first = self._start.tolist()
        # The loader asks its worker 0 first. After a resume at batch `first`, worker 0 therefore takes the part of the
        # worker whose turn that batch was. Part p makes the batches p, p + workers, p + 2 workers, ...
        part = (worker + first) % workers
        done = len(range(part, first, workers)) * self.batch_size
        end = len(range(part, self.steps, workers)) * self.batch_size
        slot = self.rank * workers + part
        raws = self._shuffled(epoch, slot, self.world * workers)
        for _ in range(done):
            next(raws)
        ahead: deque[dict] = deque()  # samples looked at, but not yet used
        for position in range(done, end):
            image, raw = self._readable(raws, ahead)
            rng = sample_generator(self.source.seed, epoch, slot, position)
            image = random_crop(image, self.source.resolution, self.source.resize_ratio, rng)
            yield image, self.source.target(raw, epoch)

    def _readable(self, raws: Iterator[dict], ahead: deque[dict]) -> tuple[Tensor, dict]:
        """The next sample, or for an unreadable one the next readable one, which also keeps its own turn.

        So what is at a position does not depend on unreadable samples before it: a resumed run counts without decoding.
        """
        for step in range(MAX_SKIPS):
            if step == len(ahead):
                ahead.append(next(raws))
            raw = ahead[step]
            try:
                image = self.source.decode(raw)
            except UnreadableImage as error:
                self._note_unreadable(raw, error)
                remedy = error.remedy
            else:
                ahead.popleft()
                return image, raw
        name = f"{raw['__key__']} in {raw['__url__']}"
        raise DataError(f"{MAX_SKIPS} samples in a row cannot be used, up to {name}. {remedy}")

    def _shuffled(self, epoch: int, slot: int, slots: int) -> Iterator[dict]:
        """The slot's endless stream of undecoded samples in epoch `epoch`, shuffled within each pass."""
        import webdataset

        shards, seed = self.source.shards, self.source.seed
        shared = len(shards) >= slots
        barren = 0  # shards read since the last sample
        for turn in itertools.count():
            parts = (seed, epoch, turn) if shared else (seed, epoch, turn, slot)
            order = random.Random(mix_seed(*parts)).sample(shards, len(shards))
            mine = order[slot::slots] if shared else order
            rng = random.Random(mix_seed(seed, epoch, turn, slot, 1))
            barren += len(mine)
            raws = read_shards(mine, self.source.skipped)
            for raw in webdataset.shuffle(self.source.shuffle_buffer, rng=rng)(raws):
                barren = 0
                yield raw
            if barren >= 4 * len(shards):
                raise DataError(f"no sample with an image ({' '.join(IMAGE_KEYS)}) in {shards[0]} and the others.")


class EvalShards(_Stream):
    """Each sample once, in shard order; None for an unreadable one, and for an empty batch where a rank needs one."""

    def _batches(self, samples: int) -> int:
        """Batches of the rank with most of a worker's `samples`: what every rank makes."""
        return math.ceil(math.ceil(samples / self.world) / self.batch_size)

    def steps(self, workers: int) -> int | None:
        """All batches, an upper bound where shards are damaged; None with remote shards, whose size is unknown."""
        if self.source.remote:
            return None
        workers = max(1, workers)
        return sum(self._batches(sum(map(count_images, self.source.shards[w::workers]))) for w in range(workers))

    def __iter__(self) -> Iterator[tuple[Tensor, int | str] | None]:
        worker, workers = _worker()
        samples = mine = 0
        for raw in read_shards(self.source.shards[worker::workers], self.source.skipped):
            if samples % self.world == self.rank:
                mine += 1
                yield self._sample(raw)
            samples += 1
        if math.ceil(mine / self.batch_size) < self._batches(samples):
            yield None

    def _sample(self, raw: dict) -> tuple[Tensor, int | str] | None:
        try:
            image = self.source.decode(raw)
        except UnreadableImage as error:
            self._note_unreadable(raw, error)
            return None
        return centre_crop(image, self.source.resolution), self.source.target(raw)
