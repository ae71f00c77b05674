"""What each room of the package may import, read from the sources, late imports included (docs/architecture.md)."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "latent_verse").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))

# From the ground up: a room imports rooms before it. The last ones are imported by nothing.
ROOMS = {
    "config": {"omegaconf", "yaml"},
    "files": set(),
    "shared": {"jinja2", "PIL", "torch", "tqdm"},  # files directly in latent_verse/ that several rooms use
    "nn": {"torch"},
    "augvae": {"torch", "einops", "torchmetrics", "torchvision"},
    "biart": {"torch", "einops", "triton"},
    "data": {
        "torch",
        "numpy",
        "PIL",
        "torchvision",
        "webdataset",
        "pytorch_lightning",
        "tokenizers",
        "ftfy",
        "regex",
        "tqdm",
    },
    "metrics": {"torch", "numpy", "PIL", "torchvision", "torchmetrics", "torch_fidelity", "pycocoevalcap", "open_clip"},
    "checkpoints": {"torch", "safetensors", "huggingface_hub"},
    "training": {"torch", "numpy", "PIL", "pytorch_lightning", "tensorboard", "torchmetrics", "torchvision", "wandb"},
    "inference": {"torch", "einops", "numpy", "PIL"},
    "evaluation": {"torch", "numpy", "PIL"},
    "commands": {"torch", "pytorch_lightning"},
    "demo": {"torch", "numpy", "PIL", "matplotlib"},
}
ORDER = list(ROOMS)
ENDS = {"commands", "demo"}
FACES = {
    "latent_verse/__init__.py",
    "latent_verse/__main__.py",
    "latent_verse/checkpoint.py",
    "latent_verse/pipeline.py",
}
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric"}
DEVELOPMENT = {"transformers", "pytest", "_pytest", "ruff", "mypy", "tests", "benchmarks"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(path: Path) -> str:
    parts = path.relative_to(ROOT / "latent_verse").parts
    return parts[0] if len(parts) > 1 else "shared"


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it; names taken from a package count as modules."""
    found: set[str] = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    return found


def rooms_of(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    found = set()
    for module in imports(path):
        package, _, rest = module.partition(".")
        if package == "latent_verse" and rest:
            first = rest.split(".")[0]
            found.add(first if (ROOT / "latent_verse" / first).is_dir() else "shared")
    return found


def outside(path: Path) -> set[str]:
    """The packages, other than the standard library and this one, that a file imports from."""
    return {module.split(".")[0] for module in imports(path)} - set(sys.stdlib_module_names) - {"latent_verse", ""}


each_room = pytest.mark.parametrize("here", ORDER)
each_file = pytest.mark.parametrize("path", [*LIBRARY, *SCRIPTS], ids=name)


def files_of(here: str) -> list[Path]:
    return [path for path in LIBRARY if room(path) == here and name(path) not in FACES]


def test_the_reader_sees_every_kind_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "latent_verse" / "room" / "a.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import a.b as c\nfrom d import e\nfrom . import f\nfrom .g import h\nfrom ..i import j\n"
        "def late():\n    import k\n    importlib.import_module('l.m')\n"
    )
    assert imports(file) == {
        *("a.b", "d", "d.e", "latent_verse.room", "latent_verse.room.f", "latent_verse.room.g"),
        *("latent_verse.room.g.h", "latent_verse.i", "latent_verse.i.j", "k", "l.m"),
    }
    assert rooms_of(file) == {"room", "shared"}


def test_every_folder_is_a_room_and_every_room_a_folder():
    folders = {path.name for path in (ROOT / "latent_verse").iterdir() if (path / "__init__.py").exists()}
    assert folders | {"shared"} == set(ROOMS)
    assert len(files_of("shared")) <= 3


@each_room
def test_a_room_imports_only_rooms_below_it(here):
    allowed = {here, *ORDER[: ORDER.index(here)]} - (ENDS - {here})
    if here == "biart":
        allowed -= {"augvae"}  # the two stages know nothing of each other
    if here == "config":
        allowed -= {"shared"}
    assert not {name(path): rooms_of(path) - allowed for path in files_of(here) if rooms_of(path) - allowed}


@each_room
def test_a_room_uses_only_its_packages(here):
    assert not {name(path): outside(path) - ROOMS[here] for path in files_of(here) if outside(path) - ROOMS[here]}


@pytest.mark.parametrize("file", ["augvae/layers", "augvae/quantizer", "augvae/model", "biart/model", "biart/sampling"])
def test_the_networks_are_torch_alone(file):
    assert outside(ROOT / "latent_verse" / f"{file}.py") <= {"torch", "einops"}


def test_no_two_files_import_each_other_in_a_circle():
    modules = {name(p).removesuffix(".py").removesuffix("/__init__").replace("/", "."): p for p in LIBRARY}
    graph = {module: {m for m in imports(path) if m in modules} - {module} for module, path in modules.items()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for below in graph[module]:
                visit(below, (*above, module))
            done.add(module)

    for module in graph:
        if module != "latent_verse":  # its public names are taken from the rooms when they are first asked for
            visit(module, ())


def test_lightning_appears_in_training_the_data_modules_and_commands():
    rooms = {name(p) for p in LIBRARY if outside(p) & LIGHTNING and room(p) not in ("training", "commands")}
    assert rooms == {"latent_verse/data/modules.py"}


def test_only_the_command_line_knows_argparse_and_yaml():
    parsers = {"argparse", "omegaconf", "yaml", "click", "typer", "optparse", "hydra"}
    found = {name(p): {m.split(".")[0] for m in imports(p)} & parsers for p in [*LIBRARY, *SCRIPTS]}
    # released files hold their settings in an argparse.Namespace: allowed by name, nothing is parsed
    allowed = {"latent_verse/config/cli.py", "latent_verse/config/yaml_files.py"}
    assert {file for file, used in found.items() if used - {"argparse"}} <= allowed
    assert {file for file, used in found.items() if used} <= allowed | {
        "latent_verse/checkpoints/ckpt_files.py",
        "latent_verse/checkpoints/augvae.py",
    }


@each_file
def test_only_checkpoints_read_weight_files(path):
    readers = ("torch.load", "pickle.load", "pickle.loads", "torch.serialization.load", "load_from_checkpoint")
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    found = [node for node in calls if ast.unparse(node.func).endswith(readers)]
    assert not found or name(path).startswith("latent_verse/checkpoints/"), [node.lineno for node in found]
    for node in found:
        assert {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only") == "True", node.lineno
    assert not {"pickle", "dill", "cloudpickle", "joblib"} & imports(path)


@each_file
def test_no_grab_bags_no_development_packages_and_nothing_imports_a_script(path):
    assert path.stem.strip("_") not in {"utils", "util", "common", "helpers", "helper", "misc", "tools"}
    assert not outside(path) & DEVELOPMENT
    assert not {m.split(".")[0] for m in imports(path)} & {p.stem for p in SCRIPTS}


# one idea that two rooms have each their part of
SHARED_NAMES = set("augvae biart captions checkpoint datasets generate model models page pairs pipeline".split())


def test_two_files_share_a_name_only_for_one_idea_in_two_rooms():
    names = [path.stem for path in LIBRARY if path.stem not in ("__init__", "__main__")]
    assert {name for name in names if names.count(name) > 1} <= SHARED_NAMES
