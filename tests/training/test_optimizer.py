"""adamw's fused kernel under mixed precision: Lightning clips gradients, and their scale is undone once."""

from __future__ import annotations

import copy

import pytest
import torch
from pytorch_lightning.plugins import MixedPrecision

from latent_verse.training.optimizer import adamw


def net_and_input() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3), 10 * torch.randn(5, 4)


def test_lightning_clips_in_mixed_precision():
    """The private attribute that adamw sets is one that Lightning still reads."""
    precision = MixedPrecision("bf16-mixed", "cpu")
    net, x = net_and_input()
    net(x).square().sum().backward()
    with pytest.raises(RuntimeError, match="fused"):
        precision.clip_gradients(torch.optim.AdamW(net.parameters(), fused=True), 1.0)
    precision.clip_gradients(adamw(list(net.parameters()), lr=0.1), 1.0)
    assert torch.cat([p.grad.flatten() for p in net.parameters()]).norm() == pytest.approx(1, abs=1e-3)


def test_scaled_gradients_are_unscaled_once():
    net, x = net_and_input()
    scaled = copy.deepcopy(net)
    for model, scaler in ((net, None), (scaled, torch.amp.GradScaler("cpu", init_scale=8.0))):
        optimizer = adamw(list(model.parameters()), lr=0.1, eps=1.0)  # an eps this large shows the gradients' scale
        loss = model(x).square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
    torch.testing.assert_close(list(net.parameters()), list(scaled.parameters()))
