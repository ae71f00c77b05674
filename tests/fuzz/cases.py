"""What a case and an area are, and all areas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.mutations import Mutator
from tests.fuzz.valid import Valid

VALID_EVERY = 10  # one case in so many is left unchanged


@dataclasses.dataclass
class Case:
    """One input and what reads it."""

    run: Callable[[], int | None]  # returns the exit code of a command, or None
    replayed: str = ""  # the call in words: a command line, or the function and its arguments


@dataclasses.dataclass
class Bench:
    """Where a case is made: its folders, its changes, and the valid inputs to start from."""

    valid: Valid
    place: Path  # the only folder that the case may write to; it is also the working folder
    mutate: Mutator
    unchanged: bool  # whether the input is to be left as it is

    @property
    def given(self) -> Path:
        """The folder for inputs, which nothing may change."""
        return self.place / "given"

    def bytes(self, data: bytes, first: int = 0) -> bytes:
        return data if self.unchanged else self.mutate.bytes(data, first)

    def text(self, text: str) -> bytes:
        return text.encode() if self.unchanged else self.mutate.encoded(self.mutate.text(text))

    def json(self, tree) -> bytes:
        """A tree as a JSON file, with a change to the tree or to its text."""
        if self.unchanged:
            return self.mutate.json(tree).encode()
        if self.mutate.chance(0.05):
            return self.mutate.twice(self.mutate.json(tree)).encode()
        if self.mutate.chance(0.75):
            return self.mutate.encoded(self.mutate.json(self.mutate.tree(tree)))
        return self.text(self.mutate.json(tree))

    def either(self, *changes: Callable[[], None]) -> None:
        """Make one of these changes, unless the input is to be left as it is."""
        if not self.unchanged:
            self.mutate.pick(changes)()


@dataclasses.dataclass(frozen=True)
class Area:
    """A kind of input."""

    make: Callable[[Bench], Case]
    cases: int  # in the slow tests
    needs: tuple[str, ...] = ()  # valid inputs, by the names of methods of `Valid`, to make before the first case
    seconds: float = 40  # of processor time, for one case
    codes: tuple[int, ...] = (2,)  # exit codes of what is refused; 1, where training may diverge or a disk is written
    changes_given: bool = False  # whether what is given is to be written to, as a run folder is by a rerun


def areas() -> dict[str, Area]:
    """All areas by name; imports PyTorch."""
    from tests.fuzz import commands, data, models, settings, tars

    return {**settings.AREAS, **data.AREAS, **tars.AREAS, **models.AREAS, **commands.AREAS}
