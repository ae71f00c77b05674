"""Selective activation checkpointing (Chen et al., 2016; Korthikanti et al., 2022), for both networks.

A convolution or matrix product keeps its input for the backward pass. If that input comes from a norm and an activation
function, it can be recomputed from the norm's input, which is kept anyway, at the cost of two elementwise passes.
Products are never computed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# What the compiler must keep: it would otherwise recompute the whole part, expensive products included. Eager
# recomputation needs no such list: it stops as soon as the product's input is there.
aten = torch.ops.aten
PRODUCTS = [aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default]


class ActivationCheckpointing(nn.Module):
    """A module with parts whose intermediate results can be recomputed: see `checkpoint_activations`."""

    activation_checkpointing = False

    def recomputed(self, part: Callable[[Tensor], Tensor], x: Tensor, dropout: float = 0.0) -> Tensor:
        """part(x), which ends with a product and may hold dropout. Only x is kept, with `activation_checkpointing`."""
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return part(x)
        how: dict[str, Any] = {}
        if torch.compiler.is_compiling():
            how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, PRODUCTS)
        return checkpoint(part, x, use_reentrant=False, preserve_rng_state=dropout > 0, **how)


def checkpoint_activations(network: nn.Module) -> None:
    """From now on, `network` recomputes the outputs of norms and activation functions in the backward pass."""
    for module in network.modules():
        if isinstance(module, ActivationCheckpointing):
            module.activation_checkpointing = True
