"""What a setting is: a dataclass field with its help and its range; paths; plain types.

Each field's metadata holds what `latent_verse.config.cli` makes flags and YAML keys from. Leaf names are unique over
the whole tree of a script, so that a leaf is also a flag. This room imports nothing but the standard library (cli.py
and yaml_files.py apart): the models can use it without YAML or argparse being loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import operator
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, get_args, get_origin, get_type_hints

from latent_verse.config.messages import ConfigError, closest, shown

PathKind = Literal[True, "hub", "shards", "first"]
LARGEST = 2**63 - 1  # what PyTorch takes for an integer
EXACT = 2**53  # up to here every integer is exact in JSON and as a float
LONGEST_NAME = 255  # bytes of a file's or folder's name, in all common file systems
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
WITHIN = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


def setting(
    default: Any,
    help: str,
    choices: Collection[str] | None = None,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    path: PathKind | Literal[False] = False,
    training_only: bool = False,
    hidden: bool = False,
) -> Any:
    """A dataclass field with its one-line help and its range, which holds for each item of a list.

    Args:
        choices: the allowed values, where they are a fixed set.
        path: a file or folder, of which `~` is expanded; each item of a list. "hub": or a hub id; "shards": or a URL,
            or several with commas between them; "first": of the items, only the first is a path.
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
    """Base of a section of settings: frozen, of the annotated types, in range, `~` in paths expanded, however made.

    Raises:
        ConfigError: on creation, for a value of another type or out of its range.
    """

    def __post_init__(self) -> None:
        section: Any = type(self)
        hints = types_of(section)
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, checked(f, hints[f.name], getattr(self, f.name)))


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """How tokens are sampled from the model's distribution, wherever images or captions are generated."""

    temperature: float = setting(1.0, "sampling temperature for images; 0 takes the most likely code", at_least=0)
    top_k: Optional[int] = setting(None, "sample only from the k most likely tokens", at_least=1)
    top_p: Optional[float] = setting(None, "nucleus sampling: top tokens of this total probability", above=0, at_most=1)
    guidance: float = setting(
        1.0, "scale of classifier-free guidance towards the input; 1 is off", at_least=0, at_most=1e4
    )

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


@functools.cache
def types_of(section: Any) -> dict[str, Any]:
    """{setting: annotated type} of a section."""
    return get_type_hints(section)


def is_optional(hint: Any) -> bool:
    """Whether a setting of this annotated type may be None."""
    return type(None) in get_args(hint)


def inner(hint: Any) -> Any:
    """The annotated type without the None that `Optional` adds."""
    return next(a for a in get_args(hint) if a is not type(None)) if is_optional(hint) else hint


def item_type(hint: Any) -> Any:
    """The type of the items of a list, or of the one value: int, float, bool or str."""
    return get_args(inner(hint))[0] if is_list(hint) else inner(hint)


def is_list(hint: Any) -> bool:
    """Whether a setting of this annotated type has several items."""
    return get_origin(inner(hint)) is tuple


def type_name(hint: Any) -> str:
    """The annotated type as messages and --help name it."""
    if is_list(hint):
        return "a list of texts" if item_type(hint) is str else "a list of numbers"
    return item_type(hint).__name__


def check(section: Any, called: str = "", **values: Any) -> None:
    """Refuse values that are out of the range that a section declares: arguments of a function, named as its settings.

    Raises:
        ConfigError: as `checked`, with the name that the value is `called` there.
    """
    hints = types_of(section)
    for f in dataclasses.fields(section):
        if f.name in values:
            checked(f, hints[f.name], values[f.name], called and f" ({called})")


def expected(f: dataclasses.Field, hint: Any) -> str:
    """What messages say of a value of another type: the setting's type, and what the setting is."""
    return f"{type_name(hint)} ({f.metadata['help']})"


def checked(f: dataclasses.Field, hint: Any, value: Any, source: str = "") -> Any:
    """A value of the type and range that its setting declares, with `~` in paths expanded; a list becomes a tuple.

    Raises:
        ConfigError: naming the setting, the value, its `source`, as ` (from --flag)`, and what is expected.
    """
    if value is None and is_optional(hint):
        return None
    if not is_list(hint):
        (value,) = _checked_items(f, hint, [value], source)
        return value
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{f.name}: {shown(value)}{source} is invalid; expected {expected(f, hint)}.")
    if not value and f.default != ():
        raise ConfigError(f"{f.name} is []{source}; give at least one.")
    wanted = len(get_args(inner(hint)))
    if Ellipsis not in get_args(inner(hint)) and len(value) != wanted:
        default: Any = f.default
        example = " ".join(map(str, default))
        raise ConfigError(f"{f.name} is {shown(list(value))}{source}; it needs {wanted} values, such as {example}.")
    return tuple(_checked_items(f, hint, list(value), source))


