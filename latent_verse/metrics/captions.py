"""Quality of captions: BLEU-1..4, METEOR, ROUGE-L, CIDEr and SPICE by pycocoevalcap; diversity by counting.

The field's tokenizer (Stanford's PTBTokenizer), METEOR and SPICE are Java programs. If one cannot run, the metrics that
need it are missing, with the reason; the others are computed on another tokenizer's words, and their protocol says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from latent_verse.data import DataError

PTB = "PTBTokenizer (Stanford CoreNLP 3.4.1), lower case, punctuation removed"
PLAIN = "a regular expression in place of PTBTokenizer: lower case, words and clitics, punctuation removed"
_WORDS = re.compile(r"n't|'(?:s|m|d|re|ve|ll)\b|\w+?(?=n't\b)|[^\W_]+(?:[-.,/][^\W_]+)*")
BLEU_NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
JAVA_NAMES = ("meteor", "spice")
Texts = dict[int, list[str]]  # by number of the image: captions, or references
Scored = dict[str, tuple[float, Sequence[float]]]  # by metric: its value, and that of each image


@dataclass
class CaptionScores:
    """Metrics over all images and of each, by name, and what is missing, with the reason."""

    metrics: dict[str, float]  # on the library's own scale: CIDEr to 10, the others to 1
    each: dict[str, list[float]]  # in the order of the captions
    missing: dict[str, str]
    tokenizer: str
    words: list[list[str]]  # the captions as they were tokenized


def score(generated: Sequence[str], references: Sequence[Sequence[str]], java: bool = True) -> CaptionScores:
    """All metrics of one caption per image against the image's references; without those in Java if `java` is False.

    Raises:
        DataError: no captions, or an image without references.
    """
    if not generated or len(generated) != len(references) or not all(references):
        raise DataError(f"{len(generated)} captions for {len(references)} images, each of which needs a reference.")
    if importlib.util.find_spec("pycocoevalcap") is None:
        reason = "needs the package pycocoevalcap: pip install pycocoevalcap"
        words = [plain_words(text) for text in generated]
        missing = dict.fromkeys((*BLEU_NAMES, "rouge_l", "cider", *JAVA_NAMES), reason)
        return CaptionScores({}, {}, missing, PLAIN, words)
    res, gts, tokenizer, no_java = _tokenize(generated, references, java)
    out = CaptionScores({}, {}, {}, tokenizer, [res[i][0].split() for i in res])
    _add(out, "bleu", _bleu, gts, res)
    _add(out, "rouge_l", _rouge_l, gts, res)
    if len(res) == 1:
        out.missing["cider"] = "needs more than one image: it weighs words by how many images they occur with"
    else:
        _add(out, "cider", _cider, gts, res)
    if no_java:
        out.missing |= dict.fromkeys(JAVA_NAMES, no_java)
        return out
    _add(out, "meteor", _meteor, gts, res)
    absent = spice_missing()
    if absent:
        out.missing["spice"] = absent
    else:
        _add(out, "spice", _spice, gts, res)
    return out


def _add(out: CaptionScores, name: str, scorer: Callable[[Texts, Texts], Scored], gts: Texts, res: Texts) -> None:
    """Keep what a scorer returns. If it fails, as Java programs may, the metric is missing."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some of them print
            found = scorer(gts, res)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        out.missing[name] = f"its scorer failed: {type(error).__name__}: {str(error).strip()[:200]}"
        return
    for key, (value, each) in found.items():
        out.metrics[key], out.each[key] = float(value), [float(of_image) for of_image in each]


def _bleu(gts: Texts, res: Texts) -> Scored:
    from pycocoevalcap.bleu.bleu import Bleu

    values, each = Bleu(4).compute_score(gts, res, verbose=0)
    return {name: (values[n], each[n]) for n, name in enumerate(BLEU_NAMES)}


def _rouge_l(gts: Texts, res: Texts) -> Scored:
    from pycocoevalcap.rouge.rouge import Rouge

    return {"rouge_l": Rouge().compute_score(gts, res)}


def _cider(gts: Texts, res: Texts) -> Scored:
    from pycocoevalcap.cider.cider import Cider

    return {"cider": Cider().compute_score(gts, res)}


def _meteor(gts: Texts, res: Texts) -> Scored:
    from pycocoevalcap.meteor.meteor import Meteor

    scorer = Meteor()
    try:
        return {"meteor": scorer.compute_score(gts, res)}
    finally:
        scorer.meteor_p.kill()


def _spice(gts: Texts, res: Texts) -> Scored:
    import subprocess

    from pycocoevalcap.spice.spice import Spice

    try:
        value, each = Spice().compute_score(gts, res)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{error}; SPICE 1.0 was written for Java 8") from error
    return {"spice": (value, [scores["All"]["f"] for scores in each])}


def spice_missing() -> str:
    """Why SPICE cannot run, or "": it needs Stanford CoreNLP 3.6.0, which pycocoevalcap would download by itself."""
    spec = importlib.util.find_spec("pycocoevalcap.spice")
    lib = Path(spec.submodule_search_locations[0]) / "lib"
    names = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
    absent = [name for name in names if not (lib / name).is_file()]
    if not absent:
        return ""
    url = "http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
    return f"needs {' and '.join(absent)} in {lib}, from {url}"


