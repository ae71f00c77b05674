"""The tasks that judge pictures: generation, round trips, and the exact truth of shapes. Measurements -> figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_verse.data.shapes import World
from latent_verse.evaluation import captions, generation, round_trips, samples, shapes
from latent_verse.evaluation.context import Context, as_image
from latent_verse.evaluation.figures import OWN, library
from latent_verse.evaluation.intervals import wilson
from latent_verse.evaluation.pairs import ordered
from latent_verse.evaluation.samples import Group, read_picture

CROP = "both sides resized (shorter side, bilinear, antialiased) and centre-cropped to {r} px, 8-bit"


def generate(c: Context) -> dict[str, Any]:
    """Draw pictures, or read another system's, and judge them; returns what metrics.json says of the draw."""
    j, g = c.config.judged, c.config.generation
    drawn = c.pairs.draw(g.eval_captions, c.seed)
    about: dict[str, Any] = {}
    if j.generated_dir:
        groups = samples.read_groups(Path(j.generated_dir).expanduser())
        digest = c.ranks.share(lambda: samples.fingerprint_files([f for group in groups for f in group.files]))
        checkpoint = {"generated_dir": digest}
        texts = {d.caption for d in drawn}
        found = {"captions": len(groups), "captions_of_the_draw": sum(group.text in texts for group in groups)}
        about["generated_dir"] = found | {"candidates": len(groups[0].files), "sha256": digest}
    else:
        folder, checkpoint = c.folder / "samples", c.model.fingerprints
        options = {"candidates": g.candidates, "seed": c.seed, "batch_size": c.config.write.batch_size}
        options["dtype"] = c.config.write.dtype
        samples.draw(c.model, [d.caption for d in drawn], folder, c.ranks, settings=c.drawing, **options)
        groups = samples.read_groups(folder)
        about["draw"] = c.pairs.about(drawn, c.seed) | {"cut_to_text_len": c.cut([d.caption for d in drawn])}
    real = reference(c, {d.index for d in drawn} if g.reference == "drawn" else None)
    clip = score_by_clip(c, groups)
    for prefix, chosen, how in selections(groups, clip):
        selected = {"drawn": len(groups[0].files), "selected_by": how, "checkpoint": checkpoint}
        files = [group.files[n] for group, n in zip(groups, chosen, strict=True)]
        judge_files(c, f"generation/{prefix}", files, real, selected)
        numbers = list(enumerate(chosen))
        if clip is not None:
            values = [clip[i][n] for i, n in numbers]
            add_mean(
                c, f"generation/{prefix}clip_score", values, library("open_clip_torch"), clip_protocol(c), selected
            )
        if all(group.log_p[0] is not None for group in groups):
            values = [groups[i].log_p[n] for i, n in numbers]
            protocol = "mean of the model's log p(text | the codes it drew), in nats"
            add_mean(c, f"generation/{prefix}log_p_text", values, OWN, protocol, selected)
    show(c, groups, clip)
    return about


def add_mean(c: Context, name: str, values: list[float], library: str, protocol: str, more: dict[str, Any]) -> None:
    """The mean of a score over pictures as a figure."""
    mean = sum(values) / len(values)
    c.figures.add(name, mean, samples=len(values), library=library, protocol=protocol, better="higher", **more)


def selections(groups: Sequence[Group], clip: list[list[float]] | None) -> list[tuple[str, list[int], str]]:
    """(prefix of the figures' names, number of the picture taken for each caption, how it was chosen)."""
    count = len(groups[0].files)
    found = [("", [0] * len(groups), "the first")]
    if count > 1 and all(value is not None for group in groups for value in group.log_p):
        best = [max(range(count), key=lambda n, v=group.log_p: v[n]) for group in groups]
        found.append((f"best_of_{count}_by_model/", best, "best by the model's log p(text | image)"))
    if count > 1 and clip is not None:
        best = [max(range(count), key=lambda n, v=values: v[n]) for values in clip]
        found.append((f"best_of_{count}_by_clip/", best, "best by CLIP"))
    return found


