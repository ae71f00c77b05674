"""What generate.py does with a model: draw, caption, score, complete; and the files that come of it."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latent_verse import runs
from latent_verse.config import ConfigError
from latent_verse.config_generate import GenerateConfig
from latent_verse.data import DataError
from latent_verse.data.images import EXTENSIONS, describe_files, walk
from latent_verse.pictures import grid, load_image, save_png, to_pictures
from latent_verse.pipeline import LVerse

GROUP = 1024  # pictures that are held in memory to be captioned
GRID_ROWS = 64  # more are hard to look at, and to open


def open_folder(out: str | None, overwrite: bool) -> Path:
    """Where results go; nothing is made yet.

    Raises:
        ConfigError: it holds files already, and overwrite is not set, or no folder can be made or written to there.
    """
    if out is None and not overwrite:
        return runs.open_run(".", "generated", backup=False, backup_dir=None, config={}).folder
    folder = Path(out or "generated").expanduser()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"out: {there} is a file; give a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"out: nothing can be written to {there}; give another folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigError(f"out: {folder} holds files already. Give another folder, or --overwrite to replace them.")
    return folder


def load(config: GenerateConfig) -> LVerse:
    """The model on the device that is asked for, with a progress bar. Raises CheckpointError."""
    gpu = config.write.gpus > 0 and torch.cuda.is_available()
    if config.write.gpus and not gpu:
        print("No GPU on this machine: using the CPU.", file=sys.stderr)
    model = LVerse.from_pretrained(config.what.model, device="cuda" if gpu else "cpu")
    model.progress, model.too_long = True, config.draw.text_too_long
    return model


def run(config: GenerateConfig, task: str) -> None:
    """Do the task and write or print what comes of it.

    Raises:
        ConfigError, CheckpointError, DataError, TokenizerError: mistakes in settings, model, pictures, texts.
    """
    if task == "score":
        print_scores(load(config), config)
        return
    folder = open_folder(config.write.out, config.write.overwrite)
    {"text": draw, "complete": complete, "image": caption}[task](load(config), config, folder)


# --------------------------------------------------------------------------------------------------------------- tasks


def draw(model: LVerse, config: GenerateConfig, folder: Path) -> None:
    """Pictures for texts: one PNG each, grid.png and pictures.jsonl."""
    texts = read_texts(config)
    pictures = model.text_to_image(texts, config.draw.num, **_sampling(config), rerank=config.draw.rerank)
    _write_pictures(folder, model, config, [{"text": text} for text in texts], pictures, [[] for _ in texts])


def complete(model: LVerse, config: GenerateConfig, folder: Path) -> None:
    """Pictures whose top was given: one PNG each, grid.png (the given picture first) and pictures.jsonl."""
    resolution = model.vae.config.resolution
    given = dict(_some_readable(find_pictures([config.what.complete]), resolution))
    texts = read_texts(config)
    text = texts[0] if len(texts) == 1 else texts or None
    pictures = model.complete(
        list(given.values()), config.what.rows, text, config.draw.num, **_sampling(config), rerank=config.draw.rerank
    )
    texts = texts * len(given) if len(texts) == 1 else texts or [""] * len(given)
    about = [
        {"text": text, "completed": name, "rows": config.what.rows} for text, name in zip(texts, given, strict=True)
    ]
    _write_pictures(folder, model, config, about, pictures, [to_pictures(image[None]) for image in given.values()])


def caption(model: LVerse, config: GenerateConfig, folder: Path) -> None:
    """Captions for pictures: printed, and captions.jsonl with one picture a line."""
    files = find_pictures(config.what.image)
    sampling = _sampling(config) | {"beams": config.draw.beams}
    lines = []
    for start in range(0, len(files), GROUP):
        group = _readable(files[start : start + GROUP], model.vae.config.resolution)
        if not group:
            continue
        captions = model.image_to_text([image for _, image in group], config.draw.num, **sampling)
        for (name, _), found in zip(group, captions, strict=True):
            lines.append({"image": name, "captions": found, "settings": sampling, "model": model.fingerprints})
            print("\n".join(f"{name}: {text}" for text in found))
        folder.mkdir(parents=True, exist_ok=True)
        runs.write_whole(folder / "captions.jsonl", _jsonl(lines))  # as it goes: a later picture may end it
    if not lines:
        raise _none_readable(files)
    print(f"Written to {folder / 'captions.jsonl'}")


def print_scores(model: LVerse, config: GenerateConfig) -> None:
    """A table of log-likelihoods, every picture with every text."""
    name, *texts = config.what.score
    images = _some_readable(find_pictures([name]), model.vae.config.resolution)
    tensors = [image for _, image in images]
    of_text, of_image = (model.score(tensors, texts, given=given).tolist() for given in ("image", "text"))
    width = max(len("picture"), *(len(name) for name, _ in images))
    print(f"{'log p(text | picture)':>21}  {'log p(picture | text)':>21}  {'picture':<{width}}  text")
    for i, (name, _) in enumerate(images):
        for j, text in enumerate(texts):
            print(f"{of_text[i][j]:>21.3f}  {of_image[i][j]:>21.3f}  {name:<{width}}  {text}")


# --------------------------------------------------------------------------------------------------------------- input


def read_texts(config: GenerateConfig) -> list[str]:
    """The texts of `text`, or the lines of `text_file` that are not blank. May be none.

    Raises:
        ConfigError: the file is absent, not UTF-8, or holds no text.
    """
    name = config.what.text_file
    if name is None:
        return list(config.what.text)
    try:
        texts = [line.strip() for line in Path(name).expanduser().read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"text_file: {name} cannot be read as UTF-8 text: {error}") from error
    texts = [text for text in texts if text]
    if not texts:
        raise ConfigError(f"text_file: {name} holds no text; write one a line.")
    return texts


def find_pictures(names: list[str] | tuple[str, ...]) -> list[tuple[str, bool]]:
    """(file, whether it was named itself) for every file named and every picture below a folder named.

    Raises:
        DataError: no such file or folder, or a folder without pictures.
    """
    found = []
    for name in names:
        path, others = Path(name).expanduser(), Counter()
        if not path.exists():
            raise DataError(f"{name} does not exist. Give a picture or a folder of pictures.")
        inside = [str(path / file) for file in walk(str(path), EXTENSIONS, others)] if path.is_dir() else []
        if path.is_dir() and not inside:
            raise DataError(f"no picture below {name}: looked for {' '.join(EXTENSIONS)}, {describe_files(others)}.")
        found += [(file, False) for file in inside] or [(str(path), True)]
    return found


def _readable(files: list[tuple[str, bool]], resolution: int) -> list[tuple[str, Tensor]]:
    """The pictures as tensors. An unreadable one of a folder is reported and left out; DataError if it was named."""
    out = []
    for file, named in files:
        try:
            out.append((file, load_image(file, resolution)))
        except DataError as error:
            if named:
                raise
            print(f"left out: {error}", file=sys.stderr)
    return out


def _some_readable(files: list[tuple[str, bool]], resolution: int) -> list[tuple[str, Tensor]]:
    """The same; DataError where none is left."""
    out = _readable(files, resolution)
    if not out:
        raise _none_readable(files)
    return out


def _none_readable(files: list[tuple[str, bool]]) -> DataError:
    return DataError(f"not one of {len(files)} pictures can be read, from {files[0][0]} on. Are the files whole?")


# -------------------------------------------------------------------------------------------------------------- output


def _sampling(config: GenerateConfig) -> dict[str, Any]:
    return config.draw.arguments()


def _write_pictures(folder: Path, model: LVerse, config: GenerateConfig, about: list[dict], pictures, shown) -> None:
    """PNG files with metadata, pictures.jsonl and grid.png, whose rows begin with the pictures in `shown`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**_sampling(config), "rerank": config.draw.rerank}
    lines = []
    for i, (source, row) in enumerate(zip(about, pictures, strict=True)):
        for j, picture in enumerate(row):
            entry = {"file": f"{i:04d}_{j:02d}.png", **source, "number": j, "settings": settings}
            lines.append(entry | {"model": model.fingerprints})
            metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in lines[-1].items()}
            save_png(picture, folder / entry["file"], metadata | {"seed": str(config.draw.seed), "Software": "L-Verse"})
    runs.write_whole(folder / "pictures.jsonl", _jsonl(lines))
    rows = [(source["text"], [*first, *row]) for source, first, row in zip(about, shown, pictures, strict=True)]
    save_png(grid(rows[:GRID_ROWS]), folder / "grid.png", {"settings": json.dumps(settings)})
    more = f", the first {GRID_ROWS} rows in" if len(rows) > GRID_ROWS else ", all in"
    print(f"{len(lines)} pictures written to {folder}{more} {folder / 'grid.png'} (seed {config.draw.seed})")


def _jsonl(lines: list[dict]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
