"""Stages of a demo that cost nothing."""

from __future__ import annotations

from latent_verse.demo.run import DemoSettings, Stage


def python(name: str, lines: str, output: str = "") -> Stage:
    return Stage(name, name, ["-c", lines], output or f"{name}.done")


def touch(tmp_path, name: str) -> str:
    """Python that makes a file and adds a line to the log of what has run."""
    out = tmp_path / "out"
    return f"open({str(out / 'log')!r}, 'a').write('{name} '); open({str(out / (name + '.done'))!r}, 'w')"


def settings(tmp_path, recipes=None) -> DemoSettings:
    recipes = str(recipes) if recipes else None
    return DemoSettings(out=str(tmp_path / "out"), recipes=recipes, train_pairs=16, count=4, rerank=2, gpus=0)
