"""The tasks that evaluate images: generation, round trips, and the exact truth of shapes. Measurements -> records."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from latent_verse.data.folders import describe_found
from latent_verse.data.shapes import World
from latent_verse.data.transforms import centre_crop
from latent_verse.evaluation import round_trips, samples
from latent_verse.evaluation import shapes_truth as shapes
from latent_verse.evaluation.context import Context, Images, Texts
from latent_verse.evaluation.pairs import Sample, ordered
from latent_verse.evaluation.records import OWN
from latent_verse.evaluation.samples import Group, read_image
from latent_verse.machine import versions
from latent_verse.metrics import captions, image_quality
from latent_verse.metrics.image_quality import ImageFeatures, as_pil
from latent_verse.metrics.intervals import wilson

CROP = "both sides resized (shorter side, bilinear, antialiased) and centre-cropped to {r} px, 8-bit"
Scores = list[list[float]]  # of the images of each caption


def generate(c: Context) -> dict[str, object]:
    """Generate images, or read another system's, and evaluate them; returns what metrics.json says about them."""
    j, g = c.config.judged, c.config.generation
    chosen = c.pairs.sample(g.eval_captions, c.seed)
    about: dict[str, object] = {}
    if j.generated_dir:
        others: Counter[str] = Counter()
        groups = samples.read_groups(Path(j.generated_dir), others)
        if c.ranks.is_first:
            found = describe_found(sum(len(g.files) for g in groups), "image", others)
            print(f"generated_dir {j.generated_dir}: {found}")
        digest = c.ranks.share(lambda: samples.fingerprint_files([f for group in groups for f in group.files]))
        checkpoint = {"generated_dir": digest}
        texts = {sample.caption for sample in chosen}
        found = {"captions": len(groups), "captions_of_the_draw": sum(group.text in texts for group in groups)}
        about["generated_dir"] = found | {"candidates": len(groups[0].files), "sha256": digest}
    else:
        folder, checkpoint, texts = c.folder / "samples", c.model.fingerprints, [sample.caption for sample in chosen]
        w = c.config.write
        settings = {"candidates": g.candidates, "seed": c.seed, "batch_size": w.batch_size, "dtype": w.dtype}
        samples.generate(c.model, texts, folder, c.ranks, sampling=g, **settings)
        groups = samples.read_groups(folder)
        about["draw"] = c.pairs.about(chosen, c.seed) | {"cut_to_text_len": c.cut(texts)}
    real = reference(c, {sample.index for sample in chosen} if g.reference == "drawn" else None)
    clip = score_by_clip(c, groups)
    for name, numbers, how in selections(groups, clip):
        prefix = f"generation/{name}"
        more = {"drawn": len(groups[0].files), "selected_by": how, "checkpoint": checkpoint}
        files = [group.files[n] for group, n in zip(groups, numbers, strict=True)]
        report_images(c, prefix, files, real, more)
        more["better"] = "higher"
        if clip is not None:
            values = [scores[n] for scores, n in zip(clip, numbers, strict=True)]
            library = versions("open_clip_torch")
            about_it = {"library": library, "protocol": clip_protocol(c), "unit": "of 100"}
            c.records.add_mean(f"{prefix}clip_score", values, **about_it, **more)
        if all(group.log_p[0] is not None for group in groups):
            values = [group.log_p[n] for group, n in zip(groups, numbers, strict=True)]
            protocol = "mean of the model's log p(text | the codes it sampled), in nats"
            about_it = {"library": OWN, "protocol": protocol, "unit": "nats"}
            c.records.add_mean(f"{prefix}log_p_text", values, **about_it, **more)
    show(c, groups, clip, chosen)
    return about


def selections(groups: Sequence[Group], clip: Scores | None) -> list[tuple[str, list[int], str]]:
    """(prefix of the metrics' names, number of the image taken for each caption, how it was chosen)."""
    count = len(groups[0].files)

    def best(scores: Sequence[Sequence[float]]) -> list[int]:
        return [max(range(count), key=of_caption.__getitem__) for of_caption in scores]

    found = [("", [0] * len(groups), "the first")]
    log_p = [group.log_p for group in groups]
    if count > 1 and all(value is not None for of_caption in log_p for value in of_caption):
        found.append((f"best_of_{count}_by_model/", best(log_p), "best by the model's log p(text | image)"))
    if count > 1 and clip is not None:
        found.append((f"best_of_{count}_by_clip/", best(clip), "best by CLIP"))
    return found


