"""The tasks that evaluate captions and likelihoods: captions, retrieval, classification, bits; each adds records."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from latent_verse.config.evaluate import LikelihoodConfig
from latent_verse.data import DataError
from latent_verse.data.caption_files import clean, setting_named
from latent_verse.data.datasets import how_many
from latent_verse.data.images import ImageDataset
from latent_verse.evaluation import samples
from latent_verse.evaluation.context import Context, Images, Texts
from latent_verse.evaluation.pairs import ordered
from latent_verse.evaluation.records import OWN
from latent_verse.files import text_lines, write_text
from latent_verse.machine import versions
from latent_verse.metrics import captions, likelihood
from latent_verse.metrics.image_quality import as_pil
from latent_verse.metrics.intervals import wilson

log = logging.getLogger(__name__)

SHOWN = {"cider": "CIDEr", "rouge_l": "ROUGE-L"}  # the scores that order captions on the page, by preference
LOG_P = {"image": "text_given_image", "text": "image_given_text"}  # by what is given


def caption(c: Context) -> dict[str, object]:
    """Generate captions, or read another system's, and evaluate them; returns what metrics.json says about them."""
    k, file = c.config.captions, c.config.judged.captions_file
    numbers = list(range(min(k.caption_pictures or len(c.pairs), len(c.pairs))))
    numbers = [i for i in numbers if c.pairs.image(i) is not None]
    if not numbers:
        raise DataError("None of the images can be read. Are the files whole?")
    of_all = c.pairs.image_ids()
    ids = [of_all[i] for i in numbers]
    if file:
        path = Path(file)
        generated = captions.read_captions_file(path, of_all, c.pairs.names, numbers)
        checkpoint, how = {"captions_file": samples.fingerprint_files([path])}, f"captions of {path.name}"
    else:
        read, size = lambda n: c.pairs.image(numbers[n]), c.config.write.batch_size
        generated = samples.caption(c.model, read, len(numbers), c.ranks, beams=k.beams, batch_size=size)
        checkpoint, how = c.model.fingerprints, f"beam search with {k.beams}" if k.beams > 1 else "greedy"
    references = [c.pairs.captions(i) for i in numbers]
    scores = c.ranks.share(lambda: captions.score(generated, references, k.java))
    about = {"samples": len(generated), "checkpoint": checkpoint, "written": how}
    protocol = f"{sum(map(len, references)) / len(references):.3g} references per image; {scores.tokenizer}"
    for name, value in scores.metrics.items():
        library = versions("pycocoevalcap")
        more = {"unit": captions.UNITS.get(name, "0 to 1"), "better": "higher"}
        c.records.add(f"captions/{name}", value, library=library, protocol=protocol, **more, **about)
    for name, reason in scores.missing.items():
        c.records.miss(f"captions/{name}", reason)
    for name, value in captions.diversity(scores.words).items():
        more = {"library": OWN, "protocol": scores.tokenizer, "unit": captions.UNITS.get(name, "0 to 1")}
        c.records.add(f"captions/{name}", value, **more, **about)
    if c.ranks.is_first:
        write_text(c.folder / "captions.json", captions.coco_results(ids, generated))
    key, title = next((pair for pair in SHOWN.items() if pair[0] in scores.each), (None, ""))
    if key:

        def case(i: int) -> tuple[Images, Texts]:
            return {"image": as_pil(c.pairs.image(numbers[i]))}, {
                "caption": [generated[i]],
                "references": references[i],
            }

        c.add_gallery("Captions generated for images", title, scores.each[key], case)
    return {"pictures": len(generated), "references": sum(map(len, references)), "file": "captions.json"}


def _scored(c: Context, given: str) -> str:
    """The score of `likelihood.corrected`, in words."""
    k = c.config.likelihood
    score = f"log p({'text | image' if given == 'image' else 'image | text'})"
    if k.prior_weight:
        score += f" - {k.prior_weight:g} x the candidate's own ({k.prior})"
    if given == "image" and k.length_power:
        score = f"({score}) / tokens^{k.length_power:g}"
    return score


