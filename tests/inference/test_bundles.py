"""Bundles as LVerse saves and loads them: the same results, precision, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_verse.checkpoints.bundle import BUNDLE_FILES
from latent_verse.checkpoints.ckpt_files import CheckpointError, fingerprint
from latent_verse.config import ConfigError, as_plain
from latent_verse.inference.pipeline import LVerse
from latent_verse.nn.precision import sampling_dtype
from tests.messages import naming
from tests.tiny_lverse import TEXTS, make_lverse, same

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bundle_gives_the_same_images_captions_and_scores(model, bundle):
    loaded = LVerse.from_pretrained(bundle, device="cpu")
    sampled = model.text_to_image(TEXTS, 2, guidance=2.0, rerank=2, top_k=9, seed=3)
    assert same(sampled, loaded.text_to_image(TEXTS, 2, guidance=2.0, rerank=2, top_k=9, seed=3), within=0)
    images = [row[0] for row in sampled]
    assert model.image_to_text(images) == loaded.image_to_text(images)
    assert torch.equal(model.score(images, TEXTS), loaded.score(images, TEXTS))
    assert loaded.info == model.info and loaded.fingerprints == model.fingerprints
    assert not loaded.biart.training and not loaded.vae.training


def test_loading_leaves_the_random_numbers_alone(bundle):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    LVerse.from_pretrained(bundle, device="cpu")
    assert torch.equal(torch.rand(3), expected)


def test_a_bundle_may_be_written_again_and_any_other_folder_may_not(model, bundle, tmp_path):
    with torch.no_grad():
        model.biart.ln_f.bias.add_(1)
    model.save_pretrained(bundle)
    assert torch.equal(LVerse.from_pretrained(bundle, device="cpu").biart.ln_f.bias, model.biart.ln_f.bias)
    assert not [p for p in bundle.rglob("*") if p.name.startswith(".")]
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "config.json").write_text('{"chapter": 1}')
    for place in (other, other / "config.json"):
        with pytest.raises(CheckpointError, match=naming(place, "bundle")):
            model.save_pretrained(place)
    assert [p.name for p in other.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", (*BUNDLE_FILES[1:], "tokenizer/tokenizer.json"))
def test_an_incomplete_bundle_names_the_missing_file(model, bundle, name):
    (bundle / name).unlink()
    with pytest.raises(CheckpointError, match=naming(bundle, name.split("/")[-1])):
        LVerse.from_pretrained(bundle)
    model.save_pretrained(bundle)  # what an interrupted export leaves can be written again
    LVerse.from_pretrained(bundle)


@pytest.mark.parametrize("name", ["biart.safetensors", "vae/model.safetensors", "config.json", "vae/config.json"])
def test_a_damaged_file_is_refused(bundle, name):
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=naming(bundle, "damaged")):
        LVerse.from_pretrained(bundle)


def test_a_mixed_bundle_is_refused(bundle):
    state = load_file(bundle / "biart.safetensors")
    state["ln_f.bias"] += 1
    save_file(state, bundle / "biart.safetensors")
    with pytest.raises(CheckpointError, match=naming(bundle, "biart", "config.json")):
        LVerse.from_pretrained(bundle)


def test_weights_of_another_shape_are_refused(bundle):
    state = load_file(bundle / "biart.safetensors")
    del state["seg_emb.weight"]
    save_file(state, bundle / "biart.safetensors")
    with pytest.raises(CheckpointError, match=naming(bundle, "seg_emb.weight")):
        LVerse.from_pretrained(bundle)


def test_folders_of_another_kind_are_refused(model, bundle, tmp_path):
    with pytest.raises(CheckpointError, match=naming(bundle / "vae", "AugVAE")):
        LVerse.from_pretrained(bundle / "vae")
    bundle.rename(tmp_path / "other")
    with pytest.raises(CheckpointError, match=naming(tmp_path, tmp_path / "other")):
        LVerse.from_pretrained(tmp_path)
    (tmp_path / "other").rename(bundle)
    assert LVerse.from_pretrained(tmp_path).fingerprints == model.fingerprints  # the folder of a run
    with pytest.raises(CheckpointError, match=naming(bundle / "config.json", "file")):
        LVerse.from_pretrained(bundle / "config.json")
    with pytest.raises(CheckpointError, match=naming(tmp_path / "nowhere")):
        LVerse.from_pretrained(tmp_path / "nowhere")
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps(config | {"biart": {"depth": 3}}))
    with pytest.raises(CheckpointError, match=naming(bundle, "depth")):
        LVerse.from_pretrained(bundle)


def test_parts_that_were_not_trained_together_are_refused(tiny_augvae, model, bundle):
    vae = tiny_augvae(single_level=4)
    for changes in ({"image_vocab": 25}, {"image_len": 4}, {"text_vocab": 999}):
        with pytest.raises(ConfigError, match=naming("BiART", *changes, *changes.values())):
            make_lverse(vae, **changes)
    shutil.rmtree(bundle / "vae")
    stranger = tiny_augvae(single_level=4, num_tokens=30)
    stranger.save_pretrained(bundle / "vae")
    config = json.loads((bundle / "config.json").read_text())
    config["fingerprints"]["vae"] = fingerprint(stranger)
    config["vae"] = as_plain(stranger.config)
    del config["settings_fingerprint"]
    (bundle / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=naming(bundle, "BiART", "image_vocab", 24, 30)):
        LVerse.from_pretrained(bundle)


def test_dtype_is_the_transformers_alone(bundle, tmp_path):
    model = LVerse.from_pretrained(bundle, device="cpu", dtype="bfloat16")
    assert model.biart.head.weight.dtype == torch.bfloat16
    assert model.vae.quantizer.embedding.weight.dtype == torch.float32
    assert len(model.text_to_image(["a"], 2, seed=0)[0]) == 2
    model.save_pretrained(tmp_path / "half")
    assert LVerse.from_pretrained(tmp_path / "half", device="cpu").biart.head.weight.dtype == torch.bfloat16
    for wrong in ("float23", torch.int64):
        with pytest.raises(ConfigError, match=naming("dtype", repr(wrong), "float32", "auto")):
            LVerse.from_pretrained(bundle, dtype=wrong)


@pytest.mark.parametrize(
    ("stored", "device", "capability", "expected"),
    [
        (torch.float32, "cuda", (9, 0), torch.bfloat16),
        (torch.float32, "cuda", (8, 0), torch.bfloat16),
        (torch.float32, "cuda", (7, 5), torch.float32),
        (torch.float16, "cuda", (9, 0), torch.float16),
        (torch.float32, "cpu", None, torch.float32),
        (torch.bfloat16, "cpu", None, torch.bfloat16),
        (torch.float32, "mps", None, torch.float32),
    ],
)
def test_auto_is_bfloat16_on_a_gpu_that_has_it(monkeypatch, stored, device, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert sampling_dtype(stored, torch.device(device)) == expected


def test_auto_is_asked_for_and_what_is_stored_is_kept_otherwise(model, bundle, tmp_path, monkeypatch):
    """A model that is loaded and saved again must not lose precision, whatever the machine."""
    monkeypatch.setattr("latent_verse.inference.placement.sampling_dtype", lambda stored, device: torch.bfloat16)
    assert LVerse.from_pretrained(bundle, device="cpu", dtype="auto").biart.head.weight.dtype == torch.bfloat16
    LVerse.from_pretrained(bundle, device="cpu").save_pretrained(tmp_path / "again")
    again = LVerse.from_pretrained(tmp_path / "again", device="cpu")
    assert again.fingerprints == model.fingerprints and again.biart.head.weight.dtype == torch.float32
