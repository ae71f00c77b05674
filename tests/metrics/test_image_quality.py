"""FID against closed forms and other libraries on the same features; scores, caches, blur; two processes as one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from latent_verse.config import ConfigError
from latent_verse.data import DataError
from latent_verse.data.images import ImageDataset2
from latent_verse.evaluation.samples import read_image
from latent_verse.metrics import image_quality, networks
from latent_verse.metrics.image_quality import Moments, extract_features, frechet_distance
from latent_verse.metrics.networks import NetworkMissing, Weights
from latent_verse.metrics.processes import Ranks
from tests.messages import naming
from tests.stand_ins import Colours, write_pairs
from tests.two_processes import in_two_processes

OPTIONS = {"radii": (0, 2), "batch_size": 3, "keep_features": 100, "keep_logits": True}


def images(count: int, seed: int = 0, low: int = 0) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.integers(low, 256, (3, 16, 16), np.uint8)) for _ in range(count)]


def moments(features_NF: torch.Tensor) -> Moments:
    out = Moments.none(features_NF.shape[1])
    for part in features_NF.split(7):
        out.add(part)
    return out


def with_moments(mean, covariance, count: int = 50, seed: int = 0) -> torch.Tensor:
    """Features (count, F) float64 whose sample mean and covariance are exactly these."""
    x = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1))).T
    return x @ torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64)).T + torch.tensor(mean)


# ----------------------------------------------------------------------------------------------------------------- FID


def test_fid_of_gaussians_is_the_closed_form():
    a, b = [[2.0, 0.6], [0.6, 1.0]], [[1.0, -0.3], [-0.3, 3.0]]
    real, made = with_moments([1.0, 2.0], a, 40), with_moments([0.0, 4.0], b, 60, seed=1)
    product = torch.tensor(a, dtype=torch.float64) @ torch.tensor(b, dtype=torch.float64)
    # of 2 x 2 matrices: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M))
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = 1 + 4 + (2 + 1) + (1 + 3) - 2 * root
    assert frechet_distance(moments(real), moments(made)) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(moments(real), moments(real)) == pytest.approx(0, abs=1e-9)
    shifted = frechet_distance(moments(real), moments(real + torch.tensor([3.0, 4.0])))
    assert shifted == pytest.approx(25, rel=1e-8)


def test_fid_is_torchmetrics_and_torch_fidelitys_on_the_same_features():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image import FrechetInceptionDistance

    network, real, made = Colours(), images(40), images(30, seed=1, low=60)
    sides = [extract_features(lambda i, x=x: x[i], len(x), network, Ranks(), **OPTIONS) for x in (real, made)]
    ours = frechet_distance(*(side.moments[0] for side in sides))
    theirs = FrechetInceptionDistance(feature=network)
    theirs.update(torch.stack(real), real=True)
    theirs.update(torch.stack(made), real=False)
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-4)  # theirs rounds to float32
    statistics = [fid_features_to_statistics(network(torch.stack(x)).double()) for x in (real, made)]
    (value,) = fid_statistics_to_metric(*statistics, verbose=False).values()
    assert ours == pytest.approx(value, rel=1e-6) and ours > 10


def test_fid_k_blurs_both_sides_after_resizing():
    x = images(1)[0]
    pil = Image.fromarray(x.permute(1, 2, 0).numpy())
    expected = torch.from_numpy(np.array(pil.filter(ImageFilter.GaussianBlur(2)))).permute(2, 0, 1)
    assert torch.equal(image_quality.blur(x, 2), expected) and not torch.equal(expected, x)
    assert torch.equal(image_quality.blur(x, 0), x)
    side = extract_features(images(5).__getitem__, 5, Colours(), Ranks(), **OPTIONS)
    features = Colours()(torch.stack([image_quality.blur(x, 2) for x in images(5)]))
    assert torch.allclose(side.moments[2].sum_F, features.double().sum(0))


def test_threads_change_nothing():
    one, four = (extract_features(images(9).__getitem__, 9, Colours(), Ranks(), **OPTIONS, workers=n) for n in (1, 4))
    assert torch.equal(one.moments[2].outer_FF, four.moments[2].outer_FF) and list(one.logits) == list(four.logits)


def test_a_single_image_has_no_fid():
    assert math.isnan(frechet_distance(moments(torch.ones(1, 2)), moments(torch.ones(5, 2))))


def test_unreadable_images_are_left_out():
    some = images(6)
    side = extract_features(lambda i: None if i in (1, 4, 5) else some[i], 6, Colours(), Ranks(), **OPTIONS)
    assert side.moments[0].count == 3 and list(side.features) == [0, 2, 3]


def shared(rank: int) -> dict[str, torch.Tensor]:
    some = images(11)
    side = extract_features(lambda i: None if i == 3 else some[i], 11, Colours(), Ranks(rank, 2), **OPTIONS)
    out = {f"outer{k}": m.outer_FF for k, m in side.moments.items()} | {"sum": side.moments[0].sum_F}
    return out | {
        "count": torch.tensor(side.moments[2].count),
        "numbers": torch.tensor(list(side.features)),
        "features": torch.from_numpy(np.stack(list(side.features.values()))),
        "logits": torch.from_numpy(np.stack(list(side.logits.values()))),
    }


def test_two_processes_measure_what_one_does(tmp_path):
    some = images(11)
    one = extract_features(lambda i: None if i == 3 else some[i], 11, Colours(), Ranks(), **OPTIONS)
    for two in in_two_processes(tmp_path, shared):
        assert two["count"] == one.moments[2].count == 10
        assert two["numbers"].tolist() == list(one.features) == [0, 1, 2, *range(4, 11)]
        assert torch.allclose(two["sum"], one.moments[0].sum_F)
        for k in (0, 2):
            assert torch.allclose(two[f"outer{k}"], one.moments[k].outer_FF)
        assert torch.allclose(two["features"], torch.from_numpy(np.stack(list(one.features.values()))))
        assert torch.allclose(two["logits"], torch.from_numpy(np.stack(list(one.logits.values()))))


def summed(rank: int) -> dict[str, torch.Tensor]:
    metric = image_quality.FrechetDistance(12)
    if rank == 0:  # the other process has no images
        metric.update(Colours()(torch.stack(images(9))), real=True)
        metric.update(Colours()(torch.stack(images(9, 1))), real=False)
    return {"fid": metric.compute()}


def test_a_process_without_images_has_the_same_fid(tmp_path):
    """As in eval_vae.py with more processes than images, where torchmetrics' own FID fails."""
    one, two = in_two_processes(tmp_path, summed)
    sides = [extract_features(images(9, seed).__getitem__, 9, Colours(), Ranks(), **OPTIONS) for seed in (0, 1)]
    expected = frechet_distance(*(side.moments[0] for side in sides))
    assert one["fid"].item() == pytest.approx(expected, rel=1e-6) and one["fid"] == two["fid"]


