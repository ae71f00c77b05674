"""Quality of reconstructions: PSNR, SSIM, L1, MSE, LPIPS, rFID; torchmetrics sums them over processes.

Everything is computed on images in [0, 1] with a data range of 1: (clamped reconstruction + 1) / 2 against
(centre crop + 1) / 2, over all images, none counted twice. rFID compares reconstructions with those same crops, by the
code that computes the FID of generated images.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torchmetrics.image import StructuralSimilarityIndexMeasure

from latent_verse.augvae.losses import LPIPS
from latent_verse.machine import versions
from latent_verse.metrics import networks
from latent_verse.metrics.codebook_usage import CodebookUsage
from latent_verse.metrics.image_quality import FrechetDistance
from latent_verse.metrics.running import Count, Mean

SSIM_WINDOW = 11  # side of SSIM's Gaussian window


class ReconstructionMetrics(nn.Module):
    """Accumulates the metrics over batches; `with_networks` False leaves out LPIPS and rFID: they need real images."""

    def __init__(self, levels: tuple[int, ...], num_tokens: int, resolution: int, with_networks: bool = True):
        super().__init__()
        self.missing: dict[str, str] = {}
        self.psnr, self.mse, self.l1 = Mean(), Mean(), Mean()
        self.usage = CodebookUsage(levels, num_tokens)
        self.count = Count()
        self.ssim = self.fid = self.features = self.lpips_mean = self.lpips = None
        if resolution < SSIM_WINDOW:
            self.missing["ssim"] = f"images of {resolution} px are smaller than its window of {SSIM_WINDOW}"
        else:
            self.ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        if not with_networks:
            self.missing["lpips"] = self.missing["rfid"] = "not computed on fake data"
            return
        try:
            networks.vgg16_weights().find()
            self.lpips, self.lpips_mean = LPIPS(), Mean()
        except networks.NetworkMissing as error:
            self.missing["lpips"] = str(error)
        try:
            self.features = networks.open_inception()
            self.fid = FrechetDistance(self.features.num_features)
        except networks.NetworkMissing as error:
            self.missing["rfid"] = str(error)

    def update(self, x_BCHW: torch.Tensor, reconstruction_BCHW: torch.Tensor, indices: list[torch.Tensor]) -> None:
        """Add a batch: input and reconstruction in [-1, 1], and the codes of each level, (B, h, h)."""
        if len(x_BCHW) == 0:
            return
        reconstruction_BCHW = reconstruction_BCHW.float().clamp(-1, 1)
        a_BCHW, b_BCHW = (x_BCHW.float() + 1) / 2, (reconstruction_BCHW + 1) / 2
        n = len(a_BCHW)
        self.count.update(n)
        self.usage.update(indices)
        mse_B = (a_BCHW - b_BCHW).square().mean(dim=(1, 2, 3))
        self.psnr.update(-10 * torch.log10(mse_B.clamp(min=1e-10)))  # 100 dB for equal images
        self.mse.update(mse_B)
        self.l1.update((a_BCHW - b_BCHW).abs().mean(), weight=n)
        if self.ssim is not None:
            self.ssim.update(b_BCHW, a_BCHW)
        if self.lpips is not None:
            self.lpips.to(x_BCHW.device)
            self.lpips_mean.update(self.lpips(reconstruction_BCHW, x_BCHW).mean(), weight=n)
        if self.fid is not None:
            self.fid.update(self.features((a_BCHW * 255).round().to(torch.uint8)), real=True)
            self.fid.update(self.features((b_BCHW * 255).round().to(torch.uint8)), real=False)

    def compute(self) -> dict[str, Any]:
        """All metrics, the number of images, and why a metric is missing. The same in every process."""
        images = int(self.count.compute())
        means = {"psnr": self.psnr, "ssim": self.ssim, "l1": self.l1, "mse": self.mse, "lpips": self.lpips_mean}
        out: dict[str, Any] = {"images": images}
        out |= {name: metric.compute().item() for name, metric in means.items() if metric is not None}
        if self.fid is not None:
            if images < 2:
                self.missing["rfid"] = f"needs at least 2 images, got {images}"
            else:
                out["rfid"] = self.fid.compute().item()
        out |= self.usage.compute()
        out["missing"] = dict(self.missing)
        out["protocol"] = {
            "images": "resize of the shorter side, centre crop, values in [0, 1], reconstructions clamped",
            "psnr": "mean over images, in dB",
            "ssim": f"Gaussian window of {SSIM_WINDOW}, sigma 1.5",
            "lpips": "VGG16, linear weights v0.1",
            "rfid": f"{networks.Inception.described}, against the same centre crops, 8-bit",
            "library": versions("torchmetrics", "torch-fidelity"),
        }
        return out


UNITS = {"psnr": ("dB", "higher"), "ssim": ("to 1", "higher")} | dict.fromkeys(
    ("l1", "mse", "lpips", "rfid"), ("", "lower")
)


def table(results: dict[str, Any], title: str) -> str:
    """The metrics as lines to print; missing ones with the reason."""
    lines = [title]
    for name, value in results.items():
        if isinstance(value, float) and not math.isfinite(value):
            lines.append(f"  {name:<16} {'n/a':>12}  is {value}")
        elif isinstance(value, (int, float)):
            shown = f"{value:.0f}" if isinstance(value, int) or name.startswith("codes_used") else f"{value:.4f}"
            unit, better = UNITS.get(name, ("", ""))
            note = ", ".join(filter(None, (unit, better and f"{better} is better")))
            lines.append(f"  {name:<16} {shown:>12}  {note}".rstrip())
    lines += [f"  {k:<16} {'missing':>12}  {why}" for k, why in results.get("missing", {}).items()]
    return "\n".join(lines)
