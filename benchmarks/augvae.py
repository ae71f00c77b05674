"""AugVAE's training step and evaluation against the plain formulation: images/s and memory.

    python benchmarks/run.py augvae [--device cuda]

"plain" is eager float32 on NCHW tensors with the one-hot quantiser, pictures enlarged before they are convolved, and
AdamW's ordinary step. "ours" is LitAugVAE's own step (no one-hot, transposed convolutions, AdamW in one kernel,
channels last but where a CPU trains), in float32, in bfloat16 and compiled. In float32 both must give the same codes.
On a GPU the batch that fits is extrapolated from the memory of two batch sizes of each way. Enlarging and convolving is
raced by itself too, forward and backward, in the memory format and precision that training has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from benchmarks.measure import Row, absent, peak_bytes, peer, race, row
from benchmarks.plain import enlarge_then_convolve, plain_augvae
from latent_verse.augvae.layers import Upsample
from latent_verse.augvae.model import AugVAE
from latent_verse.augvae.training import LitAugVAE
from latent_verse.config import AugVAEConfig, TrainerConfig, TrainVAEConfig, VAELossConfig
from latent_verse.evaluation.reconstruction import ReconstructionMetrics
from latent_verse.optimizer import adamw

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
# (shape, batch, whether to train) of each case; ours in these precisions, compiled or not; (batch, channels, side) of
# what is enlarged: the tiny model's and the released one's largest
SIZES = {
    "toy": {
        "cases": [("toy", 2, True), ("toy", 2, False)],
        "ways": [("32", False)],
        "enlarged": [(2, 8, 4)],
        "repeats": 1,
    },
    "cpu": {
        "enlarged": [(4, 64, 32), (1, 128, 128)],
        "cases": [("tiny", 4, True), ("tiny", 4, False)],
        "ways": [("32", False)],
        "repeats": 3,
    },
    "cuda": {
        "enlarged": [(8, 128, 128)],
        "cases": [("released", 8, True), ("released", 8, False), ("tiny", 32, True)],
        "ways": [("32", False), ("bf16", False), ("bf16", True)],
        "repeats": 5,
    },
}
Step = Callable[[], object]


def lit(shape: str, compile: bool, device: str = "cpu", train: bool = True) -> LitAugVAE:
    """LitAugVAE as train_vae.py makes it, with MSE, which needs no other network, or as eval_vae.py does.

    Always with the same weights.
    """
    config = TrainVAEConfig(
        model=AugVAEConfig(**SHAPES[shape]),
        loss=VAELossConfig(loss_type="mse"),
        trainer=TrainerConfig(compile=compile),
    )
    torch.manual_seed(0)
    with torch.device(device):
        module = LitAugVAE(AugVAE(config.model), config)
    if not train:
        m = config.model
        module.test_metrics = ReconstructionMetrics(
            module.model.levels, m.num_tokens, m.resolution, with_networks=False
        )
    module.to(device).configure_model()
    return module


def our_step(module: LitAugVAE, x_BCHW: torch.Tensor, precision: str, train: bool) -> Step:
    """One call is one training step, or one evaluation, of LitAugVAE."""
    device = x_BCHW.device.type
    module.train(train)
    optimizer = adamw([p for p in module.model.parameters() if p.requires_grad], lr=1e-5) if train else None

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"), torch.set_grad_enabled(train):
            if not train:
                reconstruction = module._through(x_BCHW)[1]
                (reconstruction - x_BCHW).square().mean()
                return reconstruction
            parts, reconstruction = module._losses(x_BCHW, "train")
        optimizer.zero_grad(set_to_none=True)
        parts["total_loss"].backward()
        optimizer.step()
        return reconstruction

    return step


def plain_step(model: AugVAE, x_BCHW: torch.Tensor, train: bool) -> Step:
    """The same in eager float32 on NCHW tensors."""
    model.train(train)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5) if train else None

    def step():
        with torch.set_grad_enabled(train):
            reconstruction, embed_loss, _ = model(x_BCHW)
            loss = (reconstruction - x_BCHW).square().mean() + embed_loss
        if train:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return reconstruction

    return step


def same_codes(plain: AugVAE, ours: AugVAE, x_BCHW: torch.Tensor) -> bool:
    """Whether both give the same codes, but for one in a thousand: convolutions sum in another order."""
    with torch.no_grad():
        a, b = (m.eval().encode(x_BCHW).indices for m in (plain, ours))
    differing = sum((i != j).sum().item() for i, j in zip(a, b, strict=True))
    return differing <= 1e-3 * sum(i.numel() for i in a)


def suite(device: str, size: str) -> Iterator[Row]:
    """A row for each shape, task, precision and compilation."""
    s = SIZES[size]
    for shape, batch, train in s["cases"]:
        x_BCHW = torch.rand(batch, 3, *(AugVAEConfig(**SHAPES[shape]).resolution,) * 2, device=device) * 2 - 1
        plain = plain_augvae(lit(shape, False, device).model)
        same = same_codes(plain, lit(shape, False).model, x_BCHW) if device == "cpu" else None
        run_plain = plain_step(plain, x_BCHW, train)
        plain_bytes = peak_bytes(run_plain, device)
        for precision, compile in s["ways"]:
            task = "train" if train else "evaluate"
            case = f"{shape}, {task}, batch {batch}, {precision}{', compiled' if compile else ''}"
            goal = ">= 1.3x" if device == "cpu" else ">= 3x, <= 1/2 of the memory" if shape == "released" else None
            try:
                module = lit(shape, compile, device, train)
                step = our_step(module, x_BCHW, precision, train)
                step()  # compiles
                times = race({"ours": step, "plain": run_plain}, device, s["repeats"])
                our_bytes = peak_bytes(step, device)
            except RuntimeError as error:
                yield row("augvae", case, {}, [absent("ours", error)], unit="step", goal=goal, met=False)
                continue
            against = peer("plain", times["ours"], times["plain"], plain_bytes, our_bytes)
            figures = {"images_per_s": batch / times["ours"], "plain_images_per_s": batch / times["plain"]}
            if device == "cuda" and train and shape == "released" and not compile:  # another batch compiles anew
                figures |= _batch_that_fits(plain, module, x_BCHW, precision, plain_bytes, our_bytes)
            met = against["ratio"] >= (1.3 if device == "cpu" else 3)
            met = met and (device == "cpu" or against.get("memory_ratio", 0) >= 2)
            yield row(
                "augvae",
                case,
                {"seconds": times["ours"], "bytes": our_bytes},
                [against],
                unit="step",
                same=same,
                goal=goal,
                met=met if goal else None,
                figures=figures,
            )
            del module, step
            torch._dynamo.reset()
            if device == "cuda":
                torch.cuda.empty_cache()
    for shape in s["enlarged"]:
        yield enlarging(*shape, device, s["repeats"])


def enlarging(batch: int, channels: int, side: int, device: str, repeats: int) -> Row:
    """Upsample's transposed convolution against the convolution of an enlarged picture, forward and backward."""
    memory_format, dtype = (
        (torch.contiguous_format, torch.float32) if device == "cpu" else (torch.channels_last, torch.bfloat16)
    )
    layer = Upsample(channels).to(device, dtype, memory_format=memory_format)
    x_BCHW = torch.randn(batch, channels, side, side, device=device, dtype=dtype).to(memory_format=memory_format)
    x_BCHW.requires_grad_()
    ways = {"ours": layer, "plain": functools.partial(enlarge_then_convolve, layer)}
    ours, plain = (way(x_BCHW).detach() for way in ways.values())
    steps = {
        name: lambda way=way: torch.autograd.grad(way(x_BCHW), (x_BCHW, layer.conv.weight), ours)
        for name, way in ways.items()
    }
    times = race(steps, device, repeats)
    memory = {name: peak_bytes(step, device) for name, step in steps.items()}
    return row(
        "augvae",
        f"enlarge and convolve {batch} x {channels} x {side} x {side}, forward and backward",
        {"seconds": times["ours"], "bytes": memory["ours"]},
        [peer("plain", times["ours"], times["plain"], memory["plain"], memory["ours"])],
        unit="call",
        same=torch.allclose(ours, plain, rtol=1e-3, atol=1e-4 if dtype == torch.float32 else 5e-2),
    )


def _batch_that_fits(plain, module, x_BCHW, precision: str, plain_bytes: int, our_bytes: int) -> Row:
    """The largest batch of each way on this card, from its memory at this batch and at twice it."""
    batch, double = len(x_BCHW), torch.cat([x_BCHW, x_BCHW])
    card = torch.cuda.get_device_properties(0).total_memory
    more = {
        "plain": (plain_bytes, peak_bytes(plain_step(plain, double, True), "cuda")),
        "ours": (our_bytes, peak_bytes(our_step(module, double, precision, True), "cuda")),
    }
    fits = {}
    for name, (once, twice) in more.items():
        each = (twice - once) / batch
        fits[name] = (card - (once - each * batch)) / each
    return {f"batch_that_fits_{name}": count for name, count in fits.items()} | {
        "batch_ratio": fits["ours"] / fits["plain"]
    }
