"""docs/extending_metrics.md: its example is a metric, and reports itself, with nothing changed but the two files."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from latent_verse.commands import eval_biart
from latent_verse.evaluation import image_tasks
from latent_verse.evaluation.samples import read_image
from latent_verse.metrics import networks
from tests.stand_ins import Colours, Words, write_pairs

DOC = Path(__file__).parents[1] / "docs" / "extending_metrics.md"


@pytest.fixture
def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S)


@pytest.fixture
def metric(blocks) -> types.ModuleType:
    module = types.ModuleType("colourfulness")
    exec(blocks[0], module.__dict__)
    return module


def test_the_metric(metric):
    grey = torch.full((3, 8, 8), 90, dtype=torch.uint8)
    assert metric.colourfulness(grey) == 0
    halves = torch.zeros(3, 8, 8, dtype=torch.uint8)
    halves[0, :4], halves[1, 4:] = 200, 200  # red above green
    assert metric.colourfulness(halves) == pytest.approx(np.hypot(200, 0) + 0.3 * np.hypot(0, 100))


def test_one_line_reports_it(blocks, metric, tmp_path, monkeypatch):
    head, end, body = inspect.getsource(image_tasks.report_images).partition('\n    """\n')
    source = head + end + textwrap.indent(blocks[1], "    ") + body
    namespace = vars(image_tasks) | {"colourfulness": metric.colourfulness}
    exec(source, namespace)
    monkeypatch.setattr(image_tasks, "report_images", namespace["report_images"])
    monkeypatch.setattr(networks, "open_inception", Colours)
    monkeypatch.setattr(networks, "open_clip_network", lambda *arguments: Words())
    pairs = write_pairs(tmp_path / "pairs", 5)
    flags = ["--generated_dir", pairs, "--test_dir", pairs, "--fid_resolution", 16, "--is_splits", 1, "--gpus", 0]
    assert eval_biart.main([*map(str, flags), "--log_dir", str(tmp_path / "runs"), "--name", "run"]) == 0
    record = json.loads((tmp_path / "runs" / "run" / "metrics.json").read_text())["figures"]["generation/colourfulness"]
    expected = [metric.colourfulness(read_image(file, 16)) for file in sorted(pairs.glob("*.png"))]
    assert record["value"] == pytest.approx(np.mean(expected)) and record["samples"] == 5
    assert "generation/colourfulness" in (tmp_path / "runs" / "run" / "index.html").read_text().replace("<wbr>", "")
