"""YAML files and flags -> a typed configuration. The only file that knows argparse and YAML.

Precedence: dataclass default < YAML < flags given. A YAML file may be sectioned (`model: {hidden_dim: 64}`), flat
(`hidden_dim: 64`, as the original's) or mixed. Unknown keys and wrong types are errors that name the closest valid one.
Nothing heavy is imported, so that `--help` answers at once.

A value means the same as a flag and in YAML. Both are texts, which `convert` reads as the type of their setting, by
OmegaConf's rules. YAML's own types are not used, so that `name: 001` and `name: on` stay what was written and
`batch_size: 010` is 10. `${x}` is text too. null, none and ~ (in YAML also nothing) leave an optional setting out;
quotes make texts of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import glob
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from latent_verse.config import program
from latent_verse.config.settings import (
    ConfigError,
    as_plain,
    checked,
    closest,
    expand,
    expected,
    inner,
    is_list,
    is_optional,
    item_type,
    reason,
    shown,
    type_name,
    types_of,
)

if TYPE_CHECKING:
    from yaml import Node

Config = TypeVar("Config")
RECIPES = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")  # installed; in the repository
NULL = ("null", "none", "~")
YAML_TAG = "tag:yaml.org,2002:"
TAGS = {f"{YAML_TAG}{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}
LARGEST_FILE = 2_000_000  # bytes of a YAML file of some hundred settings; lists of shards have files of their own


class Quoted(str):
    """A text in quotes, in YAML: `null` in it is no null."""


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError instead of leaving the program, and takes -1e-4 for a number."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d|-inf|-nan", re.IGNORECASE)

    def error(self, message: str):
        dash = " A value that begins with - is written --flag=value." if "expected" in message else ""
        raise ConfigError(f"{message}.{dash} See --help.")


class Once(argparse.Action):
    """Store the values of a flag that may be given only once: the first of two lists of texts would be lost."""

    def __call__(self, parser, namespace, values, option_string=None):
        if hasattr(namespace, self.dest):
            raise argparse.ArgumentError(self, "given twice; write all values after the first one")
        setattr(namespace, self.dest, values)


def leaves(cls: type) -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(section, field, annotated type) of every setting of a run's dataclass, in order.

    Raises:
        TypeError: two sections hold the same leaf name, so that it could not be a flag.
    """
    seen: dict[str, str] = {}
    for section, section_type in get_type_hints(cls).items():
        hints = types_of(section_type)
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
        raise ConfigError(
            f"unknown argument {shown(unknown[0])}{closest(unknown[0].lstrip('-').split('=')[0], names, '--')}"
        )
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
    parser.add_argument("-c", "--config", "--configs", metavar="FILE", action=Once, help=text)
    groups: dict[str, Any] = {}
    for section, f, hint in leaves(cls):
        group = groups.setdefault(section, parser.add_argument_group(section))
        shown = list(f.default) if isinstance(f.default, tuple) else f.default
        text = f.metadata["help"].replace("%", "%%") + ("" if shown in (None, []) else f" (default: {shown})")
        text = argparse.SUPPRESS if f.metadata["hidden"] else text
        if inner(hint) is bool:
            group.add_argument(f"--{f.name}", nargs="?", const="true", metavar="true|false", help=text)
            off = {"dest": f.name, "action": "store_const", "const": "false", "help": argparse.SUPPRESS}
            group.add_argument(f"--no-{f.name}", **off)
        elif is_list(hint):
            kinds = {True: "PATH", "first": ("PATH", "TEXT"), False: "TEXT" if item_type(hint) is str else "N"}
            metavar, action = kinds[f.metadata["path"]], Once if item_type(hint) is str else "store"
            group.add_argument(f"--{f.name}", nargs="+", action=action, metavar=metavar, help=text)
        else:
            choices = f.metadata["choices"]
            kind = "PATH" if f.metadata["path"] else type_name(hint).upper()
            metavar = "{" + ",".join(choices) + "}" if choices else kind
            group.add_argument(f"--{f.name}", metavar=metavar, help=text)
    return parser


def find_config(name: str) -> str:
    """The YAML file that --config names: a path, or from any folder the bare name of a shipped recipe.

    Raises:
        ConfigError: a bare name that is neither a file nor a recipe.
    """
    name = expand(name, True, "config")
    if os.path.isfile(name) or Path(name).name != name or Path(name).suffix:
        return name
    folder = next((folder for folder in RECIPES if folder.is_dir()), RECIPES[0])
    recipes = {file.stem: str(file) for file in sorted(folder.glob("*.yaml"))}
    if name not in recipes and not Path(name).is_dir():
        near = closest(name, recipes, otherwise=f". Recipes: {', '.join(recipes)}." if recipes else ".")
        raise ConfigError(f"config {name} is neither a file nor a shipped recipe{near}")
    return recipes.get(name, name)