# ---------------------------------------------------------------------------------------------------------- statistics


def reference(c: Context, numbers: set[int] | None) -> generation.Side | None:
    """FID's other side, from its file or made and kept; None where the network is missing."""
    g = c.config.generation
    if isinstance(c.inception, str):
        return None
    # not in the order of files: precision and recall compare the first, which must not be those of one folder or day
    order = ordered(c.pairs.names, 0)
    taken = [i for i in order if numbers is None or i in numbers]
    names = [c.pairs.identity(i) for i in taken] + ([c.pairs.source, str(c.seed)] if c.pairs.made_up else [])
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    about = {"network": c.inception.described, "resolution": c.resolution, "pictures": len(taken), "files": digest}
    about["prc_pictures"] = min(g.prc_pictures, len(taken))
    path = Path(g.reference_stats).expanduser() if g.reference_stats else c.folder / "reference.npz"
    if c.ranks.share(path.is_file):
        return generation.load_reference(path, about, g.blur_radii)
    side = _measure(c, lambda i: c.pairs.picture(taken[i]), len(taken), keep_logits=False)
    c.ranks.share(lambda: generation.save_reference(path, side, about))
    return side


def _measure(c: Context, read: generation.Read, count: int, keep_logits: bool = True) -> generation.Side:
    g = c.config.generation
    return generation.measure(
        read,
        count,
        c.inception,
        c.ranks,
        radii=tuple(dict.fromkeys((0, *g.blur_radii))),
        batch_size=c.config.write.batch_size,
        keep_features=g.prc_pictures,
        keep_logits=keep_logits,
        device=c.device,
        workers=c.config.write.num_workers,
    )


def judge_files(c: Context, prefix: str, files: Sequence[Path], real: generation.Side | None, more: dict) -> None:
    """FID, FID-k, Inception Score, precision and recall of picture files, or why they are missing."""
    g = c.config.generation
    names = [f"fid_{k}" for k in g.blur_radii] + ["inception_score", "precision", "recall"]
    if real is None:
        for name in names:
            c.figures.miss(prefix + name, c.inception)
        return
    made = _measure(c, lambda i: read_picture(files[i], c.resolution), len(files))
    add_fid(c, prefix, real, made, more)
    network = c.inception.described

    def add(needed_for: tuple[str, ...], protocol: str, compute: Any, samples: int, **extra: Any) -> None:
        try:
            for key, value in c.ranks.share(compute).items():
                about = {"library": library("torch-fidelity"), "protocol": protocol, **extra, **more}
                about |= {} if key.endswith("_std") else {"better": "higher"}
                c.figures.add(prefix + key, value, samples=samples, **about)
        except ValueError as error:
            for name in needed_for:
                c.figures.miss(prefix + name, str(error))

    protocol = f"{g.is_splits} splits, shuffled with seed 2020, classes of {network}"
    add(("inception_score",), protocol, lambda: generation.inception_score(made.logits, g.is_splits), len(files))
    protocol = f"manifolds of {g.prc_neighbours} nearest neighbours in the features of {network}"
    both = {"references": len(real.features)}
    compute = lambda: generation.precision_recall(made, real, g.prc_neighbours)  # noqa: E731
    add(("precision", "recall"), protocol, compute, len(made.features), **both)


def add_fid(c: Context, prefix: str, real: generation.Side, made: generation.Side, more: dict[str, Any]) -> None:
    """FID-k of two sides."""
    for k in c.config.generation.blur_radii:
        a, b = real.moments[k], made.moments[k]
        blurred = f", both blurred (Pillow GaussianBlur, radius {k})" if k else ""
        protocol = f"{CROP.format(r=c.resolution)}{blurred}; {c.inception.described}; against {a.count} pictures"
        about = {"library": library("torchmetrics", "torch-fidelity"), "protocol": protocol, "references": a.count}
        if min(a.count, b.count) < 2:
            c.figures.miss(f"{prefix}fid_{k}", f"needs at least 2 pictures of each side, got {b.count} and {a.count}")
        else:
            c.figures.add(
                f"{prefix}fid_{k}", generation.frechet(a, b), samples=b.count, better="lower", **about, **more
            )


