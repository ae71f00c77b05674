"""YAML files of settings: read as texts with their lines, and written so that they are read as the same again."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_verse.config.messages import ConfigError, closest, no_file, reason, shown
from latent_verse.config.settings import as_plain

if TYPE_CHECKING:
    from yaml import Node

NULL = ("null", "none", "~")
YAML_TAG = "tag:yaml.org,2002:"
TAGS = {f"{YAML_TAG}{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}
LARGEST_FILE = 2_000_000  # bytes of a YAML file of some hundred settings; lists of shards have files of their own


class NoSetting(ConfigError):
    """A key of a YAML file is no setting of the program, or one that holds no others."""


class Quoted(str):
    """A text in quotes, in YAML: `null` in it does not mean nothing."""


def read_yaml(path: str, sections: Mapping[str, str]) -> dict[str, Any]:
    """A YAML file as {leaf: value}; a value is a text, None, or a list of texts, whatever types YAML would see in it.

    Args:
        sections: {leaf: its section} of every setting that the file may hold.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, unknown keys, a key that is given twice or in another
            section than its own, or a value that no setting has.
    """
    out: dict[str, Any] = {}

    def take(key: Node, value: Node, section: str | None = None) -> None:
        leaf = key.value
        if leaf not in sections:
            known = [*sections, *sections.values()] if section is None else sections
            raise NoSetting(f"{_at(path, key)}: unknown key {shown(leaf)}{closest(leaf, known)}")
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
        elif value.id == "sequence" or not is_null(_scalar(value)):
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

    if not os.path.isfile(path):
        near = sorted(map(os.path.basename, glob.glob(f"{glob.escape(os.path.dirname(path) or '.')}/*.y*ml")))
        there = f" That folder holds: {', '.join(near)}." if near else ""
        raise ConfigError(f"config: {path} {no_file(path)}.{there}")
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
    if root is None or (root.id == "scalar" and is_null(_scalar(root))):
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
    raise NoSetting(f"{_at(path, node)}: {leaf} is {nested}; a setting is one value or a list of values.")


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


def is_null(value: str | list[str] | None) -> bool:
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
