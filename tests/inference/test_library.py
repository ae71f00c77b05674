"""LVerse as an object of a library: what it says of itself, where it is, copies, threads, and names of arguments."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import threading

import numpy as np
import pytest
import torch
from torch import nn

from latent_verse.augvae.model import AugVAE
from latent_verse.checkpoints.ckpt_files import CheckpointError
from latent_verse.config import ConfigError
from latent_verse.inference.pipeline import LVerse
from tests.messages import naming
from tests.tiny_lverse import make_lverse, photo, same

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(tiny_augvae) -> LVerse:
    return make_lverse(tiny_augvae(single_level=4))


def test_its_repr_says_what_it_takes_and_where_it_is(model):
    said = repr(model.to(dtype="bfloat16"))
    weights = [f"{sum(p.numel() for p in part.parameters()):,}" for part in (model.vae, model.biart)]
    assert naming("LVerse", *weights, "16 x 16 px", "4 x 4 codes of 24", "24 tokens", 280, "cpu", "bfloat16").search(
        said
    )


def test_it_moves_in_place_and_augvae_stays_float32(model):
    weights = {part: next(getattr(model, part).parameters()) for part in ("vae", "biart")}
    for dtype in (torch.bfloat16, "float16", torch.float32):
        for arguments in ({"dtype": dtype}, {"device": "cpu", "dtype": dtype}):
            assert model.to(**arguments) is model
            assert model.biart.head.weight.dtype == getattr(torch, str(dtype).removeprefix("torch."))
            assert model.vae.dtype == torch.float32 and model.device == torch.device("cpu")
    assert model.to(torch.bfloat16).biart.head.weight.dtype == torch.bfloat16  # as torch's own .to
    assert all(next(getattr(model, part).parameters()) is weight for part, weight in weights.items())
    assert model.to("meta").device == model.biart.device == torch.device("meta")


def test_what_it_cannot_move_to_is_one_line(model):
    before = model.text_to_image(["a"], seed=0)
    absent = [] if torch.cuda.is_available() else ["cuda"]
    for given in ("bogus", 1.5, "cuda:99", *absent):
        with pytest.raises(ConfigError, match=naming("device", repr(given))) as error:
            model.to(given)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=naming("dtype", "'float23'", "bfloat16")):
        model.to("cpu", "float23")
    assert same(model.text_to_image(["a"], seed=0), before, within=0)


def test_it_is_for_use_and_not_for_training(model):
    model.biart.train()
    assert model.eval() is model and not model.biart.training and not model.vae.training
    with pytest.raises(ConfigError, match=naming("train_biart.py", "biart")):
        model.train()


def test_codes_are_decoded_into_images(model):
    photos = [photo(seed=i) for i in range(3)]
    model.batch_size = 2
    codes = model.codes(photos)
    images = model.decode_codes(codes)
    assert [image.size for image in images] == [(16, 16)] * 3
    assert same([images], [model.reconstruct(photos)], within=0)
    for wrong, fact in ((codes[0], (16,)), (codes.numpy(), "torch.from_numpy"), (codes.float(), "torch.float32")):
        with pytest.raises(ValueError, match=naming("codes", fact)):
            model.decode_codes(wrong)
    with pytest.raises(ValueError, match=naming(24, 23)):
        model.decode_codes(codes * 0 + 24)


def pickled(model: LVerse) -> LVerse:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_are_whole_and_independent(model, copied):
    expected = model.text_to_image(["a red circle"], 2, seed=1)
    again = copied(model)
    assert same(again.text_to_image(["a red circle"], 2, seed=1), expected, within=0)
    with torch.no_grad():
        again.biart.head.weight.zero_()
    assert same(model.text_to_image(["a red circle"], 2, seed=1), expected, within=0)


def test_threads_share_a_model(model):
    def results(seed: int) -> tuple:
        images = model.text_to_image(["a red circle"], seed=seed)
        return images[0][0].tobytes(), model.image_to_text(images[0]), model.score(images[0], ["a"]).item()

    expected, found = [results(seed) for seed in range(4)], {}
    threads = [threading.Thread(target=lambda s=seed: found.update({s: results(s)})) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(4)] == expected


# ------------------------------------------------------------------------------------------------ names of arguments


@pytest.mark.parametrize(
    ("method", "given", "here"),
    [
        ("text_to_image", "generator", "seed"),
        ("sample_scored", "generator", "seed"),
        ("complete", "generator", "seed"),
        ("image_to_text", "generator", "seed"),
        ("text_to_image", "prompt", "texts"),
        ("complete", "prompt", "text"),
        ("text_to_image", "num_images_per_prompt", "num_images"),
        ("text_to_image", "num_samples", "num_images"),
        ("image_to_text", "num_return_sequences", "num_captions"),
        ("image_to_text", "num_beams", "beams"),
        ("text_to_image", "guidance_scale", "guidance"),
        ("score", "image", "images"),
        ("text_to_image", "topk", "top_k"),
    ],
)
def test_a_name_of_other_libraries_is_answered_with_ours(model, method, given, here):
    with pytest.raises(TypeError, match=naming(method, given, here)) as error:
        getattr(model, method)(**{given: 1})
    assert "\n" not in str(error.value) and here in inspect.signature(getattr(model, method)).parameters


# -------------------------------------------------------------------------------------------------- image forms


def test_every_form_of_an_image_gives_the_same_codes(model, tmp_path):
    image = photo()
    image.save(tmp_path / "a.png")
    array = np.array(image)
    x_CHW = torch.from_numpy(array).permute(2, 0, 1)
    expected = model.codes(image)
    opaque = np.dstack([array, np.full(array.shape[:2], 255, np.uint8)])
    for one in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        array,
        array[::-1][::-1],
        opaque,
        x_CHW,
        x_CHW / 127.5 - 1,
    ):
        assert torch.equal(model.codes(one), expected)
        assert torch.equal(model.codes([one, image]), expected.expand(2, -1))
    for batch in (np.stack([array] * 2), torch.stack([x_CHW] * 2), torch.stack([x_CHW] * 2) / 127.5 - 1):
        assert torch.equal(model.codes(batch), expected.expand(2, -1))
    grey = model.codes(image.convert("L"))
    pixels = np.array(image.convert("L"))
    for one in (pixels, pixels[..., None], torch.from_numpy(pixels)[None]):
        assert torch.equal(model.codes(one), grey)
    assert len(model.complete(array, 2, "a")) == len(model.reconstruct(array)) == len(model.score(array, ["a"])) == 1


# ------------------------------------------------------------------------------------------------- export, quantisation


class Calling(nn.Module):
    """A module whose forward pass is a method of another, as torch.export needs."""

    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, x):
        return getattr(self.module, self.method)(x)


def test_decode_codes_is_exported_for_any_batch(tiny_augvae, tiny_images):
    for single_level in (None, 4):
        vae = tiny_augvae(single_level=single_level)
        few, many = vae.codes(tiny_images()), vae.codes(tiny_images(5))
        exported = torch.export.export(
            Calling(vae, "decode_codes"), (few,), dynamic_shapes=({0: torch.export.Dim("B")},)
        )
        for codes in (few, many):
            assert torch.equal(exported.module()(codes), vae.decode_codes(codes))
        with pytest.raises(ValueError, match=naming(24)):  # the model itself checks as before
            vae.decode_codes(few * 0 + 24)


def test_codes_and_the_whole_augvae_are_exported(tiny_augvae, tiny_images):
    vae, x = tiny_augvae(single_level=4), tiny_images()
    assert torch.equal(torch.export.export(Calling(vae, "codes"), (x,)).module()(x), vae.codes(x))
    for ours, theirs in zip(torch.export.export(vae, (x,)).module()(x), vae(x), strict=True):
        assert torch.equal(ours, theirs)


def test_biart_is_exported_for_any_batch(model):
    def packed(texts: list[str]) -> tuple:
        codes = model.codes([photo(seed=i) for i in range(len(texts))])
        sequences = model.biart.vocab.pack(model.encode_texts(texts), codes, "text_to_image")
        return sequences.idx_BT, sequences.seg_BT

    few, many = packed(["a", "b"]), packed(["a", "b", "c", "d", "e"])
    shapes = ({0: torch.export.Dim("B")},) * 2
    exported = torch.export.export(model.biart, few, dynamic_shapes=shapes)
    for inputs in (few, many):
        torch.testing.assert_close(exported.module()(*inputs), model.biart(*inputs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per:UserWarning")
def test_int8_dynamic_quantisation_samples_and_scores(model, tmp_path):
    """All layers but the head, whose rows are read: its name in PyTorch says that quantisation leaves it alone."""
    scores, sampled = model.score([photo()], ["a", "b"]), model.text_to_image(["a"], temperature=0)
    quantise = functools.partial(torch.ao.quantization.quantize_dynamic, qconfig_spec={nn.Linear}, dtype=torch.qint8)
    model.biart = quantise(model.biart)
    kinds = [type(module) for module in model.biart.modules()]
    assert nn.Linear not in kinds and type(model.biart.head.weight) is nn.Parameter
    found = model.score([photo()], ["a", "b"])
    assert not torch.equal(found, scores)
    torch.testing.assert_close(found, scores, rtol=0.05, atol=0)
    assert model.text_to_image(["a"], temperature=0)[0][0].size == sampled[0][0].size
    assert model.image_to_text([photo()], beams=2) and model.complete([photo()], 2, "a", seed=0)
    assert model.to("cpu") is model and "LVerse" in repr(model)
    with pytest.raises(ConfigError, match=naming("quantised", "CPU", "float32", "torch.bfloat16")):
        model.to(dtype="bfloat16")
    with pytest.raises(CheckpointError, match=naming(tmp_path / "bundle", "quantised", "Save")) as error:
        model.save_pretrained(tmp_path / "bundle")
    assert "\n" not in str(error.value) and not (tmp_path / "bundle").exists()


def test_bytes_and_arrays_given_to_augvae_are_answered_with_what_it_takes(tiny_augvae, tiny_images):
    vae: AugVAE = tiny_augvae()
    x_BCHW = (tiny_images() + 1) * 127.5
    for method in (vae, vae.encode, vae.features, vae.codes):
        with pytest.raises(ValueError, match=naming("torch.uint8", [-1, 1], "x / 127.5 - 1")):
            method(x_BCHW.byte())
        with pytest.raises(ValueError, match=naming("ndarray", "torch.from_numpy")):
            method(x_BCHW.numpy())
    with pytest.raises(ValueError, match=naming("values", [-1, 1], "x / 127.5 - 1")):
        vae.codes(x_BCHW)
