"""The quantiser against the plain one-hot formulation: time and memory of one training-mode forward pass.

    python benchmarks/quantizer.py [--device cuda] [--N 8192] [--K 8192] [--D 256] [--repeat 5] [--json FILE]

Both find the nearest codes of N vectors, look them up, take the commitment loss and update the moving averages.
"one-hot" is the textbook form (distances N x K, an int64 one-hot matrix and its float copy, products for look-up,
counts and sums). "ours" is `Quantizer` in training mode. They must agree on codes, loss and codebook. Memory, in a
fresh process each: what a step adds to the peak of the allocator (CUDA) or of the bytes that tensors hold (CPU, counted
operator by operator with a dispatch mode; temporaries inside an operator are left out).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from latent_verse.augvae.codebook import Codebook, Quantizer

DECAY, EPS, BETA = 0.99, 1e-5, 0.25
VARIANTS = ("one-hot", "ours")


@torch.no_grad()
def one_hot_update(book: Codebook, flat_ND: torch.Tensor, hot_NK: torch.Tensor) -> None:
    book.cluster_size.mul_(DECAY).add_(hot_NK.sum(0), alpha=1 - DECAY)
    book.embed_avg.mul_(DECAY).add_(hot_NK.t() @ flat_ND, alpha=1 - DECAY)
    n = book.cluster_size.sum()
    smoothed = (book.cluster_size + EPS) / (n + len(book.weight) * EPS) * n
    book.weight.copy_(book.embed_avg / smoothed[:, None])


def one_hot_forward(book: Codebook, z_BDHW: torch.Tensor):
    """The plain formulation of Quantizer.forward (van den Oord et al. 2017, appendix A.1)."""
    z_BHWD = z_BDHW.permute(0, 2, 3, 1)
    flat_ND = z_BHWD.reshape(-1, z_BHWD.shape[-1])
    weight = book.weight.clone()
    d_NK = flat_ND.pow(2).sum(1, keepdim=True) - 2 * flat_ND @ weight.t() + weight.pow(2).sum(1)
    indices_N = d_NK.argmin(1)
    hot_NK = F.one_hot(indices_N, len(weight)).to(flat_ND.dtype)
    quantised = (hot_NK @ weight).view(z_BHWD.shape)
    one_hot_update(book, flat_ND.detach(), hot_NK)
    loss = BETA * F.mse_loss(quantised, z_BHWD)
    out = (z_BHWD + (quantised - z_BHWD).detach()).permute(0, 3, 1, 2)
    return out, indices_N.view(z_BHWD.shape[:-1]), loss


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in given or key in self.seen:
                continue
            self.seen.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def inputs(args: argparse.Namespace) -> tuple[torch.Tensor, Codebook]:
    torch.manual_seed(0)
    book = Codebook(args.K, args.D, DECAY, EPS, 0.0)
    book.cluster_size.uniform_(0.5, 2.0)
    book.embed_avg.copy_(book.weight * book.cluster_size[:, None])
    z_BDHW = torch.randn(1, args.D, args.N, 1)
    return z_BDHW.to(args.device), book.to(args.device)


def make_step(variant: str, book: Codebook):
    if variant == "one-hot":
        return lambda z_BDHW: one_hot_forward(book, z_BDHW)
    return Quantizer(book, BETA).train()


def measure_times(args: argparse.Namespace) -> dict[str, dict]:
    """Seconds of each way's fastest step, taken in turns so that a busy machine slows both, and what the first gave."""
    results, steps = {}, {}
    for variant in VARIANTS:
        z_BDHW, book = inputs(args)
        steps[variant] = make_step(variant, book)
        _, indices, loss = steps[variant](z_BDHW)
        results[variant] = {"indices": indices.flatten().cpu(), "loss": loss.item(), "seconds": float("inf")}
        results[variant] |= {name: value.cpu().clone() for name, value in book.state_dict().items()}
    for _ in range(args.repeat):
        for variant, step in steps.items():
            synchronise(args)
            start = time.perf_counter()
            step(z_BDHW)
            synchronise(args)
            results[variant]["seconds"] = min(results[variant]["seconds"], time.perf_counter() - start)
    return results


def measure_memory(variant: str, args: argparse.Namespace) -> int:
    """Bytes that a step adds to the peak."""
    z_BDHW, book = inputs(args)
    step = make_step(variant, book)
    if args.device == "cuda":
        step(z_BDHW)  # cuBLAS keeps a workspace from its first call on
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(z_BDHW)
        synchronise(args)
        return torch.cuda.max_memory_allocated() - before
    with PeakBytes() as count:
        step(z_BDHW)
    return count.peak


def synchronise(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def agree(a: dict, b: dict) -> str:
    """Why two results differ; empty where they agree. A code may differ where two are equally near to rounding."""
    different = (a["indices"] != b["indices"]).sum().item()
    if different > 1e-4 * len(a["indices"]):
        return f"{different} of {len(a['indices'])} codes differ"
    for name in ("weight", "cluster_size", "embed_avg"):
        if different == 0 and not torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5):
            return f"{name} differs by up to {(a[name] - b[name]).abs().max():g}"
    return "" if abs(a["loss"] - b["loss"]) < 1e-5 * abs(a["loss"]) else f"losses {a['loss']} and {b['loss']}"


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 where the two ways disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--N", type=int, default=8192, help="vectors")
    parser.add_argument("--K", type=int, default=8192, help="codes")
    parser.add_argument("--D", type=int, default=256, help="code dimension")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
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
    figures = {
        "speedup": plain["seconds"] / ours["seconds"],
        "memory_share": ours["bytes"] / plain["bytes"],
        "codes_differing": int((plain["indices"] != ours["indices"]).sum()),
    }
    print(
        f"{figures['speedup']:.1f}x as fast, {figures['memory_share']:.1%} of the memory; {problem or 'same results'}"
    )
    if args.json:
        rows = [{"variant": v, "seconds": r["seconds"], "bytes": r["bytes"]} for v, r in results.items()]
        setup = {"N": args.N, "K": args.K, "D": args.D, "device": where, "torch": torch.__version__}
        args.json.write_text(json.dumps({"setup": setup, "rows": rows, **figures}, indent=2) + "\n")
    return 1 if problem else 0


if __name__ == "__main__":
    raise SystemExit(main())
