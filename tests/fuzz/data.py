"""Images, folders and captions, damaged or odd, read as training, evaluation and generation read them."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import struct
import zlib
from collections.abc import Iterable

import torch
from PIL import Image

from latent_verse.config.evaluate import EvalDataConfig
from latent_verse.config.train import ImageDataConfig, PairDataConfig
from latent_verse.data.text import ClipTokenizer
from latent_verse.inference.tasks import read_images
from tests.fuzz.cases import Area, Bench, Case
from tests.fuzz.mutations import ODD_NAMES, Mutator
from tests.fuzz.reading import RESOLUTION, loader_case, read_all_images, read_all_pairs, read_for_evaluation
from tests.fuzz.valid import MODES, image_bytes

FOREIGN = (
    "ICO",
    "PDF",
    "EPS",
    "TGA",
    "PCX",
    "SGI",
    "JPEG2000",
    "ICNS",
    "DDS",
    "MSP",
    "XBM",
    "IM",
    "SPIDER",
    "MPO",
)


# -------------------------------------------------------------------------------------------------------------- images


def make_images(bench: Bench) -> Case:
    """One image file, damaged or odd, beside a good one: read for training, for evaluation and for generation."""
    m = bench.mutate
    extension = m.pick(MODES)
    mode = m.pick(MODES[extension])
    data = image_bytes(extension, mode, m.rng.randrange(100))
    m.note(f"{mode} {extension}")
    odd = not bench.unchanged and m.chance(0.3)
    if odd:
        data = odd_image(m)
    elif not bench.unchanged and extension in (".jpg", ".jpeg") and m.chance(0.5):
        data = damaged_scan(m, data)
    else:
        data = bench.bytes(data)
    if not bench.unchanged and m.chance(0.1):
        extension = m.pick(MODES)
    place = bench.given / "images"
    place.mkdir()
    (place / "good.png").write_bytes(image_bytes(".png", seed=1))
    file = place / f"tried{extension}"
    file.write_bytes(data)

    def read() -> None:
        read_all_images(ImageDataConfig(dataset="flat", train_dir=str(place), val_dir=str(place)))
        found = list(read_images([str(place)], RESOLUTION))
        assert all(torch.isfinite(x).all() and x.abs().max() <= 1 for _, x in found)
        list(read_images([str(file)], RESOLUTION))

    return loader_case(read, f"open_images and read_images of {place}")


def damaged_scan(m: Mutator, data: bytes) -> bytes:
    """A JPEG with something in the data of its pixels, where decoders rarely look for it."""
    start = data.index(b"\xff\xda") + 14
    at, run = m.rng.randrange(start, len(data)), m.pick((1, 40, 400))
    inside = {
        "ends": b"\xff\xd9" * run,
        "zeros": bytes(run),
        "noise": m.rng.randbytes(run),
        "restarts": bytes((0xFF, 0xD0 + m.rng.randrange(8))) * run,
        "marker": b"\xff" + bytes([m.rng.randrange(256)]),
        "fill": b"\xff" * run,
    }
    what = m.pick(inside)
    m.note("in the scan, at byte", at, what, run)
    behind = data[at + (len(inside[what]) if m.chance(0.7) else 0) :]
    return data[:at] + inside[what] + m.pick((behind, behind, behind.removesuffix(b"\xff\xd9"), b"\xff\xd9"))


def odd_image(m: Mutator) -> bytes:
    """A file that no change to a valid image makes: of another format, huge, or empty."""
    kind = m.pick(("foreign", "foreign", "huge png", "huge header", "text", "frames", "gif", "thin", "metadata"))
    m.note("an odd image:", kind)
    if kind == "foreign":
        name = m.pick(FOREIGN)
        m.note(name)
        mode = {"XBM": "1", "MSP": "1", "SPIDER": "F"}.get(name, "RGB")
        Image.new(mode, (20, 24)).save(data := io.BytesIO(), name)
        return data.getvalue()
    if kind == "huge png":
        return png(*m.pick(((13000, 13000), (1, 100_000), (100_000, 1), (30_000, 3000), (2**31 - 1, 1), (9000, 9000))))
    if kind == "huge header":
        header = m.pick(
            (b"P6 %d %d 255\n", b"P5 %d %d 65535\n", b"P3 %d %d 255\n", b"#define im_width %d\n#define im_height %d\n")
        )
        return header % (m.pick((0, 20, 2**31 - 1, 99999, 2**70)), m.pick((1, 24, 10**6))) + bytes(1000)
    if kind == "text":
        return m.pick(
            (
                b"",
                b"\0" * 100,
                b"<svg xmlns='http://www.w3.org/2000/svg'/>",
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            )
        )
    if kind == "frames":
        frames = [Image.new("RGB", (20, 24), colour) for colour in ("red", "blue")] * m.pick((1, 500))
        form = m.pick(("GIF", "TIFF", "WEBP", "PNG"))
        frames[0].save(data := io.BytesIO(), form, save_all=True, append_images=frames[1:])
        return m.bytes(data.getvalue()) if m.chance(0.5) else data.getvalue()
    if kind == "gif":
        return odd_gif(m)
    if kind == "thin":
        Image.new("RGB", m.pick(((1, 1), (1, 5000), (5000, 1), (2, 1)))).save(data := io.BytesIO(), "PNG")
        return data.getvalue()
    chunk = m.pick((b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"acTL", b"gAMA", b"tRNS", b"PLTE"))
    body = m.pick((m.rng.randbytes(50), b"a\0" + b"x" * 2_000_000, b"a\0\0" + zlib.compress(bytes(200_000_000))))
    return png(20, 24, [(chunk, body)])


def odd_gif(m: Mutator) -> bytes:
    """A GIF with another size of canvas, place of its image, palette, or what lies before and within its image."""
    data = image_bytes(".gif", m.pick(("P", "L", "RGBA")), m.rng.randrange(100))
    image = data.index(b",", 13 + 768)
    side = (0, 1, 20, 1000, 65535)
    canvas = struct.pack("<HH", m.pick(side), m.pick(side)) if m.chance(0.5) else data[6:10]
    frame = struct.pack("<HHHH", *(m.pick(side) for _ in range(4))) if m.chance(0.5) else data[image + 1 : image + 9]
    block = m.rng.randbytes(m.pick((0, 1, 4, 255)))
    kind = bytes([m.pick((0xF9, 0xFE, 0xFF, 0x01, m.rng.randrange(256)))])
    extension = b"!" + kind + (bytes([len(block)]) + block) * m.pick((0, 1, 100, 20_000)) + m.pick((b"\0", b"\0", b""))
    before = m.pick(
        (b"", b"", extension, b"\0" * m.pick((3, 5_000_000)), b"!\xfe" + b"\x01a" * 3_000_000 + b"\0", b";")
    )
    flags = bytes([m.rng.randrange(256)]) if m.chance(0.3) else data[image + 9 : image + 10]
    start = data[:6] + canvas + (m.rng.randbytes(1) if m.chance(0.2) else data[10:11]) + data[11:image]
    pixels = data[image + 10 :]
    at = m.rng.randrange(len(pixels))
    pixels = m.pick((pixels, pixels, pixels[:at], pixels[:at] + b"\0" + pixels[at:], pixels + data[image:] * 500))
    return start + before + b"," + frame + flags + pixels


def png(width: int, height: int, more: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """A PNG of that size, written without its pixels in memory; `more` chunks come before them."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    pack, rows, left = zlib.compressobj(1), [], min(height * (3 * width + 1), 600_000_000)
    zeros = bytes(1 << 20)
    while left > 0:
        rows.append(pack.compress(zeros[:left]))
        left -= len(zeros)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *more]
    chunks += [(b"IDAT", b"".join(rows) + pack.flush()), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


# ------------------------------------------------------------------------------------------------------------- folders


def make_folders(bench: Bench) -> Case:
    """A folder of images or pairs with odd names, and with what is no file."""
    m = bench.mutate
    kind = m.pick(("imagefolder", "flat", "pairs", "image"))
    place = bench.given / m.pick(("images", "images", "größe", "a b", "x,y", "{x}"))
    shutil.copytree(bench.valid.pairs() if kind == "pairs" else bench.valid.images(), place)
    for file in (*place.glob("*/[2-9]*"), *place.glob("*/1[0-9]*")):
        file.unlink()
    for _ in range(m.pick((1, 1, 2, 4))) if not bench.unchanged else ():
        _odd_entry(m, os.fsencode(m.pick([place, *sorted(p for p in place.glob("class*") if p.is_dir())])))
    root = str(place)
    if not bench.unchanged and m.chance(0.2):
        root = m.pick(
            (root + "/", root + "//.", f"{root}/../{place.name}", root + "/nothing", f"{root},{root}", root + "*", "")
        )
        m.note("given as", root)

    def read() -> None:
        if kind == "pairs":
            read_all_pairs(PairDataConfig(dataset="pairs", train_dir=root, val_dir=root))
            read_for_evaluation(EvalDataConfig(dataset="pairs", test_dir=root))
        elif kind == "image":
            found = list(read_images([root], RESOLUTION))
            print(*(name for name, _ in found), sep="\n")
        else:
            read_all_images(ImageDataConfig(dataset=kind, train_dir=root, val_dir=root))

    return loader_case(read, f"{kind}: {root!r}")


def _odd_entry(m: Mutator, folder: bytes) -> None:
    """Put something odd into a folder."""
    name = m.pick(ODD_NAMES)
    path = os.path.join(folder, name)
    kind = m.pick(
        (
            "image",
            "image",
            "text",
            "folder",
            "pipe",
            "socket",
            "broken link",
            "loop",
            "device",
            "empty",
            "locked",
            "many",
        )
    )
    m.note(kind, name)
    if os.path.lexists(path):
        return
    if kind in ("image", "text", "empty", "locked"):
        data = {"image": image_bytes(".png", seed=5), "text": "größe".encode("latin-1"), "empty": b""}.get(kind, b"x")
        with open(path, "wb") as file:
            file.write(data)
        stem = os.path.splitext(path)[0]
        if kind == "image" and not os.path.lexists(stem + b".txt"):
            with open(stem + b".txt", "wb") as file:
                file.write(
                    m.pick((b"a caption", b"", b"\xef\xbb\xbfwith a mark", "größe".encode("latin-1"), b"a\0b", b"\n\n"))
                )
        if kind == "locked":
            os.chmod(path, 0)
    elif kind == "folder":
        os.mkdir(path)
        with open(os.path.join(path, b"inside.png"), "wb") as file:
            file.write(image_bytes(".png", seed=6))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket" and len(path) < 90:
        with socket.socket(socket.AF_UNIX) as here:
            here.bind(path)
    elif kind == "many":
        os.makedirs(os.path.join(path, *[b"deep"] * m.pick((3, 60))))
    elif kind in ("broken link", "loop", "device"):
        os.symlink({"broken link": b"nowhere.png", "loop": b".", "device": b"/dev/zero"}[kind], path)


# ------------------------------------------------------------------------------------------------------------ captions


def make_captions(bench: Bench) -> Case:
    """A captions file of each kind, changed; read for training and for evaluation."""
    m = bench.mutate
    place = bench.given / "pairs"
    shutil.copytree(bench.valid.pairs(), place)
    kind = m.pick(("pairs", "coco", "karpathy", "csv", "tsv", "jsonl"))
    dataset = {"csv": "table", "tsv": "table", "jsonl": "table"}.get(kind, kind)
    m.note(kind)
    file = place / {"pairs": "a.txt", "coco": "coco.json", "karpathy": "karpathy.json"}.get(kind, f"table.{kind}")
    old = file.read_text(encoding="utf-8")
    if kind in ("coco", "karpathy"):
        file.write_bytes(bench.json(json.loads(old)))
    elif kind == "jsonl" and not bench.unchanged and m.chance(0.7):
        rows = m.tree([json.loads(line) for line in old.splitlines()])
        rows = rows if isinstance(rows, list) else [rows]
        file.write_bytes(m.encoded("".join(m.json(row) + "\n" for row in rows)))
    else:
        file.write_bytes(bench.text(old))
    if not bench.unchanged and m.chance(0.05):
        file.unlink()
        m.pick(
            (file.mkdir, lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/zero"), lambda: file.write_bytes(b""))
        )()
        m.note("no regular file with text")
    captions = {"train_captions": str(file), "val_captions": str(file)} if kind != "pairs" else {}
    folders = {"train_dir": str(place), "val_dir": str(place)} if dataset != "table" else {}
    clip = ClipTokenizer() if m.chance(0.1) else None

    def read() -> None:
        read_all_pairs(PairDataConfig(dataset=dataset, **folders, **captions), clip)
        test = {"test_captions": str(file)} if captions else {}
        read_for_evaluation(EvalDataConfig(dataset=dataset, test_dir=str(place) if folders else None, **test))

    if kind == "karpathy":  # it has no test split
        return loader_case(
            lambda: read_all_pairs(PairDataConfig(dataset=dataset, **folders, **captions), clip), str(file)
        )
    return loader_case(read, f"dataset {dataset}: {file}{' with the clip tokenizer' if clip else ''}")


AREAS = {
    "images": Area(make_images, 150, ("images",)),
    "folders": Area(make_folders, 80, ("images", "pairs")),
    "captions": Area(make_captions, 150, ("pairs",)),
}
