"""What generate.py does: generate, complete, caption or score images, and write the results."""

from __future__ import annotations

import itertools
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from latent_verse.checkpoints.shipped import default_model, default_notice
from latent_verse.config import ConfigError, printable
from latent_verse.config.generate import GenerateConfig
from latent_verse.config.messages import counted, shown
from latent_verse.data import DataError
from latent_verse.data.caption_files import clean
from latent_verse.data.folders import EXTENSIONS, describe_files, describe_found, walk
from latent_verse.files import made_folder, setting_named, text_lines, write_text
from latent_verse.inference.arguments import ABOUT_TEXTS
from latent_verse.inference.image_io import grid, load_image, save_png, to_images
from latent_verse.inference.pipeline import LVerse
from latent_verse.inference.placement import best_device
from latent_verse.training import runs

GROUP = 1024  # images in memory at a time
GRID_ROWS = 64  # of grid.png
TEXT_FILE_BYTES = 1 << 26  # 64 MiB: the images of more texts would not fit into memory


def _open_folder(out: str | None, overwrite: bool) -> Path:
    """The folder for the results, not yet created. If it holds files, `overwrite` must allow it."""
    if out is None and not overwrite:
        return runs.new_folder(".", "generated")
    folder = Path(out or "generated")
    if os.path.isdir(folder) and os.listdir(folder) and not overwrite:
        raise ConfigError(f"out: {folder} holds files already. Give another folder, or --overwrite to replace them.")
    return folder


def load(config: GenerateConfig) -> LVerse:
    """`LVerse.from_pretrained` on the device that the settings ask for, with a progress bar."""
    name = config.what.model
    if name is None:
        name = str(default_model())
        print(default_notice("No --model given", "--model results/NAME/bundle"), file=sys.stderr)
    device = best_device() if config.write.gpus else "cpu"
    if config.write.gpus and device == "cpu":
        print("No GPU on this machine: using the CPU.", file=sys.stderr)
    # bfloat16 changes scores by more than close texts differ in, which matters where they are printed
    dtype = None if config.what.score and config.write.dtype == "auto" else config.write.dtype
    model = LVerse.from_pretrained(name, device=device, dtype=dtype)
    model.progress, model.too_long = True, config.draw.text_too_long
    return model


def run(config: GenerateConfig, task: str) -> None:
    """Do the task that `resolve_generate` returns, and write or print the results."""
    texts = read_texts(config)
    if task == "score":
        print_scores(load(config), config, texts)
        return
    folder = _open_folder(config.write.out, config.write.overwrite)
    with made_folder(folder, "out"):
        if task == "image":
            caption_images(load(config), config, folder)
        else:
            {"text": generate_images, "complete": complete_images}[task](load(config), config, texts, folder)


def generate_images(model: LVerse, config: GenerateConfig, texts: list[str], folder: Path) -> None:
    """Images for texts: one PNG each, grid.png and pictures.jsonl. They are written in groups, as they are made."""
    settings = config.draw.arguments() | {"rerank": config.draw.rerank}
    written, size = _Images(folder, model, settings), max(1, GROUP // (config.draw.num * max(1, config.draw.rerank)))
    if len(model.encode_texts(texts).unique(dim=0)) < len(texts):
        size = len(texts)  # a text that comes again has new samples, but only within a call
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ABOUT_TEXTS)  # which the line above gave for all texts
        for start in range(0, len(texts), size):
            group = texts[start : start + size]
            written.add([{"text": text} for text in group], model.text_to_image(group, config.draw.num, **settings))
    written.finish()


