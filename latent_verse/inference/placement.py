"""Where and in which precision `LVerse` computes: what users may give as device and dtype."""

from __future__ import annotations

from typing import Any, Literal

import torch

from latent_verse.biart.model import BiART
from latent_verse.config import ConfigError
from latent_verse.config.messages import reason, shown
from latent_verse.nn.precision import sampling_dtype

PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def best_device() -> str:
    """The fastest device of this machine: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def chosen_device(device: str | torch.device | int) -> torch.device:
    """The device of this name.

    Raises:
        ConfigError: there is no such device, or this machine has none.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:  # another kind, or not on this machine
        why = reason(error).split(". ")[0].rstrip(".")  # the first sentence: advice on drivers follows
        raise ConfigError(f"device is {shown(device)}: {why}. This machine's fastest is {best_device()}.") from error


def chosen_dtype(dtype: torch.dtype | str | None) -> torch.dtype | Literal["auto"] | None:
    """The precision of this name; None and "auto" as they are.

    Raises:
        ConfigError: there is no such precision.
    """
    kind: Any = getattr(torch, dtype, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    if kind not in (None, "auto", *PRECISIONS):
        raise ConfigError(f"dtype is {shown(dtype)}; give float32, bfloat16, float16 or auto.")
    return kind


def dtype_for(biart: BiART, device: torch.device, dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The precision to give BiART's weights when they go to `device`, None for the one they have; see `chosen_dtype`.

    Raises:
        ConfigError: as `chosen_dtype`, or BiART is quantised (`torch.ao.quantization.quantize_dynamic`): kernels for
            that are a CPU's, and read float32.
    """
    kind = chosen_dtype(dtype)
    if kind == "auto":
        kind = sampling_dtype(biart.head.weight.dtype, device)
    quantised = not all(isinstance(weight, torch.Tensor) for weight in biart.state_dict().values())
    if quantised and (device.type != "cpu" or kind not in (None, torch.float32)):
        raise ConfigError(f"a quantised BiART computes on the CPU in float32, not on {device} in {kind or 'float32'}.")
    return kind
