"""Images with captions: folders, COCO's and Karpathy's JSON, tables, and generated pairs for smoke tests.

All give `(image, caption)`: the image as in images.py (float32 (3, R, R) in [-1, 1], or uint8), the caption a string.
An image may have several captions. Which of them, and which crop, index i shows in epoch e is a pure function of
(seed, e, i). `dataset.captions(i)` gives all of them. `dataset.describe()` counts what was found and what was left out:
images without a caption, captions without an image, empty captions, captions that cannot be read.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from latent_verse.config import UserError, printable
from latent_verse.config.messages import shown
from latent_verse.config.settings import expand
from latent_verse.data import DataError
from latent_verse.data.caption_files import (
    Pair,
    caption_lines,
    check_file,
    entries,
    identifier,
    ids_of,
    image_file,
    read_captions_json,
    table_rows,
    usable_pairs,
)
from latent_verse.data.folders import EXTENSIONS, check_folder, nothing_found, walk
from latent_verse.data.images import FakeDataset, ImageFiles, MapImages, PathList, Strings
from latent_verse.data.transforms import mix_seed

log = logging.getLogger(__name__)

NAMED = 100  # unreadable texts that are logged one by one; the rest are only counted
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
                yield from of_one
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
    unit = "pair"
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

    Args:
        captions_key: the setting that messages about the captions file mention, as `key` in those about the images.

    Raises:
        DataError: a folder or file is missing or damaged, no image has a caption, or none can be read.
    """

    def __init__(self, resolution: int, captions_key: str | None = None, **options):
        super().__init__(resolution, **options)
        self.captions_key = captions_key or self.key.removesuffix("_dir") + "_captions"

    def _hold(self, source: str, pairs: list[Pair], left_out: dict[str, list[str]], key: str, remedy: str) -> None:
        """Keep the pairs.

        Args:
            left_out: what was skipped -> its names.
            key, remedy: if nothing is left, the setting to name, and what to do.
        """
        self.source = source
        self.left_out = {what: len(names) for what, names in left_out.items()}
        found = "; ".join(f"{len(n)} {what} (the first: {printable(n[0][:1000])})" for what, n in left_out.items() if n)
        if not pairs:
            raise DataError(f"{key}: no image with a caption in {source}{': ' + found if found else ''}. {remedy}")
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
        images, second = [], list[str]()
        texts: dict[str, str] = {}
        for name in walk(root, (*EXTENSIONS, ".txt"), self.others):
            stem, extension = os.path.splitext(name)
            if extension.lower() != ".txt":
                images.append((stem, os.path.join(root, name)))
            elif stem in texts:
                second.append(os.path.join(root, name))  # a.TXT and a.txt
            else:
                texts[stem] = os.path.join(root, name)
        if not images:
            found = nothing_found(self.others + Counter({".txt": len(texts)}))
            raise DataError(f"{self.key}: no image below {root}: {found} Put name.txt beside name.jpg.")
        captions: dict[str, list[str]] = {}
        unreadable = {}
        for stem in dict.fromkeys(stem for stem, _ in images if stem in texts):
            try:
                captions[stem] = caption_lines(texts[stem])
            except UserError as error:
                unreadable[stem] = str(error)
                if len(unreadable) <= NAMED:
                    log.warning("skipped unreadable captions: %s", printable(error))
        pairs = [(path, captions[stem]) for stem, path in images if captions.get(stem)]
        bare = [path for stem, path in images if stem not in texts]
        empty = [path for stem, path in images if captions.get(stem) == []]
        with_image = {stem for stem, _ in images}
        lonely = [path for stem, path in texts.items() if stem not in with_image]
        left_out = {"images without a .txt": bare, "texts without an image": lonely, "empty captions": empty}
        left_out |= {"unreadable texts": list(unreadable.values())} if unreadable else {}
        left_out |= {"second texts of an image": second} if second else {}
        remedy = "Put the captions of name.jpg into name.txt beside it, one per line."
        self._hold(root, pairs, left_out, self.key, remedy)


class CocoCaptions(PairFiles):
    """COCO's captions_*.json: {"images": [{id, file_name}], "annotations": [{image_id, caption}]}, and its images.

    Ids are ints or strings; 139 and "139" are the same. An image that is listed twice has the captions of both entries.

    Raises:
        DataError: as PairFiles; two different files have one id.
    """

    def __init__(self, path: str | os.PathLike, image_dir: str | os.PathLike, resolution: int, **options):
        super().__init__(resolution, **options)
        key = self.captions_key
        content, path = read_captions_json(path, key)
        image_dir = check_folder(image_dir, self.key)
        images = entries(content, "images", {"id": object, "file_name": str}, path, key)
        annotations = entries(content, "annotations", {"image_id": object, "caption": object}, path, key)
        files: dict[int | str, str] = {}
        ids = ids_of(images, "id", "images", path, key)
        for image, i in zip(images, ids, strict=True):
            file = image_file(image_dir, image["file_name"])
            if files.setdefault(i, file) != file:
                raise DataError(f"{key}: {path}: {files[i]} and {file} have one id, {i!r}. Give each image its own.")
        captions: dict[str, list[str]] = {file: [] for file in files.values()}
        lonely = []
        for annotation, i in zip(annotations, ids_of(annotations, "image_id", "annotations", path, key), strict=True):
            if i in files:
                captions[files[i]].append(annotation["caption"])
            else:
                lonely.append(f"image_id {i}")
        if not self.train:
            self.ids = {files[i]: image["id"] for image, i in zip(reversed(images), reversed(ids), strict=True)}
        kept, left_out = usable_pairs(captions.items(), path, key)
        left_out["captions without an image"] = lonely
        if len(captions) < len(images):
            left_out["second entries of an image"] = _repeated(image_file("", image["file_name"]) for image in images)
        self._hold(path, kept, left_out, key, f"Are the images below {image_dir}?")