def complete_images(model: LVerse, config: GenerateConfig, texts: list[str], folder: Path) -> None:
    """Images whose top is given: one PNG each, grid.png (the given image first) and pictures.jsonl.

    Args:
        texts: none, one for all images, or one for each.
    """
    source, rows = config.what.complete, config.what.rows
    assert source is not None and rows is not None  # resolve_generate
    given = dict(read_images([source], model.vae.config.resolution))
    text = texts[0] if len(texts) == 1 else texts or None
    settings = config.draw.arguments() | {"rerank": config.draw.rerank}
    images = model.complete(list(given.values()), rows, text, config.draw.num, **settings)
    texts = texts * len(given) if len(texts) == 1 else texts or [""] * len(given)
    about = [{"text": text, "completed": name, "rows": rows} for text, name in zip(texts, given, strict=True)]
    originals = [to_images(x_CHW[None]) for x_CHW in given.values()]
    written = _Images(folder, model, settings)
    written.add(about, images, originals)
    written.finish()


def caption_images(model: LVerse, config: GenerateConfig, folder: Path) -> None:
    """Captions for images: printed, and captions.jsonl with one image per line."""
    settings = config.draw.arguments() | {"beams": config.draw.beams}
    images, lines = read_images(config.what.image, model.vae.config.resolution), list[dict]()
    while group := list(itertools.islice(images, GROUP)):
        captions = model.image_to_text([image for _, image in group], config.draw.num, **settings)
        for (name, _), found in zip(group, captions, strict=True):
            lines.append({"image": name, "captions": found, "settings": settings, **_about(model)})
        write_text(folder / "captions.jsonl", _jsonl(lines))  # after each group: a later image may be an error
        for (name, _), found in zip(group, captions, strict=True):  # written first: printing may fail too
            print("\n".join(f"{printable(name)}: {printable(text)}" for text in found))
    print(f"Written to {folder / 'captions.jsonl'}")


def print_scores(model: LVerse, config: GenerateConfig, texts: list[str]) -> None:
    """Print a table of log-likelihoods, every image with every text."""
    images = list(read_images(config.what.score[:1], model.vae.config.resolution))
    tensors = [image for _, image in images]
    of_text, of_image = (model.score(tensors, texts, given=given).tolist() for given in ("image", "text"))
    names = [printable(name) for name, _ in images]
    width = max(len("image"), *map(len, names))
    print(f"{'log p(text | image)':>19}  {'log p(image | text)':>19}  {'image':<{width}}  text")
    for i, name in enumerate(names):
        for j, text in enumerate(texts):
            print(f"{of_text[i][j]:>19.3f}  {of_image[i][j]:>19.3f}  {name:<{width}}  {printable(text)}")


def read_texts(config: GenerateConfig) -> list[str]:
    """The texts of `text` or `score`, of which there may be none, or the lines of `text_file` that hold a text.

    Raises:
        ConfigError: a text is not text or has no visible character; the file is too large, or no line of it holds one.
        FileError: the file cannot be read.
    """
    name = config.what.text_file
    if name is None:
        setting, texts = ("score", config.what.score[1:]) if config.what.score else ("text", config.what.text)
        for text in texts:
            if why := _no_text(text):
                raise ConfigError(f"{setting}: the text {shown(text)} {why}. Give another, or leave it out.")
        return list(texts)
    if os.path.isfile(name) and os.path.getsize(name) > TEXT_FILE_BYTES:
        raise ConfigError(f"text_file: {name} is larger than {TEXT_FILE_BYTES} bytes. Split it.")
    with setting_named("text_file"):
        lines = [line.strip() for line in text_lines(name)]
    reasons = {number: _no_text(line) for number, line in enumerate(lines, start=1) if line}
    left_out = [f"line {number} {reason}" for number, reason in reasons.items() if reason]
    if left_out:
        print(
            f"left out: {counted(len(left_out), 'line')} of {printable(name)}, the first: {left_out[0]}",
            file=sys.stderr,
        )
    if len(left_out) == len(reasons):
        raise ConfigError(f"text_file: {name} holds no text; write one text per line.")
    return [lines[number - 1] for number, reason in reasons.items() if not reason]