def retrieve(c: Context) -> dict[str, object]:
    """R@1/5/10 both ways, by either likelihood; returns the pool."""
    k = c.config.likelihood
    # as many captions of the fixed sample as images: each is of another image
    chosen, images = c.readable(c.pairs.sample(min(k.retrieval_pictures, len(c.pairs)), c.seed))
    texts, owners = [], []
    for i, sample in enumerate(chosen):
        others = [text for text in c.pairs.captions(sample.index) if text != sample.caption]
        of_it = [sample.caption, *others][: k.retrieval_captions]
        texts += of_it
        owners += [i] * len(of_it)
    if len(chosen) < 2:
        raise DataError(f"retrieval needs at least 2 images that can be read, got {len(chosen)}.")
    scores = likelihood.score_all(c.model, c.model.codes(images), c.model.encode_texts(texts), c.ranks)
    for given, name in LOG_P.items():
        matrix_IT = likelihood.corrected(scores, given, k.length_power, k.prior_weight, k.prior)
        for direction, found in likelihood.retrieval(matrix_IT, torch.tensor(owners)).items():
            queries, pool = len(chosen), len(texts)
            if direction == "text_to_image":
                queries, pool = pool, queries
            for key, value in found.items():
                protocol = f"{_scored(c, given)}; {queries} queries, pool of {pool}; ties count against"
                about: dict[str, object] = {"library": OWN, "protocol": protocol, "pool": pool}
                about |= {"unit": "rank", "better": "lower"}
                if key.startswith("r@"):
                    share = {"interval": wilson(round(value * queries), queries), "unit": "share", "better": "higher"}
                    about |= share
                c.records.add(f"retrieval/{name}/{direction}/{key}", value, samples=queries, **about)
    return {"pictures": len(chosen), "captions": len(texts), "cut_to_text_len": c.cut(texts)}


def open_classes(k: LikelihoodConfig, resolution: int) -> tuple[ImageDataset, list[str]]:
    """The images of `classes_dir`, and the names of its classes.

    Raises:
        DataError: the folder holds no class with an image, or `class_names` cannot be read or lacks one.
    """
    dataset = ImageDataset(k.classes_dir, resolution, train=False, as_uint8=True, key="classes_dir")
    return dataset, class_names(dataset.classes, k.class_names)


def classify(c: Context) -> dict[str, object]:
    """Zero-shot classification of class folders by scoring the classes' names."""
    k, (dataset, names) = c.config.likelihood, c.classes
    if c.ranks.is_first:
        print(f"classes_dir {k.classes_dir}: {how_many(dataset)}")
    files = [os.path.relpath(dataset.paths[i], dataset.paths.root) for i in range(len(dataset))]
    codes_IN, label_I = _codes_and_labels(c, dataset, ordered(files, c.seed)[: k.class_pictures])
    prompts = [k.class_prompt.replace("{}", name) for name in names]
    scores = likelihood.score_all(c.model, codes_IN, c.model.encode_texts(prompts), c.ranks)
    for given, name in LOG_P.items():
        matrix_IC = likelihood.corrected(scores, given, k.length_power, k.prior_weight, k.prior)
        rank_I = likelihood.ranks_of_truth(matrix_IC, label_I[:, None] == torch.arange(len(names)))
        for top in (1, 5):
            if top == 5 and len(names) <= 5:
                continue
            right = int((rank_I <= top).sum())
            protocol = f"{_scored(c, given)}; {len(names)} classes as {k.class_prompt!r}; ties count against"
            about = {"library": OWN, "protocol": protocol, "classes": len(names)}
            about |= {"unit": "share", "better": "higher", "interval": wilson(right, len(label_I))}
            c.records.add(f"zero_shot/{name}/top_{top}", right / len(label_I), samples=len(label_I), **about)
    return {"classes": len(names), "pictures": len(label_I), "cut_to_text_len": c.cut(prompts)}


