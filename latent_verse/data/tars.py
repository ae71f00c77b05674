"""Reading tar files that may be damaged, or made to do harm: headers are not believed, and memory is bounded.

A sample is the run of members that share a name up to its first dot; its image is under one of IMAGE_KEYS. Nothing is
unpacked to the disk. A file may be compressed by gzip, bzip2 or xz, whatever it is called.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, BinaryIO

from latent_verse.data.caption_files import TEXT_BYTES
from latent_verse.data.decoding import MAX_BYTES
from latent_verse.data.folders import EXTENSIONS, is_hidden

IMAGE_KEYS = tuple(kind[1:] for kind in EXTENSIONS)  # of several images in a sample, the first of these is taken
TEXT_KEYS = ("cls", "txt", "json")
MAX_TEXT = TEXT_BYTES  # of one of these, as of a .txt beside an image; MAX_BYTES is the limit of an image
MAX_HEADER = 1 << 16  # bytes of a member's long name or its properties
MAX_PROPERTIES = 1000  # that hold for all members: tarfile copies them for each
UNPACKED = 1 << 28, 1000  # a compressed shard may unpack to so many bytes, and this many times its own: gzip's most
# tarfile's own streams would read only the first of several gzip members
_COMPRESSED = {b"\x1f\x8b": partial(gzip.GzipFile, None, "rb", 9), b"BZh": bz2.BZ2File, b"\xfd7zXZ\0": lzma.LZMAFile}


class Header(tarfile.TarInfo):
    """A member's header that is not believed: tarfile takes a damaged one for the end, and reads what one declares."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> Header:
        header = super().frombuf(buf, encoding, errors)
        text = header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, b"L", b"K")
        if header.size < 0 or (text and header.size > MAX_HEADER):
            raise tarfile.ReadError(f"a header declares {header.size:,} bytes")
        return header

    def _proc_pax(self, tar: tarfile.TarFile) -> Header:
        """Python before 3.11.10 looks for a number in the properties in a time that is the square of its digits."""
        stream, data = tar.fileobj, tar.fileobj.read(self._block(self.size))
        if len(tar.pax_headers) > MAX_PROPERTIES or re.search(rb"\d{256}", data):  # no name of a file has as many
            raise tarfile.ReadError("a header holds properties that no program writes")

        def once(size: int) -> bytes:
            tar.fileobj = stream
            return data

        tar.fileobj = SimpleNamespace(read=once)
        return super()._proc_pax(tar)

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


class _Peeked:
    """A stream of which the first bytes have been read."""

    def __init__(self, start: bytes, stream: BinaryIO):
        self.start, self.stream, self.given = start, stream, 0

    def read(self, size: int) -> bytes:
        data, self.start = self.start[:size], self.start[size:]
        data = data or self.stream.read(size)
        self.given += len(data)
        return data


class _Unpacked:
    """What a compressed stream holds; an error once that is out of all proportion to what was read for it."""

    def __init__(self, plain: BinaryIO, packed: _Peeked):
        self.plain, self.packed, self.given = plain, packed, 0

    def read(self, size: int) -> bytes:
        data = self.plain.read(size)
        self.given += len(data)
        free, times = UNPACKED
        if self.given > free + times * self.packed.given:
            raise ValueError(f"it unpacks to more than {times:,} times its size")
        return data


class Crc32:
    """A file that is read or written once, from its beginning on, and the CRC-32 of what has passed."""

    def __init__(self, file: BinaryIO):
        self.file, self.sum = file, 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.sum = zlib.crc32(data, self.sum)
        return data

    def write(self, data: bytes) -> int:
        self.sum = zlib.crc32(data, self.sum)
        return self.file.write(data)

    def of_all(self) -> int:
        """The CRC-32 of the whole file, once the rest is read."""
        while self.read(1 << 20):
            pass
        return self.sum


