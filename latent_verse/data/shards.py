"""WebDataset shards: tar files on disk or behind http(s), gs and hf URLs, streamed by the webdataset library.

One path serves local and remote shards, and every shard is read from front to back. A sample is the run of members that
share a name up to its first dot: an image, under one of IMAGE_KEYS, and optionally `cls` (an integer; the label is -1
without it). Hidden members are passed over. Nothing is unpickled, and nothing is unpacked to the disk. Items are
`(image, label)`, the image uint8 (3, R, R).

A shell command (`pipe:cat a.tar`) runs only if the caller hands it over itself and allows it: never one that a list or
a pattern names.

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

import bz2
import glob
import gzip
import itertools
import lzma
import math
import os
import random
import re
import tarfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from latent_verse.config.settings import split_shards
from latent_verse.data import DataError
from latent_verse.data.images import EXTENSIONS, MAX_SKIPS, SkipLog, describe_files, is_hidden, walk
from latent_verse.data.transforms import (
    MAX_BYTES,
    UnreadableImage,
    centre_crop,
    decode_rgb,
    mix_seed,
    random_crop,
    sample_generator,
)
from latent_verse.files import lines_of, read_text

IMAGE_KEYS = tuple(kind[1:] for kind in EXTENSIONS)  # of several images in a sample, the first of these is taken
TEXT_KEYS = ("cls", "txt", "json")
MAX_TEXT = 16 << 20  # bytes of one of these; MAX_BYTES is the limit of an image
BUFFER_BYTES = 2 << 30  # that wait to be shuffled, in each worker
TARS = (".tar", ".tgz", ".tar.gz")
SCHEMES = ("http", "https", "gs", "hf")  # webdataset opens them without a shell; it knows more
MAX_SHARDS = 1_000_000  # of all patterns and lists together
MAX_PATTERN = 1 << 16  # characters
MAX_LISTS = 20  # lists within lists
# tarfile's own streams would read only the first of several gzip members
_COMPRESSED = {b"\x1f\x8b": partial(gzip.GzipFile, None, "rb", 9), b"BZh": bz2.BZ2File, b"\xfd7zXZ\0": lzma.LZMAFile}
SKIP_SLOTS = 1 << 16  # a stream has no index, so a hash of its name distinguishes an unreadable sample


def is_remote(shard: str) -> bool:
    """Whether a shard is a URL or a pipe: nothing is known of it before it is read."""
    return shard.startswith("pipe:") or ("://" in shard and not shard.startswith("file:"))


def find_shards(
    source: str | os.PathLike | Sequence[str], key: str = "train_dir", allow_pipe: bool = False
) -> list[str]:
    """The shards that `source` names: a folder of tars, a brace or * pattern, a comma list, a .txt of them, a URL.

    Args:
        allow_pipe: `source`, or an item of the sequence, may also be `pipe:` and a shell command that writes a tar.

    Raises:
        DataError: a local shard is no file, or a URL of an unknown kind; naming the setting `key` and the first one.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else source
    known: dict[str, list[str]] = {}
    shards = _joined((_expand(os.fspath(part).strip(), key, known, allow_pipe) for part in sources), source, key)
    if not allow_pipe and any(shard.startswith("pipe:") for shard in shards):
        raise DataError(f"{key}: {str(source)[:200]} hides a shell command, which is never run.")
    missing = [shard for shard in shards if not is_remote(shard) and not os.path.isfile(shard)]
    if missing:
        raise DataError(
            f"{key}: {len(missing)} of {len(shards)} shards do not exist as files, the first is {missing[0]}. "
            f"Check {str(source)[:200]!r}: it must name existing tar files, or be a folder that holds them."
        )
    return shards


def _local(path: str) -> str:
    """A path that stays one: a file or folder may be called `pipe:` and a command, and would be taken for it."""
    return os.path.join(os.curdir, path) if is_remote(path) else path


def _joined(parts: Iterable[list[str]], source: object, key: str) -> list[str]:
    """The shards of all parts of a source, of which there are not too many."""
    shards: list[str] = []
    for part in parts:
        if len(shards) + len(part) > MAX_SHARDS:
            what = str(source)[:200]
            raise DataError(f"{key}: {what} names more than {MAX_SHARDS:,} shards. Check its lists and patterns.")
        shards += part
    return shards


