#!/usr/bin/env python3
"""Draw pictures from texts, write captions for pictures, score their fit, complete pictures, with a trained bundle."""

from __future__ import annotations

import sys

from latent_verse.config.cli import errors_to_exit_code, parse, quick_imports
from latent_verse.config.generate import GenerateConfig, resolve_generate


def main(argv: list[str] | None = None) -> int:
    """Generate; 0 when done, 2 for a mistake in the settings, the model, pictures or texts."""
    with errors_to_exit_code() as code:
        config, given = parse(GenerateConfig, argv, __doc__)
        config, task = resolve_generate(config, given)
    return code[0] if code else run(config, task)


def run(config: GenerateConfig, task: str) -> int:
    """Load the model and do the task."""
    with quick_imports():
        from latent_verse import generation
        from latent_verse.checkpoint import CheckpointError
        from latent_verse.data import DataError
        from latent_verse.text import TokenizerError

    with errors_to_exit_code(CheckpointError, DataError, TokenizerError) as code:
        generation.run(config, task)
    return code[0] if code else 0


if __name__ == "__main__":
    sys.exit(main())
