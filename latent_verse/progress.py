"""The progress bar of everything but the training loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(
    items: Iterable | None = None, *, what: str, total: float | None = None, unit: str = "it", shown: bool = True
) -> tqdm:
    """A tqdm bar on stderr, to iterate over or to `update`. Silent if not `shown`, or without a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=what, total=total, unit=unit, disable=None if shown else True, unit_scale=True)
