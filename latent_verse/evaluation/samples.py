"""Generated images on disk: generating them for a list of captions, and reading any system's.

A folder holds PNG files `<caption>_<number>.png` and pictures.jsonl, as generate.py writes them: one line per image
with `file`, `text`, `number` and, if the model has generated it, `log_p`, its own log p(text | image). An image depends
only on the seed, its caption and its number: processes share the captions, and a rerun generates what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from latent_verse.config import ConfigError, SamplingSettings
from latent_verse.config.messages import differences, reason, shown
from latent_verse.config.settings import is_count, is_number
from latent_verse.data import DataError
from latent_verse.data.caption_files import caption_lines, clean
from latent_verse.data.decoding import UnreadableImage, check_pixels, read_rgb
from latent_verse.data.folders import EXTENSIONS, describe_files, walk
from latent_verse.data.transforms import centre_crop, mix_seed
from latent_verse.files import (
    lines_of,
    parse_json,
    read_json_object,
    read_text,
    write_json,
    write_text,
)
from latent_verse.inference.image_io import save_png
from latent_verse.inference.pipeline import LVerse
from latent_verse.metrics.processes import Ranks

INDEX = "pictures.jsonl"
ABOUT = "settings.json"  # of the images in the folder, which takes no others


@dataclass
class Group:
    """The images generated for one caption."""

    text: str | None
    files: list[Path] = field(default_factory=list)
    log_p: list[float | None] = field(default_factory=list)  # of each image: the model's log p(text | image)


def read_image(path: Path, resolution: int) -> Tensor:
    """An image file as uint8 (3, R, R), resized and cropped as everywhere in evaluation.

    Raises:
        DataError: it is absent or cannot be read.
    """
    try:
        return centre_crop(read_rgb(path), resolution)
    except UnreadableImage as error:
        raise DataError(f"image {path} cannot be read: {error}. Generate or copy it again.") from error


def generate(
    model: LVerse,
    texts: Sequence[str],
    folder: Path,
    ranks: Ranks,
    *,
    candidates: int,
    seed: int,
    batch_size: int,
    sampling: SamplingSettings,
    dtype: str = "float32",  # BiART's, recorded because the images depend on it
) -> None:
    """Generate what is missing of `candidates` images for each text into `folder`, shared among processes.

    Raises:
        ConfigError: the folder holds images of another model, of other texts or settings.
    """
    digest = hashlib.sha256("\n".join(texts).encode("utf-8", "replace")).hexdigest()[:16]
    about = {"model": model.fingerprints, "texts": digest, "candidates": candidates, "seed": seed}
    about |= sampling.arguments() | {"dtype": dtype}
    ranks.share(lambda: _claim(folder, about))
    # an empty file is what a machine that lost power may have left
    there = [all(p.is_file() and p.stat().st_size for p in _files(folder, i, candidates)) for i in range(len(texts))]
    missing = [i for i in ranks.mine(len(texts)) if not there[i]]
    for part, own_seed in ranks.follow(calls(model, texts, missing, seed, batch_size), "generating"):
        images, log_p = model.sample_scored([texts[i] for i in part], candidates, seed=own_seed, **sampling.arguments())
        for i, row, values in zip(part, images, log_p.tolist(), strict=True):
            for file, image, value in zip(_files(folder, i, candidates), row, values, strict=True):
                save_png(image, file, {"text": texts[i], "log_p": repr(value), "Software": "L-Verse"})
    ranks.gather({ranks.rank: None})  # until all processes are done
    ranks.share(lambda: write_index(folder, texts, candidates))


def caption(
    model: LVerse, read: Callable[[int], Tensor | Image.Image], count: int, ranks: Ranks, *, beams: int, batch_size: int
) -> list[str]:
    """The model's captions of images 0 .. count - 1, shared among processes."""
    mine, found = ranks.mine(count), {}
    for start in range(0, len(mine), batch_size):
        part = mine[start : start + batch_size]
        rows = model.image_to_text([read(i) for i in part], beams=beams)
        found |= {i: row[0] for i, row in zip(part, rows, strict=True)}
    return list(ranks.gather(found).values())


