"""Tar shards with damaged bytes, odd members and odd sources, read as training and evaluation read them."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

from latent_verse.config.train import ImageDataConfig, PairDataConfig
from tests.fuzz.cases import Area, Bench, Case
from tests.fuzz.mutations import CHARACTERS, ODD_NAMES, TEXTS, Mutator
from tests.fuzz.reading import loader_case, read_all_images, read_all_pairs
from tests.fuzz.valid import NAMES, image_bytes


def make_tars(bench: Bench) -> Case:
    """Tar shards with damaged bytes, odd members or an odd source."""
    m = bench.mutate
    place = bench.given / "shards"
    place.mkdir()
    good = bench.valid.pairs() / "shard.tar"
    data = good.read_bytes()
    pairs = m.chance(0.6)
    way = "none" if bench.unchanged else m.pick(("bytes", "bytes", "members", "members", "members", "source"))
    m.note(way)
    if way == "bytes":
        data = m.bytes(data)
    elif way == "members":
        data = odd_tar(m)
    name = m.pick(("tried.tar", "tried.tar", "tried.tgz", "tried.tar.gz")) if way != "none" else "tried.tar"
    (place / name).write_bytes(data)
    source = str(place)
    if way == "source":
        source = odd_source(m, place, name)
        m.note("given as", source)
    elif m.chance(0.5):
        shutil.copy(good, place / "good.tar")
    config = {"dataset": "webdataset", "train_dir": source, "val_dir": source, "shuffle_buffer": 3}

    def read() -> None:
        if pairs:
            read_all_pairs(PairDataConfig(**config))
        else:
            read_all_images(ImageDataConfig(**config))

    return loader_case(read, f"webdataset{' with captions' if pairs else ''}: {source!r}")


def odd_tar(m: Mutator) -> bytes:
    """A tar with members that are odd in name, kind, size or content."""
    members = {}
    for i, name in enumerate(NAMES):
        image, text = image_bytes(".png", seed=i), f"a caption {i}".encode()
        how = (
            "plain"
            if m.chance(0.4)
            else m.pick(("dots", "json", "cls", "text", "image", "name", "lonely", "case", "twice"))
        )
        m.note(how)
        if how == "dots":
            members |= {f"{name}.b.png": image, f"{name}.b.txt": text}
        elif how == "json":
            about = {"caption": f"caption {i}", "captions": ["a", "b"]}
            members |= {f"{name}.png": image, f"{name}.json": m.encoded(m.json(m.tree(about)))}
        elif how == "cls":
            members |= {f"{name}.png": image, f"{name}.txt": text, f"{name}.cls": m.pick(TEXTS).encode()}
        elif how == "text":
            members |= {f"{name}.png": image, f"{name}.txt": m.encoded(m.text("a red circle"))}
        elif how == "image":
            members |= {f"{name}.{m.pick(('png', 'jpg', 'gif', 'PNG'))}": m.bytes(image), f"{name}.txt": text}
        elif how == "name":
            odd = m.pick(ODD_NAMES).decode("utf-8", "surrogateescape").replace("\0", "")
            members |= {
                f"{m.pick(('', '/', '../', './', 'a/', '__'))}{odd}": image,
                f"{os.path.splitext(odd)[0]}.txt": text,
            }
        elif how == "lonely":
            members |= {
                f"{name}.{m.pick(('txt', 'json', 'pyd', 'pkl', 'npy', 'pth', 'mp4', 'gz'))}": m.rng.randbytes(30)
            }
        elif how == "case":
            members |= {f"{name}.PNG": image, f"{name.upper()}.txt": text}
        else:
            members |= {f"{name}.png": image, f"{name}.txt": text}
    mode = m.pick(("w", "w", "w", "w:gz", "w:bz2", "w:xz"))
    with tarfile.open(fileobj=(data := io.BytesIO()), mode=mode, errors="surrogateescape") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            if m.chance(0.1):
                tar.addfile(info, io.BytesIO(content))
            if m.chance(0.1):
                _odd_member(m, tar)
    return data.getvalue() if m.chance(0.8) or mode != "w" else _with_size(m, data.getvalue())


def _odd_member(m: Mutator, tar: tarfile.TarFile) -> None:
    info = tarfile.TarInfo(m.pick(("z.png", "z.txt", "a.png", "..", "/etc/passwd", "z" * 300 + ".png", "")))
    info.type = m.pick((tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"Z"))
    info.linkname = m.pick(("a.png", "/etc/passwd", "z.png", "../up", ""))
    m.note("member of type", info.type, info.name)
    tar.addfile(info)


def _with_size(m: Mutator, data: bytes) -> bytes:
    """A tar whose first header declares another size, with its checksum."""
    size = m.pick(
        (b"77777777777\0", b"00000000001\0", b"-0000000001\0", b"\x80" + b"\0" * 3 + b"\xff" * 8, b"\xff" * 12)
    )
    header = bytearray(data[:512])
    header[124:136], header[148:156] = size, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    m.note("declares the size", size)
    return bytes(header) + data[512:]


def odd_source(m: Mutator, place: Path, name: str) -> str:
    """Another way to name the shards of a folder: patterns, lists, URLs."""
    lines = [
        name,
        str(place / name),
        "pipe:echo x",
        "http://127.0.0.1:9/x.tar",
        "",
        "# note",
        "é",
        "../up.tar",
        "a\0b",
        "list.txt",
    ]
    (place / "list.txt").write_bytes(m.encoded("\n".join(m.pick(lines) for _ in range(3)) + "\n"))
    file = place / name
    return m.pick(
        (
            *(
                str(file),
                f"{file},{file}",
                f"{place}/*.tar",
                f"{place}/tri{{ed,xx}}.tar",
                f"{place}/{{0..9}}.tar",
                f"{place}/x.tar",
            ),
            *(
                str(place / "list.txt"),
                str(place / "list.txt"),
                f"pipe:cat {file}",
                "pipe:",
                "pipe:exit 1",
                f"file://{file}",
            ),
            *(
                f"{place}/{{0..99999999}}.tar",
                f"{place}/{{0..{10**18}}}.tar",
                f"{place}/{{{{a}}",
                "::",
                ",",
                f"file:{file}",
                "x://y",
            ),
            *(
                "http://127.0.0.1:9/{0..3}.tar",
                "s3://bucket/x.tar",
                "gs://b/x.tar",
                "hf://datasets/a/b/x.tar",
                "ftp://a/b.tar",
            ),
            *(
                f"{file}\n",
                f" {file} ",
                f"{file}?x",
                m.pick(TEXTS)[:300].replace("\0", ""),
                str(place) + m.pick(CHARACTERS).replace("\0", ""),
            ),
        )
    )


AREAS = {"tars": Area(make_tars, 120, ("pairs",))}
