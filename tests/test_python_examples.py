"""The Python of README.md, the model card and docs/guide.md, run from its first block to its last as a user would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.small_checkpoints import own_ckpt
from tests.tiny_lverse import make_lverse, photo

REPO = Path(__file__).parents[1]


def run(page: Path) -> dict[str, Any]:
    """Run the Python of a page; returns its names."""
    text, names = page.read_text(encoding="utf-8"), {"__name__": "page"}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines = "\n" * text.count("\n", 0, block.start(1)) + block[1]  # tracebacks name the page's own lines
        exec(compile(lines, str(page), "exec", dont_inherit=True), names)
    return names


@pytest.mark.usefixtures("one_thread")
def test_the_python_of_the_readme_and_the_card_runs_from_any_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run(REPO / "README.md")
    assert names["caption"] in capsys.readouterr().out and names["image"].size == names["decoded"].size == (32, 32)
    assert Path("ring.png").exists()
    assert run(REPO / "models" / "shapes" / "README.md")["image"].size == (32, 32)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per:UserWarning")
def test_the_python_of_the_guide_runs(tiny_augvae, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vae = tiny_augvae(single_level=4)
    make_lverse(vae).save_pretrained("results/photos/bundle")
    own_ckpt(vae, tmp_path / "augvae_sl.ckpt")
    photo().save("photo.png")
    names = run(REPO / "docs" / "guide.md")
    assert capsys.readouterr().out.startswith("LVerse(") and len(names["captions"][1]) == 2
    assert sorted(path.name for path in Path("augvae-sl").iterdir()) == ["config.json", "model.safetensors"]