def report_images(
    c: Context, prefix: str, files: Sequence[Path], real: ImageFeatures | None, more: dict[str, object]
) -> None:
    """Metrics of image files: FID, FID-k, Inception Score, precision and recall, or why they are missing.

    A metric of your own goes here: see docs/extending.md.
    """
    g = c.config.generation
    if real is None:
        for name in (*(f"fid_{k}" for k in g.blur_radii), "inception_score", "precision", "recall"):
            c.records.miss(prefix + name, c.inception)
        return
    generated = _features(c, lambda i: read_image(files[i], c.resolution), len(files))
    report_fid(c, prefix, real, generated, more)
    network, library = c.inception.described, versions("torch-fidelity")
    try:
        scores = c.ranks.share(lambda: image_quality.inception_score(generated.logits, g.is_splits))
        protocol = f"{g.is_splits} splits, shuffled with seed 2020, classes of {network}"
        for name, value in scores.items():
            better = {} if name.endswith("_std") else {"better": "higher"}
            about = {"samples": len(files), "library": library, "protocol": protocol}
            c.records.add(prefix + name, value, **about, **better, **more)
    except ValueError as error:
        c.records.miss(f"{prefix}inception_score", str(error))
    try:
        scores = c.ranks.share(lambda: image_quality.precision_recall(generated, real, g.prc_neighbours))
        protocol = f"manifolds of {g.prc_neighbours} nearest neighbours in the features of {network}"
        for name, value in scores.items():
            about = {"samples": len(generated.features), "references": len(real.features)}
            about |= {"unit": "share", "better": "higher"}
            c.records.add(prefix + name, value, library=library, protocol=protocol, **about, **more)
    except ValueError as error:
        for name in ("precision", "recall"):
            c.records.miss(prefix + name, str(error))


def reference(c: Context, numbers: set[int] | None) -> ImageFeatures | None:
    """The features of the reference images, read from their file or computed; None if the network is missing."""
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
    path = Path(g.reference_stats) if g.reference_stats else c.folder / "reference.npz"
    if c.ranks.share(path.is_file):
        return image_quality.load_reference(path, about, g.blur_radii)
    found = _features(c, lambda i: c.pairs.image(taken[i]), len(taken), keep_logits=False)
    c.ranks.share(lambda: image_quality.save_reference(path, found, about))
    return found