# --------------------------------------------------------------------------------------------------------------- cache


def test_reference_statistics_come_back_from_their_file(tmp_path):
    real, made = (
        extract_features(x.__getitem__, 20, Colours(), Ranks(), **OPTIONS) for x in (images(20), images(20, 1))
    )
    about, file = {"network": "mean colours", "resolution": 16}, tmp_path / "deep" / "reference.npz"
    image_quality.save_reference(file, real, about)
    again = image_quality.load_reference(file, about, (0, 2))
    for k in (0, 2):
        assert frechet_distance(again.moments[k], made.moments[k]) == pytest.approx(
            frechet_distance(real.moments[k], made.moments[k]), rel=1e-7
        )
    assert np.array_equal(np.stack(list(again.features.values())), np.stack(list(real.features.values())))
    with np.load(file) as arrays:  # as other tools read them
        features = Colours()(torch.stack(images(20))).double()
        assert np.allclose(arrays["mu_0"], features.mean(0)) and np.allclose(arrays["sigma_0"], features.T.cov())
    assert [p.name for p in file.parent.iterdir()] == ["reference.npz"]


@pytest.mark.parametrize(
    ("about", "radii", "facts"),
    [
        ({"network": "other", "resolution": 16}, (0,), ["network", "mean colours", "other"]),
        ({"network": "mean colours", "resolution": 32}, (0,), ["resolution", 16, 32]),
        ({"network": "mean colours", "resolution": 16}, (0, 4), ["radius 4"]),
    ],
)
def test_statistics_of_another_reference_are_refused(tmp_path, about, radii, facts):
    side = extract_features(images(5).__getitem__, 5, Colours(), Ranks(), **OPTIONS)
    image_quality.save_reference(tmp_path / "r.npz", side, {"network": "mean colours", "resolution": 16})
    with pytest.raises(DataError, match=naming(tmp_path / "r.npz", *facts)):
        image_quality.load_reference(tmp_path / "r.npz", about, radii)


