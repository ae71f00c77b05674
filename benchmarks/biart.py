"""BiART's training step: tokens/s, MFU and memory against minGPT's formulation, Hugging Face's GPT-2 and others.

    python benchmarks/run.py biart [--device cuda]

Ours is LitBiART's loss (both directions in the batch, heads by modality, attention by SDPA), backward pass and AdamW,
in bfloat16 with compiled blocks on a GPU and in float32 on a CPU. The peers predict the next token of the same
sequences over the joint vocabulary, in the same precision, with AdamW's ordinary step; minGPT also in float32, as it is
published. With the same weights minGPT and GPT-2 must give BiART's logits. MFU follows from `BiART.flops_per_token` and
989 TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from benchmarks import heads
from benchmarks.measure import PEAK_BF16, Row, absent, matmul_rate, peak_bytes, peer, race, row
from benchmarks.plain import MinGPT, embeddings, gpt2, x_transformer
from latent_verse.biart.model import BiART
from latent_verse.biart.sequence import Sequences
from latent_verse.config import PRESETS, BiARTConfig
from latent_verse.config.train import TrainBiARTConfig, TrainerConfig
from latent_verse.training.biart import LitBiART
from latent_verse.training.optimizer import adamw

# preset, our batch, the peers' batch (they hold more), and what is compared; seq 1,088 = 64 + 1,024
SIZES = {
    "toy": {
        "cases": [("tiny", 2, 2)],
        "shape": {"n_layer": 1, "text_vocab": 40, "image_vocab": 24, "text_len": 4, "image_len": 16},
        "repeats": 1,
        "heads": {"n_embd": 16, "batch": 2, "text_vocab": 40, "image_vocab": 24, "text_len": 4, "image_len": 16},
    },
    "cpu": {
        "cases": [("tiny", 2, 2)],
        "shape": {"image_len": 256},
        "repeats": 3,
        "heads": {"n_embd": 128, "batch": 2, "image_len": 256},
    },
    "cuda": {
        "cases": [("24x1024", 32, 8), ("12x768", 32, 8)],
        "shape": {},
        "repeats": 5,
        "heads": {"n_embd": 1024, "batch": 16},
    },
}


def sequences_of(model: BiART, batch: int, device: str) -> Sequences:
    """A batch of random pairs, half of it in each direction."""
    vocab = model.vocab
    text_BL = torch.randint(vocab.text_vocab, (batch, vocab.text_len))
    text_BL[:, vocab.text_len // 2 :] = vocab.pad
    codes_BN = torch.randint(vocab.image_vocab, (batch, vocab.image_len))
    return vocab.pack(text_BL, codes_BN, batch // 2).to(device)


def our_step(model: BiART, sequences: Sequences, bf16: bool, compile: bool) -> Callable[[], object]:
    """A training step as train_biart.py takes it."""
    device = sequences.idx_BT.device.type
    config = TrainBiARTConfig(trainer=TrainerConfig(compile=compile))
    module = LitBiART(model, torch.nn.Identity(), config, {})
    module.configure_model()
    optimizer = adamw(model.parameter_groups(0.05), lr=1e-5)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss, _ = module.loss(module.model, sequences)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def peer_step(network: torch.nn.Module, logits: Callable, sequences: Sequences, bf16: bool) -> Callable[[], object]:
    """The next token of the whole sequence over the joint vocabulary, and AdamW's ordinary step."""
    device = sequences.idx_BT.device.type
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    next_BT = torch.cat([sequences.idx_BT[:, 1:], sequences.idx_BT[:, :1]], dim=1)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits_BTV = logits(sequences.idx_BT, sequences.seg_BT)
            loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), next_BT.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def peers_of(model: BiART, bf16: bool) -> dict[str, tuple[Callable, bool, bool]]:
    """name -> (makes (network, its logits), in bfloat16, whether its logits must be BiART's)."""

    def mingpt():
        network = MinGPT(model)
        return network, network

    def hf():
        network = gpt2(model)
        return network, lambda idx, seg: network(inputs_embeds=embeddings(model, idx, seg), use_cache=False).logits

    def x():
        network = x_transformer(model)
        return network, lambda idx, seg: network(idx)

    ways = {"minGPT": (mingpt, bf16, True), "Hugging Face GPT-2": (hf, bf16, True), "x-transformers": (x, bf16, False)}
    return ways | ({"minGPT, float32": (mingpt, False, True)} if bf16 else {})


