"""BiART's training step: tokens/s, MFU and memory against minGPT's formulation, Hugging Face's GPT-2 and others.

    python benchmarks/run.py biart [--device cuda]

Ours is LitBiART's loss (both directions in the batch, heads by modality, attention by SDPA), backward pass and AdamW,
in bfloat16 with compiled blocks on a GPU and in float32 on a CPU. The peers predict the next token of the same
sequences over the joint vocabulary, in the same precision, with AdamW's ordinary step; minGPT also in float32, as it is
published. With the same weights minGPT and GPT-2 must give BiART's logits. MFU follows from `BiART.flops_per_token` and
989 TFLOP/s. On a GPU ours and the peers are timed apart, since the memory does not hold two of them. Ours is timed
again at the end, and `clock_drift` says how much longer it takes then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import heads
from benchmarks.measure import PEAK_BF16, Case, Row, Step, against, matmul_rate, measured, race, release, row, seconds
from benchmarks.plain import MinGPT, embeddings, gpt2, x_transformer
from latent_verse.biart.model import BiART
from latent_verse.biart.sequence import Sequences
from latent_verse.config import PRESETS, BiARTConfig
from latent_verse.config.train import TrainBiARTConfig, TrainerConfig
from latent_verse.training.biart import LitBiART
from latent_verse.training.optimizer import adamw

# preset, our batch, the peers' batch (they hold more); seq 1,088 = 64 + 1,024; ours in bfloat16 or not, compiled or not
SIZES = {
    "toy": {
        "cases": [("tiny", 2, 2)],
        "shape": {"n_layer": 1, "text_vocab": 40, "image_vocab": 24, "text_len": 4, "image_len": 16},
        "ways": [(False, False), (True, True)],
        "repeats": 1,
        "heads": {"n_embd": 16, "batch": 2, "text_vocab": 40, "image_vocab": 24, "text_len": 4, "image_len": 16},
    },
    "cpu": {
        "cases": [("tiny", 2, 2)],
        "shape": {"image_len": 256},
        "ways": [(False, False)],
        "repeats": 3,
        "heads": {"n_embd": 128, "batch": 2, "image_len": 256},
    },
    "cuda": {
        "cases": [("24x1024", 32, 8), ("12x768", 32, 8)],
        "shape": {},
        "ways": [(True, True)],
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


def our_step(model: BiART, sequences: Sequences, bf16: bool, compile: bool) -> Step:
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


def peer_step(network: torch.nn.Module, logits: Callable, sequences: Sequences, bf16: bool) -> Step:
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


def cases(device: str, size: str) -> list[Case]:
    """The heads alone, then the training step of each preset."""
    s, cuda = SIZES[size], device == "cuda"
    found = heads.cases(device, **s["heads"], dtype="bfloat16" if cuda else "float32", repeats=s["repeats"])
    for preset, batch, peer_batch in s["cases"]:
        config = BiARTConfig(**{**PRESETS[preset], **s["shape"]})
        for bf16, compile in s["ways"]:
            how = f"{'bf16' if bf16 else 'fp32'}{', compiled' if compile else ''}"
            name = f"{preset}, {config.text_len} + {config.image_len} tokens, batch {batch}, {how}"
            run = partial(_train, device, name, preset, config, batch, peer_batch, bf16, compile, s["repeats"])
            found.append(Case(name, run, 150 if compile and cuda else None, compile))
    return sorted(found, key=lambda case: case.compiles)


def _train(device, name, preset, config, batch, peer_batch, bf16, compile, repeats) -> Iterator[Row]:
    torch.manual_seed(0)
    cuda = device == "cuda"
    with torch.device(device):
        model = BiART(config)
    step = our_step(model.train(), sequences_of(model, batch, device), bf16, compile)
    first = seconds(step, device)
    result = row("biart", name, measured(step, device, repeats), [], unit="training step (peers: scaled to our batch)")
    figures = {"parameters": model.num_parameters(), "first_step_s": first if compile else None}
    if cuda:
        figures["memory_with_weights_bytes"] = torch.cuda.max_memory_allocated()
        if preset == "24x1024":
            result["goal"] = ">= 50 % MFU, batch 32 within 40 GB"

    def rates() -> Row:
        """The row, with what follows from the seconds of a step."""
        tokens = batch * model.vocab.input_len / result["ours"]["seconds"]
        flops = tokens * model.flops_per_token()
        limit = (
            {"mfu": flops / PEAK_BF16} if cuda else {"share_of_matmul_rate": flops / matmul_rate(device, torch.float32)}
        )
        result["figures"] = {"tokens_per_s": tokens, "flops_per_s": flops, **limit, **figures}
        if result["goal"]:
            result["met"] = limit["mfu"] >= 0.5 and figures["memory_with_weights_bytes"] <= 40e9
        return result

    yield rates()
    release(device)
    few = sequences_of(model, peer_batch, device)
    with torch.device(device):
        start = BiART(config).eval()  # in float32, with weights that no step has moved
    for peer, (make, in_bf16, comparable) in peers_of(start, bf16).items():

        def theirs(make=make, in_bf16=in_bf16, comparable=comparable) -> Step:
            network, logits = make()
            if comparable:
                idx_BT, seg_BT = few.idx_BT[:1], few.seg_BT[:1]
                with torch.no_grad():
                    close = torch.allclose(logits(idx_BT, seg_BT), start(idx_BT, seg_BT), rtol=1e-3, atol=1e-3)
                result["same"] = result["same"] is not False and close
            return peer_step(network.train(), logits, few, in_bf16)

        against(result, peer, step, theirs, device, repeats, apart=cuda, scale=batch / peer_batch)
        yield result
    if cuda:
        again = race({"ours": step}, device, repeats)["ours"]
        figures["clock_drift"] = again / result["ours"]["seconds"]
        yield rates()
