"""How much of what a bundle draws and writes is true, by the shapes world's exact readers. From the repository root:

    python -m latent_verse.evaluation.shapes --model results/run/bundle --world small --split val --count 500

Text to image: a picture is drawn for the caption of every scene, read back (`World.parse_image`), and right if the
scene found there satisfies the caption. Image to text: a caption is written for the true picture of every scene, and
right if the scene satisfies it. Reconstructions are right if the same is read from them as from the picture: what
text to image can reach at most. No scene comes twice, and the same seed gives the same scenes, captions and draws.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from PIL import Image

from latent_verse.config import ConfigError, SamplingSettings, Settings, setting
from latent_verse.config.cli import one_line_errors, parse
from latent_verse.data.shapes import PRESETS, SPLITS, Scene, ShapesDataset, World
from latent_verse.evaluation.intervals import wilson
from latent_verse.runs import write_whole

ATTRIBUTES = ("count", "colour", "shape", "size", "layout")  # of World.compare; "all" is what counts


@dataclass(frozen=True)
class ShapesConfig(Settings):
    """What is judged."""

    model: Optional[str] = setting(None, "bundle: a folder that train_biart.py wrote, or a hub id")
    world: str = setting("small", "the shapes world to judge in", tuple(PRESETS))
    split: str = setting("val", "val: unseen scenes; heldout: pairs of colour and shape kept out of training", SPLITS)
    count: int = setting(500, "different scenes; small has 6216 in val and 7328 in heldout", at_least=1)
    seed: int = setting(0, "seed of scenes, captions and draws", at_least=0)


@dataclass(frozen=True)
class ShapesDrawConfig(SamplingSettings):
    """How pictures are drawn; captions are the likeliest ones."""

    rerank: int = setting(
        0, "besides, draw so many pictures for each text and judge the one the model itself chooses", at_least=0
    )
    rerank_temperature: float = setting(1.0, "temperature of those, which must differ to be chosen from", above=0)

    @property
    def is_greedy(self) -> bool:
        """Whether neither the images nor those to choose from are sampled."""
        return super().is_greedy and not self.rerank


@dataclass(frozen=True)
class ShapesWriteConfig(Settings):
    """Where results go."""

    json: Optional[str] = setting(None, "write the figures, and what was drawn and written, to this file")
    samples: int = setting(
        0, "scenes whose pictures are written to the folder <json without suffix>_samples", at_least=0
    )
    gpus: int = setting(1, "0 is the CPU, 1 the GPU, or the CPU where there is none", at_least=0, at_most=1)


@dataclass(frozen=True)
class ShapesEvalConfig:
    """Everything this command can be told."""

    what: ShapesConfig = field(default_factory=ShapesConfig)
    draw: ShapesDrawConfig = field(default_factory=ShapesDrawConfig)
    write: ShapesWriteConfig = field(default_factory=ShapesWriteConfig)


@dataclass
class Case:
    """One scene and all that was made of it. `drawn`, `reranked` answer `text`; `written` answers `picture`."""

    scene: Scene
    text: str
    picture: Image.Image
    reconstruction: Image.Image
    drawn: Image.Image
    written: str
    reranked: Image.Image | None
    right: dict[str, bool]  # by direction: reconstruction, text_to_image, image_to_text, reranked


def evaluate(
    model: Any, world: World, split: str, count: int, seed: int, draw: ShapesDrawConfig
) -> tuple[dict[str, Any], list[Case]]:
    """Judge a model, an `LVerse` or what has its methods, on the first `count` scenes of a split.

    Returns:
        The figures, {text_to_image, image_to_text, reconstruction: {right, total, ...}, ...}, text_to_image and
        image_to_text with {attribute: {right, total}} and, where draw.rerank is set, `reranked` apart; and the cases.

    Raises:
        DataError: the split has fewer scenes.
        ConfigError: settings of drawing that cannot be used.
    """
    data = ShapesDataset(world, split, count, seed)
    scenes = [data.scene(i) for i in range(count)]
    texts = [data.captions(i, 1)[0] for i in range(count)]
    pictures = [world.render(scene) for scene in scenes]
    settings = draw.arguments() | {"seed": seed}
    reconstructions = model.reconstruct(pictures)
    first = settings | {"top_k": None, "top_p": None} if draw.temperature == 0 else settings
    drawn = [row[0] for row in model.text_to_image(texts, **first)]
    written = [row[0] for row in model.image_to_text(pictures, seed=seed)]
    reranked: list[Image.Image | None] = [None] * count
    if draw.rerank:
        settings |= {"temperature": draw.rerank_temperature}
        best = model.text_to_image(texts, rerank=draw.rerank, **settings)
        reranked = [row[0] for row in best]

    judged: dict[str, list[dict[str, bool]]] = {"text_to_image": [], "image_to_text": [], "reranked": []}
    cases = []
    made = zip(scenes, texts, pictures, reconstructions, drawn, written, reranked, strict=True)
    for scene, text, picture, reconstruction, picture_drawn, caption, chosen in made:
        asked = world.parse_caption(text)
        reports = {
            "text_to_image": world.compare(world.parse_image(picture_drawn), asked),
            "image_to_text": world.compare(scene, world.parse_caption(caption)),
        }
        if chosen is not None:
            reports["reranked"] = world.compare(world.parse_image(chosen), asked)
        for name, report in reports.items():
            judged[name].append(report)
        right = {name: report["all"] for name, report in reports.items()}
        right["reconstruction"] = world.key(world.parse_image(reconstruction)) == world.key(scene)
        cases.append(Case(scene, text, picture, reconstruction, picture_drawn, caption, chosen, right))

    figures: dict[str, Any] = {name: _figures(judged[name]) for name in ("text_to_image", "image_to_text")}
    if draw.rerank:
        figures["reranked"] = _figures(judged["reranked"]) | {"drawn": draw.rerank}
    figures["reconstruction"] = {"right": sum(case.right["reconstruction"] for case in cases), "total": count}
    return figures, cases


def _figures(reports: list[dict[str, bool]]) -> dict[str, Any]:
    def share(name: str) -> dict[str, int]:
        return {"right": sum(report[name] for report in reports), "total": len(reports)}

    return share("all") | {"attributes": {name: share(name) for name in ATTRIBUTES}}


def write_json(path: Path, figures: dict[str, Any], cases: list[Case], samples: int) -> None:
    """Write the figures and every case's texts and marks; the pictures of the first `samples` cases beside it."""
    place = path.with_name(f"{path.stem}_samples")
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = []
    for i, case in enumerate(cases):
        about: dict[str, Any] = {"text": case.text, "written": case.written, "right": case.right}
        if i < samples:
            place.mkdir(exist_ok=True)
            for name in ("picture", "reconstruction", "drawn", "reranked"):
                if (picture := getattr(case, name)) is not None:
                    picture.save(place / f"{i:04d}_{name}.png")
                    about[name] = f"{place.name}/{i:04d}_{name}.png"
        listed.append(about)
    write_whole(path, json.dumps(figures | {"cases": listed}, indent=1))