def _no_text(text: str) -> str:
    """Why this is not a text to generate for; "" if it is one."""
    try:
        return "" if clean(text) else "has no visible character"
    except DataError as error:
        return str(error)


def _find_images(names: Sequence[str]) -> list[tuple[str, bool]]:
    """(file, whether it is one of `names`) for every file of `names` and every image below its folders."""
    found = []
    for name in names:
        path, others = Path(name), Counter[str]()
        if not path.exists():
            raise DataError(f"{printable(name)} does not exist. Give an image or a folder of images.")
        inside = [str(path / file) for file in walk(str(path), EXTENSIONS, others)] if path.is_dir() else []
        if path.is_dir() and not inside:
            raise DataError(f"no image below {name}: looked for {' '.join(EXTENSIONS)}, {describe_files(others)}.")
        if inside:
            print(f"{printable(name)}: {describe_found(len(inside), 'image', others)}", file=sys.stderr)
        found += [(file, False) for file in inside] or [(str(path), True)]
    return found


def read_images(names: Sequence[str], resolution: int) -> Iterator[tuple[str, Tensor]]:
    """(file, x_CHW) of every file of `names` and every image below its folders, where unreadable ones are left out.

    Raises:
        DataError: a file of `names` is absent or cannot be read, or a folder has no image, or none can be read.
    """
    files, unreadable = _find_images(names), 0
    for file, named in files:
        try:
            x_CHW = load_image(file, resolution)
        except DataError as error:
            if named:
                raise
            print(f"left out: {printable(error)}", file=sys.stderr)
            unreadable += 1
        else:
            yield file, x_CHW
    if unreadable == len(files):
        raise DataError(f"none of {len(files)} images can be read, the first being {files[0][0]}. Are the files whole?")


class _Images:
    """PNG files with metadata, and pictures.jsonl, which are written as images are added; in the end grid.png."""

    def __init__(self, folder: Path, model: LVerse, settings: dict[str, object]):
        self.folder, self.model, self.settings = folder, model, settings
        self.texts = 0  # so far; each has a row of images
        self.lines: list[dict] = []
        self.rows: list[tuple[str, list[Image.Image]]] = []  # of the grid

    def add(
        self,
        about: Sequence[Mapping[str, object]],
        images: Sequence[Sequence[Image.Image]],
        originals: Sequence[Sequence[Image.Image]] | None = None,
    ) -> None:
        """Write a row of images for each of `about`; in the grid, it begins with `originals`."""
        for i, (source, row) in enumerate(zip(about, images, strict=True)):
            for j, image in enumerate(row):
                file = f"{self.texts:04d}_{j:02d}.png"
                line = {"file": file, **source, "number": j, "settings": self.settings, **_about(self.model)}
                self.lines.append(line)
                metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in line.items()}
                metadata |= {"seed": str(self.settings["seed"]), "Software": "L-Verse"}
                save_png(image, self.folder / file, metadata)
            if self.texts < GRID_ROWS:
                self.rows.append((str(source["text"]), [*(originals[i] if originals else ()), *row]))
            self.texts += 1
        write_text(self.folder / "pictures.jsonl", _jsonl(self.lines))

    def finish(self) -> None:
        """Write the grid, and print where all is."""
        file = self.folder / "grid.png"
        save_png(grid(self.rows), file, {"settings": json.dumps(self.settings)})
        shown = f"the first {GRID_ROWS} rows" if self.texts > GRID_ROWS else "all of them"
        number, seed = counted(len(self.lines), "image"), self.settings["seed"]
        print(f"{number} written to {self.folder}, {shown} in {file} (seed {seed})")


def _about(model: LVerse) -> dict[str, object]:
    """What results depend on besides their settings: the model, and its precision if that is not float32."""
    dtype = str(model.biart.head.weight.dtype).removeprefix("torch.")
    return {"model": model.fingerprints} | ({} if dtype == "float32" else {"dtype": dtype})


def _jsonl(lines: list[dict]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
