"""Training BiART from codes against training from images: steps per second of both, and their ratio, in one run.

    python benchmarks/codes.py [--device cuda] [--image_size 256] [--preset 12x768] [--batch 8] [--json FILE]
    python benchmarks/run.py codes [--device cuda]

Both run LitBiART's training step, backward pass and AdamW on the same batches of random pairs. From images each step
first runs the frozen AugVAE, of the released width, with random weights. The loader is left out (the images are on the
device), so the ratio is a lower bound: training from images also has to decode and crop them. The speed of extraction
is printed too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import Case, Row, Step, against, race, row
from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.config import PRESETS, AugVAEConfig, BiARTConfig
from latent_verse.config.train import TrainBiARTConfig
from latent_verse.training.biart import LitBiART
from latent_verse.training.optimizer import adamw

# (codebook, widths, side of the codes) by the side of the image: the released shape at 256 px, small ones for a CPU
WIDTHS = {256: (8192, 128, 256, (1, 2, 4), 32), 64: (512, 32, 64, (1, 2, 4), 16), 32: (128, 32, 32, (1, 1, 2), 8)}


def build(image_size: int, preset: str, device: str) -> tuple[AugVAE, LitBiART]:
    """A random AugVAE-SL (at 256 px: 32 x 32 codes, as released) and a BiART for its codes."""
    num_tokens, hidden_dim, z, ch_mult, single = WIDTHS[image_size]
    levels = (64, 32) if image_size == 256 else (single,)
    shape = {"hidden_dim": hidden_dim, "z_channels": z, "codebook_dim": z, "ch_mult": ch_mult, "num_tokens": num_tokens}
    with torch.device(device):
        vae = AugVAE(AugVAEConfig(**shape, resolution=image_size, attn_resolutions=levels, single_level=single))
        model = BiART(BiARTConfig(image_vocab=num_tokens, image_len=vae.num_codes, text_vocab=4096, **PRESETS[preset]))
    return vae, LitBiART(model, vae, TrainBiARTConfig(), {}).to(device)


def make_step(module: LitBiART, batch: list[torch.Tensor], device: str, precision: torch.dtype) -> Step:
    """A function that takes one training step."""
    optimizer = adamw(module.model.parameter_groups(0.05), lr=1e-4)

    def step():
        with torch.autocast(device, precision, enabled=precision != torch.float32):
            loss, _ = module.loss(module.model, module.pack(batch, len(batch[1]) // 2, reference_dropout=0.1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def steps_of(
    device: str, image_size: int, preset: str, batch: int, precision: torch.dtype
) -> tuple[dict[str, Step], bool]:
    """A step from codes, one from images, encoding a batch; and whether the two steps train on the same codes."""
    torch.manual_seed(0)
    vae, module = build(image_size, preset, device)
    x = (torch.rand(batch, 3, image_size, image_size) * 2 - 1).to(device)
    text = torch.randint(0, 4096, (batch, module.model.vocab.text_len)).to(device)
    text[:, 16:] = module.model.vocab.pad
    codes = vae.codes(x)
    same = torch.equal(module.codes(x), codes) and torch.equal(module.codes(codes), codes)
    steps = {
        "codes": make_step(module, [codes, text], device, precision),
        "images": make_step(module, [x, text], device, precision),
        "extraction": lambda: vae.codes(x).cpu(),
    }
    return steps, same


# ------------------------------------------------------------------------------------------- as an area of run.py

SIZES = {
    "toy": [(32, "tiny", 2, 1)],  # side, preset, batch, repeats
    "cpu": [(32, "tiny", 4, 3), (64, "tiny", 2, 1)],
    "cuda": [(256, "12x768", 8, 5), (256, "12x768", 32, 3)],
}


def cases(device: str, size: str) -> list[Case]:
    """One for each side and batch."""
    found = []
    for image_size, preset, batch, repeats in SIZES[size]:
        name = f"{image_size} px, {WIDTHS[image_size][-1] ** 2} codes, {preset}, batch {batch}"
        found.append(Case(name, partial(_case, device, name, image_size, preset, batch, repeats)))
    return found


def _case(device: str, name: str, image_size: int, preset: str, batch: int, repeats: int) -> Iterator[Row]:
    precision = torch.bfloat16 if device == "cuda" else torch.float32
    steps, same = steps_of(device, image_size, preset, batch, precision)
    taken = race({"codes": steps["codes"]}, device, repeats)["codes"]
    result = row("codes", name, {"seconds": taken, "bytes": None}, [], unit="training step", same=same)
    result["figures"] = {"steps_per_s": 1 / taken}
    result["goal"] = ">= 2x" if device == "cuda" else None
    yield result
    entry = against(result, "from images", steps["codes"], lambda: steps["images"], device, repeats)
    if result["goal"] and "ratio" in entry:
        result["met"] = entry["ratio"] >= 2
    yield result
    extraction = race({"extraction": steps["extraction"]}, device, repeats)["extraction"]
    result["figures"]["extraction_images_per_s"] = batch / extraction
    yield result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--image_size", type=int, choices=tuple(WIDTHS), help="default: 256 on cuda, 32 on the CPU")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="default: 12x768 on cuda, tiny on the CPU")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    size, preset = args.image_size or (256 if cuda else 32), args.preset or ("12x768" if cuda else "tiny")
    precision = torch.bfloat16 if cuda else torch.float32

    times = race(steps_of(args.device, size, preset, args.batch, precision)[0], args.device, args.repeats)
    rows = {source: times[source] for source in ("images", "codes")}
    extraction = args.batch / times["extraction"]
    speedup = rows["images"] / rows["codes"]
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{size} px, {WIDTHS[size][-1] ** 2} codes, BiART {preset}, batch {args.batch}, {precision} on {name}")
    for source, seconds in rows.items():
        print(f"from {source:9s} {1 / seconds:8.2f} steps/s {args.batch / seconds:9.1f} pairs/s")
    print(f"codes are {speedup:.2f}x as fast; extraction encodes {extraction:.0f} images/s")
    if args.json:
        results = {
            "setup": {
                "device": name,
                "image_size": size,
                "preset": preset,
                "batch": args.batch,
                "dtype": str(precision),
            },
            "steps_per_second": {"pictures": 1 / rows["images"], "codes": 1 / rows["codes"]},
            "speedup": speedup,
            "extraction_pictures_per_second": extraction,
        }
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
