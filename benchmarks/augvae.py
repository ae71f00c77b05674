"""AugVAE's training step and evaluation against the plain formulation: images/s and memory.

    python benchmarks/run.py augvae [--device cuda]

"plain" is eager float32 on NCHW tensors with the one-hot quantiser, maps upsampled before they are convolved, and
AdamW's ordinary step. "ours" is LitAugVAE's own step (no one-hot, transposed convolutions, AdamW in one kernel,
channels last except where a CPU trains), in float32, in bfloat16, compiled, and with activation checkpointing. In
float32 both must give the same codes. bfloat16 is measured on a CPU that has units for it (AVX512-BF16 or AMX), and at
the toy size anywhere. On a GPU the batch that fits is extrapolated from the memory of two batch sizes of each
implementation. Compiled cases come last; `first_step_s` is their first step, which compiles. The tiny recipe's
optimiser, Muon, is timed within a training step and by itself, against Muon matrix by matrix and `torch.optim.Muon`.
Upsampling and convolving is timed by itself too, forward and backward, in training's memory format and precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.measure import Case, Row, Step, against, cpu_has_bf16, measured, peak_bytes, row, seconds
from benchmarks.plain import PlainMuon, enlarge_then_convolve, plain_augvae
from latent_verse.augvae.layers import Upsample
from latent_verse.augvae.model import AugVAE
from latent_verse.config import AugVAEConfig
from latent_verse.config.train import EvalVAEConfig, ImageDataConfig, TrainerConfig, VAELossConfig
from latent_verse.training.augvae import LitAugVAE, LitAugVAEEvaluation
from latent_verse.training.optimizer import MuonAdamW, adamw

SHAPES = {
    "toy": {
        "hidden_dim": 32,
        "ch_mult": (1, 2),
        "num_res_blocks": 1,
        "resolution": 16,
        "attn_resolutions": (8, 4),
        "z_channels": 16,
        "codebook_dim": 8,
        "num_tokens": 24,
    },
    "tiny": {  # configs/tiny_augvae_ml.yaml
        "hidden_dim": 32,
        "ch_mult": (2, 1, 2),
        "num_res_blocks": 1,
        "resolution": 64,
        "attn_resolutions": (16, 8, 4, 2),
        "z_channels": 32,
        "codebook_dim": 32,
        "num_tokens": 512,
    },
    "released": {},
}
EVALUATE, TRAIN, MUON = "evaluate", "train", "train with Muon"
# (shape, batch, task) of each case; ours in these precisions, compiled or not, checkpointing or not;
# (batch, channels, side) of what is enlarged: the tiny model's and the released one's largest; the shape of the model
# whose kernels Muon steps on
SIZES = {
    "toy": {
        "cases": [("toy", 2, TRAIN), ("toy", 2, MUON), ("toy", 2, EVALUATE)],
        "ways": [("32", False, False), ("32", False, True), ("bf16", False, False), ("bf16", True, False)],
        "enlarged": [(2, 8, 4)],
        "muon": "toy",
        "repeats": 1,
    },
    "cpu": {
        "enlarged": [(4, 64, 32), (1, 128, 128)],
        "cases": [("tiny", 4, TRAIN), ("tiny", 4, MUON), ("tiny", 4, EVALUATE)],
        "ways": [("32", False, False), ("bf16", False, False), ("32", False, True), ("bf16", False, True)],
        "muon": "tiny",
        "repeats": 3,
    },
    "cuda": {
        "enlarged": [(8, 128, 128)],
        "cases": [("released", 8, TRAIN), ("released", 8, EVALUATE), ("tiny", 32, TRAIN)],
        "muon": "released",
        "ways": [("32", False, False), ("bf16", False, True), ("bf16", False, False), ("bf16", True, False)],
        "repeats": 5,
    },
}
RATE = 1e-5


def lit(shape: str, compile: bool, device: str = "cpu", train: bool = True, again: bool = False) -> LitAugVAE:
    """LitAugVAE as train_vae.py makes it, with MSE, which needs no other network, or as eval_vae.py does.

    Always with the same weights. `again`: with activation checkpointing.
    """
    config = EvalVAEConfig(
        model=AugVAEConfig(**SHAPES[shape]),
        data=ImageDataConfig(fake_data=not train),  # evaluation without LPIPS and Inception
        loss=VAELossConfig(loss_type="mse"),
        trainer=TrainerConfig(compile=compile, activation_checkpointing=again),
    )
    torch.manual_seed(0)
    with torch.device(device):
        module = (LitAugVAE if train else LitAugVAEEvaluation)(AugVAE(config.model), config)
    module.to(device).configure_model()
    return module


def our_step(module: LitAugVAE, x_BCHW: torch.Tensor, precision: str, task: str) -> Step:
    """One call is one training step, or one evaluation, of LitAugVAE."""
    device, train = x_BCHW.device.type, task != EVALUATE
    module.train(train)
    trainable = [p for p in module.model.parameters() if p.requires_grad]
    if task == MUON:
        rest = {"params": [p for p in trainable if p.ndim != 4], "weight_decay": 0.0}
        optimizer = MuonAdamW([p for p in trainable if p.ndim == 4], [rest], RATE, RATE, 0.0)
    elif train:
        optimizer = adamw(trainable, lr=RATE)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"), torch.set_grad_enabled(train):
            if not train:
                reconstruction = module.reconstruct(x_BCHW)[1]
                (reconstruction - x_BCHW).square().mean()
                return reconstruction
            parts, reconstruction, _ = module._losses(x_BCHW, "train")
        optimizer.zero_grad(set_to_none=True)
        parts["total_loss"].backward()
        optimizer.step()
        return reconstruction

    return step


def plain_step(model: AugVAE, x_BCHW: torch.Tensor, task: str) -> Step:
    """The same in eager float32 on NCHW tensors."""
    train = task != EVALUATE
    model.train(train)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizers = []
    if train:
        optimizers.append(torch.optim.AdamW([p for p in trainable if task == TRAIN or p.ndim != 4], lr=RATE))
    if task == MUON:
        optimizers.append(PlainMuon([p for p in trainable if p.ndim == 4], lr=RATE))

    def step():
        with torch.set_grad_enabled(train):
            reconstruction, embed_loss, _ = model(x_BCHW)
            loss = (reconstruction - x_BCHW).square().mean() + embed_loss
        if train:
            model.zero_grad(set_to_none=True)
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return reconstruction

    return step


def same_codes(plain: AugVAE, ours: AugVAE, x_BCHW: torch.Tensor) -> bool:
    """Whether both give the same codes, except for one in a thousand: convolutions sum in another order."""
    with torch.no_grad():
        a, b = (m.eval().encode(x_BCHW).indices for m in (plain, ours))
    differing = sum((i != j).sum().item() for i, j in zip(a, b, strict=True))
    return differing <= 1e-3 * sum(i.numel() for i in a)


def cases(device: str, size: str) -> list[Case]:
    """One for each shape, task, precision and compilation; upsampling and Muon by themselves; last what is compiled."""
    s, found = SIZES[size], []
    has_bf16 = device == "cuda" or size == "toy" or cpu_has_bf16()
    for shape, batch, task in s["cases"]:
        for precision, compile, again in s["ways"]:
            if (precision == "bf16" and not has_bf16) or (again and task != TRAIN) or (compile and task == MUON):
                continue
            how = f"{', compiled' if compile else ''}{', checkpointing' if again else ''}"
            name = f"{shape}, {task}, batch {batch}, {precision}{how}"
            run = partial(_way, device, name, shape, batch, task, precision, compile, again, s["repeats"])
            found.append(Case(name, run, 240 if compile and device == "cuda" else None, compile))
    for batch, channels, side in s["enlarged"]:
        name = f"enlarge and convolve {batch} x {channels} x {side} x {side}, forward and backward"
        found.append(Case(name, partial(enlarging, name, batch, channels, side, device, s["repeats"])))
    name = f"Muon's step on the kernels of the {s['muon']} model"
    found.append(Case(name, partial(muon, name, s["muon"], device, s["repeats"])))
    return sorted(found, key=lambda case: case.compiles)


def _way(device, name, shape, batch, task, precision, compile, again, repeats) -> Iterator[Row]:
    x_BCHW = torch.rand(batch, 3, *(AugVAEConfig(**SHAPES[shape]).resolution,) * 2, device=device) * 2 - 1
    module = lit(shape, compile, device, train=task != EVALUATE, again=again)
    step = our_step(module, x_BCHW, precision, task)
    first = seconds(step, device)
    result = row("augvae", name, measured(step, device, repeats), [], unit="step", goal=_goal(device, shape, again))
    result["figures"] = {"images_per_s": batch / result["ours"]["seconds"], "first_step_s": first if compile else None}
    yield result
    plain = plain_augvae(lit(shape, False, device).model)
    if device == "cpu":
        result["same"] = same_codes(plain, lit(shape, False).model, x_BCHW)
    entry = against(result, "plain", step, lambda: plain_step(plain, x_BCHW, task), device, repeats)
    if "seconds" in entry:
        result["figures"]["plain_images_per_s"] = batch / entry["seconds"]
        result["met"] = _met(result, device, entry)
    yield result
    # not compiled: another batch compiles anew
    if device == "cuda" and task == TRAIN and shape == "released" and not compile and "bytes" in entry:
        result["figures"] |= _batch_that_fits(plain, module, x_BCHW, precision, entry["bytes"], result["ours"]["bytes"])
        result["met"] = _met(result, device, entry)
        yield result


def _goal(device: str, shape: str, again: bool) -> str | None:
    if device == "cpu":
        return None if again else ">= 1.3x"
    if shape == "released":
        return ">= 4x the batch" if again else ">= 3x, <= 1/2 of the memory"
    return None


def _met(result: Row, device: str, plain: Row) -> bool | None:
    if result["goal"] is None:
        return None
    if "the batch" in result["goal"]:
        ratio = result["figures"].get("batch_ratio")
        return None if ratio is None else ratio >= 4
    return plain["ratio"] >= (1.3 if device == "cpu" else 3) and (device == "cpu" or plain["memory_ratio"] >= 2)


def muon(name: str, shape: str, device: str, repeats: int) -> Iterator[Row]:
    """A step of Muon on a model's kernels: ours, matrix by matrix, and torch's own (for matrices, in bfloat16)."""
    kernels = [p.detach() for p in lit(shape, False, device).model.parameters() if p.ndim == 4]
    gradients = [torch.randn_like(k) for k in kernels]

    def optimize(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], flat: bool = False):
        """A step of an optimiser on parameters of its own, and how far its first step moves them."""
        parameters = [torch.nn.Parameter((k.flatten(1) if flat else k).clone()) for k in kernels]
        optimizer = make(parameters)

        def step():
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient.view(p.shape).clone()
            optimizer.step()

        step()
        moved = [(p.detach().view(k.shape) - k).flatten() for p, k in zip(parameters, kernels, strict=True)]
        return step, torch.cat(moved)

    def by_matrix() -> Step:
        step, moved = optimize(lambda parameters: PlainMuon(parameters, lr=0.05))
        most = (1e-3 if device == "cpu" else 5e-2) * moved.norm()
        result["same"] = bool((our_move - moved).norm() <= most)
        return step

    def of_torch() -> Step:  # from PyTorch 2.9 on
        settings = {"lr": 0.05, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
        return optimize(lambda parameters: torch.optim.Muon(parameters, **settings), flat=True)[0]

    our_step, our_move = optimize(lambda parameters: MuonAdamW(parameters, [{"params": []}], RATE, 0.05, 0.0))
    result = row("augvae", name, measured(our_step, device, repeats), [], unit="step")
    result["figures"] = {"kernels": len(kernels)}
    yield result
    for peer, make in (("matrix by matrix", by_matrix), ("torch.optim.Muon", of_torch)):
        against(result, peer, our_step, make, device, repeats)
        yield result


def enlarging(name: str, batch: int, channels: int, side: int, device: str, repeats: int) -> Iterator[Row]:
    """Upsample's transposed convolution against the convolution of an upsampled map, forward and backward."""
    memory_format, dtype = (
        (torch.contiguous_format, torch.float32) if device == "cpu" else (torch.channels_last, torch.bfloat16)
    )
    layer = Upsample(channels).to(device, dtype, memory_format=memory_format)
    x_BCHW = torch.randn(batch, channels, side, side, device=device, dtype=dtype).to(memory_format=memory_format)
    x_BCHW.requires_grad_()
    given = layer(x_BCHW).detach()

    def steps(way: Callable[[torch.Tensor], torch.Tensor]) -> Step:
        return lambda: torch.autograd.grad(way(x_BCHW), (x_BCHW, layer.conv.weight), given)

    def plain() -> Step:
        way = partial(enlarge_then_convolve, layer)
        atol = 1e-4 if dtype == torch.float32 else 5e-2
        result["same"] = torch.allclose(given, way(x_BCHW).detach(), rtol=1e-3, atol=atol)
        return steps(way)

    result = row("augvae", name, measured(steps(layer), device, repeats), [], unit="call")
    yield result
    against(result, "plain", steps(layer), plain, device, repeats)
    yield result


def _batch_that_fits(plain, module, x_BCHW, precision: str, plain_bytes: int, our_bytes: int) -> Row:
    """The largest batch of each implementation on this card, from its memory at this batch and at twice it."""
    batch, double = len(x_BCHW), torch.cat([x_BCHW, x_BCHW])
    card = torch.cuda.get_device_properties(0).total_memory
    more = {
        "plain": (plain_bytes, peak_bytes(plain_step(plain, double, TRAIN), "cuda")),
        "ours": (our_bytes, peak_bytes(our_step(module, double, precision, TRAIN), "cuda")),
    }
    fits = {}
    for name, (once, twice) in more.items():
        each = (twice - once) / batch
        fits[name] = (card - (once - each * batch)) / each
    return {f"batch_that_fits_{name}": count for name, count in fits.items()} | {
        "batch_ratio": fits["ours"] / fits["plain"]
    }
