"""LVerse on tiny random weights: bundles, both directions, scores, completion, and input that cannot be used."""

from __future__ import annotations

import inspect
import io
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import latent_verse
from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.biart.sampling import NotFinite, beam_search, log_likelihood
from latent_verse.checkpoints.augvae import load_augvae
from latent_verse.checkpoints.bundle import BUNDLE_FILES
from latent_verse.checkpoints.ckpt_files import CheckpointError, fingerprint
from latent_verse.config import ConfigError, as_plain
from latent_verse.data import DataError
from latent_verse.data.text import TokenizerError
from latent_verse.data.transforms import centre_crop, to_unit_range
from latent_verse.inference.batching import sample_seeds
from latent_verse.inference.image_io import grid, load_image, to_images
from latent_verse.inference.pipeline import LVerse
from latent_verse.inference.placement import best_device
from latent_verse.nn.precision import sampling_dtype
from tests.messages import naming
from tests.tiny_lverse import make_lverse, photo, same

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["a red circle", "two small blue squares", "красный круг", "赤い丸 🔴", ""]


@pytest.fixture
def model(tiny_augvae):
    return make_lverse(tiny_augvae(single_level=4))


@pytest.fixture
def bundle(model, tmp_path):
    model.save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


def decoded_codes(model, monkeypatch) -> list[torch.Tensor]:
    """A list that collects the codes of all images that the model decodes from now on."""
    decoded, decode = [], model.vae.decode_codes
    monkeypatch.setattr(model.vae, "decode_codes", lambda codes: decoded.append(codes.clone()) or decode(codes))
    return decoded


# ------------------------------------------------------------------------------------------------------------- bundles


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
    with pytest.raises(CheckpointError, match=naming(tmp_path, bundle)):
        LVerse.from_pretrained(tmp_path)
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


# -------------------------------------------------------------------------------------------------- images and captions


def test_images_depend_on_seed_and_text_and_not_on_the_batch(model):
    settings = {"temperature": 0.9, "guidance": 1.5, "seed": 11}
    sampled = model.text_to_image(TEXTS, 3, **settings)
    assert [len(row) for row in sampled] == [3] * len(TEXTS)
    assert all(p.mode == "RGB" and p.size == (16, 16) for row in sampled for p in row)
    assert len({p.tobytes() for row in sampled for p in row}) == 3 * len(TEXTS)
    for batch_size in (1, 2, 7):
        model.batch_size = batch_size
        assert same(sampled, model.text_to_image(TEXTS, 3, **settings))
    assert same(sampled[3:4], model.text_to_image(TEXTS[3], 3, **settings))
    assert same([sampled[1][:2]], model.text_to_image([TEXTS[1]], 2, **settings))
    assert not same(sampled, model.text_to_image(TEXTS, 3, **settings | {"seed": 12}))
    first, second = model.text_to_image(["a", "a"], seed=1)
    assert not same([first], [second])
    torch.manual_seed(4)
    unseeded = model.text_to_image(["a"])
    assert not same(unseeded, model.text_to_image(["a"]))
    torch.manual_seed(4)
    assert same(unseeded, model.text_to_image(["a"]))


def test_seeds_are_all_different():
    seeds = sample_seeds(0, torch.tensor([[1, 2], [2, 1], [1, 2]]), 4)
    assert len(set(seeds)) == 12 and min(seeds) >= 0 and max(seeds) < 2**63
    with pytest.raises(ConfigError, match=naming("seed", -1)):
        sample_seeds(-1, torch.tensor([[1]]), 1)


