"""What a setting is: a dataclass field with its help and its range; the error for a mistake in one; plain types.

Each field's metadata holds what `latent_verse.config.cli` makes flags and YAML keys from. Leaf names are unique over
the whole tree of a script, so that a leaf is also a flag. This room imports nothing but the standard library (cli.py
apart): the models can use it without YAML or argparse being loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional  # OmegaConf reads these annotations at run time

WITHIN = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


class UserError(ValueError):
    """What a program reports as one line: a mistake of the user, mostly. The message says what to do."""

    exit_code = 2  # of the program


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """A caption, a file's name or another text from outside as one line that is safe to print.

    Control characters, which could move the cursor or change the terminal, line separators, characters that turn the
    direction of writing, and lone surrogates, which stand for bytes of a name that are not UTF-8, become escapes.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another. The message says what to do."""


def setting(
    default: Any,
    help: str,
    choices: Collection[str] | None = None,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    path: bool = False,
    training_only: bool = False,
    hidden: bool = False,
) -> Any:
    """A dataclass field with its one-line help and its range, which holds for each item of a list.

    Args:
        choices: the allowed values, where they are a fixed set.
        path: a file or folder, of which `~` is expanded when flags and YAML are read; or several.
        training_only: of a model's setting: it changes how the model trains, not which weights it has.
        hidden: left out of --help: a name of the original's that has no use here, but works.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    kinds = {"path": path, "training_only": training_only, "hidden": hidden}
    return field(default=default, metadata={"help": help, "choices": choices, "bounds": bounds, **kinds})


def same(section: type, name: str, default: Any = dataclasses.MISSING, help: str | None = None) -> Any:
    """The setting `name` of another section, where its range is declared; default and help may differ."""
    (of_section,) = (f for f in dataclasses.fields(section) if f.name == name)
    metadata = {**of_section.metadata} | ({} if help is None else {"help": help})
    return field(default=of_section.default if default is dataclasses.MISSING else default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Base of a section of settings: frozen, and a value out of its range is refused whenever one is made."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            check_value(f, getattr(self, f.name))


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """How tokens are sampled from the model's distribution, wherever images or captions are generated."""

    temperature: float = setting(1.0, "sampling temperature for images; 0 takes the most likely code", at_least=0)
    top_k: Optional[int] = setting(None, "sample only from the k most likely tokens", at_least=1)
    top_p: Optional[float] = setting(None, "nucleus sampling: top tokens of this total probability", above=0, at_most=1)
    guidance: float = setting(1.0, "scale of classifier-free guidance towards the input; 1 is off", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_greedy:
            check_rules([self], needs={"top_k": "temperature", "top_p": "temperature"})

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is sampled, so that settings of sampling have no effect."""
        return self.temperature == 0

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of these settings for `LVerse`'s methods and for `biart.sampling.generate`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(SamplingSettings)}


def check_value(f: dataclasses.Field, value: Any, source: str = "") -> None:
    """Refuse a value out of the range that its setting declares; None is never out of range.

    Raises:
        ConfigError: naming the setting, the value, its `source`, as ` (from --flag)`, and the range.
    """
    listed = isinstance(value, (list, tuple))
    items = value if listed else () if value is None else (value,)
    shown = list(value) if listed else repr(value)
    choices, bounds = f.metadata["choices"], f.metadata["bounds"]
    if listed and not value and f.default != ():
        raise ConfigError(f"{f.name} is []{source}; give at least one.")
    for item in items if choices else ():
        if item not in choices:
            near = closest(str(item), choices, otherwise=".")
            raise ConfigError(f"{f.name}: {item!r}{source} is not one of {', '.join(choices)}{near}")
    numbers = [item for item in items if isinstance(item, (int, float))]
    if not all(math.isfinite(number) for number in numbers):
        raise ConfigError(f"{f.name} is {shown}{source}; it must be a finite number.")
    if not all(WITHIN[name](number, bound) for number in numbers for name, bound in bounds.items()):
        wanted = " and ".join(f"{name} {bound}" for name, bound in bounds.items())
        raise ConfigError(f"{f.name} is {shown}{source}; {'each' if listed else 'it'} must be {wanted}.")


def by_name(sections: Iterable[Settings]) -> dict[str, tuple[dataclasses.Field, Any]]:
    """{name: (field, value)} of all settings of these sections."""
    return {f.name: (f, getattr(section, f.name)) for section in sections for f in dataclasses.fields(section)}


def check_rules(sections: Iterable[Settings], needs: Mapping[str, str], excludes: Mapping[str, str] = {}) -> None:
    """Refuse a setting that is not its default while another that it needs is off, or one that it excludes is given.

    Both are {setting: other}, where the other may be `name=value`. Rules on settings that no section has are ignored.

    Raises:
        ConfigError: naming both settings.
    """
    found = by_name(sections)
    for excluded, rules in ((False, needs), (True, excludes)):
        for name, rule in rules.items():
            other, _, wanted = rule.partition("=")
            if name not in found or other not in found or found[name][1] == found[name][0].default:
                continue
            (f, value), (its, now) = found[name], found[other]
            shown = f"{name} {value}" if f.metadata["choices"] or type(value) in (int, float) else name
            meant = f"{other}: {wanted}" if wanted else f"{other} above 0" if type(its.default) is float else other
            if excluded and (now == wanted if wanted else now != its.default):
                raise ConfigError(f"{shown} and {meant} contradict each other: give one of them.")
            if not excluded and not (now == wanted if wanted else now):
                raise ConfigError(f"{shown} needs {meant} ({its.metadata['help']}). Set it, or leave {name} out.")


def require(sections: Iterable[Settings], *names: str, hint: str = "See --help.") -> None:
    """Refuse a configuration in which none of these settings is given.

    Raises:
        ConfigError: naming them.
    """
    found = by_name(sections)
    if not any(found[name][1] for name in names):
        what = found[names[0]][0].metadata["help"]
        missing = f"{names[0]} is not given ({what})." if len(names) == 1 else f"Give one of {', '.join(names)}."
        raise ConfigError(f"{missing} {hint}")


def closest(name: str, valid: Iterable[str], prefix: str = "", otherwise: str = ". See --help.") -> str:
    """'. Did you mean X?' for the nearest valid names, or `otherwise`."""
    near = difflib.get_close_matches(name, list(valid), n=2, cutoff=0.6)
    return f". Did you mean {' or '.join(prefix + n for n in dict.fromkeys(near))}?" if near else otherwise


def training_only(cls: type) -> frozenset[str]:
    """Settings of a model that change how it trains, not which weights it has: checkpoints may differ in them."""
    return frozenset(f.name for f in dataclasses.fields(cls) if f.metadata["training_only"])


def expand_paths(paths: str) -> str:
    """`~` expanded in a path, or in each of several with commas between them."""
    return ",".join(os.path.expanduser(path) for path in paths.split(","))


def as_plain(config: Any) -> dict[str, Any]:
    """Any of these dataclasses as plain dicts, lists and scalars: what checkpoints and YAML files hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))
