"""Images with captions: folders, COCO's and Karpathy's JSON, tables, and generated pairs for smoke tests.

All give `(image, caption)`: the image as in images.py (float32 (3, R, R) in [-1, 1], or uint8), the caption a string.
An image may have several captions. Which of them, and which crop, index i shows in epoch e is a pure function of
(seed, e, i). `dataset.captions(i)` gives all of them. `dataset.describe()` counts what was found and what was left out:
images without a caption, captions without an image, empty captions.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from latent_verse.data import DataError
from latent_verse.data.caption_files import Pair, caption_lines, check_file, entries, read_json, sorted_out, table_rows
from latent_verse.data.images import (
    EXTENSIONS,
    FakeDataset,
    ImageFiles,
    MapImages,
    PathList,
    Strings,
    check_folder,
    nothing_found,
    walk,
)
from latent_verse.data.transforms import mix_seed

log = logging.getLogger(__name__)

CROP_SEED, CAPTION_SEED = 0, 1  # a sample's crop and its caption are chosen by separate random numbers


class EncodedCaption(NamedTuple):
    """A caption with its ids, tokenized ahead of training; see codes.py."""

    text: str
    ids: list[int]


class CaptionList:
    """The captions of each image; those of image i are numbered from `starts[i]` on, counted over all images."""

    def __init__(self, captions: Iterable[Sequence[str]]):
        starts = array("q", [0])

        def texts() -> Iterator[str]:
            for of_one in captions:
                for caption in of_one:
                    yield caption.encode("utf-8", "replace").decode()  # a JSON file can hold lone surrogates
                starts.append(starts[-1] + len(of_one))

        self._texts = Strings(texts())
        self.starts = np.array(starts, np.int64)

    def __getitem__(self, i: int) -> list[str]:
        return [self._texts[number] for number in range(self.starts[i], self.starts[i + 1])]


class PairDataset(MapImages):
    """What datasets of pairs share: which caption an item shows. A subclass gives `captions` besides what images need.

    In training the pair that stands in for an unreadable one brings its own caption.

    Attributes:
        source: where the pairs come from, in words.
        ids: image file -> its id, in evaluation with a captions file that gives ids.
    """

    crop_seed = (CROP_SEED,)
    source = ""
    ids: dict[str, int | str | None]

    def captions(self, i: int) -> list[str]:
        """All captions of item i, at least one."""
        raise NotImplementedError

    def target(self, used: int, epoch: int, index: int) -> str:
        captions = self.captions(used)
        return captions[mix_seed(self.seed, epoch, index, CAPTION_SEED) % len(captions)]

    def image_path(self, i: int) -> str | None:
        """The file of item i; None where there is none."""
        return None

    def describe(self) -> dict[str, str | int]:
        """Where the pairs come from and how many there are."""
        return {"source": self.source, "pairs": len(self)}


class PairFiles(PairDataset, ImageFiles):
    """Pairs whose images are files. A subclass finds the pairs and hands them to `_hold`.

    Raises:
        DataError: a folder or file is missing or damaged, no image has a caption, or none can be read.
    """

    def _hold(self, source: str, pairs: list[Pair], left_out: dict[str, list[str]], remedy: str) -> None:
        """Keep the pairs. `left_out`: what was skipped -> its names; `remedy`: what to do if nothing is left."""
        self.source = source
        self.left_out = {what: len(names) for what, names in left_out.items()}
        found = "; ".join(f"{len(n)} {what} (the first: {n[0]})" for what, n in left_out.items() if n)
        if not pairs:
            raise DataError(f"{self.key}: no image with a caption in {source}{': ' + found if found else ''}. {remedy}")
        if found:
            log.warning("%s: %d pairs; left out: %s", source, len(pairs), found)
        self._captions = CaptionList(captions for _, captions in pairs)
        self._hold_paths(PathList("", [path for path, _ in pairs]), source)

    def captions(self, i: int) -> list[str]:
        return self._captions[i]

    def image_path(self, i: int) -> str:
        return self.paths[i]

    def describe(self) -> dict[str, str | int]:
        return {**super().describe(), "captions": int(self._captions.starts[-1]), **self.left_out}


class PairFolder(PairFiles):
    """`name.jpg` (or png, webp, ...) with `name.txt` beside it, at any depth; one caption per line."""

    def __init__(self, root: str | os.PathLike, resolution: int, **options):
        super().__init__(resolution, **options)
        root = check_folder(root, self.key)
        others: Counter = Counter()
        images, texts = [], {}
        for name in walk(root, (*EXTENSIONS, ".txt"), others):
            stem, extension = os.path.splitext(name)
            if extension.lower() == ".txt":
                texts[stem] = os.path.join(root, name)
            else:
                images.append((stem, os.path.join(root, name)))
        if not images:
            others[".txt"] += len(texts)
            raise DataError(f"{self.key}: no image below {root}: {nothing_found(others)} Put name.txt beside name.jpg.")
        captions = {stem: caption_lines(texts[stem]) for stem, _ in images if stem in texts}
        pairs = [(path, captions[stem]) for stem, path in images if captions.get(stem)]
        bare = [path for stem, path in images if stem not in captions]
        empty = [path for stem, path in images if captions.get(stem) == []]
        lonely = [path for stem, path in texts.items() if stem not in captions]
        left_out = {"images without a .txt": bare, "texts without an image": lonely, "empty captions": empty}
        self._hold(root, pairs, left_out, "Put the captions of name.jpg into name.txt beside it, one per line.")


class CocoCaptions(PairFiles):
    """COCO's captions_*.json: {"images": [{id, file_name}], "annotations": [{image_id, caption}]}, and its images."""

    def __init__(self, path: str | os.PathLike, image_dir: str | os.PathLike, resolution: int, **options):
        super().__init__(resolution, **options)
        content, path = read_json(path, self.key)
        image_dir = check_folder(image_dir, self.key)
        images = entries(content, "images", {"id": (int, str), "file_name": str}, path, self.key)
        annotations = entries(content, "annotations", {"image_id": (int, str), "caption": object}, path, self.key)
        files = {image["id"]: os.path.join(image_dir, image["file_name"]) for image in images}
        captions: dict[object, list[str]] = {i: [] for i in files}
        lonely = []
        for annotation in annotations:
            if annotation["image_id"] in captions:
                captions[annotation["image_id"]].append(annotation["caption"])
            else:
                lonely.append(f"image_id {annotation['image_id']}")
        if not self.train:
            self.ids = {file: i for i, file in files.items()}
        kept, left_out = sorted_out(((file, captions[i]) for i, file in files.items()), path)
        left_out["captions without an image"] = lonely
        self._hold(path, kept, left_out, f"Are the images below {image_dir}?")


