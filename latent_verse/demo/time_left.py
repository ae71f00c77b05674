"""How long the demo's stages take, and from that and what they took here, how long is left."""

from __future__ import annotations

from collections.abc import Collection, Mapping

# seconds on two otherwise idle cores (docs/results.md), of each world's stages
USUAL = {
    "small": {
        "pictures": 8,
        "augvae_ml": 34,
        "augvae_sl": 74,
        "codes": 25,
        "biart": 409,
        "unseen": 41,
        "heldout": 41,
    },
    "full": {
        "pictures": 35,
        "augvae_ml": 71,
        "augvae_sl": 265,
        "codes": 176,
        "biart": 5384,
        "unseen": 134,
        "heldout": 133,
    },
}
ENOUGH = 0.05  # of all the time: what less than this took says nothing yet of the speed of this machine


def seconds_left(
    usual: Mapping[str, float], took: Mapping[str, float], finished: Collection[str]
) -> tuple[float, bool]:
    """The seconds that a demo still needs, and whether they are measured: scaled by what its finished stages took here.

    Args:
        usual: seconds of each stage, of the same demo on another machine.
        took: seconds so far of each stage that was begun.
    """
    expected, measured = (sum(seconds[name] for name in finished) for seconds in (usual, took))
    is_measured = expected >= ENOUGH * sum(usual.values())
    pace = measured / expected if is_measured else 1.0
    left = {name: seconds * pace - took.get(name, 0) for name, seconds in usual.items() if name not in finished}
    return sum(max(seconds, 0) for seconds in left.values()), is_measured
