"""Runs of eval_biart.py in tests."""

from __future__ import annotations

import json

from latent_verse.commands import eval_biart


def run(tmp_path, *flags, name="run"):
    """Metrics of a run, which has to succeed."""
    argv = ["--gpus", "0", "--no-java", "--log_dir", str(tmp_path / "runs"), "--name", name, *map(str, flags)]
    assert eval_biart.main(argv) == 0
    return json.loads((tmp_path / "runs" / name / "metrics.json").read_text())