def _codes_and_labels(c: Context, dataset: ImageDataset, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Codes (I, N) and labels (I) of the images that can be read; at most a batch of images is in memory."""
    codes, labels, size = [], [], c.config.write.batch_size
    for start in c.ranks.follow(range(0, len(numbers), size), "codes"):
        read = [item for i in numbers[start : start + size] if (item := dataset[(0, i)]) is not None]
        if read:
            codes.append(c.model.codes([x for x, _ in read]))
            labels += [label for _, label in read]
    if not labels:
        raise DataError(f"classes_dir: none of the {len(numbers)} images asked for can be read.")
    return torch.cat(codes), torch.tensor(labels)


def class_names(folders: list[str], file: str | None) -> list[str]:
    """A name for each folder: its own, underscores as spaces, or that in the lines `folder<TAB>name` of `file`.

    Raises:
        DataError: the file cannot be read, lacks a folder, or gives it two names.
    """
    if file is None:
        return _told_apart([folder.replace("_", " ") for folder in folders])
    known: dict[str, str] = {}
    with setting_named("class_names"):
        for number, line in enumerate(text_lines(file), start=1):
            folder, tab, name = line.partition("\t")
            try:
                name = name.strip().replace("\t", " ") if clean(name) else ""
            except DataError as error:
                raise DataError(f"class_names: {file} line {number} {error}.") from error
            if tab and known.setdefault(folder, name) != name:
                raise DataError(f"class_names: {file} line {number} names {folder} a second time. Keep one name.")
    without = [folder for folder in folders if not known.get(folder)]
    if without:
        raise DataError(f"class_names: {file} has no line `{without[0]}<TAB>name` ({len(without)} folders lack one).")
    return _told_apart([known[folder] for folder in folders])


def _told_apart(names: list[str]) -> list[str]:
    """The names, with a warning if several classes have one."""
    repeated = [name for name, n in Counter(names).items() if n > 1]
    if repeated:
        log.warning("%d names stand for several classes, which no text can tell apart: %s", len(repeated), repeated[0])
    return names


def likelihoods(c: Context) -> dict[str, object]:
    """Held-out log p of both directions in bits per token, per code and per image dimension; returns the pairs."""
    chosen, images = c.readable(c.pairs.sample(c.config.likelihood.likelihood_pairs, c.seed))
    if not chosen:
        raise DataError("None of the images of the chosen pairs can be read. Are the files whole?")
    texts = [sample.caption for sample in chosen]
    found = likelihood.held_out(c.model, c.model.codes(images), c.model.encode_texts(texts), c.ranks)
    units = {
        "bits_per_token": "log2 p of captions, their ends included, over all tokens of the model's tokenizer",
        "bits_per_code": "log2 p of AugVAE's codes, over their number",
        "bits_per_dimension": "log2 p of AugVAE's codes over 3 x R x R: the rate of a lossy code, not of the pixels",
    }
    for name, (value, error) in found.bits().items():
        protocol = f"{units[name.rsplit('/', 1)[1]]}; teacher forcing, one sampled caption per image"
        about = {"library": OWN, "protocol": protocol, "unit": "bits", "better": "lower"}
        if not math.isnan(error):
            about |= {"standard_error": error, "interval": (value - 1.96 * error, value + 1.96 * error)}
        c.records.add(f"likelihood/{name}", value, samples=len(chosen), **about)
    if found.text_alone_B is None:
        reason = "the model was trained without reference_dropout, so it has no likelihood without a reference"
        for name in ("text_alone/bits_per_token", "image_alone/bits_per_code", "image_alone/bits_per_dimension"):
            c.records.miss(f"likelihood/{name}", reason)
    return {"pairs": len(chosen), "cut_to_text_len": c.cut(texts)}