def test_rerank_keeps_what_the_score_ranks_first(model, monkeypatch):
    """The chosen codes are the argmax, in each group of N samples, of log p(text | codes)."""
    decoded = decoded_codes(model, monkeypatch)
    text_TL = model.encode_texts(TEXTS[:3])
    model.text_to_image(TEXTS[:3], 8, seed=5)
    samples = torch.cat(decoded).view(3, 8, 16)
    decoded.clear()
    model.text_to_image(TEXTS[:3], 2, rerank=4, seed=5)
    kept = torch.cat(decoded).view(3, 2, 16)
    for t in range(3):
        total = log_likelihood(model.biart, text_TL[t : t + 1].expand(8, -1), samples[t], "image").total_B
        for w in range(2):
            group = slice(4 * w, 4 * w + 4)
            assert total[group].max() > total[group].min()
            assert torch.equal(kept[t, w], samples[t, group][total[group].argmax()])


def test_score_is_the_log_likelihood_of_every_pair(model):
    images = [photo(seed=i) for i in range(3)]
    codes, text = model.codes(images), model.encode_texts(TEXTS)
    assert len(codes.unique(dim=0)) == 3
    for given in ("image", "text"):
        model.batch_size = 4
        table = model.score(images, TEXTS, given=given)
        assert table.shape == (3, len(TEXTS)) and table.dtype == torch.float32
        for i in range(3):
            for t in range(len(TEXTS)):
                alone = log_likelihood(model.biart, text[t : t + 1], codes[i : i + 1], given).total_B
                torch.testing.assert_close(table[i, t], alone[0], atol=1e-3, rtol=1e-5)
    with pytest.raises(ConfigError, match=naming("given", "sound", "image", "text")):
        model.score(images, TEXTS, given="sound")


def test_captions_greedy_sampled_and_by_beams(model):
    images = [photo(seed=i) for i in range(5)]
    greedy = model.image_to_text(images)
    assert [len(row) for row in greedy] == [1] * 5 and greedy == model.image_to_text(images, seed=9)
    sampled = model.image_to_text(images, 3, temperature=1.0, seed=2)
    assert [len(row) for row in sampled] == [3] * 5 and len({c for row in sampled for c in row}) > 5
    model.batch_size = 2
    assert sampled == model.image_to_text(images, 3, temperature=1.0, seed=2)
    assert sampled[4:] == model.image_to_text(images[4], 3, temperature=1.0, seed=2)
    ids = model.biart.vocab.unpad_text(beam_search(model.biart, model.codes(images), 3)[0])
    assert model.image_to_text(images, beams=3) == [[model.tokenizer.decode(row)] for row in ids]
    assert model.image_to_text(images, temperature=1.0, top_k=1, guidance=2.0) != greedy


def test_reconstruct_is_what_the_codes_hold(model):
    image = photo()
    with torch.no_grad():
        x_BCHW = to_unit_range(centre_crop(image, 16))[None]
        expected = to_images(model.vae.decode(model.vae.encode(x_BCHW).z_q).clamp(-1, 1))
    (found,) = model.reconstruct([image])
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(expected[0], dtype=int)).max() <= 1


@pytest.mark.parametrize("text", [None, "a red circle", ["a red circle", "赤い丸"]])
def test_complete_keeps_the_rows_exactly_and_generates_the_rest(model, monkeypatch, text):
    decoded = decoded_codes(model, monkeypatch)
    images = [photo(seed=i) for i in range(2)]
    given = model.codes(images)
    rows = model.complete(images, 2, text, num_images=3, seed=1)
    assert [len(row) for row in rows] == [3, 3]
    codes = torch.cat(decoded).view(2, 3, 4, 4)
    assert torch.equal(codes[:, :, :2], given.view(2, 1, 4, 4)[:, :, :2].expand(-1, 3, -1, -1))
    assert not torch.equal(codes[:, :, 2:], given.view(2, 1, 4, 4)[:, :, 2:].expand(-1, 3, -1, -1))
    alone = model.complete(images[1], 2, text[1] if isinstance(text, list) else text, num_images=3, seed=1)
    assert same(alone, rows[1:])


