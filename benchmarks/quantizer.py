"""The quantiser against the plain one-hot formulation: time and memory of one training-mode forward pass.

    python benchmarks/quantizer.py [--device cuda] [--N 8192] [--K 8192] [--D 256] [--repeat 5] [--json FILE]

Both find the nearest codes of N vectors, look them up, take the commitment loss and update the moving averages.
"one-hot" is the textbook form (distances N x K, an int64 one-hot matrix and its float copy, products for look-up,
counts and sums). "ours" is `EMAQuantizer` in training mode. They must agree on codes, loss and codebook. Memory, in a
fresh process each: what a step adds to the peak of the allocator (CUDA) or of the bytes that tensors hold (CPU, counted
operator by operator with a dispatch mode; temporaries inside an operator are left out).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import Case, Row, against, matmul_rate, measured, peak_bytes, row, seconds
from benchmarks.plain import BETA, DECAY, EPS, one_hot_forward
from latent_verse.augvae.quantizer import Codebook, EMAQuantizer

VARIANTS = ("one-hot", "ours")


def inputs(args: argparse.Namespace) -> tuple[torch.Tensor, Codebook]:
    torch.manual_seed(0)
    with torch.device(args.device):
        book = Codebook(args.K, args.D, DECAY, EPS, 0.0)
        book.cluster_size.uniform_(0.5, 2.0)
        book.embed_avg.copy_(book.weight * book.cluster_size[:, None])
        z_BDHW = torch.randn(1, args.D, args.N, 1)
    if args.device == "cuda":  # channels last, as AugVAE's maps are there
        z_BDHW = z_BDHW.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return z_BDHW, book


def make_step(variant: str, book: Codebook):
    if variant == "one-hot":
        return lambda z_BDHW: one_hot_forward(book, z_BDHW)
    return EMAQuantizer(book, BETA).train()


def measure_times(args: argparse.Namespace) -> dict[str, dict]:
    """Seconds of each one's fastest step, timed alternately so that a busy machine slows both, and the first result."""
    results, steps = {}, {}
    for variant in VARIANTS:
        z_BDHW, book = inputs(args)
        steps[variant] = make_step(variant, book)
        _, indices, loss = steps[variant](z_BDHW)
        results[variant] = {"indices": indices.flatten().cpu(), "loss": loss.item(), "seconds": float("inf")}
        results[variant] |= {name: value.cpu().clone() for name, value in book.state_dict().items()}
    for _ in range(args.repeat):
        for variant, step in steps.items():
            taken = seconds(lambda step=step: step(z_BDHW), args.device)
            results[variant]["seconds"] = min(results[variant]["seconds"], taken)
    return results


def measure_memory(variant: str, args: argparse.Namespace) -> int:
    """Bytes that a step adds to the peak."""
    z_BDHW, book = inputs(args)
    step = make_step(variant, book)
    return peak_bytes(lambda: step(z_BDHW), args.device)


def agree(a: dict, b: dict) -> str:
    """Why two results differ; empty where they agree. A code may differ where two are equally near to rounding."""
    different = (a["indices"] != b["indices"]).sum().item()
    if different > 1e-4 * len(a["indices"]):
        return f"{different} of {len(a['indices'])} codes differ"
    for name in ("weight", "cluster_size", "embed_avg"):
        if different == 0 and not torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5):
            return f"{name} differs by up to {(a[name] - b[name]).abs().max():g}"
    return "" if abs(a["loss"] - b["loss"]) < 1e-5 * abs(a["loss"]) else f"losses {a['loss']} and {b['loss']}"


# ------------------------------------------------------------------------------------------- as an area of run.py

# pairs (N, K) for each D; the one-hot matrix is left out where it would take more than `most` elements
SIZES = {
    "toy": {"D": (8,), "N": (64, 128), "K": (32,), "at": (64, 32), "repeats": 1, "most": 2**26},
    "cpu": {
        "D": (32, 256),
        "N": (2**10, 2**12, 2**14, 2**17),
        "K": (2**10, 2**13, 2**16),
        "at": (2**11, 2**10),
        "repeats": 3,
        "most": 2**27,
    },
    "cuda": {
        "D": (32, 256),
        "N": tuple(2**i for i in range(10, 18)),
        "K": tuple(2**i for i in range(10, 17)),
        "at": (2**13, 2**13),
        "repeats": 5,
        "most": 2**30,
    },
}


