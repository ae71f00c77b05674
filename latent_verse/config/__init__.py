"""Every setting of L-Verse, once: typed dataclasses with defaults, help, ranges and rules. Standard library only.

settings.py   what a setting is, its range, its errors
models.py     shapes of AugVAE and BiART
train.py      train_vae.py, eval_vae.py and train_biart.py
evaluate.py   eval_biart.py
generate.py   generate.py
cli.py        flags and YAML files -> these dataclasses; the only file that knows argparse and YAML
"""

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
from latent_verse.config.train import (
    FAKE_LIMITS,
    PRECISIONS,
    EvalVAEConfig,
    ImageDataConfig,
    TrainerConfig,
    TrainVAEConfig,
    VAELossConfig,
    VAEOptimConfig,
    batch_limit,
    idle_flags_vae,
    resolve_data,
    resolve_eval_vae,
    resolve_train_vae,
    resolve_trainer,
    with_evaluated_shape,
    with_pretrained_shape,
)

__all__ = [
    "FAKE_LIMITS",
    "PRECISIONS",
    "AugVAEConfig",
    "BiARTConfig",
    "ConfigError",
    "EvalVAEConfig",
    "ImageDataConfig",
    "SamplingSettings",
    "Settings",
    "TrainVAEConfig",
    "TrainerConfig",
    "UserError",
    "VAELossConfig",
    "VAEOptimConfig",
    "as_plain",
    "batch_limit",
    "idle_flags_vae",
    "resolve_data",
    "resolve_eval_vae",
    "resolve_train_vae",
    "resolve_trainer",
    "setting",
    "training_only",
    "with_evaluated_shape",
    "with_pretrained_shape",
]
