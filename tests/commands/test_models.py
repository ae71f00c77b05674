"""`latent-verse models`: what is listed of each shipped model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from latent_verse.__main__ import main
from latent_verse.checkpoints import shipped
from tests.messages import naming
from tests.tiny_lverse import make_lverse

REPO = Path(__file__).parents[2]


def test_the_list_says_what_a_model_does_reached_and_where_it_lies(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    card = shipped.read_card(REPO / "models" / "shapes")
    (first,) = (i for i, line in enumerate(lines) if line.startswith("shapes "))
    assert "MB" in lines[first] and lines[first + 1].strip() == card.does
    about = [line.strip() for line in lines[first : first + 8]]
    assert str(REPO / "models" / "shapes") in about
    for what, found in card.results.items():
        (line,) = (line for line in about if line.startswith(f"{what}: "))
        assert all(f"{r['right'] / r['total']:.1%}" in line and where in line for where, r in found.items())


def test_further_models_are_listed(capsys, tmp_path, monkeypatch, tiny_augvae):
    monkeypatch.setattr(shipped, "PLACES", (tmp_path,))
    assert main(["models"]) == 0 and len(capsys.readouterr().out.splitlines()) == 1
    make_lverse(tiny_augvae(single_level=4)).save_pretrained(tmp_path / "plain")
    make_lverse(tiny_augvae(single_level=4)).save_pretrained(tmp_path / "told")
    results = {"captions": {"cats": {"right": 3, "total": 4}}}
    card = {"does": "cats\x1b[2J", "example": "a cat", "seed": 2, "runs": [{"seed": 2, "results": results}]}
    (tmp_path / "told" / "card.json").write_text(json.dumps(card))
    assert main(["models"]) == 0
    said = capsys.readouterr().out
    assert naming("plain", "told", tmp_path / "plain", "a cat", "75.0%", 4).search(said) and "\x1b" not in said
    (tmp_path / "told" / "card.json").write_text("[")
    assert main(["models"]) == 2 and naming(tmp_path / "told" / "card.json").search(capsys.readouterr().err)


def test_it_takes_no_flags_and_loads_no_torch(capsys, tmp_path):
    assert main(["models", "--all"]) == 2 and naming("--all").search(capsys.readouterr().err)
    code = "import sys; from latent_verse.__main__ import main; main(['models']); sys.exit('torch' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(REPO)}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, timeout=60).returncode == 0