def read_yaml(cls: type, path: str) -> dict[str, Any]:
    """A YAML file as {leaf: value}; a value is a text, None, or a list of texts, whatever types YAML would see in it.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, unknown keys, a key that is given twice or in another
            section than its own, or a value that no setting has.
    """
    sections = {f.name: section for section, f, _ in leaves(cls)}
    out: dict[str, Any] = {}

    def take(key: Node, value: Node, section: str | None = None) -> None:
        leaf = key.value
        if leaf not in sections:
            known = [*sections, *sections.values()]
            raise ConfigError(f"{_at(path, key)}: unknown key {shown(leaf)}{closest(leaf, known)}")
        if section not in (None, sections[leaf]):
            raise ConfigError(f"{_at(path, key)}: {leaf} belongs to section {sections[leaf]}, not {section}.")
        if leaf in out:
            raise ConfigError(f"{_at(path, key)}: {leaf} is given twice, in a section and outside. Keep one.")
        out[leaf] = _value(path, leaf, value)

    for key, value in _pairs(path, _compose(path)):
        if key.value not in sections.values():
            take(key, value)
        elif value.id == "mapping":
            for leaf, leaf_value in _pairs(path, value):
                take(leaf, leaf_value, key.value)
        elif value.id == "sequence" or not _is_null(_scalar(value)):
            found = "a list" if value.id == "sequence" else shown(str(value.value))
            raise ConfigError(
                f"{_at(path, value)}: {key.value} is a section; write its settings indented under it, not {found}."
            )
    return out


def _compose(path: str) -> Node:
    """The nodes of a YAML file: each a text, a list or a mapping, with its line.

    Raises:
        ConfigError: no such file, too large, not UTF-8, not YAML, or not a mapping.
    """
    import yaml

    if os.path.isdir(path):
        raise ConfigError(f"config {path} is a folder; name a YAML file in it.")
    if not os.path.isfile(path):
        near = sorted(map(os.path.basename, glob.glob(f"{glob.escape(os.path.dirname(path) or '.')}/*.y*ml")))
        there = f" That folder holds: {', '.join(near)}." if near else ""
        kind = "is a pipe or device; a file is needed" if os.path.exists(path) else "does not exist"
        raise ConfigError(f"config file {path} {kind}.{there}")
    if (size := os.path.getsize(path)) > LARGEST_FILE:
        raise ConfigError(f"config file {path} has {size:,} bytes, more than {LARGEST_FILE:,}. Is it a YAML file?")
    try:
        data = Path(path).read_bytes()
        root = yaml.compose(data.decode("utf-8-sig"), yaml.BaseLoader)  # types no value: each is a text
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"config file {path} is not YAML in UTF-8 (line {line}). Save it as UTF-8.") from error
    except yaml.MarkedYAMLError as error:
        where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        what = error.problem or error.context
        raise ConfigError(f"config file {path} is not readable YAML{where}: {what}.") from error
    except RecursionError as error:
        raise ConfigError(f"config file {path} is nested too deeply; settings are at most in a section.") from error
    except (yaml.YAMLError, ValueError, OverflowError, OSError) as error:  # of escapes and directives out of range, too
        raise ConfigError(f"config file {path} is not readable YAML: {reason(error)}.") from error
    if root is None or (root.id == "scalar" and _is_null(_scalar(root))):
        return yaml.MappingNode(f"{YAML_TAG}map", [])  # an empty file
    if root.id != "mapping":
        raise ConfigError(f"config file {path} holds no settings; it should be lines of `key: value`.")
    return root


def _pairs(path: str, mapping: Node) -> list[tuple[Node, Node]]:
    """The (key, value) of a mapping, each key once, which YAML libraries do not check."""
    seen: dict[str, Node] = {}
    _check_tag(path, mapping)
    for key, _ in mapping.value:
        _check_tag(path, key)
        if key.id != "scalar":
            raise ConfigError(f"{_at(path, key)}: a key is the name of a setting, not a list or mapping.")
        if key.value in seen:
            first = seen[key.value].start_mark.line + 1
            raise ConfigError(f"{_at(path, key)}: {shown(key.value)} is given twice, first on line {first}. Keep one.")
        seen[key.value] = key
    return mapping.value


def _value(path: str, leaf: str, node: Node) -> str | list[str] | None:
    """What a node says of a setting."""
    for part in (node, *(node.value if node.id == "sequence" else ())):
        _check_tag(path, part)
    if node.id == "scalar":
        return _scalar(node)
    if node.id == "sequence" and all(item.id == "scalar" for item in node.value):
        return [_scalar(item) or "" for item in node.value]
    nested = "a mapping" if node.id == "mapping" else "a list of lists or mappings"
    raise ConfigError(f"{_at(path, node)}: {leaf} is {nested}; a setting is one value or a list of values.")