@pytest.mark.parametrize("text", ["a red circle", ["a red circle", "two small blue squares"]])
def test_complete_keeps_what_the_score_ranks_first(model, monkeypatch, text):
    """Of each group of N samples after the same rows, the one with the largest log p(its text | codes)."""
    decoded = decoded_codes(model, monkeypatch)
    images = [photo(seed=i) for i in range(2)]
    given = model.codes(images).view(2, 4, 4)
    model.complete(images, 1, text, num_images=8, seed=3)
    samples = torch.cat(decoded).view(2, 8, 16)
    decoded.clear()
    model.batch_size = 3  # rows of different images in one batch
    rows = model.complete(images, 1, text, num_images=2, rerank=4, seed=3)
    kept = torch.cat(decoded).view(2, 2, 16)
    text_TL = model.encode_texts([text] * 2 if isinstance(text, str) else text)
    chosen = set()
    for i in range(2):
        assert torch.equal(samples[i, :, :4], given[i, 0].expand(8, -1))
        total = log_likelihood(model.biart, text_TL[i : i + 1].expand(8, -1), samples[i], "image").total_B
        for w in range(2):
            group = slice(4 * w, 4 * w + 4)
            best = total[group].argmax()
            assert torch.equal(kept[i, w], samples[i, group][best])
            chosen.add(int(best))
    assert len(chosen) > 1  # not always the first
    assert [len(row) for row in rows] == [2, 2]
    assert same(rows, [to_images(model.vae.decode_codes(codes)) for codes in kept])


def test_complete_refuses_what_it_cannot_do(model, tiny_augvae):
    for rows in (-1, 0, 4, 5):
        with pytest.raises(ConfigError, match=naming("keep_rows", "--rows", rows, 1, 3)):
            model.complete([photo()], rows)
    with pytest.raises(ConfigError, match=naming("guidance", "rerank", "text")):
        model.complete([photo()], 2, guidance=2.0)
    with pytest.raises(ConfigError, match=naming("3 texts", "1 images")):
        model.complete([photo()], 2, ["a", "b", "c"])
    with pytest.raises(ConfigError, match=naming((8, 4, 2), "AugVAE-SL")):
        make_lverse(tiny_augvae()).complete([photo()], 2)
    undropped = make_lverse(tiny_augvae(single_level=4), reference_dropout=0)
    with pytest.raises(ConfigError, match=naming("reference_dropout", "text")):
        undropped.complete([photo()], 2)
    assert undropped.complete([photo()], 2, "a")


def test_several_levels_of_codes_work_both_ways(tiny_augvae):
    model = make_lverse(tiny_augvae())
    sampled = model.text_to_image(["a"], seed=0)
    assert sampled[0][0].size == (16, 16) and len(model.image_to_text(sampled[0])) == 1


# ------------------------------------------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"temperature": -0.1}, ["temperature", -0.1]),
        ({"top_k": 25}, ["top_k", 25, [1, 24]]),
        ({"num_images": 0}, ["num_images", "num", 0]),
        ({"num_images": 100_000_000}, ["num_images", "num", 100_000_000, 65536]),
        ({"rerank": -1}, ["rerank", -1]),
        ({"rerank": 5000}, ["rerank", 5000, 4096]),
        ({"num_images": 60_000, "rerank": 4000}, [60_000, 4000, 240_000_000, 2**22]),
        ({"seed": -5}, ["seed", -5]),
        ({"temperature": 0, "num_images": 2}, ["num_images", "num", "temperature", 0]),
        ({"temperature": 0, "rerank": 2}, ["rerank", "temperature", 0]),
    ],
)
def test_settings_that_make_no_sense_are_refused(model, settings, facts):
    with pytest.raises(ConfigError, match=naming(*facts)):
        model.text_to_image(["a"], **settings)