def calls(
    model: LVerse, texts: Sequence[str], numbers: Sequence[int], seed: int, batch_size: int
) -> list[tuple[list[int], int]]:
    """(numbers, seed) of the calls that generate images for texts[number], so that an image depends on no other text.

    If a text occurs again, it gets another seed and so new images: the texts of one call all differ.
    """
    seen, turns, out = Counter[bytes](), [], []
    for row in model.encode_texts(texts).numpy():
        turns.append(seen[row.tobytes()])
        seen[row.tobytes()] += 1
    for turn in sorted({turns[i] for i in numbers}):
        same = [i for i in numbers if turns[i] == turn]
        out += [(same[start : start + batch_size], mix_seed(seed, turn)) for start in range(0, len(same), batch_size)]
    return out


def _claim(folder: Path, about: dict[str, object]) -> None:
    """Write the settings into a new folder; one that holds images must have the same settings."""
    file = folder / ABOUT
    if not file.is_file():
        if folder.is_dir() and any(walk(str(folder), (".png",), Counter())):
            raise ConfigError(f"{folder} holds images of unknown origin. Give another --name, or remove them.")
        write_json(file, about)
        return
    changed = differences(read_json_object(file), about)
    if changed:
        raise ConfigError(
            f"{folder} holds images of different settings. Give the old settings to resume, another --name, "
            "or evaluate them as they are with --generated_dir:\n  " + "\n  ".join(changed)
        )


def _files(folder: Path, i: int, candidates: int) -> list[Path]:
    return [folder / f"{i:06d}_{j:02d}.png" for j in range(candidates)]


def write_index(folder: Path, texts: Sequence[str], candidates: int) -> None:
    """Write pictures.jsonl, from the captions and the files' metadata."""
    lines = []
    for i, text in enumerate(texts):
        for j, file in enumerate(_files(folder, i, candidates)):
            try:
                log_p = float(_png_text(file)["log_p"])
            except (KeyError, ValueError) as error:
                raise DataError(
                    f"{file} is not an image of this run: it holds no log_p. Remove it, and rerun."
                ) from error
            lines.append(json.dumps({"file": file.name, "text": text, "number": j, "log_p": log_p}, ensure_ascii=False))
    write_text(folder / INDEX, "\n".join(lines) + "\n")


def read_groups(folder: Path, others: Counter[str] | None = None) -> list[Group]:
    """The images of a folder, in order, by caption: those of its pictures.jsonl, or any image files.

    Without an index, files that are not read are counted in `others`.

    Without an index every file is a group of its own; its caption is `<name>.txt` beside it, or the PNG's `text`.
    Hidden and special files are passed over.

    Raises:
        DataError: there is no such folder, no image, or an index that does not fit them.
        FileError: a caption or the index is not UTF-8.
    """
    if not folder.is_dir():
        raise DataError(f"generated_dir: {folder} is not a folder. Give one that holds images.")
    if (folder / INDEX).is_file():
        return _read_index(folder)
    others = Counter() if others is None else others
    files = sorted(folder / name for name in walk(str(folder), EXTENSIONS, others))
    files = [file for file in files if file.name != "grid.png"]
    if not files:
        looked_for = f"looked for {' '.join(EXTENSIONS)}, {describe_files(others)}"
        raise DataError(f"generated_dir: no image below {folder}; {looked_for}.")
    return [Group(_text_of(file), [file], [None]) for file in files]


def _text_of(file: Path) -> str | None:
    beside = file.with_suffix(".txt")
    if beside.is_file():
        return next(iter(caption_lines(str(beside))), None)
    return _caption(_png_text(file).get("text"), file) if file.suffix.lower() == ".png" else None


def _caption(text: str | None, where: object) -> str | None:
    """The text as it is written; None if nothing of it can be seen, as in images completed without a text.

    Raises:
        DataError: it is not text.
    """
    try:
        return text if text and clean(text) else None
    except DataError as error:
        raise DataError(f"{where}: its text {error}.") from error