def _tokenize(
    generated: Sequence[str], references: Sequence[Sequence[str]], java: bool
) -> tuple[Texts, Texts, str, str]:
    """(captions, references, both tokenized; which tokenizer; why not the field's, or "")."""
    no_java = "" if java else "needs Java, which java: false turns off"
    if java and not shutil.which("java"):
        no_java = "needs Java, and there is no `java` on this machine's PATH"
    res = {i: [" ".join(text.split())] for i, text in enumerate(generated)}
    gts = {i: [" ".join(text.split()) for text in texts] for i, texts in enumerate(references)}
    if not no_java:
        try:
            return _ptb(res), _ptb(gts), PTB, ""
        except (OSError, ValueError) as error:  # Java does not start, or the package's folder is not writable
            no_java = f"needs PTBTokenizer, which failed: {type(error).__name__}: {error}"
    res, gts = ({i: [" ".join(plain_words(text)) for text in texts] for i, texts in of.items()} for of in (res, gts))
    return res, gts, PLAIN, no_java


def _ptb(texts: Texts) -> Texts:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    with _quiet_stderr():
        tokenized = PTBTokenizer().tokenize({i: [{"caption": text} for text in of] for i, of in texts.items()})
    counts = {i: len(of) for i, of in texts.items()}
    if {i: len(of) for i, of in tokenized.items()} != counts:
        raise ValueError(f"it gave {sum(map(len, tokenized.values()))} lines for {sum(counts.values())}")
    return tokenized


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Silence stderr, where the tokenizer, a process of its own, reports its speed."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def plain_words(text: str) -> list[str]:
    """The words of a text without Java: "It's red, isn't it?" -> it 's red is n't it."""
    return _WORDS.findall(text.lower().replace("’", "'"))


def diversity(words: Sequence[Sequence[str]]) -> dict[str, float]:
    """Shares of distinct n-grams (Li et al., 2016) and captions, vocabulary and mean length of tokenized captions."""
    out = {}
    for n in (1, 2, 3):
        grams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
        if grams:
            out[f"distinct_{n}"] = len(set(grams)) / len(grams)
    out["vocabulary"] = float(len({word for row in words for word in row}))
    out["words_per_caption"] = sum(map(len, words)) / len(words)
    out["different_captions"] = len({tuple(row) for row in words}) / len(words)
    return out


def read_captions_file(path: Path, ids: Sequence[int | str], names: Sequence[str]) -> list[str]:
    """The captions of another system, in the order of the data's images.

    Args:
        path: COCO results JSON ([{"image_id", "caption"}]), or JSON lines with `image` and `captions` (the first
            counts) or `caption`, as generate.py writes them.
        ids, names: of the data's images; entries are matched by id, by name, or by the name without folders.

    Raises:
        DataError: no such file, another format, an image without a caption, or no caption of an image of the data.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"captions_file: {path} cannot be read as UTF-8 text: {error}") from error
    try:
        if text.lstrip().startswith("["):
            entries = json.loads(text)
        else:
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"captions_file: {path} is neither COCO results JSON nor JSON lines ({error}).") from error
    places = {os.path.basename(name): i for i, name in reversed(list(enumerate(names)))}  # of equal ones, the first
    places |= {name: i for i, name in enumerate(names)} | {found: i for i, found in enumerate(ids)}
    captions: dict[int, str] = {}
    unknown = []
    for number, entry in enumerate(entries):
        try:
            key = entry["image_id"] if "image_id" in entry else entry["image"]
            caption = entry["caption"] if "caption" in entry else entry["captions"][0]
        except (TypeError, KeyError, IndexError) as error:
            raise DataError(
                f"captions_file: entry {number} of {path} is {str(entry)[:80]!r}; it needs image_id (or image) and "
                "caption (or captions)."
            ) from error
        if not isinstance(caption, str):
            raise DataError(f"captions_file: the caption of entry {number} of {path} is {caption!r}, not a text.")
        place = places.get(key, places.get(os.path.basename(str(key))))
        if place is None:
            unknown.append(key)
        else:
            captions.setdefault(place, caption)
    without = [str(ids[i]) for i in range(len(ids)) if i not in captions]
    if unknown and len(unknown) == len(entries):
        raise DataError(f"captions_file: none of its images ({unknown[0]!r}, ...) is in the data ({names[0]!r}, ...).")
    if without:
        raise DataError(
            f"captions_file: {path} has no caption for {len(without)} of {len(ids)} images (the first: {without[0]}). "
            "The field's metrics are over all images: complete the file, or limit both with caption_pictures."
        )
    return [captions[i] for i in range(len(ids))]


def coco_results(ids: Sequence[int | str], captions: Sequence[str]) -> str:
    """The captions as COCO results JSON, for its evaluation server and other tools."""
    rows = [{"image_id": i, "caption": text} for i, text in zip(ids, captions, strict=True)]
    return json.dumps(rows, ensure_ascii=False, indent=0) + "\n"
