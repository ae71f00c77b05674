"""WebDataset shards: tar files on disk or behind http(s), gs and hf URLs, streamed by the webdataset library.

One path serves local and remote shards, and every shard is read from front to back. A sample is the run of members that
share a name up to its first dot: an image, under one of IMAGE_KEYS, and optionally `cls` (an integer; the label is -1
without it). Hidden members are passed over. Nothing is unpickled, and nothing is unpacked to the disk. Items are
`(image, label)`, the image uint8 (3, R, R).

TrainShards: a slot is one worker of one rank. In each pass the shards are permuted by (seed, epoch, pass), the same on
all ranks, and each slot takes every slots-th one, or all in an order of its own where there are fewer shards than
slots. A slot starts the next pass when its shards are used up, and stops after its share of the epoch, so all ranks
make the same number of steps. Samples are shuffled through a buffer, pass by pass: with even shards none comes twice
before all have come once. Everything follows from (seed, epoch, slot, position), so a run resumes exactly by skipping
positions, which reads but does not decode.

EvalShards: every sample comes exactly once over ranks x workers. Workers split by shard, ranks by position in the
worker's stream: each rank reads all bytes but decodes only its share, and knows how many batches the others make.

A shard that cannot be opened, or holds no image, is an error that names it. An image that cannot be decoded, members
that are too large, links or sparse, and what follows the damage in a shard, are logged, counted and skipped. Of a
sample's images one is kept, and BUFFER_BYTES bounds what waits to be shuffled.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import re
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from latent_verse.config.messages import reason
from latent_verse.data import DataError
from latent_verse.data.decoding import UnreadableImage, decode_rgb
from latent_verse.data.folders import EXTENSIONS, describe_files
from latent_verse.data.images import MAX_SKIPS, SkipLog
from latent_verse.data.shard_names import find_shards, is_remote
from latent_verse.data.tars import IMAGE_KEYS, Contents, count_images, image_key, members, other_kinds
from latent_verse.data.transforms import centre_crop, mix_seed, random_crop, sample_generator

BUFFER_BYTES = 2 << 30  # that wait to be shuffled, in each worker
PIPE_ENDED = re.compile(r": exit (-?[0-9]+) \(\w+\) ")
SKIP_SLOTS = 1 << 16  # a stream has no index, so a hash of its name distinguishes an unreadable sample


def read_shards(shards: Iterable[str], skipped: SkipLog) -> Iterator[dict]:
    """Undecoded samples that hold an image: dicts with `__key__`, `__url__` and the bytes of each member.

    Raises:
        DataError: a shard cannot be opened, or no image in it can be read.
    """
    from webdataset.gopen import gopen
    from webdataset.tariterators import group_by_keys

    for shard in shards:
        errors: list[Exception] = []
        contents, images = Contents(), 0

        def note(error: Exception, errors: list = errors) -> bool:
            if "duplicate file name" in str(error):  # webdataset's, with all that it knows
                error = ValueError(str(error.args[0]).partition(" in tar file")[0])
            if ended := PIPE_ENDED.search(str(error)):  # webdataset's, with the whole call
                error = OSError(f"the program that fetches it ended with exit code {ended[1]}")
            errors[1:] = [error if str(error) else ValueError(type(error).__name__)]  # the first and the last
            return True  # so webdataset continues

        try:
            stream = gopen(shard) if is_remote(shard) else open(shard, "rb")  # noqa: SIM115 - closed below
        except Exception as error:
            raise DataError(f"shard {shard} cannot be opened: {reason(error)}") from error
        try:
            for raw in group_by_keys(members(stream, shard, note, contents), handler=note):
                if used := image_key(raw):
                    images += 1
                    yield {key: value for key, value in raw.items() if key == used or key not in IMAGE_KEYS}
                else:
                    for key in raw:
                        if key.endswith(EXTENSIONS):
                            contents.lose(f"{raw['__key__']}.{key}")
        finally:
            try:
                stream.close()
            except OSError as error:  # a pipe's exit status; SIGPIPE and curl's 23 only say that we closed it first
                if getattr(stream, "status", None) not in (-13, 141, 23):
                    note(error)
        if not images and errors:
            remedy = "Does its address answer, and is it" if is_remote(shard) else "Is it"
            raise DataError(f"shard {shard} cannot be read: {errors[-1]}. {remedy} a complete tar file?") from errors[
                -1
            ]
        if not images:
            raise DataError(
                f"shard {shard} holds no image: {describe_files(contents.kinds)}. A sample is the run of members that "
                f"share a name up to the first dot, and its image what is called {', '.join(IMAGE_KEYS)} after it "
                "(a.b.jpg is not an image, but a member `b.jpg` of `a`). Pack it with such names."
            )
        if errors:
            skipped.add(_slot(shard), f"part of shard {shard}", errors[0])
        if contents.lost:
            name = contents.first_lost
            what = f"members of shard {shard}: {contents.lost}, {name}{' and so on' if contents.lost > 1 else ''}"
            why = "images of no sample, whose name goes up to the first dot and is not below __x__: rename them"
            skipped.add(_slot(name + shard), what, why)


def _slot(name: str) -> int:
    return zlib.crc32(name.encode("utf-8", "surrogateescape"))  # names in tars are any bytes


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
        allow_pipe: the source may be a shell command, as in `find_shards`.

    Attributes:
        shape: of one image, (3, R, R).
        skipped: counts what was unreadable in all streams.

    Raises:
        DataError: a shard is missing.
    """

    unit = "image"  # what a sample is called

    def __init__(
        self,
        source: str | os.PathLike | Sequence[str],
        resolution: int,
        resize_ratio: float = 0.75,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        size: int | None = None,
        key: str = "train_dir",
        allow_pipe: bool = False,
    ):
        self.shards = find_shards(source, key, allow_pipe)
        self.resolution, self.shape, self.size = resolution, (3, resolution, resolution), size
        self.resize_ratio, self.seed, self.shuffle_buffer = resize_ratio, seed, shuffle_buffer
        self.skipped, self.key = SkipLog(SKIP_SLOTS), key
        if not self.remote:
            self.count(self.shards[:1])  # a wrong layout is seen in the first

    @property
    def remote(self) -> bool:
        """Whether some shards are remote."""
        return any(map(is_remote, self.shards))

    @property
    def samples(self) -> int | None:
        """Samples of an epoch; None where they are neither given nor to be counted.

        Raises:
            DataError: a local shard holds no image, or cannot be read.
        """
        return self.size or (None if self.remote else self.count(self.shards))

    @property
    def others(self) -> Counter:
        """Members of local shards that no sample uses, by extension, where the samples are counted too."""
        counted = not (self.size or self.remote)
        return sum(map(other_kinds, self.shards), Counter()) if counted else Counter()

    def count(self, shards: Sequence[str]) -> int:
        """Samples of local shards. Raises as `read_shards`, naming the setting."""
        counts = list(map(count_images, shards))
        try:
            for _ in read_shards((name for name, n in zip(shards, counts, strict=True) if not n), self.skipped):
                pass  # it raises: nothing is in them
        except DataError as error:
            raise DataError(f"{self.key}: {error}") from error
        return sum(counts)

    def decode(self, raw: dict) -> Tensor:
        """The whole image of a sample, uint8 (3, H, W).

        Raises:
            UnreadableImage: it is damaged.
        """
        return decode_rgb(raw[image_key(raw)])

    def target(self, raw: dict, epoch: int | None = None) -> int | str:
        """What comes with the image, in training in epoch `epoch`: its label, -1 where .cls holds no number."""
        try:
            label = int(raw.get("cls", b"-1"))
        except ValueError:
            return -1
        return label if -(1 << 63) <= label < 1 << 63 else -1  # labels are int64

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
        self.source.skipped.add(_slot(name), name, error)


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
                ahead[step] = raw | {image_key(raw): b""}  # as unreadable as it was, but it takes no memory
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
        for turn in itertools.count():
            parts = (seed, epoch, turn) if shared else (seed, epoch, turn, slot)
            order = random.Random(mix_seed(*parts)).sample(shards, len(shards))
            mine = order[slot::slots] if shared else order
            rng = random.Random(mix_seed(seed, epoch, turn, slot, 1))
            waiting = _Waiting(read_shards(mine, self.source.skipped))
            while not waiting.ended:  # once, unless the samples are so large that they are shuffled in several parts
                for raw in webdataset.shuffle(self.source.shuffle_buffer, rng=rng)(iter(waiting)):
                    waiting.held -= _bytes(raw)
                    yield raw


class _Waiting:
    """Samples for a shuffle's buffer, which knows no sizes: a part of them ends when too many bytes wait in it."""

    def __init__(self, raws: Iterator[dict]):
        self.raws, self.held, self.ended = raws, 0, False

    def __iter__(self) -> Iterator[dict]:
        for raw in self.raws:
            self.held += _bytes(raw)
            yield raw
            if self.held > BUFFER_BYTES:
                return
        self.ended = True


def _bytes(raw: dict) -> int:
    return sum(len(value) for value in raw.values())


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
        return sum(self._batches(self.source.count(self.source.shards[w::workers])) for w in range(workers))

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