def vq_pytorch(book: Codebook):
    """vector-quantize-pytorch's VectorQuantize with the same codebook, decay and commitment, in training mode."""
    from vector_quantize_pytorch import VectorQuantize

    K, D = book.weight.shape
    peer = VectorQuantize(
        dim=D, codebook_size=K, decay=DECAY, eps=EPS, commitment_weight=BETA, rotation_trick=False
    ).to(book.weight.device)
    with torch.no_grad():
        for name, value in book.state_dict().items():
            getattr(peer._codebook, {"weight": "embed"}.get(name, name)).copy_(value[None])
    peer.train()
    return lambda z_BDHW: peer(z_BDHW.flatten(2).transpose(1, 2))


def cases(device: str, size: str) -> list[Case]:
    """Over N, then over K, for each D: time and memory of a training-mode forward pass."""
    s = SIZES[size]
    fixed_N, fixed_K = s["at"]
    points = [("vectors", N, fixed_K, N) for N in s["N"]] + [("codes", fixed_N, K, K) for K in s["K"]]
    found = {}  # by name: the point that both laws share is measured once
    for D in s["D"]:
        for law, N, K, x in points:
            name = f"N {N}, K {K}, D {D}"
            point = {"name": f"quantiser: {law}", "series": f"D = {D}", "x": x}
            found.setdefault(name, Case(name, partial(_point, device, name, N, K, D, s, point)))
    return list(found.values())


def _point(device: str, name: str, N: int, K: int, D: int, s: dict, law: dict) -> Iterator[Row]:
    args = argparse.Namespace(N=N, K=K, D=D, device=device)
    (z_BDHW, book), codes = inputs(args), {}

    def step_of(variant: str, book: Codebook):
        """A step; whether its codes are ours goes into the row."""
        if variant != "ours" and s["most"] < N * K:
            raise MemoryError(f"left out: {N} x {K} matrices would take gigabytes")
        step = vq_pytorch(book) if variant == "vector-quantize-pytorch" else make_step(variant, book)
        codes[variant] = step(z_BDHW)[1].flatten()
        if variant != "ours":
            differing = (codes[variant] != codes["ours"]).sum().item()
            result["same"] = (
                result["same"] is not False and differing <= 1e-4 * N
            )  # two may be equally near to rounding
        return lambda: step(z_BDHW)

    ours = step_of("ours", book)
    result = row("quantizer", name, measured(ours, device, s["repeats"]), [], unit="training-mode forward", law=law)
    taken, rate = result["ours"]["seconds"], matmul_rate(device, torch.float32)
    result["figures"] = {"vectors_per_s": N / taken, "share_of_matmul_rate": 2 * N * K * D / taken / rate}
    if device == "cpu":
        result["goal"] = ">= 3x"
    elif N >= 2**12:  # fewer take a GPU no less time
        result["goal"] = ">= 3x, <= 1/8 of the memory"
    yield result
    for variant in ("one-hot", "vector-quantize-pytorch"):
        against(result, variant, ours, lambda v=variant: step_of(v, inputs(args)[1]), device, s["repeats"])
        yield result
    there = [p for p in result["peers"] if "ratio" in p]
    if result["goal"] and there:
        result["met"] = all(p["ratio"] >= 3 and (device == "cpu" or p["memory_ratio"] >= 8) for p in there)
    yield result


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 if the two implementations disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--N", type=int, default=8192, help="vectors")
    parser.add_argument("--K", type=int, default=8192, help="codes")
    parser.add_argument("--D", type=int, default=256, help="code dimension")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args(argv)

    where = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"N {args.N}, K {args.K}, D {args.D}, float32 on {where}, torch {torch.__version__}")
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        results = pool.apply(measure_times, (args,))
    for variant in VARIANTS:
        with context.Pool(1) as pool:
            results[variant]["bytes"] = pool.apply(measure_memory, (variant, args))
        r = results[variant]
        print(f"{variant:8s} {r['seconds']:9.4f} s {r['bytes'] / 2**20:9.1f} MiB", flush=True)
    plain, ours = results["one-hot"], results["ours"]
    problem = agree(plain, ours)
    results = {
        "speedup": plain["seconds"] / ours["seconds"],
        "memory_share": ours["bytes"] / plain["bytes"],
        "codes_differing": int((plain["indices"] != ours["indices"]).sum()),
    }
    print(
        f"{results['speedup']:.1f}x as fast, {results['memory_share']:.1%} of the memory; {problem or 'same results'}"
    )
    if args.json:
        rows = [{"variant": v, "seconds": r["seconds"], "bytes": r["bytes"]} for v, r in results.items()]
        setup = {"N": args.N, "K": args.K, "D": args.D, "device": where, "torch": torch.__version__}
        args.json.write_text(json.dumps({"setup": setup, "rows": rows, **results}, indent=2) + "\n")
    return 1 if problem else 0


if __name__ == "__main__":
    raise SystemExit(main())