def _png_text(file: Path) -> dict[str, str]:
    """The text metadata of a PNG file; none where it cannot be read, which is said when its pixels are needed."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            check_pixels(*image.size)  # metadata may stand behind the pixels, which are decoded then
            return dict(image.text)
    except (OSError, SyntaxError, ValueError):
        return {}


def _read_index(folder: Path) -> list[Group]:
    groups: dict[tuple[str | None, int], dict[int, tuple[Path, float | None]]] = {}  # by text and its how manieth time
    times = Counter[tuple[str | None, int]]()  # how often a number of a text has come: a text may come again
    named: dict[str, int] = {}
    for number, line in enumerate(lines_of(read_text(folder / INDEX)), start=1):
        where = f"generated_dir: {folder / INDEX} line {number}"
        name, text, place, log_p = _entry(line, where)
        file = folder / name
        if os.path.normpath(name) in named:
            first = named[os.path.normpath(name)]
            raise DataError(f"{where}: {shown(name)} is already on line {first}. Give each image one line.")
        named[os.path.normpath(name)] = number
        if not os.path.isfile(file):
            raise DataError(f"{where}: {shown(name)} does not exist as a file in {folder}. Copy the whole folder.")
        groups.setdefault((text, times[text, place]), {})[place] = (file, log_p)
        times[text, place] += 1
    if not groups:
        raise DataError(f"generated_dir: {folder / INDEX} is empty: there is no image to evaluate.")
    counts = {len(images) for images in groups.values()}
    for (text, _), images in groups.items():
        if sorted(images) != list(range(len(images))):
            raise DataError(
                f"generated_dir: {folder / INDEX}: the images of {shown(text)} have the numbers "
                f"{', '.join(map(str, sorted(images)[:8]))}; they have to be 0, 1, ... for each caption."
            )
    if len(counts) > 1:
        raise DataError(f"generated_dir: {folder / INDEX} has {sorted(counts)} images per caption; make them equal.")
    ordered = [(text, [images[place] for place in sorted(images)]) for (text, _), images in groups.items()]
    if len({log_p is not None for _, images in ordered for _, log_p in images}) > 1:
        raise DataError(
            f"generated_dir: {folder / INDEX} has log_p for some images only. Give it for all, or for none."
        )
    return [Group(text, *map(list, zip(*images, strict=True))) for text, images in ordered]


def _entry(line: str, where: str) -> tuple[str, str | None, int, float | None]:
    """file, text, number and log_p of a line of an index.

    Raises:
        DataError: it is something else, or the file lies outside the folder.
    """
    entry = parse_json(line, where)
    if not isinstance(entry, dict):
        raise DataError(f"{where} is not {{file, text, number}}, but {shown(line)}.")
    name, text, place, log_p = (entry.get(key) for key in ("file", "text", "number", "log_p"))
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"{where}: `file` is {shown(name)}; it has to be the name of an image in the folder.")
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise DataError(f"{where}: `file` {shown(name)} is outside the folder. Copy the image into it.")
    if not isinstance(text, str | None):
        raise DataError(f"{where}: `text` is {shown(text)}; captions are strings.")
    text = _caption(text, where)
    place = 0 if place is None else place
    if not is_count(place):
        raise DataError(f"{where}: `number` is {shown(place)}; it has to be 0, 1, ... for each caption's images.")
    if not (log_p is None or is_number(log_p)):
        raise DataError(f"{where}: `log_p` is {shown(log_p)}; it has to be a number, or left out.")
    return name, text, place, None if log_p is None else float(log_p)


def fingerprint_files(files: Sequence[Path]) -> str:
    """16 hexadecimal digits of the files' names and contents, which identify what was evaluated.

    Raises:
        DataError: one cannot be read.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as content:
                inside = hashlib.sha256()
                while data := content.read(1 << 20):
                    inside.update(data)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {reason(error)}.") from error
        digest.update(os.path.basename(file).encode("utf-8", "surrogateescape") + inside.digest())
    return digest.hexdigest()[:16]
