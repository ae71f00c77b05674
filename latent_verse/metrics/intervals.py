"""Confidence intervals of shares."""

from __future__ import annotations

import math


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share right / total, which stays within [0, 1]; (0, 1) for 0 of 0."""
    if not total:
        return 0.0, 1.0
    z, p = 1.96, right / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return middle - half if right else 0.0, middle + half if right < total else 1.0  # exactly 0 and 1