def _check_tag(path: str, node: Node) -> None:
    if node.tag not in TAGS:
        raise ConfigError(f"{_at(path, node)}: the tag {shown(node.tag)} has no meaning here. Remove it.")


def _scalar(node: Node) -> str | None:
    """The text of a scalar; None for nothing at all."""
    if node.style:
        return Quoted(node.value)
    return node.value or None


def _at(path: str, node: Node) -> str:
    return f"{path}, line {node.start_mark.line + 1}"


def build(cls: type[Config], given: dict[str, tuple[Any, str]]) -> Config:
    """The dataclass tree with the given values, {leaf: (value, source)}, converted to the annotated types."""
    arguments: dict[str, dict[str, Any]] = {section: {} for section in get_type_hints(cls)}
    for section, f, hint in leaves(cls):
        if f.name in given:
            value, source = given[f.name]
            arguments[section][f.name] = convert(f, value, hint, source)
    return cls(**{section: get_type_hints(cls)[section](**values) for section, values in arguments.items()})


def convert(f: dataclasses.Field, value: str | list[str] | None, hint: Any, source: str) -> Any:
    """A text, or a list of them, as a flag or YAML gives it, as the setting's type; in range, `~` in paths expanded.

    Raises:
        ConfigError: naming the setting, the value, what was expected and where it was given.
    """
    where, kind = f" (from {source})", item_type(hint)
    if is_optional(hint) and _is_null(value):
        return None
    if value is None:
        raise ConfigError(f"{f.name} has no value{where}; expected {expected(f, hint)}. Give one, or leave it out.")
    texts = value if isinstance(value, list) else [value]
    if f.metadata["path"] == "shards":
        texts = [",".join(texts)]
    elif is_list(hint) and kind is not str:
        texts = _items(texts)
    read = [_read(text, kind) for text in texts]
    if None in read or not (is_list(hint) or len(read) == 1):
        found = shown([*map(str, texts)] if isinstance(value, list) else str(value))
        odd = next((c for c in "".join(texts) if not c.isascii()), None) if kind is not str else None
        remedy = f" It holds {odd!r} (U+{ord(odd):04X}), which no number has." if odd else ""
        raise ConfigError(f"{f.name}: {found}{where} is invalid; expected {expected(f, hint)}.{remedy}")
    return checked(f, hint, read if is_list(hint) else read[0], where)


def _read(text: str, kind: type) -> Any:
    """A text as a str, or by OmegaConf's rules as a bool, int or float; None if it is none."""
    from omegaconf import BooleanNode, FloatNode, IntegerNode, OmegaConf

    if kind is str:
        return str(text)
    if not text.isascii() or "$" in text or "?" in text:  # digits and spaces of all scripts; OmegaConf's own syntax
        return None
    if kind is bool and re.fullmatch(r"-?\d+", text.strip()) and text.strip() not in ("0", "1"):
        return None  # OmegaConf takes every number but 0 for true
    nodes: dict[type, Callable[[str], Any]] = {bool: BooleanNode, int: IntegerNode, float: FloatNode}
    with contextlib.suppress(ValueError, OverflowError):
        return OmegaConf.create([nodes[kind](text.strip())])[0]
    with contextlib.suppress(ValueError, OverflowError):
        return int(float(text)) if kind is int and float(text).is_integer() else None  # 1e6 is one to a person
    return None


def _is_null(value: str | list[str] | None) -> bool:
    """Whether nothing is given, or a word for it; in YAML not in quotes."""
    return value is None or (isinstance(value, str) and not isinstance(value, Quoted) and _lower(value) in NULL)


def _lower(text: str) -> str:
    return text.strip().lower()


def to_yaml(config: Any) -> str:
    """The effective configuration as sectioned YAML, which `--config` reads as the same again, whatever it holds."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Puts in quotes what would be read as null, and what YAML's other forms break or fold at odd characters."""

    def represent(dumper: Dumper, text: str) -> yaml.Node:
        quote = '"' if _lower(text) in NULL or not text.isprintable() else None
        return dumper.represent_scalar(f"{YAML_TAG}str", text, style=quote)

    Dumper.add_representer(str, represent)
    return yaml.dump(as_plain(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import PyTorch and Lightning inside this: a program starts a quarter faster and ends faster, also by a signal.

    The garbage collector is off inside, and ignores the imports ever after (`gc.freeze`), so that loader processes
    share their pages. Does nothing where PyTorch is imported already: other people's garbage is not to be kept.
    """
    with program.nothing_begun():
        if "torch" in sys.modules or not gc.isenabled():
            yield
            return
        gc.disable()
        try:
            yield
        finally:
            gc.freeze()
            gc.enable()


def _items(texts: list[str]) -> list[str]:
    """["1", "2"], ["1,2"], ["[1,2]"] and ["1"] are lists of numbers to a person."""
    return texts[0].strip("[]() ").replace(",", " ").split() if len(texts) == 1 else texts
