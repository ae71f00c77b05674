"""What the demo leaves behind: metrics.json and index.html, gathered from the outputs of its stages."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from latent_verse.report import Curves, Report, read_curves, write_report
from latent_verse.runs import write_whole

ROOT = Path(__file__).parents[1]
SPLITS = ("unseen", "heldout")
VAE_COLUMNS = {"train/rec_loss": "train", "val/rec_loss": "validation"}
NATS_COLUMNS = {
    "val/text_to_image/image_loss": "picture given text, per code",
    "val/image_to_text/text_loss": "text given picture, per token",
}
RIGHT_COLUMNS = {"val/text_to_image/right": "text to image", "val/image_to_text/right": "image to text"}


def write(out: Path, world: str, stages: list[tuple[str, str, str]], seconds: dict[str, float]) -> Path:
    """Write <out>/metrics.json and <out>/index.html; returns the page's path.

    Args:
        stages: (name, title, command) of each stage; unseen.json, heldout.json and runs/ lie in `out`.
        seconds: by stage, over all the times that it was run.
    """
    judged = {split: json.loads((out / f"{split}.json").read_text()) for split in SPLITS}
    facts = machine() | {"commit": commit()}
    metrics = gather(world, judged, seconds) | {"facts": facts, "commands": [command for _, _, command in stages]}
    write_whole(out / "metrics.json", json.dumps(metrics, indent=1))
    draw = judged["unseen"]["draw"]
    codes = json.loads((out / "codes" / "train" / "codes.json").read_text())
    about = {
        "world": world,
        "pictures to train on": f"{codes['pairs']} (scenes that come again included), {codes['captions']} captions",
        "codes of a picture": f"{codes['image_len']}, of a codebook of {codes['codebook_size']}",
        "drawing": f"temperature {draw['temperature']:g}, guidance {draw['guidance']:g}"
        + "".join(f", {name} {draw[name]:g}" for name in ("top_k", "top_p") if draw[name]),
        "captions": "the likeliest word at a time",
    }
    report = Report(
        title=f"L-Verse on the {world} shapes world",
        metrics=metrics,
        splits=judged,
        folder=out,
        stages=[(title, seconds[name], command) for name, title, command in stages],
        curves=curves(out),
        facts=[*about.items(), *facts.items()],
    )
    return write_report(out, report)


def gather(world: str, judged: dict[str, dict[str, Any]], seconds: dict[str, float]) -> dict[str, Any]:
    """The figures as metrics.json holds them.

    {text_to_image: {unseen: {right, total, attributes}, heldout, reranked, reranked_heldout}, image_to_text: {unseen,
    heldout}, reconstruction: {unseen, heldout}, seconds: {stage: s, total: s}, world, draw}. `reranked` is on unseen
    scenes; both say how many pictures were drawn.
    """
    metrics: dict[str, Any] = {"world": world, "draw": judged["unseen"]["draw"]}
    for direction in ("text_to_image", "image_to_text", "reconstruction"):
        metrics[direction] = {split: judged[split][direction] for split in SPLITS}
    for split, name in (("unseen", "reranked"), ("heldout", "reranked_heldout")):
        if "reranked" in judged[split]:
            metrics["text_to_image"][name] = judged[split]["reranked"] | {"split": split}
    metrics["seconds"] = seconds | {"total": round(sum(seconds.values()), 2)}
    return metrics


def curves(out: Path) -> list[Curves]:
    """The learning curves of every run below <out>/runs that has logged any."""
    runs = sorted((out / "runs").iterdir())
    found = []
    for run in runs:
        name = "AugVAE-ML" if run.name.endswith("_ml") else "AugVAE-SL" if run.name.endswith("_sl") else "BiART"
        if name == "BiART":
            nats = read_curves(run, NATS_COLUMNS)
            found.append(Curves("BiART: loss on validation pairs", "nats", nats))
            right = read_curves(run, RIGHT_COLUMNS)
            found.append(Curves("BiART: share of a few validation scenes that is right", "share", right))
        else:
            found.append(Curves(f"{name}: error of reconstructions", "MSE", read_curves(run, VAE_COLUMNS), True))
    order = ("AugVAE-ML", "AugVAE-SL", "BiART: loss", "BiART: share")
    found.sort(key=lambda c: next(i for i, start in enumerate(order) if c.title.startswith(start)))
    return [c for c in found if c.lines]


def machine() -> dict[str, str]:
    """What computed: processor, cores, GPU if any, and torch's version."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    about = {"machine": f"{name}, {os.cpu_count()} cores"}
    if torch.cuda.is_available():
        about["GPU"] = torch.cuda.get_device_name()
    return about | {"torch": torch.__version__, "Python": platform.python_version()}


def commit() -> str:
    """The commit of the code, marked where files differ from it; "unknown" outside a repository."""
    try:
        options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True, "timeout": 20}
        name = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{name}, with uncommitted changes" if changed else name
