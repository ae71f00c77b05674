"""The commands that README.md, docs/ and the cards of models/ show."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

REPO = Path(__file__).parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md")), *sorted(REPO.glob("models/*/README.md"))]


def commands(script: str, pages: list[Path] = PAGES) -> list[str]:
    """Lines of shell blocks that run `script`, continued ones joined."""
    lines = []
    for page in pages:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
            lines += [line for line in block.replace("\\\n", " ").splitlines() if script in line]
    return lines


def flags(line: str, script: str) -> list[str]:
    """What follows `script` in a line, as words."""
    return shlex.split(line.split(script, 1)[1])
