"""What the documentation and the docstrings name in backticks exists: files, flags, settings, functions. README's size.

A name is checked by its form; what has none of these forms (formulas, prose, users' own files) is not:

    `--flag`                    a flag of a program or a benchmark
    `folder/file`               below a top-level folder of the repository: exists; `*` matches
    `file.py` `.yaml` `.md`     the end of some file's path
    `latent_verse.room.name`    resolves to a module, and in it to what is defined there
    `snake_case` `a.CamelCase`  each such word occurs in the code, outside of docstrings and comments
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from functools import cache
from pathlib import Path

import pytest
import yaml

REPO = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
TRACKED = sorted(
    name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=REPO, capture_output=True, text=True
    ).stdout.splitlines()
    if (REPO / name).is_file()
)
PAGES = [name for name in TRACKED if name.endswith(".md")]
SOURCES = [name for name in TRACKED if name.endswith(".py")]
DOCUMENTED = [name for name in SOURCES if not name.startswith("tests/")]
TOP = {name.split("/")[0] for name in TRACKED if "/" in name}
FILE = re.compile(r"[\w./{},*<>-]+\.(?:py|yaml|md)")
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*)")
WRITTEN = {"config.yaml", "file.yaml", "colourfulness.py"}  # by programs, users and examples: not in the repository
OTHER_PROGRAMS = ("pip ", "torchrun ", "srun ", "git ", "pre-commit ", "tensorboard ")  # have flags of their own


def read(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8")


def snippets(text: str) -> list[str]:
    """What stands in backticks, line breaks inside as blanks; blocks of code are left out."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return [" ".join(found.split()) for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(read(name), name)


def docstrings(name: str) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return "\n\n".join(ast.get_docstring(n) or "" for n in ast.walk(tree(name)) if isinstance(n, kinds))


@cache
def named() -> list[tuple[str, str]]:
    """(file, snippet) of all pages and docstrings; docstrings name files without backticks too."""
    pages = [(name, found) for name in PAGES for found in snippets(read(name))]
    plain = [
        (name, found)
        for name in DOCUMENTED
        for found in re.findall(r"\b(?:docs|tests)/[\w/]+\.(?:md|py)", docstrings(name))
    ]
    return pages + plain + [(name, found) for name in DOCUMENTED for found in snippets(docstrings(name))]


def assert_none(missing: list[tuple[str, str]]) -> None:
    assert not missing, "named, but not there:\n" + "\n".join(f"  {file}: {name}" for file, name in missing)


# ----------------------------------------------------------------------------------------------------- what there is


@cache
def words() -> frozenset[str]:
    """Identifiers of the code, and whole words of its strings, keys of the recipes, targets of the Makefile."""
    found: set[str] = set()
    for name in SOURCES:
        docs = {
            node.body[0].value
            for node in ast.walk(tree(name))
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and ast.get_docstring(node) is not None
        }
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs:
                found |= set(re.findall(r"\w+", node.value))
        tokens = tokenize.generate_tokens(io.StringIO(read(name)).readline)
        found |= {token.string for token in tokens if token.type == tokenize.NAME}
    for name in TRACKED:
        if name.endswith((".yaml", ".toml")) or name == "Makefile":
            found |= set(re.findall(r"\w+", read(name)))
    return frozenset(found) | {Path(name).stem for name in TRACKED}


