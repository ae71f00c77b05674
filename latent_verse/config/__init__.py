"""Every setting of L-Verse, once: typed dataclasses with defaults, help, ranges and rules. Standard library only.

messages.py   the errors of users, and how messages show values and reasons
settings.py   what a setting is, and its range
models.py     shapes of AugVAE and BiART
datasets.py   every dataset, and the settings it needs and reads
train.py      train_vae.py, eval_vae.py and train_biart.py; train_rules.py: the rules across their settings
evaluate.py   eval_biart.py
generate.py   generate.py
cli.py        flags and YAML files -> these dataclasses; the only file that knows argparse
remembered.py what an evaluation takes from the run that made its model
yaml_files.py YAML files, read and written
program.py    how every program ends: signals, errors in one line, exit codes; faults.py: the machine's
streams.py    what programs print: any text, and it arrives, or they say that it could not
"""

from latent_verse.config.messages import ConfigError, UserError, printable
from latent_verse.config.models import PRESETS, AugVAEConfig, BiARTConfig
from latent_verse.config.settings import SamplingSettings, as_plain, setting, training_only

__all__ = [
    "PRESETS",
    "AugVAEConfig",
    "BiARTConfig",
    "ConfigError",
    "SamplingSettings",
    "UserError",
    "as_plain",
    "printable",
    "setting",
    "training_only",
]
