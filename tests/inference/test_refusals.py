"""Settings, texts and images that LVerse cannot use."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from latent_verse.config import ConfigError
from latent_verse.data import DataError
from latent_verse.data.text import TokenizerError
from latent_verse.inference.pipeline import LVerse
from tests.messages import naming
from tests.tiny_lverse import make_lverse, photo, same

pytestmark = pytest.mark.usefixtures("one_thread")


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
    for use in (model.text_to_image, model.encode_texts, lambda texts: model.score([photo()] * 2, texts)):
        with pytest.warns(UserWarning, match=naming("text 1", "text_len", 24, "круг")) as warned:
            result = use(["a", long])
        assert len(result) == 2 and warned[0].filename == __file__  # the line that called
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