# ---------------------------------------------------------------------------------------------------------------- CLIP


def clip_protocol(c: Context) -> str:
    """How CLIP scores are made."""
    return f"100 x cosine of a picture ({c.resolution} px) and its caption, mean over pictures; {c.clip.described}"


def score_by_clip(c: Context, groups: Sequence[Group]) -> list[list[float]] | None:
    """CLIP score of every picture with its caption; None, and the reason among the missing, where it cannot be."""
    untold = sum(group.text is None for group in groups)
    if untold or isinstance(c.clip, str):
        reason = f"{untold} of {len(groups)} pictures have no caption: give pictures.jsonl, or name.txt beside name.png"
        count = len(groups[0].files)
        for prefix in ("", *([f"best_of_{count}_by_clip/"] if count > 1 else [])):
            c.figures.miss(f"generation/{prefix}clip_score", reason if untold else c.clip)
        return None
    scores: dict[int, list[float]] = {}
    mine, size, count = c.ranks.mine(len(groups)), c.config.write.batch_size, len(groups[0].files)
    for start in c.ranks.follow(range(0, len(mine), size), "CLIP"):
        part = mine[start : start + size]
        for i in part:
            scores[i] = []
        for n in range(count):
            pictures = [as_image(read_picture(groups[i].files[n], c.resolution)) for i in part]
            values = generation.clip_scores(c.clip, pictures, [groups[i].text for i in part])
            for i, value in zip(part, values, strict=True):
                scores[i].append(value)
    return list(c.ranks.gather(scores).values())


def show(c: Context, groups: Sequence[Group], clip: list[list[float]] | None) -> None:
    """The first pictures drawn, by CLIP or by the model's own score."""
    if clip is not None:
        scores, scored = [values[0] for values in clip], "ordered by CLIP score"
    elif all(group.log_p[0] is not None for group in groups):
        scores, scored = [group.log_p[0] for group in groups], "ordered by the model's log p(text | picture), in nats"
    else:
        return
    case = lambda i: (as_image(read_picture(groups[i].files[0], c.resolution)), groups[i].text, "")  # noqa: E731
    c.add_gallery("Pictures drawn for texts", scored, scores, case)


# --------------------------------------------------------------------------------------------------------- round trips


def round_trip(c: Context) -> None:
    """Picture -> caption -> picture and text -> picture -> caption."""
    drawn, pictures = c.readable(c.pairs.draw(c.config.likelihood.round_trip_pairs, c.seed))
    texts, world = [d.caption for d in drawn], c.pairs.world
    scenes = [c.pairs.scene(d.index) for d in drawn] if world else []
    options = {"seed": c.seed, "beams": c.config.captions.beams, "settings": c.drawing}
    options["batch_size"] = c.config.write.batch_size
    trips = round_trips.travel(c.model, pictures, texts, c.ranks, world=world, scenes=scenes, **options)
    count = len(trips)
    if world:
        for name in ("image_text_image", "text_image_text"):
            for attribute in round_trips.ATTRIBUTES:
                right = sum(trip.right[name][attribute] for trip in trips)
                protocol = "share of trips both of whose steps are true, by the exact readers of shapes"
                about = {"library": OWN, "protocol": protocol, "interval": wilson(right, count), "better": "higher"}
                c.figures.add(f"round_trip/{name}/shapes/{attribute}", right / count, samples=count, **about)
    own = [trip.reworded for trip in trips]
    scores = c.ranks.share(lambda: captions.score(own, [[text] for text in texts], c.config.captions.java))
    for name, value in scores.figures.items():
        protocol = f"caption of the picture drawn for a text, against that text alone; {scores.tokenizer}"
        about = {"library": library("pycocoevalcap"), "protocol": protocol, "better": "higher"}
        c.figures.add(f"round_trip/text_image_text/{name}", value, samples=count, **about)
    for name, reason in scores.missing.items():
        c.figures.miss(f"round_trip/text_image_text/{name}", reason)
    _redrawn(c, pictures, texts, trips)
    if "rouge_l" in scores.each:
        case = lambda i: (trips[i].drawn, texts[i], f"written for it: {own[i]}")  # noqa: E731
        c.add_gallery("Text to picture to text", "ordered by ROUGE-L of the last text", scores.each["rouge_l"], case)


