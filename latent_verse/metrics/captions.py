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

from latent_verse.config.messages import reason, shown
from latent_verse.data import DataError
from latent_verse.data.caption_files import clean, coco_number, identifier
from latent_verse.data.text import LONG, beginning
from latent_verse.files import parse_json, read_json, setting_named, text_lines

PTB = "PTBTokenizer (Stanford CoreNLP 3.4.1), lower case, punctuation removed"
PLAIN = "a regular expression in place of PTBTokenizer: lower case, words and clitics, punctuation removed"
_WORDS = re.compile(r"n't|'(?:s|m|d|re|ve|ll)\b|\w+?(?=n't\b)|[^\W_]+(?:[-.,/][^\W_]+)*")
BLEU_NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
JAVA_NAMES = ("meteor", "spice")
UNITS = {"cider": "0 to 10", "vocabulary": "words", "words_per_caption": "words"}  # the others are between 0 and 1
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

    Of a text of more than LONG characters the beginning counts: ROUGE-L takes time and memory by the square.

    Raises:
        DataError: no captions, or an image without references.
    """
    if not generated or len(generated) != len(references) or not all(references):
        raise DataError(f"{len(generated)} captions for {len(references)} images, each of which needs a reference.")
    if importlib.util.find_spec("pycocoevalcap") is None:
        reason = "needs the package pycocoevalcap: pip install '.[eval]'"
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
        out.missing[name] = f"its scorer failed: {type(error).__name__}: {reason(error)}"
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
    no_java = "" if java else "needs Java, which java: false (--no-java) turns off"
    if java and not shutil.which("java"):
        no_java = "needs Java, and there is no `java` on this machine's PATH"
    line = lambda text: " ".join(beginning(text, LONG).split())  # noqa: E731
    res = {i: [line(text)] for i, text in enumerate(generated)}
    gts = {i: [line(text) for text in texts] for i, texts in enumerate(references)}
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


def read_captions_file(
    path: Path, ids: Sequence[int | str], names: Sequence[str], wanted: Sequence[int] | None = None
) -> list[str]:
    """The captions of another system, in the order of the images that are wanted.

    Args:
        path: COCO results JSON ([{"image_id", "caption"}]), or JSON lines with `image` and `captions` (the first
            counts) or `caption`, as generate.py writes them.
        ids, names: of all images of the data. Entries are matched by id, by name, where the shorter of two paths is the
            end of the other, or if no name fits by the id in a name like COCO's.
        wanted: the numbers of the images to be evaluated; all by default.

    Raises:
        FileError: no such file, or it cannot be read.
        DataError: another format, an entry that contradicts itself, an image without a caption, one with
            two different captions or whose name could be that of several images, or no caption of an image of the data.
    """
    wanted = range(len(ids)) if wanted is None else wanted
    with setting_named("captions_file"):
        entries = _read_entries(path)
    if not entries:
        raise DataError(f"captions_file: {path} is empty: it holds no caption. Was it written completely?")
    places = _Places(ids, names)
    captions: dict[int, str] = {}
    came: dict[int, int] = {}  # the entry that gave each image its caption
    unknown = []
    for number, entry in enumerate(entries):
        where = f"captions_file: entry {number} of {path}"
        keys, caption = _image_and_caption(entry, where)
        found = [places.find(key, where) for key in keys]
        place, key = found[0], keys[0]
        if len(set(found)) > 1:
            raise DataError(
                f"{where}: image_id {shown(keys[0])} and image {shown(keys[1])} are not the same. Keep one."
            )
        if place is None:
            unknown.append(key)
        elif captions.setdefault(place, caption) != caption:
            raise DataError(f"{where}: the image {shown(key)} has another caption in entry {came[place]}. Keep one.")
        else:
            came.setdefault(place, number)
    without = [str(ids[i]) for i in wanted if i not in captions]
    if unknown and len(unknown) == len(entries):
        raise DataError(
            f"captions_file: none of its images ({shown(unknown[0])}, ...) is in the data ({shown(names[0])}, ...)."
        )
    if without:
        raise DataError(
            f"captions_file: {path} has no caption for {len(without)} of {len(wanted)} images (the first: {without[0]}"
            "). The field's metrics are over all images: complete the file, or limit both with caption_pictures."
        )
    return [captions[i] for i in wanted]


def _image_and_caption(entry: object, where: str) -> tuple[list[int | str], str]:
    """What an entry calls its image, once or twice, and its caption.

    Raises:
        DataError: it has another form, two different captions, or one that is not text.
    """
    own = entry if isinstance(entry, dict) else {}
    keys = [(field, own[field]) for field in ("image_id", "image") if own.get(field) is not None]
    several = own.get("captions")
    firsts = several[:1] if isinstance(several, list) else [several]
    texts = [text for text in (own.get("caption"), *firsts) if text is not None]
    if not keys or not texts:
        needed = "it needs image_id (or image) and caption (or captions)"
        raise DataError(f"{where} is {shown(entry)}; {needed}.")
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"{where}: the caption is {shown(text)}, not a text.")
        try:
            clean(text)
        except DataError as error:
            raise DataError(f"{where}: its caption {error}.") from error
    if texts[0] != texts[-1]:
        raise DataError(f"{where}: its caption and the first of its captions differ. Keep one.")
    for field, key in keys:
        if identifier(key) is None:
            raise DataError(f"{where}: {field} is {shown(key)}, which is neither int nor str.")
    return [key for _, key in keys], texts[0]


def _read_entries(path: Path) -> list:
    """The entries of COCO results JSON, which begins with a bracket, or of JSON lines."""
    first = next((line for line in text_lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        lines = enumerate(text_lines(path), start=1)
        return [parse_json(line, f"{path} line {number}") for number, line in lines if line.strip()]
    content = read_json(path)
    assert isinstance(content, list)  # its first character says so
    return content


class _Places:
    """Which image of the data an id or a name in a captions file means."""

    def __init__(self, ids: Sequence[int | str], names: Sequence[str]):
        self.names = names
        self.by_id = {identifier(found): i for i, found in enumerate(ids)}
        self.whole = {name: i for i, name in reversed(list(enumerate(names)))}  # of equal ones, the first
        self.ending: dict[str, list[int]] = {}
        for name, i in self.whole.items():
            for ending in _endings(name)[1:]:
                self.ending.setdefault(ending, []).append(i)

    def find(self, key: int | str, where: str) -> int | None:
        """The number of the image; None if it is not in the data.

        Raises:
            DataError: several images have this name.
        """
        if identifier(key) in self.by_id:
            return self.by_id[identifier(key)]
        name = os.path.normpath(str(key))
        for ending in _endings(name):
            if ending in self.whole:
                return self.whole[ending]
        places = self.ending.get(name, [])
        if len(places) > 1:
            both = " and ".join(self.names[i] for i in places[:2])
            raise DataError(f"{where}: {shown(key)} could be {both}. Give the path with its folders.")
        if places:
            return places[0]
        number = coco_number(name)
        place = self.by_id.get(number)
        # an image whose own name holds another number than its id shows that the numbers in names are no ids
        return place if place is not None and coco_number(self.names[place]) in (number, None) else None


def _endings(name: str) -> list[str]:
    """a/b/c -> a/b/c, b/c, c."""
    parts = name.replace(os.sep, "/").split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def coco_results(ids: Sequence[int | str], captions: Sequence[str]) -> str:
    """The captions as COCO results JSON, for its evaluation server and other tools."""
    rows = [{"image_id": i, "caption": text} for i, text in zip(ids, captions, strict=True)]
    return json.dumps(rows, ensure_ascii=False, indent=0) + "\n"
