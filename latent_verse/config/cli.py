"""YAML files and flags -> a typed configuration. The only file that knows argparse and YAML.

Precedence: dataclass default < YAML < flags given. A YAML file may be sectioned (`model: {hidden_dim: 64}`), flat
(`hidden_dim: 64`, as the original's) or mixed. Unknown keys and wrong types are errors that name the closest valid one.
Nothing heavy is imported, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from latent_verse.config.settings import ConfigError, as_plain, check_value, closest, expand_paths

Config = TypeVar("Config")
RECIPES = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")  # installed; in the repository
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError instead of leaving the program."""

    def error(self, message: str):
        raise ConfigError(f"{message}. See --help.")


def leaves(cls: type) -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(section, field, annotated type) of every setting of a run's dataclass, in order.

    Raises:
        TypeError: two sections hold the same leaf name, so that it could not be a flag.
    """
    seen: dict[str, str] = {}
    for section, section_type in get_type_hints(cls).items():
        hints = get_type_hints(section_type)
        for f in dataclasses.fields(section_type):
            if f.name in seen:
                raise TypeError(f"{f.name} is a leaf of both {seen[f.name]} and {section}: rename one")
            seen[f.name] = section
            yield section, f, hints[f.name]


def parse(
    cls: type[Config], argv: list[str] | None, description: str, prog: str | None = None
) -> tuple[Config, dict[str, str]]:
    """Read flags (and the YAML file they name) into `cls`, a dataclass of section dataclasses.

    Returns also where each setting that was given came from: {leaf: "--flag" or "file.yaml"}.

    Raises:
        ConfigError: an unknown key or flag, a wrong type or value, a missing or malformed file.
        SystemExit: after --help.
    """
    parser = make_parser(cls, description, prog)
    flags, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if unknown:
        names = [f.name for _, f, _ in leaves(cls)] + ["config"]
        raise ConfigError(f"unknown argument {unknown[0]}{closest(unknown[0].lstrip('-').split('=')[0], names, '--')}")
    values = vars(flags)
    path = values.pop("config", None)
    given: dict[str, tuple[Any, str]] = {}
    if path:
        path = find_config(path)
        given.update({leaf: (value, path) for leaf, value in read_yaml(cls, path).items()})
    given.update({leaf: (value, f"--{leaf}") for leaf, value in values.items()})
    return build(cls, given), {leaf: source for leaf, (_, source) in given.items()}


def make_parser(cls: type, description: str, prog: str | None = None) -> Parser:
    """A parser with a flag for each leaf, grouped by section; only flags that are given appear in its result."""
    usage = "%(prog)s [--config FILE] [--SETTING VALUE ...]"
    parser = Parser(prog, usage, description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    text = "YAML file of settings, or the name of a shipped recipe; flags override it"
    parser.add_argument("-c", "--config", "--configs", metavar="FILE", help=text)
    groups: dict[str, Any] = {}
    for section, f, hint in leaves(cls):
        group = groups.setdefault(section, parser.add_argument_group(section))
        shown = list(f.default) if isinstance(f.default, tuple) else f.default
        text = f.metadata["help"].replace("%", "%%") + ("" if shown in (None, []) else f" (default: {shown})")
        text = argparse.SUPPRESS if f.metadata["hidden"] else text
        if _is(hint, bool):
            group.add_argument(f"--{f.name}", nargs="?", const="true", metavar="true|false", help=text)
            off = {"dest": f.name, "action": "store_const", "const": "false", "help": argparse.SUPPRESS}
            group.add_argument(f"--no-{f.name}", **off)
        elif _is_sequence(hint):
            metavar = "PATH" if f.metadata["path"] else "TEXT" if _is_texts(hint) else "N"
            group.add_argument(f"--{f.name}", nargs="+", metavar=metavar, help=text)
        else:
            choices = f.metadata["choices"]
            kind = "PATH" if f.metadata["path"] else _type_name(hint).upper()
            metavar = "{" + ",".join(choices) + "}" if choices else kind
            group.add_argument(f"--{f.name}", metavar=metavar, help=text)
    return parser


def find_config(name: str) -> str:
    """The YAML file that --config names: a path, or from any folder the bare name of a shipped recipe.

    Raises:
        ConfigError: a bare name that is neither a file nor a recipe.
    """
    name = os.path.expanduser(name)
    if Path(name).is_file() or Path(name).name != name or Path(name).suffix:
        return name
    folder = next((folder for folder in RECIPES if folder.is_dir()), RECIPES[0])
    recipes = {file.stem: str(file) for file in sorted(folder.glob("*.yaml"))}
    if name not in recipes and not Path(name).is_dir():
        near = closest(name, recipes, otherwise=f". Recipes: {', '.join(recipes)}." if recipes else ".")
        raise ConfigError(f"config {name} is neither a file nor a shipped recipe{near}")
    return recipes.get(name, name)


def read_yaml(cls: type, path: str) -> dict[str, Any]:
    """A YAML file as {leaf: value}.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, unknown keys, or a key in another section than its own.
    """
    from omegaconf import OmegaConf

    file = Path(path)
    if file.is_dir():
        raise ConfigError(f"config {path} is a folder; name a YAML file in it.")
    if not file.is_file():
        near = sorted(p.name for p in file.parent.glob("*.y*ml")) if file.parent.is_dir() else []
        there = f" That folder holds: {', '.join(near)}." if near else ""
        raise ConfigError(f"config file {path} does not exist.{there}")
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except Exception as error:  # OmegaConf and PyYAML raise a dozen kinds
        raise ConfigError(f"config file {path} is not readable YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"config file {path} holds no settings; it should be lines of `key: value`.")
    sections = {f.name: section for section, f, _ in leaves(cls)}
    out: dict[str, Any] = {}

    def take(leaf, value, section=None):
        if leaf not in sections:
            known = [*sections, *sections.values()]
            raise ConfigError(f"{path}: unknown key {leaf}{closest(str(leaf), known)}")
        if section not in (None, sections[leaf]):
            raise ConfigError(f"{path}: {leaf} belongs to section {sections[leaf]}, not {section}.")
        if leaf in out:
            raise ConfigError(f"{path}: {leaf} is given twice, in a section and outside. Keep one.")
        out[leaf] = value

    for key, value in tree.items():
        if key in sections.values() and not (isinstance(value, dict) or value is None):
            raise ConfigError(f"{path}: {key} is a section; write its settings indented under it, not {value!r}.")
        if key in sections.values():
            for leaf, leaf_value in (value or {}).items():
                take(leaf, leaf_value, key)
        else:
            take(key, value)
    return out


def build(cls: type[Config], given: dict[str, tuple[Any, str]]) -> Config:
    """The dataclass tree with the given values, {leaf: (value, source)}, converted to the annotated types."""
    arguments: dict[str, dict[str, Any]] = {section: {} for section in get_type_hints(cls)}
    for section, f, hint in leaves(cls):
        if f.name in given:
            value, source = given[f.name]
            arguments[section][f.name] = convert(f, value, hint, source)
    return cls(**{section: get_type_hints(cls)[section](**values) for section, values in arguments.items()})


def convert(f: dataclasses.Field, value: Any, hint: Any, source: str) -> Any:
    """One value from YAML or a flag as its annotated type, by OmegaConf's rules, in range, `~` in paths expanded.

    Raises:
        ConfigError: naming the setting, the value, what was expected and where it was given.
    """
    converted = _typed(f.name, value, hint, source)
    check_value(f, converted, f" (from {source})")
    return _expanded(converted) if f.metadata["path"] else converted


def _expanded(paths: Any) -> Any:
    """None, a path, paths with commas between them (shards) or a tuple of paths, with `~` expanded in each."""
    if isinstance(paths, tuple):
        return tuple(_expanded(path) for path in paths)
    return paths and expand_paths(paths)


def _typed(name: str, value: Any, hint: Any, source: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(value, str) and value.lower() in ("null", "none", "~") and _optional(hint):
        return None
    if _is(hint, bool) and isinstance(value, (str, int)) and str(value).lower() in TRUE + FALSE:
        return str(value).lower() in TRUE
    if _is(hint, int) and not isinstance(value, bool):
        value = _whole(value[0] if isinstance(value, list) and len(value) == 1 else value)
    if _is_texts(hint):  # whole, whatever they hold: OmegaConf would read "${x}" and "???" as its own syntax
        return None if value is None and _optional(hint) else _texts(name, value, source)
    if _is(hint, str) and isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        value = ",".join(value)  # a YAML list of shards
    if _is_sequence(hint):
        value = _items(value)
    try:
        leaf_type = OmegaConf.structured(dataclasses.make_dataclass("Leaf", [("leaf", hint)]))
        leaf: Any = OmegaConf.to_container(OmegaConf.merge(leaf_type, {"leaf": value}))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {value!r} (from {source}) is invalid; expected {_type_name(hint)}.") from error
    converted = leaf["leaf"]
    if _is_sequence(hint) and Ellipsis not in _inner(hint).__args__ and len(converted) != len(_inner(hint).__args__):
        wanted = len(_inner(hint).__args__)
        raise ConfigError(f"{name}: {converted} (from {source}) has {len(converted)} items, not {wanted}.")
    return tuple(converted) if isinstance(converted, list) else converted


def to_yaml(config: Any) -> str:
    """The effective configuration as sectioned YAML, readable by `--config` again."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(as_plain(config)))


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import PyTorch and Lightning inside this: a program starts a quarter faster and ends faster.

    The garbage collector is off inside, and ignores the imports ever after (`gc.freeze`), so that loader processes
    share their pages. Does nothing where PyTorch is imported already: other people's garbage is not to be kept.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _optional(hint: Any) -> bool:
    return type(None) in getattr(hint, "__args__", ())


