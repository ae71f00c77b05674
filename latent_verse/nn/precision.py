"""What is computed in a higher precision than the module around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, bfloat16, float16, nn

LOW_PRECISION = (float16, bfloat16)

# Where PyTorch keeps how float32 products and convolutions are computed, from the general to the particular: what is
# "none" follows the one before it. By default a GPU's convolutions are TF32.
_backends: Any = torch.backends  # its type stubs lack some of these
FLOAT32_SETTINGS = (
    _backends,
    _backends.cudnn,
    _backends.cuda.matmul,
    _backends.cudnn.conv,
    _backends.mkldnn.matmul,
    _backends.mkldnn.conv,
)


@contextlib.contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Inside, products and convolutions of float32 are float32: no autocast, no TF32, no bfloat16 on a CPU.

    Afterwards all settings are what they were. Those that follow a more general one are not set, so they still follow.
    PyTorch's older switches (torch.set_float32_matmul_precision, allow_tf32) raise an error where both kinds have been
    in use, so they are not even read.
    """
    before = []
    try:
        for settings in FLOAT32_SETTINGS:
            if settings.fp32_precision != "ieee":
                before.append((settings, settings.fp32_precision))
                settings.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for settings, precision in reversed(before):
            settings.fp32_precision = precision


def in_float64(x: Tensor) -> Tensor:
    """x in float64, on its device, or on the CPU where the device is mps, which has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def sampling_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The precision in which BiART samples unless a setting says otherwise: the stored one, which is bfloat16 in place
    of float32 on a GPU that multiplies in it (compute capability 8.0 or newer), as reading the weights takes the time.
    """
    if stored == torch.float32 and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return stored


def keeping_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn`, as nn.Module._apply takes it, without its casts to half precision; moves to a device remain.

    For running sums and averages: half precision would round small increments away.
    """

    def kept(tensor: Tensor) -> Tensor:
        out = fn(tensor)
        return tensor.to(device=out.device) if out.dtype in LOW_PRECISION else out

    return kept


def as_residual_stream(x: Tensor) -> Tensor:
    """x in bfloat16 under an autocast to it, which leaves sums to their terms' types: half the bytes of float32.

    An autocast to float16 keeps float32, as the sum of many branches may exceed float16's 65,504.
    """
    device = x.device.type
    lower = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is bfloat16
    return x.to(bfloat16) if lower else x


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that gives bfloat16 for bfloat16, also of float32 weights, and computes it in float32.

    PyTorch's kernel for a CPU would sum the weights' gradients in bfloat16: they are off by a fifth after 8,192 rows.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As nn.LayerNorm."""
        if x.dtype != bfloat16 or x.dtype == self.weight.dtype:
            return super().forward(x)
        return super().forward(x.float()).to(x.dtype)  # compiled, the copy in float32 is never stored
