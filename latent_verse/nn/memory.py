"""Whether a network fits in this machine's memory, before it is built."""

from __future__ import annotations

import os
import sys

import torch

from latent_verse.config import ConfigError


def machine_bytes() -> int:
    """The memory of this machine, without that of its GPUs; no bound where the system does not tell it (Windows)."""
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(what: str, numbers: int, settings: str, on_gpu: bool = False) -> None:
    """Refuse to build a network of which `what`, at least so many float32 numbers, takes more than the memory.

    Args:
        on_gpu: it need not be in this machine's memory, but may be in that of a GPU.

    Raises:
        ConfigError: naming both sizes and `settings`, of which some have to be lowered.
    """
    size, most = 4 * numbers, machine_bytes()
    if size > most and on_gpu:
        most = max(most, _gpu_bytes())
    if size > most:
        takes = f"{what} would take {size / 2**30:,.0f} GiB"
        raise ConfigError(f"{takes}, but this machine has {most / 2**30:,.0f} GiB of memory. Lower {settings}.")


def _gpu_bytes() -> int:
    """The memory of the largest GPU; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    return max(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