def _repeated(names: Iterable[str]) -> list[str]:
    """The names that have come before."""
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]


class KarpathyCaptions(PairFiles):
    """Karpathy's dataset_coco.json: {"images": [{filename, filepath, cocoid, split, sentences: [{raw}]}]}.

    Image paths are image_dir/filepath/filename; filepath and cocoid may be left out. `split` may join several with +,
    such as train+restval, the usual training set. Only COCO's file has a restval: files without it are read without it.
    An image that is listed twice has the sentences of both entries.

    Raises:
        DataError: as PairFiles; no such split, or a cocoid is neither int nor str.
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
        key = self.captions_key
        content, path = read_captions_json(path, key)
        image_dir = check_folder(image_dir, self.key)
        images = entries(content, "images", {"filename": str, "split": str, "sentences": list}, path, key)
        for i, image in enumerate(images):
            image.setdefault("filepath", "")
            for sentence in image["sentences"]:
                if not isinstance(sentence, dict) or "raw" not in sentence:
                    raise DataError(
                        f"{key}: images[{i}] of {path} has the sentence {shown(sentence)}; Karpathy's file holds "
                        'captions as {"raw": "..."}.'
                    )
        entries(content, "images", {"filepath": str}, path, key)
        splits = Counter(image["split"] for image in images)
        names = [name for name in split.split("+") if name in splits or name != "restval"] or [split]
        for name in names:
            if name not in splits:
                known = ", ".join(f"{s} ({n})" for s, n in splits.items()) or "none at all"
                raise DataError(f"{key}: {path} has no split {name!r}; its splits are {known}.")
        chosen = [image for image in images if image["split"] in names]
        files = [image_file(image_dir, image["filepath"], image["filename"]) for image in chosen]
        captions: dict[str, list[str]] = {}
        for file, image in zip(files, chosen, strict=True):
            captions.setdefault(file, []).extend(sentence["raw"] for sentence in image["sentences"])
        if not self.train:
            self.ids = self._cocoids(files, chosen, path)
        kept, left_out = usable_pairs(captions.items(), path, key)
        if len(captions) < len(chosen):
            left_out["second entries of an image"] = _repeated(files)
        self._hold(f"{path} ({'+'.join(names)})", kept, left_out, key, f"Are the images below {image_dir}?")

    def _cocoids(self, files: list[str], images: list[dict], path: str) -> dict[str, int | str | None]:
        """The id of each file, None where the file has none."""
        ids: dict[str, int | str | None] = {}
        of_id: dict[int | str, str] = {}
        repeated = ""
        for file, image in zip(files, images, strict=True):
            given = image.get("cocoid")
            if given is not None:
                found = identifier(given)
                if found is None:
                    raise DataError(
                        f"{self.captions_key}: {path}: cocoid of {file} is {shown(given)}, neither int nor str."
                    )
                if of_id.setdefault(found, file) != file:
                    two = f"{of_id[found]} and {file}"
                    repeated = repeated or f"{two} have one cocoid, {found!r}: images are identified by their names"
            ids.setdefault(file, given)
        if repeated:
            log.warning("%s: %s", path, printable(repeated))
        return ids


class TableCaptions(PairFiles):
    """.csv, .tsv or .jsonl with an image path (absolute, below ~, or relative to the table) and a caption in each row.

    Columns are found by name: image, image_path, filepath, file_name, filename or path; caption, captions, text or
    title. Rows of the same image are its captions; in .jsonl a caption may also be a list of them.
    """

    def __init__(self, path: str | os.PathLike, resolution: int, **options):
        super().__init__(resolution, **options)
        key = self.key = self.captions_key  # there is no other setting
        path = check_file(path, key)
        folder = os.path.dirname(path)
        by_image: dict[str, list[str]] = {}
        nameless = []
        for where, image, captions in table_rows(path, key):
            if image:
                image = expand(image, True, key, f" ({where})") if image.startswith("~") else image
                by_image.setdefault(image_file(folder, image), []).extend(captions)
            else:
                nameless.append(where)
        kept, left_out = usable_pairs(by_image.items(), path, key)
        left_out["rows without an image"] = nameless
        backslash = os.sep == "/" and any("\\" in name for name in left_out["missing image files"])
        remedy = f"Image paths in it are relative to {folder or '.'}, or absolute."
        self._hold(path, kept, left_out, key, remedy + (" Write / between folders." if backslash else ""))


class FakePairs(PairDataset, FakeDataset):
    """Generated images (see images.FakeDataset), each with two generated captions. Nothing is read from disk."""

    source = "made up"

    def captions(self, i: int) -> list[str]:
        return [f"a made-up picture of kind {i % 10}", f"kind {i % 10}, made up"]

    def describe(self) -> dict[str, str | int]:
        return {**super().describe(), "captions": 2 * len(self)}