def _features(c: Context, read: image_quality.ReadImage, count: int, keep_logits: bool = True) -> ImageFeatures:
    g = c.config.generation
    return image_quality.extract_features(
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


def report_fid(c: Context, prefix: str, real: ImageFeatures, generated: ImageFeatures, more: dict[str, object]) -> None:
    """FID-k of two sets of images."""
    for k in c.config.generation.blur_radii:
        a, b = real.moments[k], generated.moments[k]
        name = f"{prefix}fid_{k}"
        if min(a.count, b.count) < 2:
            counts = f"{b.count} generated and {a.count} reference images"
            c.records.miss(name, f"needs at least 2 images of each set, got {counts}")
            continue
        blurred = f", both blurred (Pillow GaussianBlur, radius {k})" if k else ""
        protocol = f"{CROP.format(r=c.resolution)}{blurred}; {c.inception.described}; against {a.count} images"
        about = {"library": versions("torchmetrics", "torch-fidelity"), "protocol": protocol, "references": a.count}
        value = image_quality.frechet_distance(a, b)
        c.records.add(name, value, samples=b.count, better="lower", **about, **more)


def clip_protocol(c: Context) -> str:
    """How CLIP scores are computed."""
    return f"100 x cosine of an image ({c.resolution} px) and its caption, mean over images; {c.clip.described}"


def score_by_clip(c: Context, groups: Sequence[Group]) -> Scores | None:
    """CLIP score of every image with its caption; None if it cannot be computed, which is recorded with the reason."""
    without = sum(group.text is None for group in groups)
    count = len(groups[0].files)
    if without or isinstance(c.clip, str):
        reason = f"{without} of {len(groups)} images have no caption: give pictures.jsonl, or name.txt beside name.png"
        for prefix in ("", *([f"best_of_{count}_by_clip/"] if count > 1 else [])):
            c.records.miss(f"generation/{prefix}clip_score", reason if without else c.clip)
        return None
    scores: dict[int, list[float]] = {}
    mine, size = c.ranks.mine(len(groups)), c.config.write.batch_size
    for start in c.ranks.follow(range(0, len(mine), size), "CLIP"):
        part = mine[start : start + size]
        texts, by_number = [groups[i].text for i in part], []
        for n in range(count):
            images = [as_pil(read_image(groups[i].files[n], c.resolution)) for i in part]
            by_number.append(image_quality.clip_scores(c.clip, images, texts))
        scores |= {i: list(values) for i, *values in zip(part, *by_number, strict=True)}
    return list(c.ranks.gather(scores).values())


def show(c: Context, groups: Sequence[Group], clip: Scores | None, chosen: Sequence[Sample]) -> None:
    """Put the first image of each caption on the page, beside the caption's own image.

    They are ordered by CLIP score or by the model's own, and if there is neither, as they come.
    """
    scores, scored = [None] * len(groups), ""
    if clip is not None:
        scores, scored = [values[0] for values in clip], "CLIP score"
    elif all(group.log_p[0] is not None for group in groups):
        scores, scored = [group.log_p[0] for group in groups], "log p(text | image) by the model, in nats"
    own = {sample.caption: sample.index for sample in reversed(chosen)}

    def case(i: int) -> tuple[Images, Texts]:
        text, images = groups[i].text, {}
        true = c.pairs.image(own[text]) if text in own else None
        if true is not None:
            images["true image"] = as_pil(true)
        images["generated"] = as_pil(read_image(groups[i].files[0], c.resolution))
        return images, {} if text is None else {"text": [text]}

    c.add_gallery("Images generated for texts", scored, scores, case)


def round_trip(c: Context) -> None:
    """Image -> caption -> image and text -> image -> caption."""
    chosen, images = c.readable(c.pairs.sample(c.config.likelihood.round_trip_pairs, c.seed))
    texts, world = [sample.caption for sample in chosen], c.pairs.world
    scenes = [c.pairs.dataset.scene(sample.index) for sample in chosen] if world else []
    trips = round_trips.travel(c, images, texts, scenes)
    count = len(trips)
    if world:
        protocol = "share of trips both of whose steps are true, by the exact readers of shapes"
        for name in ("image_text_image", "text_image_text"):
            for attribute in (*shapes.ATTRIBUTES, "all"):
                right = sum(trip.right[name][attribute] for trip in trips)
                _report_share(c, f"round_trip/{name}/shapes/{attribute}", right, count, protocol)
    own = [trip.recaptioned for trip in trips]
    scores = c.ranks.share(lambda: captions.score(own, [[text] for text in texts], c.config.captions.java))
    for name, value in scores.metrics.items():
        protocol = f"caption of the image sampled for a text, against that text alone; {scores.tokenizer}"
        about = {"library": versions("pycocoevalcap"), "protocol": protocol, "better": "higher"}
        about["unit"] = captions.UNITS.get(name, "0 to 1")
        c.records.add(f"round_trip/text_image_text/{name}", value, samples=count, **about)
    for name, reason in scores.missing.items():
        c.records.miss(f"round_trip/text_image_text/{name}", reason)
    _report_regenerated(c, images, texts, trips)
    if "rouge_l" in scores.each:

        def case(i: int) -> tuple[Images, Texts]:
            shown = {"true image": as_pil(images[i]), "generated": trips[i].generated}
            return shown, {"text": [texts[i]], "caption of the generated image": [own[i]]}

        c.add_gallery("Text to image to text", "ROUGE-L of the last text", scores.each["rouge_l"], case)


def _report_regenerated(
    c: Context, images: Sequence[Tensor], texts: Sequence[str], trips: Sequence[round_trips.Trip]
) -> None:
    """The images at the end of image -> caption -> image, against the first ones and their captions."""
    prefix = "round_trip/image_text_image/"
    if isinstance(c.inception, str):
        for k in c.config.generation.blur_radii:
            c.records.miss(f"{prefix}fid_{k}", c.inception)
    else:
        back = [centre_crop(trip.regenerated, c.resolution) for trip in trips]
        real, generated = (_features(c, of.__getitem__, len(of), keep_logits=False) for of in (images, back))
        report_fid(c, prefix, real, generated, {})
    if isinstance(c.clip, str):
        c.records.miss(f"{prefix}clip_score", c.clip)
        return
    values: dict[int, tuple[float, float]] = {}
    for i in c.ranks.mine(len(trips)):
        [to_text] = image_quality.clip_scores(c.clip, [trips[i].regenerated], [texts[i]])
        one_D, other_D = c.clip.images([as_pil(images[i]), trips[i].regenerated])
        values[i] = (to_text, 100 * float(one_D @ other_D))
    to_text, to_image = zip(*c.ranks.gather(values).values(), strict=True)
    about = {"library": versions("open_clip_torch"), "unit": "of 100", "better": "higher"}
    c.records.add_mean(f"{prefix}clip_score", to_text, protocol=clip_protocol(c), **about)
    protocol = f"100 x cosine of the image given and the one that came back; {c.clip.described}"
    c.records.add_mean(f"{prefix}clip_similarity", to_image, protocol=protocol, **about)


def shapes_truth(c: Context) -> dict[str, object]:
    """Exact truth on unseen scenes and on held-out combinations, per attribute; returns the counts."""
    g, d = c.config.generation, c.config.data
    reranked = {"rerank": g.candidates, "rerank_temperature": g.temperature} if g.candidates > 1 else {}
    settings = shapes.ShapesSamplingConfig(**g.arguments(), **reranked)
    world, counts = World.preset(d.world), {}
    for split, title in (("val", "Shapes: unseen scenes"), ("heldout", "Shapes: held-out combinations")):
        cases: list[shapes.Case] = []

        def evaluate(split: str = split, cases: list[shapes.Case] = cases) -> dict[str, dict]:
            results, of_scenes = shapes.evaluate(c.model, world, split, len(c.pairs), c.seed, settings)
            cases += of_scenes
            return results

        found = c.ranks.share(evaluate)
        counts[split] = found
        c.add_gallery(title, "", [None] * len(cases), lambda i, cases=cases: _in_words(world, cases[i]))
        protocol = f"share that is true of different scenes of {d.world}/{split}, by the exact readers of shapes"
        for direction, result in found.items():
            name, more = f"shapes/{split}/{direction}", {}
            if "drawn" in result:
                name = f"shapes/{split}/text_to_image/best_of_{result['drawn']}_by_model"
                more = {"drawn": result["drawn"], "selected_by": "best by the model's log p(text | image)"}
            for attribute, part in {"all": result, **result.get("attributes", {})}.items():
                _report_share(c, f"{name}/{attribute}", part["right"], part["total"], protocol, **more)
    return json.loads(json.dumps(counts))


def _in_words(world: World, case: shapes.Case) -> tuple[Images, Texts]:
    """A scene for the page: what was generated for its text and for its image, and what was read where it is wrong."""
    said = {name: "right" if right else "wrong" for name, right in case.right.items()}
    texts = {"text": [case.text], f"caption of the true image: {said['image_to_text']}": [case.caption]}
    if not case.right["text_to_image"]:
        texts["generated, read as"] = [world.describe(world.parse_image(case.generated))]
    return {"true image": case.image, f"generated: {said['text_to_image']}": case.generated}, texts


def _report_share(c: Context, name: str, right: int, total: int, protocol: str, **more: object) -> None:
    about = {"library": OWN, "protocol": protocol, "unit": "share", "better": "higher"}
    about |= {"interval": wilson(right, total)}
    c.records.add(name, right / total, samples=total, **about, **more)