@pytest.mark.parametrize("value", [1.5, "1", float("nan"), 1.0, [1], torch.tensor([1, 2]), True, b"1"], ids=repr)
def test_what_is_no_whole_number_is_refused(model, value):
    """One rule for all arguments: numpy's whole numbers are some, True is none."""
    for call, name in (
        (lambda: model.text_to_image(["a"], seed=value), "seed"),
        (lambda: model.image_to_text([photo()], temperature=1.0, seed=value), "seed"),
        (lambda: model.complete([photo()], value), "keep_rows"),
        (lambda: model.text_to_image(["a"], num_images=value), "num"),
        (lambda: model.text_to_image(["a"], top_k=value), "top_k"),
        (lambda: model.text_to_image(["a"], rerank=value), "rerank"),
        (lambda: model.image_to_text([photo()], beams=value), "beams"),
    ):
        with pytest.raises(ConfigError, match=naming(name)) as error:
            call()
        assert "\n" not in str(error.value)
    model.batch_size = value
    with pytest.raises(ConfigError, match=naming("batch_size", repr(value))):
        model.text_to_image(["a"])


def test_numpys_numbers_and_huge_ones_are_whole_numbers(model):
    expected = model.text_to_image(["a"], seed=3)
    model.batch_size = np.int64(2)
    assert same(expected, model.text_to_image(["a"], seed=np.int64(3)), within=0)
    model.batch_size = 2**70
    assert same(expected, model.text_to_image(["a"], seed=3), within=0)
    assert not same(expected, model.text_to_image(["a"], seed=2**80), within=0)
    assert model.complete([photo()], np.int64(2), "a", seed=1)


@pytest.mark.parametrize(
    "info", [None, [], "info", *({"reference_dropout": value} for value in ("0.1", True))], ids=repr
)
def test_information_that_is_none_is_refused(model, info):
    with pytest.raises(ConfigError, match=naming("info")):
        LVerse(model.vae, model.biart, model.tokenizer, info)


def test_information_that_json_cannot_hold_is_refused(model, tmp_path):
    model.info["path"] = tmp_path
    with pytest.raises(ConfigError, match=naming("config.json", "PosixPath")) as error:
        model.save_pretrained(tmp_path / "bundle")
    assert "\n" not in str(error.value) and not (tmp_path / "bundle").exists()


def test_settings_of_captions_that_make_no_sense_are_refused(model):
    for settings, facts in (
        ({"num_captions": 3}, ["num_captions", "num", "temperature", 0]),
        ({"beams": 0}, ["beams", 0]),
        ({"beams": 100_000}, ["beams", 100_000, 1024]),
        ({"beams": 2, "temperature": 1.0}, ["beams", "temperature"]),
        ({"temperature": 1.0, "top_k": 999}, ["top_k", 999]),
    ):
        with pytest.raises(ConfigError, match=naming(*facts)):
            model.image_to_text([photo()], **settings)


def test_beams_that_take_more_memory_than_there_is_are_refused(model, monkeypatch):
    monkeypatch.setattr("latent_verse.inference.batching.machine_bytes", lambda: 2_000_000)
    assert model.image_to_text([photo()], beams=2)
    with pytest.raises(ConfigError, match=naming("beams", 1000, "GiB")):
        model.image_to_text([photo()], beams=1000)


def test_a_mistyped_setting_is_named(model):
    with pytest.raises(TypeError, match="topk"):
        model.text_to_image(["a"], topk=3)


def test_guidance_needs_dropped_references_in_training(tiny_augvae):
    model = make_lverse(tiny_augvae(single_level=4), reference_dropout=0)
    for call in (
        lambda: model.text_to_image(["a"], guidance=2.0),
        lambda: model.image_to_text([photo()], guidance=2.0),
        lambda: LVerse(model.vae, model.biart, model.tokenizer, {}).text_to_image(["a"], guidance=2.0),
    ):
        with pytest.raises(ConfigError, match=naming("guidance", 2.0, "reference_dropout")):
            call()
    with pytest.raises(ConfigError, match=naming("reference_dropout", 10)):
        LVerse(model.vae, model.biart, model.tokenizer, {"reference_dropout": 10})


