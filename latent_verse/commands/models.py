"""List the models that come with this repository. Their names stand for their folders wherever a model is named."""

from __future__ import annotations

from pathlib import Path

from latent_verse.checkpoints.shipped import DEFAULT, read_card, shipped_folders
from latent_verse.config.cli import Parser
from latent_verse.config.messages import printable
from latent_verse.config.program import one_line_errors


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Print the list; 0, or 2 for an unknown flag or a card that cannot be read."""
    Parser(prog, description=__doc__).parse_args(argv)
    folders = shipped_folders()
    print("\n\n".join(described(folder) for folder in folders.values()) or "No model comes with this installation.")
    return 0


def described(folder: Path) -> str:
    """Some lines on a shipped model."""
    card, size = read_card(folder), sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    default = ", taken where no model is named" if folder.name == DEFAULT else ""
    lines = [f"{folder.name} ({size / 1e6:.1f} MB{default})", *([card.does] if card.does else [])]
    for what, found in card.results.items():
        shares = [f"{r['right'] / r['total']:.1%} of {r['total']} {where}" for where, r in found.items()]
        lines.append(f"{what}: {', '.join(shares)} right")
    lines.append(str(folder))
    if card.example:
        lines.append(f'python -m latent_verse generate --model {folder.name} --text "{card.example}"')
    return "\n  ".join(map(printable, lines))
