"""Whether a network fits in this machine's memory, before it is built."""

from __future__ import annotations

import os
import sys

from latent_verse.config import ConfigError


def machine_bytes() -> int:
    """The memory of this machine, without that of its GPUs; no bound where the system does not tell it (Windows)."""
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(network: str, weights: int, settings: str) -> None:
    """Refuse to build a network of at least so many weights if they alone take more than this machine's memory.

    Raises:
        ConfigError: naming both sizes and `settings`, of which some have to be lowered.
    """
    size, most = 4 * weights, machine_bytes()
    if size > most:
        what = f"{network} would have weights of {size / 2**30:,.0f} GiB"
        raise ConfigError(f"{what}, but this machine has {most / 2**30:,.0f} GiB of memory. Lower {settings}.")