@cache
def flags() -> frozenset[str]:
    """Names of the settings, each of which is a flag, and flags that the library or a benchmark spells out."""
    found = {"help", "config", "configs", "flag"}  # --flag: any of them
    for node in (node for name in DOCUMENTED for node in ast.walk(tree(name))):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.value or node.target).startswith(("setting(", "same(")):
            found.add(node.target.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and FLAG.fullmatch(node.value):
            found.add(node.value.removeprefix("--"))
    return frozenset(found | {f"no-{name}" for name in found})


def resolves(dotted: str) -> bool:
    """Whether `latent_verse.a.b.C.d` is a module, or defined in one: statically, nothing is imported."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[:end])
        file = next((f for f in (f"{path}.py", f"{path}/__init__.py") if f in TRACKED), None)
        if file:
            return defined(tree(file), parts[end:])
        if any(name.startswith(f"{path}/") for name in TRACKED):
            return end == len(parts)
    return False


def defined(node: ast.AST, names: list[str]) -> bool:
    """Whether names[0] is defined in a module or class, and names[1] in that. Lazy names count where they are spelt."""
    if not names:
        return True
    for inner in ast.walk(node):
        if isinstance(inner, (ast.ClassDef, ast.FunctionDef)) and inner.name == names[0]:
            return defined(inner, names[1:])
        if isinstance(inner, (ast.Name, ast.Attribute)) and names[0] in (
            getattr(inner, "id", None),
            getattr(inner, "attr", None),
        ):
            return len(names) == 1
        if isinstance(inner, ast.alias) and names[0] in (inner.asname, inner.name):
            return True
        if isinstance(inner, ast.Constant) and inner.value == names[0]:
            return True
    return False


# ----------------------------------------------------------------------------------------------------------- the tests


def test_files_that_are_named_exist():
    missing = []
    for file, word in ((file, word.rstrip(".,;:")) for file, snippet in named() for word in snippet.split()):
        inside = word.split("/")[0] in TOP and "/" in word
        if not (inside or FILE.fullmatch(word)) or re.search(r"[<>(~]|^\.\./|^/", word) or Path(word).name in WRITTEN:
            continue
        pattern = word.rstrip("/")
        found = [place for folder in (REPO, REPO / "latent_verse") for place in folder.glob(pattern)]
        if not found and not any(name.endswith(f"/{pattern}") for name in TRACKED):
            missing.append((file, word))
    assert_none(missing)


def test_flags_that_are_named_exist():
    mine = [(file, snippet) for file, snippet in named() if not snippet.startswith(OTHER_PROGRAMS)]
    assert_none([(file, f"--{flag}") for file, s in mine for flag in FLAG.findall(s) if flag not in flags()])


def test_names_that_are_dotted_resolve():
    found = [(file, dotted) for file, s in named() for dotted in re.findall(r"\blatent_verse(?:\.\w+)+", s)]
    assert_none([(file, name) for file, name in found if not name.endswith((".py", ".md")) and not resolves(name)])


def test_identifiers_that_are_named_occur_in_the_code():
    missing = []
    for file, snippet in named():
        if file.startswith("docs/extending"):  # invents names; other tests run its code
            continue
        name = re.fullmatch(r"([A-Za-z]\w*(?:\.[A-Za-z_]\w*)*)(?:\(.*\))?", snippet)
        if name and not FILE.fullmatch(snippet):
            missing += [
                (file, snippet) for word in name[1].split(".") if re.search("_|[a-z][A-Z]", word) and not is_word(word)
            ]
    assert_none(missing)


def is_word(word: str) -> bool:
    """In the code as it is, or but for a number or letter at its end, as f-strings make names (`fid_0`, `mu_k`)."""
    return word in words() or f"{re.sub(r'_(?:[0-9]+|[kN])$', '', word)}_" in words()


def test_the_map_lists_every_file_of_every_room():
    rows = re.findall(r"^\| `(\w+)/` \| (.*?) \|", read("docs/architecture.md"), re.M)
    listed = {room: set(re.findall(r"`(\w+)/?`", files)) for room, files in rows}
    there: dict[str, set[str]] = {}
    for path in map(Path, SOURCES):
        package, *below = path.with_suffix("").parts
        if package == "latent_verse" and len(below) > 1:
            there.setdefault(below[0], set()).add(below[1])
    assert listed == {room: files - {"__init__", "__main__"} for room, files in there.items()}


def test_readme_is_short():
    lines = read("README.md").splitlines()
    assert len(lines) < 220
    assert not [(number, len(line)) for number, line in enumerate(lines, start=1) if len(line) > 120]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Files, and headings by GitHub's rule: lower case, blanks as hyphens, punctuation dropped."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.S | re.M)
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, heading = target.partition("#")
        there = (REPO / page).parent / path if path else REPO / page
        assert there.exists(), f"{page}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_are_python_and_import_what_exists(page):
    for block in re.findall(r"^```python\n(.*?)^```", read(page), re.S | re.M):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "latent_verse":
                missing = [a.name for a in node.names if not resolves(f"{node.module}.{a.name}")]
                assert not missing, f"{page}: from {node.module} import {', '.join(missing)}"


def test_citation_is_of_this_version():
    citation = yaml.safe_load(read("CITATION.cff"))
    (version,) = re.findall(r'^__version__ = "(.+)"$', read("latent_verse/__init__.py"), re.M)
    assert citation["version"] == version
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["references"][0]["title"] == "L-Verse: Bidirectional Generation Between Image and Text"