class FailAtEnd:
    """A stream that is an error once it has ended: tarfile would ask for ever for what a header declares."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.ended = stream, 0

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.ended = 0 if data else self.ended + 1
        if self.ended > 2:
            raise EOFError("it ends before the bytes that its last header declares")
        return data


def open_tar(stream: BinaryIO, seek: bool) -> tarfile.TarFile:
    """A tar on an open file, whatever it is compressed with. Without `seek` it is read in one go, as a pipe must be."""
    start = stream.read(6)
    unpack = next((unpack for mark, unpack in _COMPRESSED.items() if start.startswith(mark)), None)
    if seek and unpack is None:
        stream.seek(0)
        return tarfile.open(fileobj=stream, mode="r:", tarinfo=Header)
    plain: Any = _Peeked(start, stream)
    if unpack is not None:
        plain = _Unpacked(unpack(plain), plain)
    return tarfile.open(fileobj=FailAtEnd(plain), mode="r|", tarinfo=Header)


@dataclass
class Contents:
    """What was found in a shard, for messages."""

    kinds: Counter = field(default_factory=Counter)  # members by what follows the first dot of their names
    lost: int = 0  # images that belong to no sample
    first_lost: str = ""

    def lose(self, name: str) -> None:
        """Note an image that belongs to no sample."""
        self.lost, self.first_lost = self.lost + 1, self.first_lost or name


def members(
    stream: BinaryIO, shard: str, note: Callable[[Exception], bool], contents: Contents, headers_only: bool = False
) -> Iterator[dict]:
    """The members of an open shard, as webdataset's `group_by_keys` takes them; the bytes only of those that are used.

    Of a sample's images only the one that is used is read, or until it comes one that it replaces. Hidden members are
    passed over, and those in a top folder `__x__`, as webdataset does. Links, devices, sparse members and those that
    are too large go to `note`, as does what is wrong with the archive, and ends it.
    """
    from webdataset.tariterators import base_plus_ext

    sample, best, room = None, len(IMAGE_KEYS), MAX_BYTES  # of a sample: its name, its image's rank, bytes it may have
    try:
        with open_tar(stream, seek=headers_only) as tar:
            for info in tar:
                tar.members = []  # else tarfile keeps them all
                parts = info.name.split("/")
                if info.isdir() or any(map(is_hidden, parts)):
                    continue
                if re.fullmatch("__.*__", parts[0]):
                    if info.name.lower().endswith(EXTENSIONS):
                        contents.lose(info.name)
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
                    contents.kinds[f".{kind}" if kind else "without an extension"] += 1
                    data = tar.extractfile(info).read() if limit is not None and not headers_only else b""
                    yield {"fname": info.name, "data": data, "__url__": shard}
            if not headers_only and tar.fileobj.read(1 << 20).strip(b"\0"):
                note(ValueError("more data follows the end of the archive: is it several, joined? Pack them anew"))
    except Exception as error:  # tarfile raises nearly anything on damaged bytes
        note(error)


def count_images(shard: str) -> int:
    """Samples with an image in a local shard, from its headers alone; cached while the file stays the same."""
    return _headers(shard)[0]


def other_kinds(shard: str) -> Counter:
    """Members of a local shard that no sample uses, by extension; read and cached as by `count_images`."""
    return _headers(shard)[1]


def _headers(shard: str) -> tuple[int, Counter]:
    info = os.stat(shard)
    return _read_headers(shard, info.st_size, info.st_mtime_ns)


@cache
def _read_headers(shard: str, size: int, changed: int) -> tuple[int, Counter]:
    from webdataset.tariterators import group_by_keys

    ignore = lambda error: True  # noqa: E731 - what is wrong is said when the samples are read
    contents = Contents()
    with open(shard, "rb") as stream:
        found = members(stream, shard, ignore, contents, headers_only=True)
        images = sum(image_key(sample) is not None for sample in group_by_keys(found, handler=ignore))
    used = {f".{kind}" for kind in (*IMAGE_KEYS, *TEXT_KEYS)}
    return images, Counter({kind: n for kind, n in contents.kinds.items() if kind not in used})


def image_key(raw: dict) -> str | None:
    """Under which of IMAGE_KEYS a raw sample has its image."""
    return next((key for key in IMAGE_KEYS if key in raw), None)
