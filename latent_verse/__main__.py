"""The programs by name: `latent-verse train-vae --help`, or `python -m latent_verse train-vae --help`."""

from __future__ import annotations

import difflib
import importlib
import sys

import latent_verse.commands  # noqa: F401  before all others: Ctrl-C ends it without a traceback from here on
from latent_verse.config.messages import ConfigError, shown
from latent_verse.config.program import one_line_errors

COMMANDS = {
    "train-vae": "train AugVAE-ML, or fine-tune AugVAE-SL from it",
    "eval-vae": "evaluate an AugVAE checkpoint",
    "train-biart": "train BiART in both directions",
    "eval-biart": "evaluate a bundle, or another system's images and captions",
    "generate": "generate images and captions, score and complete images with a bundle",
    "models": "list the trained models that come with this repository",
}
USAGE = """usage: latent-verse COMMAND [--SETTING VALUE ...]

commands (`latent-verse COMMAND --help` lists a command's settings):
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit code, or 2 where there is no such command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name not in COMMANDS:
        return answer(name)
    command = importlib.import_module(f"latent_verse.commands.{name.replace('-', '_')}")
    return command.main(rest, f"latent-verse {name}")


@one_line_errors
def answer(name: str) -> int:
    """Say which commands there are.

    Raises:
        ConfigError: `name` is none of them.
    """
    if name in ("-h", "--help"):
        print(USAGE + "\n".join(f"  {command:<12} {what}" for command, what in COMMANDS.items()))
        return 0
    near = difflib.get_close_matches(name[:100], COMMANDS, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]}?" if near else f"The commands are {', '.join(COMMANDS)}."
    raise ConfigError(f"latent-verse has no command {shown(name)}. {hint}")


if __name__ == "__main__":
    sys.exit(main())