class KarpathyCaptions(PairFiles):
    """Karpathy's dataset_coco.json: {"images": [{filename, filepath, cocoid, split, sentences: [{raw}]}]}.

    Image paths are image_dir/filepath/filename; filepath and cocoid may be left out. `split` may join several with +,
    such as train+restval, the usual training set. Only COCO's file has a restval: files without it are read without it.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        image_dir: str | os.PathLike,
        resolution: int,
        split: str = "train+restval",
        **options,
    ):
        super().__init__(resolution, **options)
        content, path = read_json(path, self.key)
        image_dir = check_folder(image_dir, self.key)
        images = entries(content, "images", {"filename": str, "split": str, "sentences": list}, path, self.key)
        for i, image in enumerate(images):
            image.setdefault("filepath", "")
            for sentence in image["sentences"]:
                if not isinstance(sentence, dict) or "raw" not in sentence:
                    raise DataError(
                        f"{self.key}: images[{i}] of {path} has the sentence {sentence!r}; Karpathy's file holds "
                        'captions as {"raw": "..."}.'
                    )
        entries(content, "images", {"filepath": str}, path, self.key)
        splits = Counter(image["split"] for image in images)
        names = [name for name in split.split("+") if name in splits or name != "restval"] or [split]
        for name in names:
            if name not in splits:
                known = ", ".join(f"{s} ({n})" for s, n in splits.items()) or "none at all"
                raise DataError(f"{self.key}: {path} has no split {name!r}; its splits are {known}.")
        chosen = [image for image in images if image["split"] in names]
        files = [os.path.join(image_dir, image["filepath"], image["filename"]) for image in chosen]
        if not self.train:
            self.ids = {file: image.get("cocoid") for file, image in zip(files, chosen, strict=True)}
        captions = [[sentence["raw"] for sentence in image["sentences"]] for image in chosen]
        kept, left_out = sorted_out(zip(files, captions, strict=True), path)
        self._hold(f"{path} ({'+'.join(names)})", kept, left_out, f"Are the images below {image_dir}?")


class TableCaptions(PairFiles):
    """.csv, .tsv or .jsonl with an image path (absolute, or relative to the table) and a caption in each row.

    Columns are found by name: image, image_path, filepath, file_name, filename or path; caption, captions, text or
    title. Rows of the same image are its captions; in .jsonl a caption may also be a list of them.
    """

    def __init__(self, path: str | os.PathLike, resolution: int, **options):
        super().__init__(resolution, **options)
        path = check_file(path, self.key)
        folder = os.path.dirname(path)
        by_image: dict[str, list[str]] = {}
        nameless = []
        for where, image, captions in table_rows(path, self.key):
            if image:
                by_image.setdefault(os.path.join(folder, image), []).extend(captions)
            else:
                nameless.append(where)
        kept, left_out = sorted_out(by_image.items(), path)
        left_out["rows without an image"] = nameless
        self._hold(path, kept, left_out, f"Image paths in it are relative to {folder or '.'}, or absolute.")


class FakePairs(PairDataset, FakeDataset):
    """Generated images (see images.FakeDataset), each with two generated captions. Nothing is read from disk."""

    source = "made up"

    def captions(self, i: int) -> list[str]:
        return [f"a made-up picture of kind {i % 10}", f"kind {i % 10}, made up"]

    def describe(self) -> dict[str, str | int]:
        return {**super().describe(), "captions": 2 * len(self)}