def test_texts_that_cannot_be_used_are_refused(model):
    for texts, error, facts in (
        ([], ConfigError, ["texts", "empty"]),
        (None, ConfigError, ["texts", "NoneType"]),
        ([3], TokenizerError, ["Caption 0", 3, "int"]),
        (["\ud800"], TokenizerError, ["Caption 0", "surrogate"]),
    ):
        with pytest.raises(error, match=naming(*facts)):
            model.text_to_image(texts)


def test_too_long_texts_are_cut_with_a_warning_or_refused(model):
    long = "круг " * 30
    with pytest.warns(UserWarning, match=naming("text 1", "text_len", 24, "круг")):
        sampled = model.text_to_image(["a", long], seed=0)
    assert len(sampled) == 2
    model.too_long = "error"
    with pytest.raises(TokenizerError, match=naming("Caption 1", "круг", "text_len", 24)):
        model.text_to_image(["a", long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.text_to_image(["a"])
    model.too_long = "wrap"
    with pytest.raises(TokenizerError, match=naming("too_long", "wrap", "truncate", "error")):
        model.text_to_image(["a"])


def test_images_that_cannot_be_used_are_refused(model, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n no more")
    for images, error, facts in (
        ([], ConfigError, ["images", "empty"]),
        (tmp_path / "absent.png", DataError, [tmp_path / "absent.png"]),
        ([str(tmp_path / "broken.png")], DataError, [tmp_path / "broken.png"]),
        ([3], DataError, ["int"]),
        ([torch.zeros(3, 4)], DataError, [(3, 4)]),
        (torch.zeros(2, 8, 8), DataError, [(2, 8, 8)]),
        (torch.full((3, 8, 8), 200.0), DataError, [200, [-1, 1]]),
        (torch.full((3, 8, 8), float("nan")), DataError, ["nan", [-1, 1]]),
        (torch.zeros(3, 8, 8, dtype=torch.int64), DataError, ["int64", [-1, 1]]),
        (torch.zeros(3, 8, 8, device="meta"), DataError, ["meta", "(3, H, W)"]),
        (torch.zeros(3, 8, 8).to_sparse(), DataError, ["torch.sparse_coo", "(3, H, W)"]),
        (torch.zeros(3, 8, 8).to(torch.float8_e4m3fn), DataError, ["torch.float8_e4m3fn", "(3, H, W)"]),
        ([torch.quantize_per_tensor(torch.zeros(3, 8, 8), 0.1, 0, torch.qint8)], DataError, ["torch.qint8"]),
        ([torch.nested.nested_tensor([torch.zeros(3, 8)])], DataError, ["nested"]),
    ):
        with pytest.raises(error, match=naming(*facts)):
            model.image_to_text(images)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "YCbCr", "I;16", "HSV"])
@pytest.mark.parametrize("size", [(16, 16), (1, 1), (50, 20), (7, 90)])
def test_images_of_any_mode_and_size_are_accepted(model, mode, size):
    image = photo(*size).convert("L").convert("I").point(lambda v: v * 257) if mode == "I;16" else photo(*size)
    image = image.convert(mode)
    x_CHW = load_image(image, 16)
    assert x_CHW.shape == (3, 16, 16) and x_CHW.abs().max() <= 1
    if mode in ("RGB", "L", "RGBA", "1"):  # as from a file
        file = io.BytesIO()
        image.save(file, "PNG")
        assert torch.equal(load_image(Image.open(file), 16), x_CHW)
    assert len(model.image_to_text(image)) == 1


def test_a_tensor_a_path_and_an_image_give_the_same_result(tmp_path):
    image = photo(40, 24)
    image.save(tmp_path / "a.png")
    expected = load_image(image, 16)
    assert torch.equal(load_image(tmp_path / "a.png", 16), expected)
    assert torch.equal(load_image(str(tmp_path / "a.png"), 16), expected)
    x_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(load_image(x_CHW, 16), expected)
    assert torch.equal(load_image(to_unit_range(x_CHW), 16), expected)
    assert torch.equal(load_image(expected, 16), expected)
    assert load_image(torch.zeros(1, 8, 8), 16).shape == (3, 16, 16)
    assert torch.equal(load_image(to_images(expected[None])[0], 16), expected)


def test_exif_orientation_is_applied(tmp_path):
    image, exif = photo(16, 16), Image.Exif()
    exif[0x0112] = 3
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        assert torch.equal(load_image(turned, 16), load_image(image.rotate(180), 16))
    assert torch.equal(load_image(tmp_path / "turned.png", 16), load_image(image.rotate(180), 16))


def test_grid_holds_every_image_and_any_text():
    rows = [
        ("a red circle " * 40, [photo(16, 16), photo(16, 16)]),
        ("赤い丸" * 99, [photo(16, 16)]),
        ("", [photo(16, 16)]),
    ]
    sheet = grid(rows)
    assert sheet.width >= 2 * 128 and sheet.height >= 3 * 128 and sheet.mode == "RGB"
    assert grid([("x", [photo(300, 200)])]).width >= 300


def test_progress_goes_to_a_terminal_alone_and_does_not_change_the_result(model, capsys, monkeypatch):
    quiet = model.text_to_image(["a", "b"], 2, rerank=2, seed=1)
    model.progress, model.batch_size = True, 3
    assert same(quiet, model.text_to_image(["a", "b"], 2, rerank=2, seed=1))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert same(quiet, model.text_to_image(["a", "b"], 2, rerank=2, seed=1))
    model.image_to_text([photo()])
    model.image_to_text([photo()], beams=2)
    out, err = capsys.readouterr()
    bars = [bar.split("\r")[-1] for bar in err.strip("\n").split("\n")]  # what each of them shows at its end
    assert out == "" and [bar.split(":")[0].split()[-1] for bar in bars] == ["images", "scoring", "texts", "captions"]
    assert all("100%" in bar for bar in bars)  # however early a text ends


def test_the_device_is_cuda_then_mps_then_cpu(bundle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert best_device() == "cpu" and LVerse.from_pretrained(bundle).device == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert best_device() == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert best_device() == "cuda"


def test_training_mode_and_gradients_are_left_alone(model):
    model.biart.train()
    model.text_to_image(["a"], rerank=2, guidance=2.0)
    model.score([photo()], ["a"])
    assert model.biart.training and all(p.grad is None for p in model.biart.parameters())


def test_public_signatures_are_those_of_the_design():
    names = list(inspect.signature(LVerse.text_to_image).parameters)
    assert names[1:] == ["texts", "num_images", "temperature", "top_k", "top_p", "guidance", "rerank", "seed"]
    assert list(inspect.signature(LVerse.image_to_text).parameters)[1:6] == [
        "images",
        "num_captions",
        "temperature",
        "seed",
        "beams",
    ]
    assert list(inspect.signature(LVerse.complete).parameters)[1:4] == ["images", "keep_rows", "text"]


def test_importing_the_package_stays_light():
    code = "import latent_verse, latent_verse.config.generate, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_augvae_of_the_package_can_be_loaded_and_saved():
    code = "from latent_verse import AugVAE; AugVAE.from_pretrained, AugVAE.save_pretrained"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_the_package_gives_its_public_names():
    assert (latent_verse.LVerse, latent_verse.AugVAE, latent_verse.BiART) == (LVerse, AugVAE, BiART)
    assert latent_verse.load_augvae is load_augvae
    assert set(latent_verse.__all__) <= set(dir(latent_verse)) and latent_verse.__version__
    from latent_verse import LVerse as imported

    assert imported is LVerse
    with pytest.raises(AttributeError, match="LVers"):
        latent_verse.LVers  # noqa: B018
    assert (Path(latent_verse.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_refused(bad):
    x_BCHW = torch.zeros(2, 3, 4, 4)
    x_BCHW[1, 2, 3, 3] = bad
    with pytest.raises(NotFinite, match="not finite"):
        to_images(x_BCHW)
