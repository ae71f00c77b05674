"""How long the images of the COCO protocol take: sampling to disk as eval_biart.py does it, on one device.

    python benchmarks/coco_sampling.py --device cuda --dtype bfloat16 --captions 1024 --json benchmarks/results/coco_sampling_gpu.json
    python benchmarks/coco_sampling.py --size tiny --captions 8

The weights are random (speed does not depend on them) and so are the captions, of COCO's length; everything else is
eval_biart.py's own: batches, seeds, AugVAE's decoding, the score log p(text | image) that re-ranking needs, PNG files.
`released` is 12 x 768 over 1,024 codes at 256 px; `tiny` proves that the script runs. The time for 30,000 captions is
the time measured per caption x 30,000, unless --captions 30000 samples for all of them. One process: N GPUs share the captions.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.config import AugVAEConfig, BiARTConfig, SamplingSettings
from latent_verse.data.text import BPETokenizer
from latent_verse.data.tokenizer_files import load_tokenizer
from latent_verse.evaluation import samples
from latent_verse.inference.pipeline import LVerse
from latent_verse.metrics.processes import Ranks

PROTOCOL = 30_000
SIZES = {
    "released": ({"single_level": 32}, {"n_layer": 12, "n_head": 12, "n_embd": 768, "text_len": 64}),
    "tiny": (
        {"hidden_dim": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "resolution": 16, "attn_resolutions": (8, 4)}
        | {"z_channels": 16, "codebook_dim": 8, "num_tokens": 24, "single_level": 4},
        {"n_layer": 1, "n_head": 1, "n_embd": 32, "text_len": 40},
    ),
}
WORDS = "a man woman dog cat red blue small large on in near with the street field table holding riding sitting".split()


def captions(count: int) -> list[str]:
    """Different random captions of COCO's usual ten words."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(WORDS), (count, 10), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row) + f" {n}" for n, row in enumerate(picks)]


def random_model(size: str, device: str, dtype: torch.dtype) -> LVerse:
    """An LVerse with random weights."""
    vae_shape, biart_shape = SIZES[size]
    torch.manual_seed(0)
    vae = AugVAE(AugVAEConfig(**vae_shape)).eval()
    tokenizer = load_tokenizer("clip") if size == "released" else BPETokenizer.train(captions(50), 300)
    lengths = {"image_vocab": vae.config.num_tokens, "image_len": vae.num_codes, "text_vocab": tokenizer.vocab_size}
    biart = BiART(BiARTConfig(**lengths, **biart_shape)).eval()
    return LVerse(vae.to(device), biart.to(device=device, dtype=dtype), tokenizer, {"reference_dropout": 0.1})


def timed(model: LVerse, device: str) -> dict[str, float]:
    """{part: seconds}, which fills while the model samples: codes by BiART, scores by BiART, images by AugVAE."""
    spent: dict[str, float] = defaultdict(float)

    def watch(owner: object, name: str, part: str) -> None:
        original = getattr(owner, name)

        def call(*arguments, **options):
            begin = time.perf_counter()
            result = original(*arguments, **options)
            if device == "cuda":
                torch.cuda.synchronize()
            spent[part] += time.perf_counter() - begin
            return result

        setattr(owner, name, call)

    watch(model, "sample_scored", "codes")  # and the two below, which `main` subtracts
    watch(model, "log_p", "scores")
    watch(model.vae, "decode_codes", "decoding")
    return spent


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="BiART's")
    parser.add_argument("--size", default="released", choices=tuple(SIZES))
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--candidates", type=int, default=1, help="images generated for each caption")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=64, help="captions at a time")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args(argv)

    model = random_model(args.size, args.device, getattr(torch, args.dtype))
    sampling = SamplingSettings(guidance=args.guidance)
    options = {"candidates": args.candidates, "seed": 0, "batch_size": args.batch_size, "sampling": sampling}
    texts = captions(args.captions)
    with tempfile.TemporaryDirectory() as folder:
        warm = texts[: min(args.batch_size, len(texts))]
        samples.generate(model, warm, Path(folder) / "warm", Ranks(), **options)
        spent = timed(model, args.device)
        begin = time.perf_counter()
        samples.generate(model, texts, Path(folder) / "all", Ranks(), **options)
        total = time.perf_counter() - begin
        assert len(list((Path(folder) / "all").glob("*.png"))) == args.captions * args.candidates
    spent["codes"] -= spent["scores"] + spent["decoding"]
    parts = dict(spent) | {"files and the rest": total - sum(spent.values())}
    result = {
        "setup": {name: value for name, value in vars(args).items() if name != "json"}
        | {"torch": torch.__version__, "threads": torch.get_num_threads()}
        | {"gpu": torch.cuda.get_device_name() if args.device == "cuda" else None},
        "seconds": total,
        "seconds_by_part": parts,
        "pictures_per_second": args.captions * args.candidates / total,
        "captions_per_second": args.captions / total,
        f"hours_for_{PROTOCOL}_captions": PROTOCOL / args.captions * total / 3600,
        "extrapolated": args.captions != PROTOCOL,
    }
    if args.device == "cuda":
        result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    shares = ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in parts.items())
    print(f"{args.captions} captions x {args.candidates}, {args.size}, {args.dtype} on {args.device}: {total:.1f} s")
    print(f"{result['pictures_per_second']:.3f} images/s ({shares})")
    word = "extrapolated" if result["extrapolated"] else "measured"
    print(f"{PROTOCOL} captions: {result[f'hours_for_{PROTOCOL}_captions']:.2f} hours on one device ({word})")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
