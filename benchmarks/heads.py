"""The loss by modality heads against the full masked softmax: time and peak memory of forward and backward.

    python benchmarks/heads.py [--device cuda] [--n_embd 768] [--batch 8] [--json FILE]

The work is that of the heads: from the features of a batch with both directions in it to the loss and its gradients
with respect to the features and the head. "full" computes the joint vocabulary's logits at every position, sets those
of the other modality to -inf and takes the cross-entropy. "modality" computes what comes next only. "modality, chunked"
does so for `--chunk` tokens at a time and again in the backward pass. Each implementation runs in fresh processes, one
for the time and one for the memory: what it adds to the peak of the allocator (CUDA) or of the process (CPU, where
malloc is set to return freed memory at once, which is slower but makes the peak what is held).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import Case, Row, against, measured, row
from latent_verse.biart.model import BiART, loss_weights
from latent_verse.biart.sequence import DIRECTIONS, IGNORE, Sequences
from latent_verse.config import BiARTConfig

REFERENCE_WEIGHT = 0.5


def full_loss(model: BiART, features_BTC: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """The plain formulation of `BiART.loss`: every logit, then a mask."""
    vocab, device = model.vocab, features_BTC.device
    logits_BTV = model.head(features_BTC)
    # Per direction: which modality each position predicts, 2 for the second begin token, which is given.
    outside_3V = torch.ones(3, vocab.size, dtype=torch.bool, device=device)
    outside_3V[2] = False
    target_BT = torch.full(features_BTC.shape[:2], IGNORE, device=device)
    weight_BT = torch.zeros(features_BTC.shape[:2], device=device)
    next_BT = torch.full(features_BTC.shape[:2], 2, device=device)
    for direction, rows in sequences.parts():
        share = (rows.stop - rows.start) / len(features_BTC)
        for i, (modality, class_BT) in enumerate((("text", sequences.text_BL), ("image", sequences.codes_BN))):
            outside_3V[i, vocab.class_ids(modality, device)] = False
            positions, class_BT = vocab.positions(direction, modality), class_BT[rows]
            counted = class_BT != IGNORE
            scale = share * (1 if direction == DIRECTIONS[1 - i] else REFERENCE_WEIGHT) / counted.sum()
            next_BT[rows, positions] = i
            target_BT[rows, positions] = torch.where(counted, vocab.to_ids(class_BT, modality), IGNORE)
            weight_BT[rows, positions] = scale
    logits_BTV = logits_BTV.float().masked_fill(outside_3V[next_BT], -math.inf)
    losses = F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), ignore_index=IGNORE, reduction="none")
    return (losses * weight_BT.flatten()).sum()


def make_step(variant: str, sizes: dict, batch: int, device: str, dtype: str, chunk: int):
    """A function of no arguments that computes the loss and its gradients by `variant` and returns the loss."""
    torch.manual_seed(0)
    with torch.device(device):
        model = BiART(BiARTConfig(**sizes, n_layer=1)).to(getattr(torch, dtype))
    vocab = model.vocab
    text_BL = torch.randint(vocab.text_vocab, (batch, vocab.text_len))
    text_BL[:, vocab.text_len // 4 :] = vocab.pad  # captions are short
    codes_BN = torch.randint(vocab.image_vocab, (batch, vocab.image_len))
    sequences = vocab.pack(text_BL, codes_BN, batch // 2).to(device)
    shape = (batch, vocab.input_len, sizes["n_embd"])
    features = torch.randn(shape).to(device, model.head.weight.dtype).requires_grad_()

    def step():
        if variant == "full":
            loss = full_loss(model, features, sequences)
        else:  # BiART.loss itself, on given features
            model.features = lambda idx, seg: features
            loss, _ = model.loss(sequences, loss_weights(REFERENCE_WEIGHT), chunk if "chunked" in variant else None)
        model.zero_grad(set_to_none=True)
        features.grad = None
        loss.backward()
        return loss.item()  # waits for the device

    return step


def run_variant(variant: str, sizes: dict, batch: int, device: str, dtype: str, chunk: int, repeats: int) -> dict:
    """Median seconds and peak bytes of one implementation, and its loss."""
    step = make_step(variant, sizes, batch, device, dtype, chunk)

    def resident(key: str) -> int:
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields[key].split()[0]) * 1024

    # The head's own gradient exists in every variant, so it is not part of what they add.
    before = torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    return {"variant": variant, "seconds": sorted(times[1:])[repeats // 2], "bytes": peak - before, "loss": loss}


def cases(device: str, n_embd: int, batch: int, dtype: str, repeats: int, chunk: int = 1024, **sizes) -> list[Case]:
    """For run.py's area biart: each of our implementations of the heads alone."""
    arguments = ({"n_embd": n_embd, "n_head": 1, **sizes}, batch, device, dtype, chunk)
    found = []
    for variant in ("modality", "modality, chunked"):
        name = f"heads by {variant}, batch {batch}, n_embd {n_embd}, {dtype}"
        found.append(Case(name, partial(_case, name, variant, arguments, device, dtype, repeats)))
    return found


def _case(name: str, variant: str, arguments: tuple, device: str, dtype: str, repeats: int) -> Iterator[Row]:
    ours = make_step(variant, *arguments)
    loss = ours()
    result = row("biart", name, measured(ours, device, repeats), [], unit="loss and gradients")
    yield result

    def full():
        step = make_step("full", *arguments)
        result["same"] = math.isclose(loss, step(), rel_tol=1e-4 if dtype == "float32" else 1e-2)
        return step

    against(result, "full masked softmax", ours, full, device, repeats)
    yield result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on the CPU, else bfloat16")
    parser.add_argument("--n_embd", type=int, help="default: 1024 on cuda, 256 on the CPU")
    parser.add_argument("--batch", type=int, help="default: 16 on cuda, 2 on the CPU")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens per piece of the chunked way")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    dtype = args.dtype or ("bfloat16" if cuda else "float32")
    sizes = {"n_embd": args.n_embd or (1024 if cuda else 256), "n_head": 1}
    batch = args.batch or (16 if cuda else 2)

    print(f"batch {batch}, n_embd {sizes['n_embd']}, {dtype} on {args.device}, torch {torch.__version__}")
    print("                      seconds   against full   peak memory   against full       loss")
    rows = []
    context = multiprocessing.get_context("spawn")
    for variant in ("full", "modality", "modality, chunked"):
        arguments = (variant, sizes, batch, args.device, dtype, args.chunk)
        with context.Pool(1) as pool:
            row = pool.apply(run_variant, (*arguments, args.repeats))
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # glibc reads it when a process starts
        with context.Pool(1) as pool:
            row["bytes"] = pool.apply(run_variant, (*arguments, 1))["bytes"]
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
        rows.append(row)
        row["speedup"], row["memory_ratio"] = rows[0]["seconds"] / row["seconds"], rows[0]["bytes"] / row["bytes"]
        print(
            f"{variant:20s} {row['seconds']:8.3f} {row['speedup']:13.1f}x {row['bytes'] / 2**20:9.0f} MiB "
            f"{row['memory_ratio']:12.1f}x {row['loss']:12.6f}",
            flush=True,
        )
    if args.json:
        setup = {"device": args.device, "dtype": dtype, "batch": batch, **sizes, "torch": torch.__version__}
        args.json.write_text(json.dumps({"setup": setup, "rows": rows}, indent=2) + "\n")
    tolerance = 1e-4 if dtype == "float32" else 1e-2
    return 0 if all(math.isclose(row["loss"], rows[0]["loss"], rel_tol=tolerance) for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
