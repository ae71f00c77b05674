"""The Python of docs/guide.md, run from its first block to its last in a folder with the files that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.small_checkpoints import own_ckpt
from tests.tiny_lverse import make_lverse, photo

GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per:UserWarning")
def test_the_python_of_the_guide_runs(tiny_augvae, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vae = tiny_augvae(single_level=4)
    make_lverse(vae).save_pretrained("results/photos/bundle")
    own_ckpt(vae, tmp_path / "augvae_sl.ckpt")
    photo().save("photo.png")
    text, names = GUIDE.read_text(encoding="utf-8"), {"__name__": "guide"}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) >= 4
    for block in blocks:  # tracebacks name the page's own lines
        lines = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        exec(compile(lines, str(GUIDE), "exec", dont_inherit=True), names)
    assert capsys.readouterr().out.startswith("LVerse(") and len(names["captions"][1]) == 2
    assert sorted(path.name for path in Path("augvae-sl").iterdir()) == ["config.json", "model.safetensors"]