def _expand(
    source: str, key: str, known: dict[str, list[str]], allow_pipe: bool = False, lists: tuple[str, ...] = ()
) -> list[str]:
    """The shards that one source names; `lists` are the .txt files that it stands in, `known` the shards of others."""
    if source.startswith("pipe:"):
        if not allow_pipe:
            raise DataError(
                f"{key}: {source[:200]} is a shell command. It runs only with --allow_pipe, and only if --{key} itself "
                "gives it: not a list, a pattern or a YAML file."
            )
        return _braces(source, key, allow_pipe)
    parts = [part.strip() for part in split_shards(source)]
    if len(parts) > 1 and not os.path.exists(source):
        return _joined((_expand(part, key, known, lists=lists) for part in parts if part), source, key)
    path = _local(os.path.expanduser(source.removeprefix("file://").removeprefix("file:")))
    if os.path.isdir(path):
        others: Counter = Counter()
        shards = [os.path.join(path, name) for name in walk(path, TARS, others)]
        if not shards:
            images = any(others[extension] for extension in EXTENSIONS)
            hint = " For a folder of images use --dataset imagefolder or flat." if images else ""
            raise DataError(f"{key}: no shard ({' '.join(TARS)}) below {path}, {describe_files(others)}.{hint}")
        return shards
    if path.endswith(".txt") and os.path.isfile(path):
        real = os.path.realpath(path)
        if real in lists:
            raise DataError(f"{key}: {path} lists itself. Put one path or URL of a shard on each line.")
        if len(lists) == MAX_LISTS:
            raise DataError(f"{key}: {path} is a list within {MAX_LISTS} lists. Put the shards themselves into one.")
        if real in known:
            return known[real]
        lines = [line for text in lines_of(read_text(path)) if (line := text.strip()) and not line.startswith("#")]
        if not lines:
            raise DataError(f"{key}: {path} lists no shard. Put one path or URL on each line.")
        known[real] = _joined((_expand(line, key, known, lists=(*lists, real)) for line in lines), path, key)
        return known[real]
    if is_remote(source):
        return _braces(source, key)
    if "*" in path:
        found = sorted(map(_local, itertools.islice(glob.iglob(path), MAX_SHARDS + 1)))
        if not found:
            raise DataError(f"{key}: no file matches {path}. Check the folder and the pattern.")
        return found
    return _braces(path, key)


def _braces(pattern: str, key: str, allow_pipe: bool = False) -> list[str]:
    """The shards that a pattern with braces names, or the one it is."""
    from webdataset.shardlists import expand_urls

    if "${" in pattern or len(pattern) > MAX_PATTERN:
        why = "holds ${, and no variable is put in" if "${" in pattern else f"is longer than {MAX_PATTERN} characters"
        raise DataError(f"{key}: the pattern {pattern[:200]} {why}. Write the shards' names out.")
    count, rest = 1, pattern
    while (without := re.sub(r"\{([^{}]*)\}", "", rest)) != rest:  # the innermost ones, level by level
        for inside in re.findall(r"\{([^{}]*)\}", rest):
            ends = re.match(r"(-?\d+)\.\.(-?\d+)", inside)
            count *= abs(int(ends[2]) - int(ends[1])) + 1 if ends else inside.count(",") + 1
        rest = without
    if count > MAX_SHARDS:
        raise DataError(f"{key}: {pattern[:200]} names more than {MAX_SHARDS:,} shards. Check what is in its braces.")
    try:
        shards = expand_urls(pattern)
    except (ValueError, AssertionError) as error:
        raise DataError(f"{key}: the pattern {pattern[:200]} cannot be expanded ({error}).") from error
    for shard in shards:
        if shard.startswith("pipe:") and not allow_pipe:
            raise DataError(f"{key}: {pattern[:200]} hides a shell command, which is never run.")
        scheme, mark, _ = shard.partition("://")
        if mark and is_remote(shard) and not shard.startswith("pipe:") and scheme.lower() not in SCHEMES:
            kinds = ", ".join(f"{kind}://" for kind in SCHEMES)
            raise DataError(f"{key}: {shard[:200]} is a URL of another kind than {kinds}. Download what it names.")
    return shards


