"""Which room of the package may import what, by reading the sources (docs/architecture.md, "rooms")."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "latent_verse").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
SCRIPT_NAMES = {"train_vae", "eval_vae", "train_biart", "eval_biart", "generate"}
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities"}
LIGHTNING_ROOMS = ("training.py", "callbacks.py", "trainer.py", "data/module.py", "data/pair_module.py")
DEVELOPMENT = {"transformers", "pytest", "_pytest", "ruff", "tests", "benchmarks"}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


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


def roots(path: Path) -> set[str]:
    return {module.split(".")[0] for module in imports(path)}


def own(path: Path) -> set[str]:
    return {module for module in imports(path) if module.split(".")[0] == "latent_verse"}


def assert_none(offenders: dict[str, set[str]]) -> None:
    assert not {file: sorted(modules) for file, modules in offenders.items() if modules}


each_file = pytest.mark.parametrize("path", [*LIBRARY, *SCRIPTS], ids=name)


def test_the_reader_sees_every_kind_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_import_rules.ROOT", tmp_path)
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


def test_there_is_something_to_read():
    names = {name(path) for path in LIBRARY}
    assert {"latent_verse/augvae/model.py", "latent_verse/biart/model.py", "latent_verse/checkpoint.py"} <= names
    assert {"train_vae.py", "eval_vae.py"} <= {name(path) for path in SCRIPTS}


@pytest.mark.parametrize(("room", "other"), [("augvae", "biart"), ("biart", "augvae")])
def test_the_two_stages_never_import_each_other(room, other):
    assert_none(
        {
            name(path): {m for m in own(path) if f"latent_verse.{other}" == m or m.startswith(f"latent_verse.{other}.")}
            for path in LIBRARY
            if path.parent.name == room
        }
    )


def test_lightning_appears_only_in_its_rooms():
    assert_none({name(p): roots(p) & LIGHTNING for p in LIBRARY if not name(p).endswith(LIGHTNING_ROOMS)})


def test_only_the_command_line_knows_argparse_and_yaml():
    knows = {
        "latent_verse/config/cli.py": {"argparse", "omegaconf", "yaml"},
        "latent_verse/checkpoint.py": {"argparse"},
    }
    parsers = {"argparse", "omegaconf", "yaml", "click", "typer", "optparse", "hydra"}
    assert_none({name(p): (roots(p) & parsers) - knows.get(name(p), set()) for p in [*LIBRARY, *SCRIPTS]})


def test_checkpoint_uses_argparse_for_the_released_files_namespace_alone():
    tree = ast.parse((ROOT / "latent_verse" / "checkpoint.py").read_text())
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "argparse"}
    assert used == {"Namespace"}


@each_file
def test_only_checkpoint_reads_pickles(path):
    readers = ("torch.load", "pickle.load", "pickle.loads", "torch.serialization.load", "load_from_checkpoint")
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = [node for node in calls if ast.unparse(node.func).endswith(readers)]
    if name(path) != "latent_verse/checkpoint.py":
        assert not found, [node.lineno for node in found]
        assert not {"torch.load", "pickle", "dill", "cloudpickle", "joblib"} & imports(path)
        return
    assert found
    for node in found:
        assert {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only") == "True", node.lineno


@each_file
def test_nothing_imports_a_script(path):
    assert not {m.split(".")[0] for m in imports(path)} & (SCRIPT_NAMES | {p.stem for p in SCRIPTS})


@each_file
def test_no_grab_bag_files_and_no_development_packages(path):
    assert path.stem.strip("_") not in {"utils", "util", "common", "helpers", "helper", "misc", "tools"}
    assert not roots(path) & DEVELOPMENT


@pytest.mark.parametrize("file", ["augvae/layers.py", "augvae/codebook.py", "recompute.py", "precision.py"])
def test_the_networks_import_torch_only(file):
    path = ROOT / "latent_verse" / file
    assert roots(path) - {"latent_verse"} - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize(
    ("file", "allowed"),
    [
        ("augvae/layers.py", {"recompute"}),
        ("augvae/codebook.py", {"precision"}),
        ("precision.py", set()),
        ("recompute.py", set()),
        ("augvae/model.py", {"augvae.codebook", "augvae.layers", "config", "checkpoint"}),
        ("augvae/perceptual.py", {"config"}),
        ("biart/sequence.py", {"config"}),
        ("biart/model.py", {"biart.sequence", "config", "recompute"}),
        ("biart/repeat.py", set()),
        ("biart/sampling.py", {"biart.model", "biart.repeat", "biart.sequence", "config"}),
        ("runs.py", {"config"}),
        ("config/cli.py", {"config"}),
        ("config/settings.py", set()),
        ("config/models.py", {"config.settings"}),
        ("text.py", {"config", "data"}),
    ],
)
def test_rooms_import_no_more_of_the_package_than_they_may(file, allowed):
    path = ROOT / "latent_verse" / file
    modules = {f"latent_verse.{m}" for m in allowed}
    extra = {m for m in own(path) if m not in modules and not any(m.startswith(f"{a}.") for a in modules)}
    assert not extra - {"latent_verse"}


def test_model_imports_checkpoint_late_only():
    """checkpoint.py imports the model: at the top of the file this would be a circle."""
    tree = ast.parse((ROOT / "latent_verse" / "augvae" / "model.py").read_text())
    top = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert "latent_verse.checkpoint" not in top


def test_settings_need_the_standard_library_alone():
    for path in (ROOT / "latent_verse" / "config").glob("*.py"):
        assert path.name == "cli.py" or roots(path) - {"latent_verse"} <= set(sys.stdlib_module_names), path.name


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_scripts_are_thin_and_start_from_main(path):
    lines = path.read_text().splitlines()
    assert len(lines) < 80
    assert any(line.startswith("def main(argv: list[str] | None = None) -> int:") for line in lines)
    assert lines[-2:] == ['if __name__ == "__main__":', "    sys.exit(main())"]