def _inner(hint: Any) -> Any:
    return next(a for a in hint.__args__ if a is not type(None)) if _optional(hint) else hint


def _is(hint: Any, kind: type) -> bool:
    return _inner(hint) is kind


def _is_sequence(hint: Any) -> bool:
    return getattr(_inner(hint), "__origin__", None) is tuple


def _is_texts(hint: Any) -> bool:
    return _is_sequence(hint) and _inner(hint).__args__[0] is str


def _texts(name: str, value: Any, source: str) -> tuple[str, ...]:
    """A text, or a list of texts, with their commas and spaces. A number in YAML is a text of digits."""
    items = value if isinstance(value, (list, tuple)) else [value]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (str, int, float)):
            raise ConfigError(f"{name}: {item!r} (from {source}) is not a text. Put it in quotes.")
    return tuple(str(item) for item in items)


def _type_name(hint: Any) -> str:
    inner = _inner(hint)
    return "a list of numbers" if _is_sequence(hint) else getattr(inner, "__name__", str(inner))


def _whole(value: Any) -> Any:
    """1e6 and "1e6" are integers to a person."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if isinstance(value, (str, float)) and float(value) == int(float(value)):
            return int(float(value))
    return value


def _items(value: Any) -> Any:
    """[1, 2], ["1", "2"], ["1,2"], "[1,2]" and 1 are lists to a person."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(items) == 1 and isinstance(items[0], str):
        items = items[0].strip("[]() ").replace(",", " ").split()
    return items
