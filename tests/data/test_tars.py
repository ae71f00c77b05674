"""Tar files that are damaged, odd or made to do harm: counted, within bounds, never unpacked."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import tracemalloc

import pytest

from latent_verse.data import DataError, EvalShards, Shards, tars
from latent_verse.data.datasets import how_many
from latent_verse.data.images import SkipLog
from latent_verse.data.shards import read_shards
from latent_verse.data.tars import count_images
from tests.messages import naming
from tests.shard_files import evaluate, flat, image_bytes, run, seen, train, write_shards, write_tar


def test_counting_reads_headers_and_counts_images(tmp_path):
    shards = write_shards(tmp_path, [5, 0])
    write_tar(
        tmp_path / "mixed.tar", [("a.jpg", b""), ("a.txt", b""), ("b.txt", b""), ("c/d.JPEG", b""), ("__x__", b"")]
    )
    assert [count_images(shard) for shard in shards] == [5, 0]
    assert count_images(str(tmp_path / "mixed.tar")) == 2
    write_shards(tmp_path, [7])  # rewritten: the cached count must not be used
    assert count_images(shards[0]) == 7


def test_shards_say_what_is_in_them_that_no_sample_uses(tmp_path):
    names = ("a.jpg", "a.txt", "a.json", "b.heic", "b.txt", "c.HEIC", "d.npy", "e.png")
    image = image_bytes(0)
    write_tar(tmp_path / "1.tar", [(name, image) for name in names])
    write_tar(tmp_path / "2.tar", [("f.jpg", image)])
    assert how_many(Shards(tmp_path, 16)) == "3 images (2 .heic, 1 .npy not read) in 2 shards"
    assert how_many(Shards(tmp_path, 16, size=7)) == "7 images in 2 shards"
    assert how_many(Shards("https://localhost:1/{0..2}.tar", 16)) == "3 shards"


def tar_of(samples, pad=0):
    """The bytes of a tar of samples, with `pad` bytes more in each label's file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in samples:
            for name, data in ((f"{i}.jpg", image_bytes(i)), (f"{i}.cls", str(i).encode() + b" " * pad)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def start_of(data, member):
    """Where in the bytes of a tar its header number `member` is."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()[member].offset


def with_header(data, member, size):
    """A tar whose header number `member` declares another size."""
    offset = start_of(data, member)
    header = bytearray(data[offset : offset + 512])
    header[124:136] = (size % (1 << 96)).to_bytes(12, "big")
    header[124] |= 0x80
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:offset] + bytes(header) + data[offset + 512 :]


def test_members_that_are_no_samples_are_passed_over(tmp_path):
    """As macOS, Linux and Windows pack them; what is counted is what is read."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in [
            *[
                ("x", None),
                ("x/._0.JPG", b"mac"),
                ("x/0.JPG", image_bytes(0)),
                ("x/._0.cls", b"mac"),
                ("x/0.cls", b"0"),
            ],
            *[("./1.jpeg", image_bytes(1)), ("./1.cls", b"1"), ("__MACOSX/x/1.jpg", b"mac"), ("__meta__/1.jpg", b"")],
            *[("../../2.tif", image_bytes(2, "TIFF")), ("../../2.cls", b"2"), ("/etc/3.bmp", image_bytes(3, "BMP"))],
            *[("/etc/3.cls", b"3"), (b"\xff4.png".decode("utf-8", "surrogateescape"), image_bytes(4, "PNG"))],
            *[("5.mp4", bytes(1000)), (".DS_Store", b"mac"), ("README", b"x")],
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.size = (tarfile.DIRTYPE, 0) if data is None else (tarfile.REGTYPE, len(data))
            tar.addfile(info, io.BytesIO(data or b""))
    assert seen(tmp_path / "a.tar") == ([0, 1, 2, 3, -1], 1, 5)
    dataset = train(tmp_path / "a.tar", steps=3)
    assert len(flat(run(dataset, 0))) == 6 and set(os.listdir(tmp_path)) == {"a.tar"}


@pytest.mark.parametrize(
    ("kind", "name"), [(tarfile.LNKTYPE, "9.jpg"), (tarfile.SYMTYPE, "9.jpg"), (tarfile.FIFOTYPE, "9.jpg")]
)
def test_links_and_devices_among_the_images_are_counted(tmp_path, kind, name, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for part in ("1.jpg", "2.jpg"):
            info = tarfile.TarInfo(part)
            info.size = len(image_bytes(1))
            tar.addfile(info, io.BytesIO(image_bytes(1)))
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    assert seen(tmp_path / "a.tar") == ([-1, -1], 1, 2)
    assert naming("9.jpg", "link", tmp_path / "a.tar").search(caplog.text)


@pytest.mark.parametrize("size", [10**15, 3 << 29, -(10**15), -512])
@pytest.mark.parametrize("member", [0, 4])
def test_a_header_that_declares_too_much_ends_the_shard(tmp_path, size, member):
    (tmp_path / "a.tar").write_bytes(with_header(tar_of(range(4)), member, size))
    if member:
        assert seen(tmp_path / "a.tar") == ([0, 1], 1, 2)
    else:
        for source in (f"{tmp_path}/a.tar", f"pipe:cat {tmp_path}/a.tar"):
            with pytest.raises(DataError, match=naming("a.tar", f"{size:,}" if size < 0 else "ends before")):
                list(EvalShards(Shards(source, 8, allow_pipe=True), 1))


def test_members_of_too_many_bytes_are_not_read(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("latent_verse.data.tars.MAX_BYTES", len(image_bytes(1)))
    write_tar(tmp_path / "a.tar", [("0.jpg", image_bytes(0)), ("1.jpg", image_bytes(0) + bytes(9000)), ("2.cls", b"2")])
    assert seen(tmp_path / "a.tar") == ([-1], 1, 1)
    assert naming("1.jpg", f"{len(image_bytes(0)) + 9000:,}").search(caplog.text)
    with open(tmp_path / "sparse.tar", "wb") as file:
        file.write(with_header(tar_of(range(2)), 2, 1 << 40)[:2560])
        file.truncate(1 << 41)  # declared and there: it is skipped by seeking
    assert count_images(str(tmp_path / "sparse.tar")) == 1


def sparse(tar, name, size, kind):
    """Write a sparse member that declares `size` bytes and holds three, in GNU's old form or one of those of pax."""
    info, body = tarfile.TarInfo(name), b"abc"
    if kind in ("gnu", "extended"):
        info.type, info.size = tarfile.GNUTYPE_SPARSE, 3
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[386:410] = b"%011o\0%011o\0" % (0, 3)
        header[482] = kind == "extended"
        header[483:495] = b"%011o\0" % size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        more = [bytes([*(b"%011o\0" % 1 * 42), last, *bytes(7)]) for last in (1, 1, 0)] if header[482] else []
        tar.fileobj.write(bytes(header) + b"".join(more) + body.ljust(512, b"\0"))
        tar.offset = tar.fileobj.tell()
        return
    info.pax_headers = {"GNU.sparse.name": name, "GNU.sparse.realsize": str(size)}
    if kind == "1.0":
        info.pax_headers |= {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        body = b"1\n0\n3\n".ljust(512, b"\0") + body
    else:
        info.pax_headers |= {"GNU.sparse.map": "0,3"}
    info.size = len(body)
    tar.addfile(info, io.BytesIO(body))


@pytest.mark.parametrize("kind", ["gnu", "extended", "0.1", "1.0"])
def test_sparse_members_are_counted_and_take_no_memory(tmp_path, kind, caplog):
    """They hold few bytes and declare as many as they like: an image has no holes."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("1.jpg", "2.jpg", "2.png", "3.jpg"):
            if name[0] == "2":
                sparse(tar, name, 500 << 20, kind)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(image_bytes(1))
            tar.addfile(info, io.BytesIO(image_bytes(1)))
    tracemalloc.start()
    assert seen(tmp_path / "a.tar") == ([-1, -1], 1, 2)
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()
    assert naming("2.jpg", "sparse", tmp_path / "a.tar").search(caplog.text)


def test_of_several_images_of_a_sample_one_is_read_and_kept(tmp_path, monkeypatch):
    names = [f"{i}.{kind}" for i, kinds in enumerate(["jpg png PGM", "pgm png jpg"]) for kind in kinds.split()]
    write_tar(tmp_path / "a.tar", [(name, image_bytes(len(name))) for name in names])
    read = []
    extract = tarfile.TarFile.extractfile
    monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda *args: read.append(args[1].name) or extract(*args))
    raws = list(read_shards([str(tmp_path / "a.tar")], SkipLog(1)))
    assert [set(raw) for raw in raws] == [{"__key__", "__url__", "jpg"}] * 2 and all(raw["jpg"] for raw in raws)
    assert read == ["0.jpg", *names[3:]]  # of the second sample each is the best so far
    monkeypatch.setattr("latent_verse.data.tars.MAX_BYTES", len(image_bytes(5)) * 2)
    kept = [item for item in evaluate(tmp_path / "a.tar")]
    assert kept[0] is not None and kept[1] is not None  # the third of the second sample is too much


@pytest.mark.parametrize("damage", ["header", "middle of a header", "no end", "joined"])
def test_damage_between_members_is_said(tmp_path, damage, caplog):
    """tarfile takes each of these for the end of the archive."""
    data = tar_of(range(4))
    third = start_of(data, 4)
    data = {
        "header": data[:third] + b"rubbish " * 64 + data[third + 512 :],
        "middle of a header": data[: third + 100],
        "no end": data[:third],
        "joined": tar_of(range(2)) + data,
    }[damage]
    (tmp_path / "a.tar").write_bytes(data)
    assert seen(tmp_path / "a.tar") == ([0, 1], 1, 2)
    assert naming("part", tmp_path / "a.tar").search(caplog.text)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_shards_are_read_whole_or_counted(tmp_path, pack):
    data = tar_of(range(4), pad=5000)
    (tmp_path / "a.tar").write_bytes(pack(data))
    assert seen(tmp_path / "a.tar") == ([0, 1, 2, 3], 0, 4)
    (tmp_path / "b.tar").write_bytes(pack(data[:9000]) + pack(data[9000:]))  # as pigz and pbzip2 write them
    assert seen(tmp_path / "b.tar") == ([0, 1, 2, 3], 0, 4)
    cut = pack(tar_of(range(40)))
    (tmp_path / "c.tar").write_bytes(cut[: len(cut) * 2 // 3])
    if pack is bz2.compress:  # which comes in blocks, of which none is whole
        with pytest.raises(DataError, match=naming(tmp_path / "c.tar", "ended before")):
            list(evaluate(tmp_path / "c.tar"))
    else:
        read, skipped, counted = seen(tmp_path / "c.tar")
        assert 0 < len(read) <= counted < 40 and skipped == 1


def test_images_whose_names_hold_another_dot_are_counted(tmp_path, caplog):
    names = ["1.jpg", "photo.final.jpg", "2.jpg", "v1.0.jpg", "v1.1.jpg", "3.jpg", "3.seg.png"]
    write_tar(tmp_path / "a.tar", [(name, image_bytes(0)) for name in names])
    assert seen(tmp_path / "a.tar") == ([-1, -1, -1], 1, 3)
    assert naming(3, "photo.final.jpg", tmp_path / "a.tar", "first dot").search(caplog.text)
    assert "seg" not in caplog.text


def test_images_in_a_folder_that_webdataset_passes_over_are_counted(tmp_path, caplog):
    members = [("__x__/1.jpg", b"1"), ("__x__/2.PNG", b"2"), ("__x__/1.txt", b"a"), (".x/3.jpg", b"3")]
    write_tar(tmp_path / "a.tar", [("1.jpg", image_bytes(1)), *members])
    assert seen(tmp_path / "a.tar") == ([-1], 1, 1)
    line, piped = caplog.messages  # `seen` reads it a second time through a pipe
    assert naming(tmp_path / "a.tar", "2", "__x__/1.jpg").search(line) and "pipe:" in piped


def test_repeated_members_are_counted(tmp_path, caplog):
    names = ["a.jpg", "b.jpg", "b.jpg", "c.jpg", "a.cls"]
    write_tar(tmp_path / "a.tar", [(name, image_bytes(0) if name.endswith("jpg") else b"7") for name in names])
    assert seen(tmp_path / "a.tar") == ([-1, -1, -1], 1, 3)
    assert naming("b.jpg", "duplicate").search(caplog.text) and "dict_keys" not in caplog.text


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_headers_of_headers_are_bounded(tmp_path, kind, caplog):
    """tarfile reads what one declares, and searches its digits in a time that is their square."""
    data = tar_of(range(4))
    third = start_of(data, 4)
    for body in (b"1" * 60_000, b"1" * (1 << 20)):
        if kind in b"LK" and len(body) < 1 << 16:
            continue
        header = tarfile.TarInfo("header")
        header.type, header.size = kind, len(body)
        more = header.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)
        (tmp_path / "a.tar").write_bytes(data[:third] + more + data[third:])
        assert seen(tmp_path / "a.tar") == ([0, 1], 1, 2)
        assert naming("header", tmp_path / "a.tar").search(caplog.text)


def test_properties_of_all_members_are_bounded(tmp_path):
    """tarfile copies them for each member."""
    data = tar_of(range(4))
    third = start_of(data, 4)
    some = [tarfile.TarInfo.create_pax_global_header({f"{i}.{k}": "" for k in range(900)}) for i in range(3)]
    (tmp_path / "a.tar").write_bytes(data[:third] + some[0] + data[third:])
    assert seen(tmp_path / "a.tar") == ([0, 1, 2, 3], 0, 4)
    (tmp_path / "a.tar").write_bytes(data[:third] + b"".join(some) + data[third:])
    assert seen(tmp_path / "a.tar") == ([0, 1], 1, 2)


def test_names_and_properties_of_ordinary_length_are_read(tmp_path):
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
            for i in range(2):
                info = tarfile.TarInfo("d" * 200 + "/" + "7" * 200 + f"{i}.jpg")
                info.size = len(image_bytes(i))
                info.pax_headers = {"SCHILY.xattr.user.comment": "long " * 5000}
                tar.addfile(info, io.BytesIO(image_bytes(i)))
        assert seen(tmp_path / "a.tar") == ([-1, -1], 0, 2)


@pytest.mark.parametrize("pack", [bz2, lzma])
def test_a_compressed_shard_that_unpacks_to_far_more_than_it_holds_is_damaged(tmp_path, monkeypatch, pack, caplog):
    """A few kilobytes can hold terabytes of zeros in a member that is only passed over."""
    monkeypatch.setattr(tars, "UNPACKED", (1 << 20, 1000))
    unpacked = []
    monkeypatch.setattr(tars._Unpacked, "read", lambda *a, f=tars._Unpacked.read: unpacked.append(a[1]) or f(*a))
    file = pack.open(tmp_path / "a.tar", "wb")
    with file, tarfile.open(fileobj=file, mode="w|") as tar:
        for name, size in (("a.jpg", None), ("a.bin", 64 << 20), ("b.jpg", None)):
            info = tarfile.TarInfo(name)
            info.size = len(image_bytes(0)) if size is None else size
            tar.addfile(info, io.BytesIO(image_bytes(0) if size is None else bytes(size)))
    assert os.path.getsize(tmp_path / "a.tar") < 20_000
    assert seen(tmp_path / "a.tar") == ([-1], 1, 1)
    assert naming("unpacks", tmp_path / "a.tar").search(caplog.text)
    assert sum(unpacked) < 5 * (24 << 20)
    monkeypatch.undo()
    os.rename(tmp_path / "a.tar", tmp_path / "b.tar")  # counts are kept by name
    assert seen(tmp_path / "b.tar") == ([-1, -1], 0, 2)
