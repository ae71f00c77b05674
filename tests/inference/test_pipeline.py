"""LVerse on tiny random weights: both directions, scores, completion, and images of every form."""

from __future__ import annotations

import inspect
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import latent_verse
from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.biart.sampling import NotFinite, beam_search, log_likelihood
from latent_verse.checkpoints.augvae import load_augvae
from latent_verse.config import ConfigError
from latent_verse.data.transforms import centre_crop, to_unit_range
from latent_verse.inference.batching import sample_seeds
from latent_verse.inference.image_io import grid, load_image, to_images
from latent_verse.inference.pipeline import LVerse
from latent_verse.inference.placement import best_device
from tests.messages import naming
from tests.tiny_lverse import TEXTS, make_lverse, photo, same

pytestmark = pytest.mark.usefixtures("one_thread")


def decoded_codes(model, monkeypatch) -> list[torch.Tensor]:
    """A list that collects the codes of all images that the model decodes from now on."""
    decoded, decode = [], model.vae.decode_codes
    monkeypatch.setattr(model.vae, "decode_codes", lambda codes: decoded.append(codes.clone()) or decode(codes))
    return decoded


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
