"""What the demo leaves behind: metrics.json and index.html, gathered from the outputs of its stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from latent_verse.data.shapes import World
from latent_verse.demo.card import spread
from latent_verse.demo.page import Curves, Report, read_curves, write_page
from latent_verse.files import read_json_object, write_json
from latent_verse.machine import commit, machine

SPLITS = ("unseen", "heldout")
VAE_COLUMNS = {"train/rec_loss": "train", "val/rec_loss": "validation"}
NATS_COLUMNS = {
    "val/text_to_image/image_loss": "image given text, per code",
    "val/image_to_text/text_loss": "text given image, per token",
}
RIGHT_COLUMNS = {"val/text_to_image/right": "text to image", "val/image_to_text/right": "image to text"}


def write(out: Path, world: str, stages: list[tuple[str, str, str]], seconds: dict[str, float]) -> Path:
    """Write metrics.json and index.html into the demo's folder; returns the page's path.

    `stages` are (name, title, command); `seconds` those of all runs of a stage.
    """
    splits = {split: read_json_object(out / f"{split}.json") for split in SPLITS}
    facts = machine() | {"commit": commit()}
    metrics = gather(world, splits, seconds) | {"facts": facts, "commands": [command for _, _, command in stages]}
    write_json(out / "metrics.json", metrics)
    sampling = splits["unseen"]["draw"]
    codes = read_json_object(out / "codes" / "train" / "codes.json")
    about = {
        "world": world,
        "training images": f"{codes['pairs']} (repeated scenes included), {codes['captions']} captions",
        "codes of an image": f"{codes['image_len']}, from a codebook of {codes['codebook_size']}",
        "image sampling": f"temperature {sampling['temperature']:g}, guidance {sampling['guidance']:g}"
        + "".join(f", {name} {sampling[name]:g}" for name in ("top_k", "top_p") if sampling[name]),
        "captions": "greedy",
    }
    report = Report(
        title=f"L-Verse on the {world} shapes world",
        metrics=metrics,
        splits=splits,
        folder=out,
        stages=[(title, seconds[name], command) for name, title, command in stages],
        curves=curves(out),
        facts=[*about.items(), *facts.items()],
        spread=spread() if world == "small" else None,
    )
    for split in splits.values():
        add_readings(out, World.preset(world), split["cases"])
    return write_page(out, report)


def add_readings(folder: Path, world: World, cases: list[dict[str, Any]]) -> None:
    """Add to every case whose images are there what the world's reader finds in each: `read`, {image: in words}."""
    for case in cases:
        case["read"] = {}
        for name in ("picture", "reconstruction", "drawn", "reranked"):
            if name in case:
                with Image.open(folder / case[name]) as image:
                    case["read"][name] = world.describe(world.parse_image(image))


def gather(world: str, splits: dict[str, dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
    """The results as metrics.json holds them.

    {text_to_image: {unseen: {right, total, attributes}, heldout, reranked, reranked_heldout}, image_to_text: {unseen,
    heldout}, reconstruction: {unseen, heldout}, seconds: {stage: s, total: s}, world, draw}. `reranked` is on unseen
    scenes; both re-ranked results have the number of images to choose from.
    """
    metrics: dict[str, Any] = {"world": world, "draw": splits["unseen"]["draw"]}
    for direction in ("text_to_image", "image_to_text", "reconstruction"):
        metrics[direction] = {split: splits[split][direction] for split in SPLITS}
    for split, name in (("unseen", "reranked"), ("heldout", "reranked_heldout")):
        if "reranked" in splits[split]:
            metrics["text_to_image"][name] = splits[split]["reranked"] | {"split": split}
    metrics["seconds"] = seconds | {"total": round(sum(seconds.values()), 2)}
    return metrics


def curves(out: Path) -> list[Curves]:
    """The learning curves of every run below <out>/runs that has logged any: both AugVAEs, then BiART."""
    of_vae, of_biart = [], []
    for run in sorted((out / "runs").iterdir()):
        if run.name.endswith(("_ml", "_sl")):
            title = f"AugVAE-{run.name[-2:].upper()}: reconstruction error"
            of_vae.append(Curves(title, "MSE", read_curves(run, VAE_COLUMNS), True))
        else:
            nats, right = (read_curves(run, columns) for columns in (NATS_COLUMNS, RIGHT_COLUMNS))
            of_biart.append(Curves("BiART: loss on validation pairs", "nats", nats))
            of_biart.append(Curves("BiART: share of a few validation scenes that is right", "share", right))
    return [c for c in of_vae + of_biart if c.lines]
