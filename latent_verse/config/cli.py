"""YAML files and flags -> a typed configuration.

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
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from latent_verse.config import program
from latent_verse.config.messages import ConfigError, UserError, closest, shown
from latent_verse.config.settings import (
    checked,
    expand,
    expected,
    inner,
    is_list,
    is_optional,
    item_type,
    type_name,
    types_of,
)
from latent_verse.config.yaml_files import NoSetting, is_null, read_yaml

Config = TypeVar("Config")
RECIPES = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")  # installed; in the repository


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError instead of leaving the program, and takes -1e-4 for a number."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-\.?\d|-inf|-nan", re.IGNORECASE)

    def print_help(self, file: Any = None) -> None:
        (file or sys.stdout).write(self.format_help())  # argparse's own hides that it could not be written

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
        given.update({leaf: (value, path) for leaf, value in _read_config(path, cls).items()})
    given.update({leaf: (value, f"--{leaf}") for leaf, value in values.items()})
    return build(cls, given), {leaf: source for leaf, (_, source) in given.items()}


def _read_config(path: str, cls: type) -> dict[str, Any]:
    """As `read_yaml`, of the settings of `cls`. If it does not hold these but another program's, that is said."""

    def read(settings: type) -> dict[str, Any]:
        return read_yaml(path, {f.name: section for section, f, _ in leaves(settings)})

    def holds(settings: type) -> bool:
        with contextlib.suppress(ConfigError):
            return bool(read(settings))
        return False

    try:
        return read(cls)
    except NoSetting as error:
        owner = next((name for name, settings in _programs().items() if holds(settings)), None)
        if owner is None:
            raise
        lacks = f"config: {path} is for {owner}.py; this program does not have all of its settings"
        raise ConfigError(f"{lacks}. Run that one, or give another file.") from error


def _programs() -> dict[str, type]:
    """Every program that --config serves, and its settings."""
    from latent_verse.config import evaluate, generate, train

    return {
        "train_vae": train.TrainVAEConfig,
        "train_biart": train.TrainBiARTConfig,
        "eval_vae": train.EvalVAEConfig,
        "eval_biart": evaluate.EvalBiARTConfig,
        "generate": generate.GenerateConfig,
    }


@contextlib.contextmanager
def naming_sources(config: Any, given: Mapping[str, str]) -> Iterator[None]:
    """Inside, an error whose message names a path that came from a YAML file says so, and which flag gives another.

    Args:
        config, given: what `parse` returned.
    """
    try:
        yield
    except UserError as error:
        paths = {
            f.name: getattr(getattr(config, section), f.name)
            for section, f, _ in leaves(type(config))
            if f.metadata["path"]
        }
        text = str(error)
        of_yaml = [leaf for leaf in paths if not given.get(leaf, "--").startswith("--")]
        named_first = sorted(of_yaml, key=lambda leaf: not re.search(rf"\b{leaf}\b", text))  # two may be one path
        for leaf in named_first:
            for path in paths[leaf] if isinstance(paths[leaf], tuple) else [paths[leaf]]:
                if path and (named := _with_source(text, leaf, path, given[leaf])) != text:
                    error.args = (named, *error.args[1:])
                    raise
        raise


def _with_source(text: str, leaf: str, path: str, source: str) -> str:
    """A message with the file that named the path `leaf` behind its first mention, and the flag that gives another."""
    mention = re.search(rf"(?<![\w./~-])(['\"]?){re.escape(path)}\1(?![\w/-]|\.\w)", text)
    if mention is None:
        return text
    if not os.path.relpath(source).startswith(os.pardir):
        source = os.path.relpath(source)
    name = "" if re.search(rf"\b{leaf}\b", text) else f"{leaf} "
    before, after = text[: mention.start()], text[mention.end() :].removesuffix(".")
    remedy = "" if f"--{leaf}" in text or os.path.exists(path) else f" Give --{leaf}."
    return f"{before}{name}{mention[0]} (from {source}){after}.{remedy}"


def make_parser(cls: type, description: str, prog: str | None = None) -> Parser:
    """A parser with a flag for each leaf, grouped by section; only flags that are given appear in its result."""
    usage = "%(prog)s [--config FILE] [--SETTING VALUE ...]"
    parser = Parser(prog, usage, description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    text = "YAML file of settings, or the name of a shipped recipe; flags override it"
    parser.add_argument("-c", "--config", "--configs", metavar="FILE", action=Once, help=text)
    groups: dict[str, Any] = {}
    unused = {f.name for f in dataclasses.fields(cls) if f.metadata.get("hidden")}  # type: ignore[arg-type]
    for section, f, hint in leaves(cls):
        group = groups.setdefault(section, parser.add_argument_group(section))
        shown = list(f.default) if isinstance(f.default, tuple) else f.default
        text = f.metadata["help"].replace("%", "%%") + ("" if shown in (None, []) else f" (default: {shown})")
        text = argparse.SUPPRESS if f.metadata["hidden"] or section in unused else text
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
    if is_optional(hint) and is_null(value):
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
