"""L-Verse: bidirectional generation between image and text (Kim et al., CVPR 2022).

    from latent_verse import LVerse, AugVAE, BiART, load_augvae

Importing the package is quick: torch is loaded when the first of these names is used.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's, whose import takes time in which Ctrl-C would print a traceback
if TYPE_CHECKING:
    from typing import Any

    from latent_verse.augvae.model import AugVAE
    from latent_verse.biart.model import BiART
    from latent_verse.checkpoints.augvae import load_augvae
    from latent_verse.inference.pipeline import LVerse

__version__ = "0.1.0"
__all__ = ["AugVAE", "BiART", "LVerse", "__version__", "load_augvae"]

_HOMES = {
    "AugVAE": "latent_verse.checkpoints.augvae",  # which gives it from_pretrained and save_pretrained
    "BiART": "latent_verse.biart.model",
    "LVerse": "latent_verse.inference.pipeline",
    "load_augvae": "latent_verse.checkpoints.augvae",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