def test_a_file_without_statistics_is_refused(tmp_path):
    (tmp_path / "r.npz").write_bytes(b"no")
    with pytest.raises(DataError, match=naming(tmp_path / "r.npz")):
        image_quality.load_reference(tmp_path / "r.npz", {}, (0,))
    np.savez(tmp_path / "s.npz", mu=np.zeros(3))
    with pytest.raises(DataError, match=naming(tmp_path / "s.npz")):
        image_quality.load_reference(tmp_path / "s.npz", {}, (0,))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("about", "["),
        ("about", "[]"),
        ("about", np.array([{}], dtype=object)),
        ("count", 0),
        ("count", np.zeros(3)),
        ("mu_0", np.full(12, np.nan)),
        ("mu_0", np.zeros(4)),
        ("mu_0", np.array(["a"] * 12)),
        ("sigma_0", np.zeros((12, 4))),
        ("sigma_0", np.full((12, 12), np.inf)),
        ("sigma_2", None),
        ("features", np.zeros((5, 4))),
        ("features", np.zeros((5, 12), dtype=complex)),
        ("features", None),
    ],
)
def test_damaged_statistics_are_refused(tmp_path, name, value):
    side = extract_features(images(5).__getitem__, 5, Colours(), Ranks(), **OPTIONS)
    image_quality.save_reference(tmp_path / "r.npz", side, {})
    with np.load(tmp_path / "r.npz") as file:
        arrays = dict(file)
    assert arrays["mu_0"].shape == (12,) and image_quality.load_reference(tmp_path / "r.npz", {}, (0, 2))
    arrays[name] = value
    np.savez(tmp_path / "r.npz", **{key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(DataError, match=naming("reference_stats", tmp_path / "r.npz")):
        image_quality.load_reference(tmp_path / "r.npz", {}, (0, 2))


def test_statistics_cut_off_or_overwritten_are_refused(tmp_path):
    side = extract_features(images(5).__getitem__, 5, Colours(), Ranks(), **OPTIONS)
    image_quality.save_reference(tmp_path / "r.npz", side, {})
    whole = (tmp_path / "r.npz").read_bytes()
    at = whole.index(b"features.npy") + 60
    for data in (whole[: len(whole) // 2], whole[:at] + bytes(300) + whole[at + 300 :], b"PK\x03\x04" + bytes(99), b""):
        (tmp_path / "r.npz").write_bytes(data)
        with pytest.raises(DataError, match=naming("reference_stats", tmp_path / "r.npz")):
            image_quality.load_reference(tmp_path / "r.npz", {}, (0, 2))


def test_statistics_that_declare_more_than_they_hold_are_refused_before_they_are_read(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "r.npz", about="{}", x=np.zeros(1 << 20))
    monkeypatch.setattr(np, "load", lambda *args, **kwargs: pytest.fail("read"))
    with pytest.raises(DataError, match=naming("reference_stats", tmp_path / "r.npz", "larger")):
        image_quality.load_reference(tmp_path / "r.npz", {}, (0,))


# ------------------------------------------------------------------------------------------------------- other metrics


def test_inception_score_of_certain_and_even_classes_is_their_number():
    sure = {i: np.eye(4, dtype=np.float32)[i % 4] * 100 for i in range(40)}
    assert image_quality.inception_score(sure, 1)["inception_score"] == pytest.approx(4, rel=1e-4)
    unsure = {i: np.zeros(4, np.float32) for i in range(40)}
    assert image_quality.inception_score(unsure, 5) == pytest.approx({"inception_score": 1, "inception_score_std": 0})
    with pytest.raises(ValueError, match=naming("is_splits", 50, 40)):
        image_quality.inception_score(unsure, 50)


def features_of(features_NF: torch.Tensor) -> image_quality.ImageFeatures:
    return image_quality.ImageFeatures({}, {i: row.numpy() for i, row in enumerate(features_NF.float())})


def test_precision_is_of_generated_and_recall_of_real_images():
    real = torch.rand(60, 2, generator=torch.Generator().manual_seed(0))
    narrow = 0.5 + 0.01 * torch.rand(60, 2, generator=torch.Generator().manual_seed(1))
    out = image_quality.precision_recall(features_of(narrow), features_of(real), 3)
    assert out["precision"] == 1 and out["recall"] < 0.1
    assert image_quality.precision_recall(features_of(real), features_of(real), 3) == {"precision": 1, "recall": 1}
    assert image_quality.precision_recall(features_of(real + 9), features_of(real), 3) == {"precision": 0, "recall": 0}
    with pytest.raises(ValueError, match=naming("prc_neighbours", 3, "3 generated", "60 reference")):
        image_quality.precision_recall(features_of(real[:3]), features_of(real), 3)


def test_one_function_resizes_and_crops(tmp_path, monkeypatch):
    """An image is the same to FID's reference, to the generated set and to the model: all call centre_crop."""
    from latent_verse.inference.image_io import load_image

    files = sorted(write_pairs(tmp_path / "pairs", 2).glob("*.png"))
    data = ImageDataset2(tmp_path / "pairs", 12, train=False, as_uint8=True)
    for i, file in enumerate(files):
        x = read_image(file, 12)
        assert x.shape == (3, 12, 12) and torch.equal(x, data[(0, i)][0])
        assert torch.equal(x, ((load_image(file, 12) + 1) * 127.5).round().to(torch.uint8))
    calls = []
    monkeypatch.setattr("latent_verse.evaluation.samples.centre_crop", lambda x, r: calls.append(r) or x)
    read_image(files[0], 12)
    assert calls == [12]


# ------------------------------------------------------------------------------------------------------------- weights


def test_missing_weights_are_named_and_other_weights_refused(tmp_path):
    file = tmp_path / "cache" / "net-12345678.pth"
    weights = Weights(file, "https://example.org/net-12345678.pth", "12345678")
    with pytest.raises(NetworkMissing, match=naming(file, weights.url)):
        weights.find()
    file.parent.mkdir()
    file.write_bytes(b"something else")
    with pytest.raises(
        NetworkMissing, match=naming(file, "SHA-256", networks.sha256(file)[:8], "12345678", weights.url)
    ):
        weights.find()
    right = Weights(file, "", networks.sha256(file)[:8])
    assert right.find() == file


def test_a_download_is_optional_checked_and_done_once(tmp_path):
    source = tmp_path / "published.bin"
    source.write_bytes(b"weights")
    digits = networks.sha256(source)[:8]
    weights = Weights(tmp_path / "cache" / "net.pth", source.as_uri(), digits)
    with pytest.raises(NetworkMissing):
        weights.find()
    assert weights.find(download=True).read_bytes() == b"weights"
    source.unlink()
    assert weights.find(download=True) == weights.file
    with pytest.raises(NetworkMissing, match=naming(tmp_path / "other.pth", source.as_uri(), "No such file")):
        Weights(tmp_path / "other.pth", source.as_uri(), digits).find(download=True)


def test_where_the_networks_are(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    assert networks.inception_weights().file == tmp_path / "hub" / "checkpoints" / networks.INCEPTION
    assert networks.vgg16_weights().sha256 == "397923af"
    clip = networks.clip_weights("ViT-B-32", "openai")
    assert clip.file.name == "ViT-B-32.pt" and len(clip.sha256) == 64 and clip.sha256 in clip.url
    assert networks.clip_weights("ViT-B-32", "laion2b_e16").sha256 == "af8dbd0c"
    assert networks.clip_weights("ViT-B-32", "metaclip_400m").sha256 == ""  # published without one
    with pytest.raises(NetworkMissing, match=naming("ViT-B-32", "nothing", "openai")):
        networks.clip_weights("ViT-B-32", "nothing")


def test_weights_of_another_network_are_an_error(tmp_path, caplog):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(ConfigError, match=naming("clip_weights", tmp_path / "junk.pt", "RN50-quickgelu")):
        networks.open_clip_network("RN50-quickgelu", str(tmp_path / "junk.pt"))
    assert "initialized randomly" not in caplog.text
    with pytest.raises(ConfigError, match=naming("clip_model", "RN5", "RN50")):
        networks.open_clip_network("RN5", "openai")


@pytest.mark.parametrize("part", ["create_model_and_transforms", "get_tokenizer"])
def test_an_architecture_that_needs_more_is_one_line(part, tmp_path, monkeypatch):
    """Some of open_clip's need other packages, or fetch parts of themselves from the hub."""
    import open_clip

    def absent(*_, **__):
        raise RuntimeError("`transformers` needs to be installed.\nmore")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *_, **__: (None, None, None))
    monkeypatch.setattr(open_clip, part, absent)
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=naming("clip_model", "RN50", "transformers")) as caught:
        networks.open_clip_network("RN50", str(tmp_path / "a.pt"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_inception_itself_with_weights_of_its_shape(tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        made = FeatureExtractorInceptionV3("x", ["2048"], "any")
    file = tmp_path / networks.INCEPTION
    torch.save(made.state_dict(), file)
    monkeypatch.setattr(networks, "inception_weights", lambda: Weights(file, "", ""))
    network = networks.open_inception().train()
    assert not any(module.training for module in network.modules())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = network.features_and_logits(torch.stack(images(2)))
    assert features.shape == (2, 2048) and logits.shape == (2, 1008) and features.dtype == torch.float32
    assert not features.requires_grad


@pytest.mark.slow
def test_clip_itself_with_weights_of_its_shape(tmp_path):
    """open_clip's own architecture from a file with random weights."""
    import open_clip

    torch.manual_seed(0)
    net = open_clip.create_model("RN50-quickgelu")
    file = tmp_path / "weights.pt"
    torch.save(net.state_dict(), file)
    network = networks.open_clip_network("RN50-quickgelu", str(file))
    rgb = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images(2)]
    scores = image_quality.clip_scores(network, rgb, ["a dog", "a cat"])
    a, b = network.images(rgb), network.texts(["a dog", "a cat"])
    assert torch.allclose(a.norm(dim=1), torch.ones(2), atol=1e-5)
    assert scores == pytest.approx((100 * (a * b).sum(1)).tolist(), abs=1e-3)
