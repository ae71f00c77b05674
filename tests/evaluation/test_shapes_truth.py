"""An oracle is right in every scene, a blind model in next to none; the command that measures it."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest
from PIL import Image

from latent_verse.data import DataError
from latent_verse.data.shapes import ShapesDataset, World
from latent_verse.evaluation import shapes_truth as shapes
from latent_verse.evaluation.shapes_truth import ATTRIBUTES, ShapesSamplingConfig, evaluate
from tests.messages import naming
from tests.stand_ins import Oracle

SMALL = World.preset("small")


class Blind(Oracle):
    """Answers without looking: noise, some scene, a caption of another one."""

    def text_to_image(self, texts, **settings):
        return [[self.world.render(self.world.scene(i))] for i, _ in enumerate(texts)]

    def image_to_text(self, images, **settings):
        return [[self.world.caption(self.world.scene(i), random.Random(i))] for i, _ in enumerate(images)]

    def reconstruct(self, images):
        noise = np.random.default_rng(0)
        return [Image.fromarray(noise.integers(0, 256, np.asarray(image).shape, np.uint8)) for image in images]


@pytest.fixture(scope="module")
def oracle():
    return Oracle(SMALL)


@pytest.mark.parametrize("split", ["val", "heldout"])
def test_an_oracle_is_right_in_everything(oracle, split):
    results, cases = evaluate(oracle, SMALL, split, 25, 0, ShapesSamplingConfig(rerank=3))
    for name in ("text_to_image", "image_to_text", "reranked"):
        assert (results[name]["right"], results[name]["total"]) == (25, 25)
        assert results[name]["attributes"] == {a: {"right": 25, "total": 25} for a in ATTRIBUTES}
    assert results["reconstruction"] == {"right": 25, "total": 25}
    assert results["reranked"]["drawn"] == 3
    assert len({SMALL.key(case.scene) for case in cases}) == 25
    assert {SMALL.split_of(case.scene) for case in cases} == {split}
    assert all(all(case.right.values()) and len(case.right) == 4 for case in cases)


def test_a_blind_model_is_right_in_next_to_nothing():
    results, _ = evaluate(Blind(SMALL), SMALL, "val", 40, 0, ShapesSamplingConfig())
    assert results["text_to_image"]["right"] <= 2
    assert results["image_to_text"]["right"] <= 2
    assert results["reconstruction"]["right"] == 0
    assert results["text_to_image"]["attributes"]["count"]["right"] > 5  # some attribute agrees by chance
    assert "reranked" not in results


def test_only_what_the_image_shows_counts(oracle):
    """Right captions beside wrong images: each direction is checked against its own reference."""

    class Wrong(Oracle):
        def text_to_image(self, texts, **settings):
            return [[SMALL.render(SMALL.scene(0))] for _ in texts]

    results, cases = evaluate(Wrong(SMALL), SMALL, "val", 10, 0, ShapesSamplingConfig())
    assert results["image_to_text"]["right"] == 10
    assert results["text_to_image"]["right"] == sum(case.right["text_to_image"] for case in cases) < 3


def test_the_seed_decides_and_settings_reach_the_model(oracle):
    sampling = ShapesSamplingConfig(temperature=0.0, guidance=2.0, rerank=4, rerank_temperature=0.8, top_k=5)
    oracle.calls.clear()
    first, cases = evaluate(oracle, SMALL, "val", 6, 3, sampling)
    again, cases_again = evaluate(oracle, SMALL, "val", 6, 3, sampling)
    assert first == again
    assert [case.text for case in cases] == [case.text for case in cases_again]
    _, cases_other = evaluate(oracle, SMALL, "val", 6, 4, sampling)
    assert [case.text for case in cases] != [case.text for case in cases_other]
    greedy, chosen = oracle.calls[:2]
    assert greedy == {"temperature": 0.0, "guidance": 2.0, "top_k": None, "top_p": None, "seed": 3}
    assert chosen == {"temperature": 0.8, "rerank": 4, "guidance": 2.0, "top_k": 5, "top_p": None, "seed": 3}


def test_more_scenes_than_there_are(oracle):
    single = dataclasses.replace(SMALL, counts=(1,))
    with pytest.raises(DataError, match=naming("dataset_size", 100, "val", "small")):
        evaluate(oracle, single, "val", 100, 0, ShapesSamplingConfig())


def test_write_json(oracle, tmp_path):
    results, cases = evaluate(oracle, SMALL, "val", 5, 0, ShapesSamplingConfig(rerank=2))
    shapes.write_json(tmp_path / "new" / "val.json", results, cases, samples=2)
    written = json.loads((tmp_path / "new" / "val.json").read_text())
    assert written["text_to_image"] == results["text_to_image"]
    assert len(written["cases"]) == 5
    first = written["cases"][0]
    assert SMALL.parse_image(Image.open(tmp_path / "new" / first["picture"])) == SMALL.parse_image(cases[0].image)
    assert {"drawn", "reranked", "reconstruction", "text", "written", "right"} <= first.keys()
    assert "picture" not in written["cases"][2]
    assert len(list((tmp_path / "new" / "val_samples").iterdir())) == 8
    assert "5 of 5  100.0%" in shapes.table(results, "title")


@pytest.fixture
def bundle(tmp_path):
    """A random model for images of 32 px."""
    import torch

    from latent_verse.augvae.model import AugVAE
    from latent_verse.biart.model import BiART
    from latent_verse.config import BiARTConfig
    from latent_verse.data.text import BPETokenizer
    from latent_verse.inference.pipeline import LVerse
    from latent_verse.training.biart_setup import FAKE_VAE

    torch.manual_seed(0)
    tokenizer = BPETokenizer.train(ShapesDataset(SMALL, "train", 20).captions(0), 300)
    config = BiARTConfig(
        text_vocab=tokenizer.vocab_size, image_vocab=64, text_len=30, image_len=64, n_layer=1, n_head=2, n_embd=16
    )
    LVerse(AugVAE(FAKE_VAE), BiART(config), tokenizer, {}).save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_command(bundle, tmp_path, capsys):
    file = tmp_path / "results.json"
    flags = ["--model", str(bundle), "--count", "4", "--gpus", "0", "--rerank", "2"]
    assert shapes.main([*flags, "--json", str(file), "--samples", "1"]) == 0
    written = json.loads(file.read_text())
    assert (written["world"], written["split"], written["count"]) == ("small", "val", 4)
    assert written["text_to_image"]["total"] == written["image_to_text"]["total"] == 4
    assert written["draw"]["temperature"] == 1.0
    assert "of 4" in capsys.readouterr().out
    again = tmp_path / "again.json"
    assert shapes.main([*flags, "--json", str(again)]) == 0
    same = ("text_to_image", "image_to_text", "reranked", "reconstruction")
    assert {k: written[k] for k in same} == {k: json.loads(again.read_text())[k] for k in same}


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        ("", ["model"]),
        ("--model nowhere-to-be-found", ["nowhere-to-be-found"]),
        ("--model x --split test", ["split", "test", "val", "heldout"]),
        ("--model x --rerank 1", ["rerank", 1, 2]),
        ("--model x --samples 3", ["samples", "json"]),
    ],
)
def test_mistakes(flags, facts, capsys):
    assert shapes.main([*flags.split(), "--gpus", "0"]) == 2
    assert naming(*facts).search(capsys.readouterr().err)


def test_a_bundle_of_another_resolution(bundle, capsys):
    assert shapes.main(["--model", str(bundle), "--world", "full", "--count", "2", "--gpus", "0"]) == 2
    assert naming("world", "full", 64, bundle, 32).search(capsys.readouterr().err)
