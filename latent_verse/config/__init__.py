"""Every setting of L-Verse, once: typed dataclasses with defaults, help, ranges and rules. Standard library only.

settings.py   what a setting is, its range, its errors
models.py     shapes of AugVAE and BiART
train.py      train_vae.py, eval_vae.py and train_biart.py
evaluate.py   eval_biart.py
generate.py   generate.py
cli.py        flags and YAML files -> these dataclasses; the only file that knows argparse and YAML
"""

from typing import Any

from latent_verse.config.models import AugVAEConfig, BiARTConfig
from latent_verse.config.settings import (
    ConfigError,
    SamplingSettings,
    Settings,
    UserError,
    as_plain,
    setting,
    training_only,
)

__all__ = [
    "AugVAEConfig",
    "BiARTConfig",
    "ConfigError",
    "SamplingSettings",
    "Settings",
    "UserError",
    "as_plain",
    "setting",
    "training_only",
]


def __getattr__(name: str) -> Any:
    """Names of `train.py` under their old path, read when they are asked for: generate.py --help needs none."""
    import importlib

    return getattr(importlib.import_module("latent_verse.config.train"), name)