class Header(tarfile.TarInfo):
    """A member's header that is not believed: tarfile takes a damaged one for the end, and reads what one declares."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> Header:
        header = super().frombuf(buf, encoding, errors)
        text = header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, *b"LK".split())
        if header.size < 0 or (text and header.size > MAX_TEXT):
            raise tarfile.ReadError(f"a header declares {header.size:,} bytes")
        return header

    def _proc_sparse(self, tar: tarfile.TarFile) -> Header:
        """Pass over the map of a sparse member, which no sample is made of: a few bytes of it can declare gigabytes."""
        more = self._sparse_structs[1]
        while more:
            more = tar.fileobj.read(tarfile.BLOCKSIZE)[504]
        self.sparse, self.offset_data = [], tar.fileobj.tell()
        tar.offset = self.offset_data + self._block(self.size)
        return self

    def _proc_gnusparse_10(self, member: Header, *_: object) -> None:
        member.sparse = []

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Header:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # the mark of the end
                raise
            raise tarfile.ReadError(f"{error} at byte {tar.offset:,}: it is damaged or cut off") from error


class _Start:
    """A stream of which the first bytes have been read."""

    def __init__(self, start: bytes, stream: BinaryIO):
        self.start, self.stream = start, stream

    def read(self, size: int) -> bytes:
        data, self.start = self.start[:size], self.start[size:]
        return data or self.stream.read(size)


class Ending:
    """A stream that is an error once it has ended: tarfile would ask for ever for what a header declares."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.ended = stream, 0

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.ended = 0 if data else self.ended + 1
        if self.ended > 2:
            raise EOFError("it ends before the bytes that its last header declares")
        return data


def _open_tar(stream: BinaryIO, seek: bool) -> tarfile.TarFile:
    """A tar on an open file, whatever it is compressed with. Without `seek` it is read in one go, as a pipe must be."""
    start = stream.read(6)
    source: Any = stream if seek else _Start(start, stream)
    if seek:
        stream.seek(0)
    unpack = next((unpack for mark, unpack in _COMPRESSED.items() if start.startswith(mark)), lambda packed: packed)
    plain = unpack(source)
    return tarfile.open(fileobj=plain if seek else Ending(plain), mode="r:" if seek else "r|", tarinfo=Header)


def _members(
    stream: BinaryIO, shard: str, note: Callable[[Exception], bool], found: Counter, headers_only: bool = False
) -> Iterator[dict]:
    """The members of an open shard, as webdataset's `group_by_keys` takes them; the bytes only of those that are used.

    Of a sample's images only the one that is used is read, or until it comes one that it replaces. Hidden members are
    passed over. Links, devices, sparse members and those that are too large go to `note`, as does what is wrong with
    the archive, and ends it. `found` counts the members by what follows the first dot of their names.
    """
    from webdataset.tariterators import base_plus_ext

    sample, best, room = None, len(IMAGE_KEYS), MAX_BYTES  # of a sample: its name, its image's rank, bytes it may have
    try:
        with _open_tar(stream, seek=headers_only) as tar:
            for info in tar:
                tar.members = []  # else tarfile keeps them all
                parts = info.name.split("/")
                if info.isdir() or any(map(is_hidden, parts)) or re.fullmatch("__.*__", parts[0]):
                    continue
                name, kind = base_plus_ext(info.name)
                kind = (kind or "").lower()
                if name not in (None, sample):
                    sample, best, room = name, len(IMAGE_KEYS), MAX_BYTES
                rank = IMAGE_KEYS.index(kind) if kind in IMAGE_KEYS else len(IMAGE_KEYS)
                limit = room if rank < best else MAX_TEXT if kind in TEXT_KEYS else None
                if kind in (*IMAGE_KEYS, *TEXT_KEYS) and (not info.isreg() or info.issparse()):
                    note(ValueError(f"{info.name} is a link, a device or a sparse member; pack the file itself"))
                elif limit is not None and info.size > limit:
                    note(ValueError(f"{info.name} holds {info.size:,} bytes; at most {limit:,} are read"))
                else:
                    if rank < best:
                        best, room = rank, room - info.size
                    found[f".{kind}" if kind else "without an extension"] += 1
                    data = tar.extractfile(info).read() if limit is not None and not headers_only else b""
                    yield {"fname": info.name, "data": data, "__url__": shard}
            if not headers_only and tar.fileobj.read(1 << 20).strip(b"\0"):
                note(ValueError("more data follows the end of the archive: is it several, joined? Pack them anew"))
    except Exception as error:  # tarfile raises nearly anything on damaged bytes
        note(error)


