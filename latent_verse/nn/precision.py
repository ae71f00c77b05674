"""What is computed in a higher precision than the module around it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, bfloat16, float16

LOW_PRECISION = (float16, bfloat16)


def in_float64(x: Tensor) -> Tensor:
    """x in float64, on its device, or on the CPU where the device is mps, which has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def keeping_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn`, as nn.Module._apply takes it, without its casts to half precision; moves to a device remain.

    For running sums and averages: half precision would round small increments away.
    """

    def kept(tensor: Tensor) -> Tensor:
        out = fn(tensor)
        return tensor.to(device=out.device) if out.dtype in LOW_PRECISION else out

    return kept
