"""Reconstruction losses of AugVAE: MSE, L1, smooth L1, and LPIPS (Zhang et al. 2018) on top of MSE or L1.

LPIPS is torchmetrics', with its backbone from torchvision's cache. It is never part of a module: it is frozen, stays in
evaluation mode and float32 whatever Lightning does, and its 14.7 M weights reach no checkpoint.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from latent_verse.config import ConfigError

PIXEL_LOSSES = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "lpips_l2": F.mse_loss,
    "lpips_l1": F.l1_loss,
}


def vgg16_file() -> Path:
    """Where torchvision caches VGG16's weights ($TORCH_HOME, or ~/.cache/torch)."""
    from torchvision.models import VGG16_Weights

    return Path(torch.hub.get_dir()) / "checkpoints" / VGG16_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]


def fetch_vgg16() -> None:
    """Download VGG16's weights into torchvision's cache, hash checked, unless they lie there. For one process a node.

    Raises:
        ConfigError: they are absent and cannot be downloaded; says which file to put where.
    """
    from torchvision.models import VGG16_Weights

    if vgg16_file().is_file():
        return
    weights = VGG16_Weights.IMAGENET1K_V1
    try:
        weights.get_state_dict(progress=True, check_hash=True, map_location="cpu")
    except Exception as error:  # urllib, ssl and socket raise kinds of their own
        raise ConfigError(
            f"LPIPS needs VGG16's weights, which are neither at {vgg16_file()} nor could be downloaded ({error}). Put "
            f"{weights.url} there from a machine with a network, or train with --loss_type mse, l1 or smooth_l1, "
            "which need no file."
        ) from error


class LPIPS:
    """LPIPS (VGG16) of images in [-1, 1]: (B, 3, H, W) twice -> (B,) float32. Not a module: see the file's head.

    Args:
        untrained: random VGG weights, the same in every process, for smoke tests on a machine without the file.
    """

    def __init__(self, untrained: bool = False):
        from torchmetrics.functional.image.lpips import _LPIPS  # its public form cannot take untrained weights

        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torchmetrics' own torch.load
            torch.manual_seed(0)
            self.net = _LPIPS(net="vgg", pnet_rand=untrained)
        self.net.eval().requires_grad_(False)

    def to(self, device: torch.device) -> LPIPS:
        """Move the network."""
        self.net.to(device)
        return self

    def __call__(self, a_BCHW: torch.Tensor, b_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(a_BCHW.device.type, enabled=False):
            return self.net(a_BCHW.float(), b_BCHW.float()).flatten()


class ReconstructionLoss:
    """mean pixel loss + p_loss_weight x mean LPIPS, for one of `PIXEL_LOSSES`.

    Args:
        untrained: for lpips_*: use random VGG weights where the trained ones are not cached, with a warning.
    """

    def __init__(self, loss_type: str, p_loss_weight: float, untrained: bool = False):
        self.pixel = PIXEL_LOSSES[loss_type]
        self.p_loss_weight = p_loss_weight
        self.lpips: LPIPS | None = None
        if loss_type.startswith("lpips"):
            stand_in = untrained and not vgg16_file().is_file()
            if stand_in:
                warnings.warn(
                    f"LPIPS runs on untrained VGG16 weights: {vgg16_file()} is absent and the data is fake. "
                    "Its figures mean nothing.",
                    stacklevel=2,
                )
            self.lpips = LPIPS(untrained=stand_in)

    def to(self, device: torch.device) -> ReconstructionLoss:
        """Move what has weights."""
        if self.lpips is not None:
            self.lpips.to(device)
        return self

    def __call__(self, reconstruction_BCHW: torch.Tensor, x_BCHW: torch.Tensor) -> dict[str, torch.Tensor]:
        """{"rec_loss": pixel loss, "lpips_loss": weighted LPIPS if any}; the loss is their sum."""
        with torch.autocast(x_BCHW.device.type, enabled=False):
            dtype = torch.promote_types(reconstruction_BCHW.dtype, torch.float32)
            parts = {"rec_loss": self.pixel(reconstruction_BCHW.to(dtype), x_BCHW.to(dtype))}
        if self.lpips is not None:
            parts["lpips_loss"] = self.p_loss_weight * self.lpips(reconstruction_BCHW, x_BCHW).mean()
        return parts