def _redrawn(c: Context, pictures: list, texts: list[str], trips: list[round_trips.Trip]) -> None:
    """The pictures that come back, against those that went, and their captions."""
    prefix = "round_trip/image_text_image/"
    if isinstance(c.inception, str):
        for k in c.config.generation.blur_radii:
            c.figures.miss(f"{prefix}fid_{k}", c.inception)
    else:
        back = [round_trips.as_uint8(trip.redrawn) for trip in trips]
        real, made = (_measure(c, side.__getitem__, len(side), keep_logits=False) for side in (pictures, back))
        add_fid(c, prefix, real, made, {})
    if isinstance(c.clip, str):
        c.figures.miss(f"{prefix}clip_score", c.clip)
        return
    values: dict[int, tuple[float, float]] = {}
    for i in c.ranks.mine(len(trips)):
        [to_text] = generation.clip_scores(c.clip, [trips[i].redrawn], [texts[i]])
        one_D, other_D = c.clip.images([as_image(pictures[i]), trips[i].redrawn])
        values[i] = (to_text, 100 * float(one_D @ other_D))
    to_text, to_picture = zip(*c.ranks.gather(values).values(), strict=True)
    about = {"samples": len(trips), "library": library("open_clip_torch"), "better": "higher"}
    c.figures.add(f"{prefix}clip_score", sum(to_text) / len(trips), protocol=clip_protocol(c), **about)
    protocol = f"100 x cosine of the picture given and the one that came back; {c.clip.described}"
    c.figures.add(f"{prefix}clip_similarity", sum(to_picture) / len(trips), protocol=protocol, **about)


# --------------------------------------------------------------------------------------------------------------- shapes


def shapes_truth(c: Context) -> dict[str, Any]:
    """Exact truth on unseen scenes and on held-out combinations, per attribute; returns the counts."""
    g, d = c.config.generation, c.config.data
    rerank = {"rerank": g.candidates, "rerank_temperature": g.temperature} if g.candidates > 1 else {}
    settings = shapes.ShapesDrawConfig(**c.drawing, **rerank)
    world, counts = World.preset(d.world), {}
    for split in ("val", "heldout"):
        found = c.ranks.share(lambda s=split: shapes.evaluate(c.model, world, s, len(c.pairs), c.seed, settings)[0])
        counts[split] = found
        for direction, f in found.items():
            drawn = f.get("drawn", 1)
            name = (
                f"shapes/{split}/text_to_image/best_of_{drawn}_by_model" if drawn > 1 else f"shapes/{split}/{direction}"
            )
            parts = {"all": f, **f.get("attributes", {})}
            for attribute, part in parts.items():
                low_high = wilson(part["right"], part["total"])
                protocol = (
                    f"share that is true of different scenes of {d.world}/{split}, by the exact readers of shapes"
                )
                about = {"library": OWN, "protocol": protocol, "interval": low_high, "better": "higher"}
                if drawn > 1:
                    about |= {"drawn": drawn, "selected_by": "best by the model's log p(text | image)"}
                share = part["right"] / part["total"]
                c.figures.add(f"{name}/{attribute}", share, samples=part["total"], **about)
    return json.loads(json.dumps(counts))
