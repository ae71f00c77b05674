"""The code of docs/extending_biart.md runs, block by block."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from latent_verse.biart.sampling import generate

PAGE = Path(__file__).parents[1] / "docs" / "extending_biart.md"


def test_the_worked_example_of_a_position_encoding_runs(monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    page: dict = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), page)
    model, text_BL = page["model"], page["text_BL"]
    assert generate(model, text_BL, "text_to_image", seed=0).shape == (2, 6)
    # the example acts: with all positions equal, features differ
    sequences = page["sequences"]
    monkeypatch.setattr(type(model), "positions", lambda self, places, image_first_B1: torch.zeros(1, 16))
    assert not torch.allclose(model.features(sequences.idx_BT, sequences.seg_BT), page["expected_BTC"], atol=1e-2)
