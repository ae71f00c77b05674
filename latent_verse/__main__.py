"""The programs by name: `latent-verse train-vae --help`, or `python -m latent_verse train-vae --help`."""

from __future__ import annotations

import difflib
import importlib
import sys

COMMANDS = {
    "train-vae": "train AugVAE-ML, or fine-tune AugVAE-SL from it",
    "eval-vae": "evaluate an AugVAE checkpoint",
    "train-biart": "train BiART in both directions",
    "eval-biart": "evaluate a bundle, or another system's images and captions",
    "generate": "generate images and captions, score and complete images with a bundle",
}
USAGE = """usage: latent-verse COMMAND [--SETTING VALUE ...]

commands (`latent-verse COMMAND --help` lists a command's settings):
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit code, or 2 where there is no such command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE + "\n".join(f"  {command:<12} {what}" for command, what in COMMANDS.items()))
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]}?" if near else f"The commands are {', '.join(COMMANDS)}."
        print(f"error: latent-verse has no command {name!r}. {hint}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"latent_verse.commands.{name.replace('-', '_')}")
    return command.main(rest, f"latent-verse {name}")


if __name__ == "__main__":
    sys.exit(main())
