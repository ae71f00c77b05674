"""Flags and YAML files of all five commands, up to where the work would begin; settings are read back from their YAML.

`main` runs as it is, with `run`, which does the work, replaced.
"""

from __future__ import annotations

import dataclasses
import importlib
import shlex
from pathlib import Path

import yaml

from latent_verse.config import UserError, as_plain
from latent_verse.config.cli import leaves, parse
from latent_verse.config.evaluate import EvalBiARTConfig
from latent_verse.config.generate import GenerateConfig
from latent_verse.config.train import EvalVAEConfig, TrainBiARTConfig, TrainVAEConfig
from latent_verse.config.yaml_files import to_yaml
from tests.fuzz.cases import Area, Bench, Case
from tests.fuzz.mutations import NUMBERS, TEXTS, Mutator

REPO = Path(__file__).parents[2]
COMMANDS = {
    "train_vae": (TrainVAEConfig, "--train_dir images --hidden_dim 64 --ch_mult 1 2 4 --betas 0.9 0.99 --epochs 2"),
    "eval_vae": (EvalVAEConfig, "--ckpt_path runs/a --test_dir images --save_images 4 --batch_size 8"),
    "train_biart": (TrainBiARTConfig, "--vae_path runs/a --train_dir pairs --n_layer 2 --n_head 2 --seed 7 --backup"),
    "eval_biart": (EvalBiARTConfig, "--model runs/b --test_dir pairs --blur_radii 0 1 --tasks generation captions"),
    "generate": (GenerateConfig, "--model runs/b --text 'a red circle' 'two squares' --num 2 --top_p 0.9 --seed 3"),
}
RECIPES = {"train_vae": "*augvae*.yaml", "eval_vae": "*augvae*.yaml", "train_biart": "*biart.yaml"}
# whole files that no change to a valid one makes
ODD_YAML = (
    *(
        "",
        "\n",
        "---\n...\n",
        "- 1\n- 2\n",
        "just text",
        "name: a\n---\nname: b\n",
        "name: a\nname: b\n",
        "\tname: a\n",
    ),
    *("a: &a [*a]\nname: *a\n", "name: &n {k: *n}\n", "? [1, 2]\n: 3\n", "<<: {name: a}\n", "name: !!binary aGk=\n"),
    *(
        "name: !!python/object/apply:os.system [echo hi]\n",
        "name: !!set {a, b}\n",
        "seed: 1:30\n",
        "name: 2026-11-27\n",
    ),
    *(
        "name: ${name}\n",
        "name: ${seed}\nseed: ${name}\n",
        "name: ${oc.env:HOME}\n",
        "name: ???\n",
        "name: |\n  a\n  b\n",
    ),
    *("seed: " + "9" * 5000 + "\n", "name: " + "[" * 2000 + "\n", "name: " + "[" * 50 + "]" * 50 + "\n", "1: 2\n"),
    *(
        "null: 1\n",
        "true: 1\n",
        "name: 001\n",
        "name: on\n",
        "batch_size: 010\n",
        "learning_rate: 1e-4\n",
        "betas: 0.9\n",
    ),
    *("{name: a, seed: 1}", "name: 'a\n", 'name: "\\x00"\n', "%YAML 9.9\n---\nname: a\n", "name: a # é\n", "model:\n"),
    "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30)),
    "model: {model: {hidden_dim: 64}}\n",
)


def make_flags(bench: Bench) -> Case:
    """A command line with odd values, names and numbers of values."""
    m = bench.mutate
    command = m.pick(COMMANDS)
    config, flags = COMMANDS[command]
    argv = shlex.split(flags)
    known = [f for _, f, _ in leaves(config)]
    for _ in m.few() if not bench.unchanged else ():
        f = m.pick(known)
        values = [odd_value(m, f) for _ in range(m.pick((*[1] * 12, 0, 2, 30)))]
        flag = m.pick(
            (*[f"--{f.name}"] * 16, f"--no-{f.name}", f"-{f.name}", f"--{f.name.upper()}", f"--{f.name[:-1]}")
        )
        new = [f"{flag}={values[0]}", *values[1:]] if values and m.chance(0.2) else [flag, *values]
        at = m.pick((0, len(argv)))
        argv[at:at] = new
        m.note(*new)
    if not bench.unchanged and m.chance(0.1):
        at = m.rng.randrange(len(argv))
        argv[at : at + 1] = [] if m.chance(0.5) else [m.text(argv[at])]
    if not bench.unchanged and m.chance(0.1):
        argv += [m.pick(("--config", "-c", "--configs")), m.pick((*TEXTS, "shapes_vae", str(REPO / "configs")))]
    return settings_case(command, [arg.replace("\0", "") for arg in argv])  # no command line holds a null


def make_yaml(bench: Bench) -> Case:
    """A YAML file: a recipe or a command's settings, with changes to its tree or its text; or an odd one."""
    m = bench.mutate
    command = m.pick(COMMANDS)
    config, flags = COMMANDS[command]
    file = bench.given / "settings.yaml"
    recipes = sorted((REPO / "configs").glob(RECIPES.get(command, "none")))
    if not bench.unchanged and m.chance(0.25):
        content = m.pick(ODD_YAML).encode()
        m.note("an odd file:", content[:60])
    elif recipes and m.chance(0.4):
        content = bench.text(m.pick(recipes).read_text())
    else:
        whole = parse(config, shlex.split(flags), "")[0]
        tree = {section: values for section, values in as_plain(whole).items() if m.chance(0.5)}
        tree.setdefault("data", {}) if hasattr(whole, "data") else None
        if bench.unchanged:
            content = yaml.safe_dump(tree).encode()
        elif m.chance(0.7):
            tree = m.tree(
                {key: value for of_one in tree.values() for key, value in of_one.items()} if m.chance(0.4) else tree
            )
            text = m.json(tree) if m.chance(0.3) else yaml.safe_dump(tree, allow_unicode=m.chance(0.5))
            content = m.encoded(text)
        else:
            content = bench.text(yaml.safe_dump(tree))
    file.write_bytes(content)
    return settings_case(command, ["--config", str(file), *shlex.split(flags)])


def odd_value(m: Mutator, f: dataclasses.Field) -> str:
    """A value for a flag: of its kind or not."""
    choices = f.metadata["choices"]
    own = f.default if not isinstance(f.default, tuple) else (f.default or ("a",))[0]
    return str(m.pick((own, m.pick(NUMBERS), m.pick(TEXTS), *(m.pick(choices) for _ in range(2) if choices))))


def settings_case(command: str, argv: list[str]) -> Case:
    """`main` of a command with its work replaced: the settings, and as they are read back from the saved YAML."""
    module = importlib.import_module(f"latent_verse.commands.{command}")

    def run() -> int:
        module.run = lambda config, *_: read_back(config)
        return module.main(argv)

    return Case(run, f"{command}.py {shlex.join(argv)}")


def read_back(config) -> int:
    """Check that config.yaml, as a run saves it, holds the same settings."""
    file = Path("saved.yaml")
    file.write_text(to_yaml(config), encoding="utf-8")
    try:
        again = parse(type(config), ["--config", str(file)], "")[0]
    except UserError as error:
        raise AssertionError(f"the saved settings cannot be read back: {error}") from error
    assert as_plain(again) == as_plain(config), "the saved settings are read back as others"
    return 0


AREAS = {"flags": Area(make_flags, 300), "yaml": Area(make_yaml, 200)}