def suite(device: str, size: str) -> Iterator[Row]:
    """A row for each preset, then the heads alone."""
    s = SIZES[size]
    cuda = device == "cuda"
    for preset, batch, peer_batch in s["cases"]:
        yield _train(device, preset, batch, peer_batch, s, bf16=cuda, compile=cuda)
    yield from heads.rows(device, **s["heads"], dtype="bfloat16" if cuda else "float32", repeats=s["repeats"])


def _train(device: str, preset: str, batch: int, peer_batch: int, s: dict, bf16: bool, compile: bool) -> Row:
    torch.manual_seed(0)
    model = BiART(BiARTConfig(**{**PRESETS[preset], **s["shape"]})).to(device)
    vocab, T = model.vocab, model.vocab.input_len
    few = sequences_of(model, peer_batch, device)
    peers, same = [], None
    times, memory = {}, {}
    step = our_step(model.train(), sequences_of(model, batch, device), bf16, compile)
    times["ours"] = race({"ours": step}, device, s["repeats"], warm=2)["ours"] / batch
    memory["ours"] = peak_bytes(step, device)
    with_weights = torch.cuda.max_memory_allocated() if device == "cuda" else None
    model = BiART(model.config).to(device) if bf16 else model  # weights as at the start, for the peers' logits
    for name, (make, in_bf16, comparable) in peers_of(model, bf16).items():
        try:
            network, logits = make()
            if comparable:
                with torch.no_grad():
                    expected = model.eval()(few.idx_BT[:1], few.seg_BT[:1])
                    close = torch.allclose(logits(few.idx_BT[:1], few.seg_BT[:1]), expected, rtol=1e-3, atol=1e-3)
                same = same is not False and close
            theirs = peer_step(network.train(), logits, few, in_bf16)
            taken = race({"theirs": theirs, "ours": step}, device, s["repeats"])
            times["ours"] = min(times["ours"], taken["ours"] / batch)
            peers.append((name, taken["theirs"] / peer_batch, taken["ours"] / batch, peak_bytes(theirs, device)))
            del network, logits, theirs
        except (ImportError, RuntimeError) as error:
            peers.append((name, error))
        if device == "cuda":
            torch.cuda.empty_cache()
    entries = []
    for entry in peers:
        if isinstance(entry[1], BaseException):
            entries.append(absent(*entry))
            continue
        name, theirs, ours, their_bytes = entry
        entries.append(peer(name, ours * batch, theirs * batch) | {"bytes": their_bytes, "batch": peer_batch})
        entries[-1]["memory_ratio"] = (their_bytes / peer_batch) / (memory["ours"] / batch)
    rate = T / times["ours"]
    flops = rate * model.flops_per_token()
    results = {"tokens_per_s": rate, "flops_per_s": flops, "parameters": model.num_parameters()}
    if device == "cuda":
        results |= {"mfu": flops / PEAK_BF16, "memory_with_weights_bytes": with_weights}
    else:
        results |= {"share_of_matmul_rate": flops / matmul_rate(device, torch.float32)}
    goal = {"24x1024": ">= 50 % MFU, batch 32 within 40 GB"}.get(preset) if device == "cuda" else None
    met = results.get("mfu", 0) >= 0.5 and results["memory_with_weights_bytes"] <= 40e9 if goal else None
    return row(
        "biart",
        f"{preset}, {vocab.text_len} + {vocab.image_len} tokens, batch {batch}, {'bf16, compiled' if bf16 else 'fp32'}",
        {"seconds": times["ours"] * batch, "bytes": memory["ours"]},
        entries,
        unit="training step (peers: scaled to our batch)",
        same=same,
        goal=goal,
        met=met,
        figures=results,
    )