def table(figures: dict[str, Any], title: str) -> str:
    """The figures as lines to print."""
    lines = [title]
    for name in ("reconstruction", "text_to_image", "reranked", "image_to_text"):
        if name in figures:
            f = figures[name]
            parts = "  ".join(f"{a} {s['right'] / s['total']:.2f}" for a, s in f.get("attributes", {}).items())
            note = f"  (best of {f['drawn']}, chosen by the model)" if "drawn" in f else ""
            share, (low, high) = f["right"] / f["total"], wilson(f["right"], f["total"])
            head = f"  {name.replace('_', ' '):<15} {f['right']:>4} of {f['total']} {share:7.1%}"
            lines.append(f"{head}  (95 %: {low:.1%} to {high:.1%})  {parts}{note}")
    return "\n".join(lines)


def check(config: ShapesEvalConfig) -> None:
    """Raises ConfigError for settings that cannot be used, before a model is loaded."""
    w, d = config.what, config.draw
    if not w.model:
        raise ConfigError("model is not given: name the folder of a bundle, as train_biart.py writes one.")
    if d.rerank == 1:
        raise ConfigError(f"rerank is {d.rerank}; give at least 2 pictures to choose from, or 0 for none.")
    if config.write.samples and not config.write.json:
        raise ConfigError("samples are written beside the file of json: give that as well.")


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Judge and print; 0 when done, 2 for a mistake in the settings or the model."""
    config, _ = parse(ShapesEvalConfig, argv, __doc__)
    check(config)
    run(config)
    return 0


def run(config: ShapesEvalConfig) -> None:
    """Load the model, judge, print and write. Raises as `evaluate`; CheckpointError for the model."""
    import torch

    from latent_verse.pipeline import LVerse

    w = config.what
    device = "cuda" if config.write.gpus and torch.cuda.is_available() else "cpu"
    model = LVerse.from_pretrained(w.model, device=device)
    world = World.preset(w.world)
    if model.vae.config.resolution != world.image_size:
        raise ConfigError(
            f"world: {w.world} has pictures of {world.image_size} px, but {w.model} draws "
            f"{model.vae.config.resolution} px: it was trained on something else."
        )
    model.progress = True
    started = time.perf_counter()
    figures, cases = evaluate(model, world, w.split, w.count, w.seed, config.draw)
    about = asdict(config.what) | {"draw": asdict(config.draw), "seconds": round(time.perf_counter() - started, 1)}
    print(table(figures, f"{w.model}: {w.count} scenes of {w.world}/{w.split}"))
    if config.write.json:
        write_json(Path(config.write.json), about | figures, cases, config.write.samples)


if __name__ == "__main__":
    sys.exit(main())
