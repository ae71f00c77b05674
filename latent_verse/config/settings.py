"""What a setting is: a dataclass field with its help and its choices; the error for a mistake in one; plain types.

Each field's metadata holds what `latent_verse.config.cli` makes flags and YAML keys from. Leaf names are unique over
the whole tree of a script, so that a leaf is also a flag. This room imports nothing but the standard library (cli.py
apart): the models can use it without YAML or argparse being loaded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field


class UserError(ValueError):
    """A mistake of the user, which a program reports as one line and exit code 2. The message says what to do."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another. The message says what to do."""


def setting(default, help: str, choices: tuple | None = None, *, training_only: bool = False):
    """A dataclass field with its one-line help.

    Args:
        choices: the allowed values, where they are a fixed set.
        training_only: of a model's setting: it changes how the model trains, not which weights it has.
    """
    metadata = {"help": help, "choices": choices, "training_only": training_only}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def training_only(cls: type) -> frozenset[str]:
    """Settings of a model that change how it trains, not which weights it has: checkpoints may differ in them."""
    return frozenset(f.name for f in dataclasses.fields(cls) if f.metadata["training_only"])


def as_plain(config) -> dict:
    """Any of these dataclasses as plain dicts, lists and scalars: what checkpoints and YAML files hold."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))