def _checked_items(f: dataclasses.Field, hint: Any, items: list[Any], source: str) -> list[Any]:
    """As `checked`, of the items of a list, or of one value alone."""
    kind, choices, bounds, path = item_type(hint), f.metadata["choices"], f.metadata["bounds"], f.metadata["path"]
    whole = shown(items if is_list(hint) else items[0])
    subject = "each" if is_list(hint) else "it"
    items = [os.fspath(item) if path and isinstance(item, os.PathLike) else item for item in items]
    for item in items:
        if not is_a(item, kind):
            raise ConfigError(f"{f.name}: {whole}{source} is invalid; expected {expected(f, hint)}.")
        if choices and item not in choices:
            near = closest(str(item), choices, otherwise=".")
            raise ConfigError(f"{f.name}: {shown(item)}{source} is not one of {', '.join(choices)}{near}")
    if kind is str:
        if not path and not is_list(hint) and not items[0].strip():
            raise ConfigError(f"{f.name} is empty{source}. Give it a value, or leave it out.")
        last = 1 if path == "first" else len(items)
        return [expand(item, path, f.name, source) if path and i < last else item for i, item in enumerate(items)]
    if kind is float and not all(math.isfinite(item) for item in items if isinstance(item, float)):
        raise ConfigError(f"{f.name} is {whole}{source}; {subject} must be a finite number.")
    if not all(WITHIN[name](item, bound) for item in items for name, bound in bounds.items()):
        wanted = " and ".join(f"{name} {bound}" for name, bound in bounds.items())
        raise ConfigError(f"{f.name} is {whole}{source}; {subject} must be {wanted}.")
    if any(isinstance(item, int) and abs(item) > LARGEST for item in items):
        raise ConfigError(f"{f.name} is {whole}{source}; {subject} must be at most {LARGEST}.")
    return [item if isinstance(item, (int, float)) else kind(item) for item in items]  # numpy's numbers become plain


def is_a(value: Any, kind: type) -> bool:
    """Whether a value is of a setting's type: numpy's numbers are numbers, an int is a float, a bool is neither."""
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    return isinstance(value, kind)


def is_count(value: object) -> bool:
    """Whether a value that was read from a file is an int (no bool) from 0 to 2**53."""
    return isinstance(value, int) and is_number(value) and value >= 0


def is_number(value: object) -> bool:
    """Whether a value that was read from a file is a finite number (no bool); an int is within 2**53 of 0."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= EXACT
    return isinstance(value, float) and math.isfinite(value)


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


def training_only(cls: type) -> frozenset[str]:
    """Settings of a model that change how it trains, not which weights it has: checkpoints may differ in them."""
    return frozenset(f.name for f in dataclasses.fields(cls) if f.metadata["training_only"])


def expand(path: str | os.PathLike, kind: PathKind, name: str, source: str = "") -> str:
    """A path with `~` or `~user` at its start expanded, else as it was written: relative ones stay so.

    Every path comes through here once: those of settings when a section of them is made, and those that the library's
    functions take.

    Args:
        kind: of `setting`.
        name, source: of the setting, for messages.

    Raises:
        ConfigError: it is not a path, empty, no file can have that name, it is a URL where none can be read, or there
            is no such user.
    """
    try:
        path = os.fsdecode(path)
    except TypeError as error:
        raise ConfigError(f"{name} is {shown(path)}{source}, which is not a path. Give a string or a Path.") from error
    if not path.strip():
        raise ConfigError(f"{name} is empty{source}. Give a path, or leave it out.")
    if "\0" in path or re.search("[\ud800-\udc7f\udd00-\udfff]", path):
        raise ConfigError(f"{name}: {shown(path)}{source} holds a character that no path may.")
    if kind == "shards" and (path.startswith("pipe:") or URL.match(path)):
        return path
    if kind == "shards" and len(parts := split_shards(path)) > 1:
        of_home = {part: expand(part.strip(), kind, name, source) for part in parts if part.lstrip().startswith("~")}
        return ",".join(of_home.get(part, part) for part in parts)
    if URL.match(path):
        remedy = "Give a path, or a hub id as owner/name" if kind == "hub" else "Give a path on this machine"
        raise ConfigError(f"{name}: {shown(path)}{source} is a URL, which cannot be used here. {remedy}.")
    if kind != "shards" and max(len(os.fsencode(part)) for part in path.split("/")) > LONGEST_NAME:
        raise ConfigError(f"{name}: {shown(path)}{source} holds a name of more than {LONGEST_NAME} bytes.")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        home = f"{name}: {shown(path)}{source} is below a home folder that is not known"
        raise ConfigError(f"{home}. If {path.split('/')[0]} is the name of a folder, write ./ before it.")
    return expanded


def split_shards(source: str) -> list[str]:
    """The parts of a text with commas between them, but for commas within braces: "a,{b,c}" is "a" and "{b,c}"."""
    parts, depth = [""], 0
    for piece in re.split("([{},])", source):
        depth = max(0, depth + (piece == "{") - (piece == "}"))
        if piece == "," and not depth:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def expand_paths(paths: str) -> str:
    """`~` expanded in what earlier versions recorded, a path or several with commas between them, where it can be."""
    return ",".join(os.path.expanduser(path) for path in paths.split(","))


def as_plain(config: Any) -> dict[str, Any]:
    """Any of these dataclasses as plain dicts, lists and scalars: what checkpoints and YAML files hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))
