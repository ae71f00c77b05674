"""How much of what a bundle generates is true, by the shapes world's exact readers. From the repository root:

    python -m latent_verse.evaluation.shapes_truth --model results/run/bundle --world small --split val --count 500

Text to image: an image is generated for the caption of every scene and read back (`World.parse_image`); it is right if
the scene found there satisfies the caption. Image to text: a caption is generated for the image of every scene; it is
right if the scene satisfies it. A reconstruction is right if the same scene is read from it as from the image: an upper
bound for text to image. No scene occurs twice, and the same seed gives the same scenes, captions and samples.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from PIL import Image

from latent_verse import files
from latent_verse.config.cli import parse
from latent_verse.config.evaluate import EvalDataConfig, EvaluatedConfig, EvalWriteConfig
from latent_verse.config.generate import GenerateSamplingConfig, WriteConfig
from latent_verse.config.messages import ConfigError
from latent_verse.config.program import one_line_errors
from latent_verse.config.settings import SamplingSettings, Settings, check_rules, require, same, setting
from latent_verse.data.shapes import SPLITS, Scene, ShapesDataset, World
from latent_verse.metrics.intervals import wilson

if TYPE_CHECKING:
    from latent_verse.inference.pipeline import LVerse

ATTRIBUTES = ("count", "colour", "shape", "size", "layout")  # of World.compare; "all" is what counts


@dataclass(frozen=True)
class ShapesConfig(Settings):
    """The model, and the scenes it is evaluated on."""

    model: Optional[str] = same(EvaluatedConfig, "model")
    world: str = same(EvalDataConfig, "world", "small", "world of shapes to evaluate in")
    split: str = setting("val", "val: unseen scenes; heldout: pairs of colour and shape held out of training", SPLITS)
    count: int = setting(500, "number of different scenes; small has 6216 in val and 7328 in heldout", at_least=1)
    seed: int = same(EvalWriteConfig, "seed", 0, "seed for scenes, captions and sampling")


@dataclass(frozen=True)
class ShapesSamplingConfig(SamplingSettings):
    """How images are sampled; captions are greedy."""

    rerank: int = same(GenerateSamplingConfig, "rerank", 0, "also evaluate the best of this many images per text")
    rerank_temperature: float = setting(1.0, "sampling temperature for the images that rerank chooses from", above=0)

    @property
    def is_greedy(self) -> bool:
        """Whether neither the images nor those to choose from are sampled."""
        return super().is_greedy and not self.rerank


@dataclass(frozen=True)
class ShapesWriteConfig(Settings):
    """Where results go."""

    json: Optional[str] = setting(None, "file to write the results, images and captions to", path=True)
    samples: int = setting(0, "number of scenes whose images are written to <json without suffix>_samples/", at_least=0)
    gpus: int = same(WriteConfig, "gpus")


@dataclass(frozen=True)
class ShapesEvalConfig:
    """Every setting of this command."""

    what: ShapesConfig = field(default_factory=ShapesConfig)
    draw: ShapesSamplingConfig = field(default_factory=ShapesSamplingConfig)
    write: ShapesWriteConfig = field(default_factory=ShapesWriteConfig)


@dataclass
class Case:
    """A scene with its caption and image, and everything generated for it."""

    scene: Scene
    text: str
    image: Image.Image
    reconstruction: Image.Image
    generated: Image.Image  # for `text`
    caption: str  # for `image`
    reranked: Image.Image | None  # for `text`
    right: dict[str, bool]  # by direction: reconstruction, text_to_image, image_to_text, reranked


def evaluate(
    model: LVerse, world: World, split: str, count: int, seed: int, sampling: ShapesSamplingConfig
) -> tuple[dict[str, dict], list[Case]]:
    """Evaluate a model on the first `count` scenes of a split.

    Returns:
        The results, {text_to_image, image_to_text, reconstruction: {right, total}}, the first two with {attribute:
        {right, total}} and, if sampling.rerank is set, `reranked` besides; and the cases.

    Raises:
        DataError: the split has fewer scenes.
    """
    data = ShapesDataset(world, split, count, seed)
    scenes = [data.scene(i) for i in range(count)]
    texts = [data.captions(i, 1)[0] for i in range(count)]
    images = [world.render(scene) for scene in scenes]
    settings = sampling.arguments() | {"seed": seed}
    reconstructions = model.reconstruct(images)
    first = settings | {"top_k": None, "top_p": None} if sampling.temperature == 0 else settings
    generated = [row[0] for row in model.text_to_image(texts, **first)]
    captions = [row[0] for row in model.image_to_text(images, seed=seed)]
    reranked: list[Image.Image | None] = [None] * count
    if sampling.rerank:
        settings |= {"temperature": sampling.rerank_temperature}
        reranked = [row[0] for row in model.text_to_image(texts, rerank=sampling.rerank, **settings)]

    reports: dict[str, list[dict[str, bool]]] = {"text_to_image": [], "image_to_text": [], "reranked": []}
    cases = []
    for parts in zip(scenes, texts, images, reconstructions, generated, captions, reranked, strict=True):
        case = Case(*parts, right={})
        asked = world.parse_caption(case.text)
        found = {
            "text_to_image": world.compare(world.parse_image(case.generated), asked),
            "image_to_text": world.compare(case.scene, world.parse_caption(case.caption)),
        }
        if case.reranked is not None:
            found["reranked"] = world.compare(world.parse_image(case.reranked), asked)
        for name, report in found.items():
            reports[name].append(report)
        case.right = {name: report["all"] for name, report in found.items()}
        case.right["reconstruction"] = world.key(world.parse_image(case.reconstruction)) == world.key(case.scene)
        cases.append(case)

    results: dict[str, dict] = {name: _counts(reports[name]) for name in ("text_to_image", "image_to_text")}
    if sampling.rerank:
        results["reranked"] = _counts(reports["reranked"]) | {"drawn": sampling.rerank}
    results["reconstruction"] = {"right": sum(case.right["reconstruction"] for case in cases), "total": count}
    return results, cases


def _counts(reports: list[dict[str, bool]]) -> dict[str, Any]:
    def count(name: str) -> dict[str, int]:
        return {"right": sum(report[name] for report in reports), "total": len(reports)}

    return count("all") | {"attributes": {name: count(name) for name in ATTRIBUTES}}


def write_json(path: Path, results: dict[str, Any], cases: list[Case], samples: int) -> None:
    """Write the results and every case's texts and marks; the images of the first `samples` cases beside it."""
    from latent_verse.inference.image_io import save_png

    place = path.with_name(f"{path.stem}_samples")
    listed = []
    for i, case in enumerate(cases):
        about: dict[str, Any] = {"text": case.text, "written": case.caption, "right": case.right}
        if i < samples:
            images = {"picture": case.image, "reconstruction": case.reconstruction, "drawn": case.generated}
            for name, image in (images | {"reranked": case.reranked}).items():
                if image is not None:
                    save_png(image, place / f"{i:04d}_{name}.png", {})
                    about[name] = f"{place.name}/{i:04d}_{name}.png"
        listed.append(about)
    files.write_json(path, results | {"cases": listed})


