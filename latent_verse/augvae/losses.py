"""Reconstruction losses of AugVAE: MSE, L1, smooth L1, and LPIPS (Zhang et al. 2018) on top of MSE or L1.

`LOSSES` is the table of them. LPIPS is torchmetrics', with its backbone from torchvision's cache. It is never part of a
module: it stays frozen, in evaluation mode and float32 whatever Lightning does, and its weights reach no checkpoint.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_verse.config import ConfigError
from latent_verse.config.messages import reason
from latent_verse.config.train import VAELossConfig


def vgg16_file() -> Path:
    """The file in which torchvision caches VGG16's weights, under $TORCH_HOME or ~/.cache/torch."""
    from torchvision.models import VGG16_Weights

    return Path(torch.hub.get_dir()) / "checkpoints" / VGG16_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]


def fetch_vgg16() -> None:
    """Download VGG16's weights into torchvision's cache, unless they are there. Call it in one process per node.

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
            f"LPIPS needs VGG16's weights: {vgg16_file()} does not exist, and the download failed ({reason(error)}). "
            f"Download {weights.url} elsewhere and put it there, or train with --loss_type "
            f"{', '.join(name for name, loss in LOSSES.items() if not loss.uses_lpips)}, which need no file."
        ) from error


class LPIPS:
    """LPIPS (VGG16) of images in [-1, 1]: (B, 3, H, W) twice -> (B,) float32. Not a module: see the top of this file.

    With `untrained` its weights are random, the same in every process, for smoke tests on a machine without the file.
    """

    def __init__(self, untrained: bool = False):
        # the public form cannot have untrained weights; requirements.txt bounds the version, a test compares the two
        from torchmetrics.functional.image.lpips import _LPIPS

        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torchmetrics' own torch.load
            torch.manual_seed(0)
            self.net = _LPIPS(net="vgg", pnet_rand=untrained)
        self.net.eval().requires_grad_(False)
        self._compute: Callable[[Tensor, Tensor], Tensor] = self._distance

    def to(self, device: torch.device) -> None:
        """Move the network to a device; channels last on a GPU, which its convolutions prefer (a CPU's do not)."""
        self.net.to(device)
        if device.type == "cuda":
            self.net.to(memory_format=torch.channels_last)

    def compile(self) -> None:
        """Compile the network, when it is first called."""
        self._compute = torch.compile(self._distance, dynamic=False)  # as AugVAE's networks: images have one size

    def __call__(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        with torch.autocast(a_BCHW.device.type, enabled=False):
            return self._compute(a_BCHW.float(), b_BCHW.float())

    def _distance(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """What `net` computes; its own forward pass defines a class, which the compiler does not accept."""
        maps_a, maps_b = self._features(a_BCHW), self._features(b_BCHW)
        differences = [(_unit(a) - _unit(b)) ** 2 for a, b in zip(maps_a, maps_b, strict=True)]
        parts = [weigh(d).mean((2, 3)) for weigh, d in zip(self.net.lins, differences, strict=True)]
        return sum(parts[1:], parts[0]).flatten()

    def _features(self, x_BCHW: Tensor) -> list[Tensor]:
        """VGG16's maps after each of its five parts."""
        vgg, maps = self.net.net, [self.net.scaling_layer(x_BCHW)]
        for part in (vgg.slice1, vgg.slice2, vgg.slice3, vgg.slice4, vgg.slice5):
            maps.append(part(maps[-1]))
        return maps[1:]


def _unit(x_BCHW: Tensor) -> Tensor:
    """Features scaled to length 1 at each position."""
    return x_BCHW / torch.sqrt(1e-8 + torch.sum(x_BCHW**2, dim=1, keepdim=True))


class ReconstructionLoss:
    """The mean of `pixel`; the base class of all `LOSSES`, which may add terms.

    Attributes:
        terms: the names of what `compute` returns. Each is logged; the loss is their sum.
        uses_lpips: whether `fetch_vgg16` must be called first, and p_loss_weight has an effect.

    Args:
        untrained: if weights of a frozen network are missing, take random ones and warn. For fake data.
    """

    terms: ClassVar[tuple[str, ...]] = ("rec_loss",)
    uses_lpips: ClassVar[bool] = False
    pixel: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, config: VAELossConfig, untrained: bool = False):
        self.config = config

    def to(self, device: torch.device) -> None:
        """Move frozen networks to a device."""

    def compile(self) -> None:
        """Compile frozen networks."""

    def compute(self, reconstruction_BCHW: Tensor, x_BCHW: Tensor) -> dict[str, Tensor]:
        """{term: value ()} of images (B, C, H, W), float32 or float64; x in [-1, 1], the reconstruction roughly so."""
        return {"rec_loss": self.pixel(reconstruction_BCHW, x_BCHW)}

    def __call__(self, reconstruction_BCHW: Tensor, x_BCHW: Tensor) -> dict[str, Tensor]:
        """As `compute`, for images of any floating-point type and under any autocast, which is switched off."""
        dtype = torch.promote_types(reconstruction_BCHW.dtype, torch.float32)
        with torch.autocast(x_BCHW.device.type, enabled=False):
            return self.compute(reconstruction_BCHW.to(dtype), x_BCHW.to(dtype))


class MSE(ReconstructionLoss):
    pixel = staticmethod(F.mse_loss)


class L1(ReconstructionLoss):
    pixel = staticmethod(F.l1_loss)


class SmoothL1(ReconstructionLoss):
    pixel = staticmethod(F.smooth_l1_loss)


class WithLPIPS(ReconstructionLoss):
    """mean pixel loss + p_loss_weight x mean LPIPS."""

    terms = ("rec_loss", "lpips_loss")
    uses_lpips = True

    def __init__(self, config: VAELossConfig, untrained: bool = False):
        super().__init__(config)
        stand_in = untrained and not vgg16_file().is_file()
        if stand_in:
            warnings.warn(f"LPIPS values mean nothing: untrained VGG16, fake data and no {vgg16_file()}.", stacklevel=2)
        self.lpips = LPIPS(untrained=stand_in)

    def to(self, device: torch.device) -> None:
        self.lpips.to(device)

    def compile(self) -> None:
        self.lpips.compile()

    def compute(self, reconstruction_BCHW: Tensor, x_BCHW: Tensor) -> dict[str, Tensor]:
        lpips = self.config.p_loss_weight * self.lpips(reconstruction_BCHW, x_BCHW).mean()
        return super().compute(reconstruction_BCHW, x_BCHW) | {"lpips_loss": lpips}


class L1WithLPIPS(WithLPIPS, L1): ...


class MSEWithLPIPS(WithLPIPS, MSE): ...


# VAELossConfig.loss_type -> its class
LOSSES: dict[str, type[ReconstructionLoss]] = {
    "mse": MSE,
    "l1": L1,
    "smooth_l1": SmoothL1,
    "lpips_l1": L1WithLPIPS,
    "lpips_l2": MSEWithLPIPS,
}
