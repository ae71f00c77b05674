"""Generate images from texts or captions from images, score pairs, or complete images, with a trained bundle."""

from __future__ import annotations

import os

from latent_verse.config.cli import naming_sources, parse, quick_imports
from latent_verse.config.generate import GenerateConfig, resolve_generate
from latent_verse.config.program import one_line_errors


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Generate; 0 when done, 2 for a mistake in the settings, the model, images or texts."""
    config, given = parse(GenerateConfig, argv, __doc__, prog)
    with naming_sources(config, given):
        return run(*resolve_generate(config, given))


def run(config: GenerateConfig, task: str) -> int:
    """Load the model and do the task."""
    # threads that wait busily slow each other down where others use the cores too: 30 s for an image in place of 1
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with quick_imports():
        from latent_verse.inference import tasks

    tasks.run(config, task)
    return 0