def count_images(shard: str) -> int:
    """Samples with an image in a local shard, from its headers alone; cached while the file stays the same."""
    info = os.stat(shard)
    return _count_images(shard, info.st_size, info.st_mtime_ns)


@cache
def _count_images(shard: str, size: int, changed: int) -> int:
    from webdataset.tariterators import group_by_keys

    ignore = lambda error: True  # noqa: E731 - what is wrong is said when the samples are read
    with open(shard, "rb") as stream:
        members = _members(stream, shard, ignore, Counter(), headers_only=True)
        return sum(_image_key(sample) is not None for sample in group_by_keys(members, handler=ignore))


def _image_key(raw: dict) -> str | None:
    return next((key for key in IMAGE_KEYS if key in raw), None)


def read_shards(shards: Iterable[str], skipped: SkipLog) -> Iterator[dict]:
    """Undecoded samples that hold an image: dicts with `__key__`, `__url__` and the bytes of each member.

    Raises:
        DataError: a shard cannot be opened, or no image in it can be read.
    """
    from webdataset.gopen import gopen
    from webdataset.tariterators import group_by_keys

    for shard in shards:
        errors: list[Exception] = []
        found: Counter = Counter()
        images = 0
        lost: list[str] = []  # samples whose image is not under one of IMAGE_KEYS

        def note(error: Exception, errors: list = errors) -> bool:
            if "duplicate file name" in str(error):  # webdataset's, with all that it knows
                error = ValueError(str(error.args[0]).partition(" in tar file")[0])
            errors[1:] = [error if str(error) else ValueError(type(error).__name__)]  # the first and the last
            return True  # so webdataset continues

        try:
            stream = gopen(shard) if is_remote(shard) else open(shard, "rb")  # noqa: SIM115 - closed below
        except Exception as error:
            raise DataError(f"shard {shard} cannot be opened: {error}") from error
        try:
            for raw in group_by_keys(_members(stream, shard, note, found), handler=note):
                if used := _image_key(raw):
                    images += 1
                    yield {key: value for key, value in raw.items() if key == used or key not in IMAGE_KEYS}
                else:
                    lost += [f"{raw['__key__']}.{key}" for key in raw if key.endswith(EXTENSIONS)]
        finally:
            try:
                stream.close()
            except OSError as error:  # a pipe's exit status; SIGPIPE and curl's 23 only say that we closed it first
                if getattr(stream, "status", None) not in (-13, 141, 23):
                    note(error)
        if not images and errors:
            raise DataError(f"shard {shard} cannot be read: {errors[-1]}. Is it a complete tar file?") from errors[-1]
        if not images:
            raise DataError(
                f"shard {shard} holds no image: {describe_files(found)}. A sample is the run of members that share a "
                f"name up to the first dot, and its image what is called {', '.join(IMAGE_KEYS)} after it (a.b.jpg is "
                "no image, but a member `b.jpg` of `a`). Pack it with such names."
            )
        if errors:
            skipped.add(_slot(shard), f"part of shard {shard}", errors[0])
        if lost:
            reason = "no images of samples, whose name goes up to the first dot: pack them with other names"
            skipped.add(_slot(lost[0] + shard), f"members of shard {shard}: {len(lost)}, {lost[0]} and so on", reason)


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
        return decode_rgb(raw[_image_key(raw)])

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
                ahead[step] = raw | {_image_key(raw): b""}  # as unreadable as it was, but it takes no memory
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