def table(results: dict[str, Any], title: str) -> str:
    """The results as lines to print."""
    lines = [title]
    for name in ("reconstruction", "text_to_image", "reranked", "image_to_text"):
        if name in results:
            r = results[name]
            parts = "  ".join(f"{a} {s['right'] / s['total']:.2f}" for a, s in r.get("attributes", {}).items())
            note = f"  (best of {r['drawn']}, chosen by the model)" if "drawn" in r else ""
            share, (low, high) = r["right"] / r["total"], wilson(r["right"], r["total"])
            head = f"  {name.replace('_', ' '):<15} {r['right']:>4} of {r['total']} {share:7.1%}"
            lines.append(f"{head}  (95 %: {low:.1%} to {high:.1%})  {parts}{note}")
    return "\n".join(lines)


def check(config: ShapesEvalConfig) -> None:
    """Check the settings before a model is loaded.

    Raises:
        ConfigError: a setting is missing, cannot be used or has no effect.
    """
    w, d = config.what, config.draw
    require([w], "model")
    check_rules([config.write], needs={"samples": "json"})
    if d.rerank == 1:
        raise ConfigError(f"rerank is {d.rerank}; give at least 2 images to choose from, or 0 for none.")


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Evaluate, print and write; 0 when done, 2 for a mistake in the settings, the bundle or the number of scenes."""
    config, _ = parse(ShapesEvalConfig, argv, __doc__)
    check(config)
    from latent_verse.evaluation.distributed import device
    from latent_verse.inference.pipeline import LVerse

    w, json = config.what, config.write.json
    with files.made_folder(Path(json).parent, "json") if json else nullcontext():
        model = LVerse.from_pretrained(w.model, device=device(config.write.gpus))
        world = World.preset(w.world)
        if model.vae.config.resolution != world.image_size:
            raise ConfigError(
                f"world: {w.world} has images of {world.image_size} px, but {w.model} generates "
                f"{model.vae.config.resolution} px: it was trained on another world or data set."
            )
        model.progress = True
        started = time.perf_counter()
        results, cases = evaluate(model, world, w.split, w.count, w.seed, config.draw)
        about = asdict(config.what) | {"draw": asdict(config.draw), "seconds": round(time.perf_counter() - started, 1)}
        print(table(results, f"{w.model}: {w.count} scenes of {w.world}/{w.split}"))
        if json:
            write_json(Path(json), about | results, cases, config.write.samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
