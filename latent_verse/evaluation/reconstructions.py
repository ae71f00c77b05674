"""An AugVAE's evaluation as a page: images beside their reconstructions, and the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from latent_verse.evaluation import page
from latent_verse.evaluation.records import Records
from latent_verse.metrics.reconstruction import UNITS

SHOWN = 24  # pairs of the images that eval_vae.py has written


def write_page(folder: Path, title: str, results: Mapping[str, Any], settings: str) -> None:
    """Write <folder>/index.html from what `ReconstructionMetrics` says and the images in the folder."""
    records, protocol = Records({}, 0), results["protocol"]
    for name, value in results.items():
        if isinstance(value, float):
            unit, better = UNITS.get(name.partition("_")[0], ("codes", ""))
            how = "; ".join(protocol[key] for key in (name, "images") if key in protocol)
            about = {"samples": results["images"], "library": protocol["library"], "protocol": how, "unit": unit}
            records.add(f"reconstruction/{name}", value, **about, **({"better": better} if better else {}))
    for name, reason in results["missing"].items():
        records.miss(f"reconstruction/{name}", reason)
    files = sorted((folder / "original_images").glob("*.png"))[:SHOWN]
    cases = [page.Case(None, {"image": _opened(f), "reconstruction": _opened(_pair(f))}, {}) for f in files]
    galleries = [page.Gallery("Reconstructions", "", results["images"], {"First": cases})] if cases else []
    about_run = {name: results[name] for name in ("images", "skipped", "checkpoint") if name in results}
    page.write(folder / "index.html", title, records, galleries, about_run, settings)


def _pair(file: Path) -> Path:
    return file.parent.with_name("generated_images") / file.name


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
