"""Muon for matrices and convolutions and AdamW for everything else, as one optimiser; the schedule of both stages.

Muon (Jordan et al., 2024) steps along the orthogonalised momentum of a matrix. `torch.optim.Muon` works on one matrix
at a time and in bfloat16, which a CPU without bfloat16 units computes 18 times slower than float32 (measured at n_embd
192). Here all matrices of one shape go through Newton-Schulz together, in bfloat16 on a GPU and in float32 elsewhere.
In float32, matrices much wider than tall (kernels) iterate on a small product only. One optimiser rather than two keeps
Lightning's automatic optimisation, its step count and its checkpoints as they are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART

FUSED_ON = ("cpu", "cuda")  # devices for which torch has one kernel for a whole step of AdamW
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, as in Jordan's post and in torch.optim.Muon


def adamw(parameters: list, **settings) -> torch.optim.AdamW:
    """AdamW in one kernel (`fused`) if torch has one: the same step, 3 times as fast on a CPU, one launch on a GPU.

    `parameters` are tensors or parameter groups, already on the device; sharded ones take the ordinary step.
    """
    tensors = [p for group in parameters for p in (group["params"] if isinstance(group, dict) else [group])]
    fused = all(p.device.type in FUSED_ON and p.is_floating_point() and not hasattr(p, "device_mesh") for p in tensors)
    optimizer = torch.optim.AdamW(parameters, fused=True if fused and tensors else None, **settings)
    # True would say that the fused kernel undoes the scale of fp16 gradients, and Lightning would then refuse
    # gradient_clip_val, in bf16 too (its issue 21435). tests/training/test_optimizer.py pins this private attribute.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def orthogonalise(g_NRC: Tensor, iterations: int = 5) -> Tensor:
    """Matrices (N, R, C) with their singular values moved close to 1 (0.7 to 1.2), their singular vectors unchanged."""
    a, b, c = COEFFICIENTS
    x = g_NRC.bfloat16() if g_NRC.is_cuda else g_NRC.float()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values of at most 1, or it would diverge
    if x.dtype == torch.float32 and x.shape[2] >= 2 * x.shape[1]:
        x = _iterate_on_gram(x, iterations)
    else:
        for _ in range(iterations):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(g_NRC.dtype)


def _iterate_on_gram(x_NRC: Tensor, iterations: int) -> Tensor:
    """The same iteration for wide matrices, on their R x R products; the matrices themselves come in at the end only.

    An iteration is x <- z @ x with z a polynomial of x @ x.mT. So x @ x.mT becomes z @ x @ x.mT @ z, and the result is
    the product of all z times x. Five iterations take 34 R^3 + 4 R^2 C FLOPs instead of 10 R^3 + 20 R^2 C: fewer if
    C > 1.5 R. Rounding errors of the small product grow by a^2 per iteration: float32 keeps 3 digits or more, bfloat16
    would diverge.
    """
    a, b, c = COEFFICIENTS

    def polynomial(gram: Tensor) -> Tensor:
        z = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        z.diagonal(dim1=1, dim2=2).add_(a)
        return z

    gram = x_NRC @ x_NRC.mT
    z = whole = polynomial(gram)
    for _ in range(iterations - 1):
        gram = z @ gram @ z
        z = polynomial(gram)
        whole = z @ whole
    return whole @ x_NRC


class MuonAdamW(torch.optim.Optimizer):
    """Muon with Nesterov momentum on `matrices`, AdamW on the parameter groups `rest`.

    Args:
        matrices: tensors of 2 or more dimensions; a kernel (out, in, k, k) counts as the matrix (out, in * k * k).
        rest: AdamW's parameter groups, each with its weight_decay.
        lr, muon_lr: learning rates of AdamW and of Muon. Muon's update has a root mean square of 0.2 x muon_lr for any
            shape (Liu et al., 2025, "Muon is scalable"), which is about AdamW's: one rate can serve both.
        weight_decay: of the matrices.
    """

    def __init__(
        self,
        matrices: list[Tensor],
        rest: list[dict],
        lr: float,
        muon_lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        muon = {"params": matrices, "lr": muon_lr, "weight_decay": weight_decay, "momentum": momentum, "muon": True}
        self._adamw = adamw(rest, lr=lr, betas=betas)
        groups = [muon, *({**group, "muon": False} for group in self._adamw.param_groups)]
        super().__init__(groups, {})
        self._share()

    def _share(self) -> None:
        """Let AdamW work on this optimiser's groups and state, so that schedules and checkpoints see only one."""
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the loss that `closure` returns, if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                self._muon_step(group)
        self._adamw.step()
        return loss

    def _muon_step(self, group: dict) -> None:
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                by_shape[p.shape].append((p, p.grad))
        for shape, pairs in by_shape.items():
            params, directions = [p for p, _ in pairs], []
            for p, grad in pairs:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(grad, 1 - group["momentum"])
                directions.append(grad.lerp(state["momentum"], group["momentum"]).flatten(1))
            updates = [u.view(shape) for u in orthogonalise(torch.stack(directions)).unbind()]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            longest = max(shape[0], math.prod(shape[1:]))
            torch._foreach_add_(params, updates, alpha=-group["lr"] * 0.2 * math.sqrt(longest))


def make_optimizer(
    model: AugVAE | BiART,
    name: str,
    lr: float,
    muon_lr: float,
    weight_decay: float,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """The optimiser of a network that the setting `optimizer` names: adamw, or muon (AugVAE's convolutions, the
    matrices in BiART's blocks) with AdamW for the rest."""
    if isinstance(model, BiART):
        groups = model.parameter_groups(weight_decay)
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    else:
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": trainable, "weight_decay": weight_decay}]
        matrices = [p for p in trainable if p.ndim == 4]
    if name == "adamw":
        return adamw(groups, lr=lr, betas=betas)
    ids = {id(p) for p in matrices}
    rest = [{**group, "params": [p for p in group["params"] if id(p) not in ids]} for group in groups]
    return MuonAdamW(matrices, rest, lr, muon_lr, weight_decay, momentum, betas)


def warm_up_then_cosine(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: Callable[[], float], floor: float = 0.0
) -> torch.optim.lr_scheduler.LambdaLR:
    """A rate that rises linearly for `warmup_steps`, then falls as a cosine to `floor` x its peak at `total_steps()`.

    `total_steps` is called only after the warm-up: Lightning loads the data to answer, and before a checkpoint is
    restored that would leave the data loader at the beginning of the epoch.
    """

    def factor(step: int) -> float:
        if step <= warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = min(1.0, (step - warmup_steps) / max(1, total_steps() - warmup_steps))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
