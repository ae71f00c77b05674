"""Reconstruction losses: their formulas; LPIPS frozen, exact and out of every checkpoint; what happens offline."""

from __future__ import annotations

import dataclasses
import urllib.error
import warnings

import pytest
import torch
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.models import VGG16_Weights
from torchvision.models._api import WeightsEnum

from latent_verse.augvae.losses import LOSSES, LPIPS, ReconstructionLoss, fetch_vgg16, vgg16_file
from latent_verse.config import ConfigError
from latent_verse.config.train import ImageDataConfig, TrainVAEConfig, VAELossConfig
from latent_verse.training.augvae import LitAugVAE
from tests.fake_cuda import DEVICE, Kept, cudnn_convolutions, fake_cuda
from tests.messages import naming

READ_CACHE = WeightsEnum.get_state_dict  # torchvision's own, which `empty_cache` replaces
VGG16_CONVS = [(0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256)]
VGG16_CONVS += [(17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512)]


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """No VGG16 on this machine, and no way to fetch it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    torch.manual_seed(123)
    return LPIPS(untrained=True)


@pytest.fixture
def with_lpips(monkeypatch, lpips) -> None:
    """Losses take the one LPIPS of this file: building another costs seconds."""
    monkeypatch.setattr("latent_verse.augvae.losses.LPIPS", lambda untrained: lpips)


def make_loss(name: str, **settings) -> ReconstructionLoss:
    return LOSSES[name](VAELossConfig(loss_type=name, **settings))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(2))
    return a, b


# ------------------------------------------------------------------------------------------------------------ formulas


def test_pixel_losses(images):
    a, b = images
    d = (a - b).double()
    expected = {
        "mse": d.square().mean(),
        "l1": d.abs().mean(),
        "smooth_l1": torch.where(d.abs() < 1, d.square() / 2, d.abs() - 0.5).mean(),
    }
    for name, value in expected.items():
        parts = make_loss(name)(a, b)
        assert parts.keys() == {"rec_loss"}
        assert parts["rec_loss"].item() == pytest.approx(value.item(), rel=1e-6)
    assert len({value.item() for value in expected.values()}) == 3


@pytest.mark.parametrize(("name", "pixel"), [("lpips_l2", "mse"), ("lpips_l1", "l1")])
@pytest.mark.usefixtures("with_lpips")
def test_lpips_losses_add_the_weighted_mean_distance(images, lpips, name, pixel):
    a, b = images
    parts = make_loss(name, p_loss_weight=0.3)(a, b)
    assert parts["rec_loss"] == make_loss(pixel)(a, b)["rec_loss"]
    assert parts["lpips_loss"].item() == pytest.approx(0.3 * lpips(a, b).mean().item(), rel=1e-6)
    assert parts["lpips_loss"] > 0


@pytest.mark.usefixtures("with_lpips")
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_the_terms_it_says(images, name):
    assert tuple(make_loss(name)(*images)) == LOSSES[name].terms


def test_every_loss_of_the_table_is_a_choice_of_the_setting():
    (field,) = [f for f in dataclasses.fields(VAELossConfig) if f.name == "loss_type"]
    assert set(field.metadata["choices"]) == LOSSES.keys()


def test_losses_are_float32_under_autocast_and_float64_for_float64(images):
    a, b = images
    loss = make_loss("mse")
    exact = loss(a, b)["rec_loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(a, b)["rec_loss"], exact)
    assert loss(a.bfloat16(), b)["rec_loss"].dtype == torch.float32
    assert loss(a.double(), b.double())["rec_loss"].dtype == torch.float64


# --------------------------------------------------------------------------------------------------------------- LPIPS


def test_lpips_is_a_distance_of_each_image(images, lpips):
    a, b = images
    distance = lpips(a, b)
    assert distance.shape == (2,)
    assert (distance > 0).all()
    torch.testing.assert_close(torch.cat([lpips(a[:1], b[:1]), lpips(a[1:], b[1:])]), distance)
    torch.testing.assert_close(lpips(b, a), distance)
    assert torch.equal(lpips(a, a), torch.zeros(2))


def test_lpips_is_frozen_deterministic_and_in_evaluation_mode(images, lpips):
    a, b = images
    assert not any(module.training for module in lpips.net.modules())
    assert not any(p.requires_grad for p in lpips.net.parameters())
    assert any(isinstance(module, torch.nn.Dropout) for module in lpips.net.modules())  # what made the original random
    assert torch.equal(lpips(a, b), lpips(a, b))


def test_lpips_is_float32_under_autocast(images, lpips):
    a, b = images
    exact = lpips(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = lpips(a, b)
    assert under.dtype == torch.float32
    assert torch.equal(under, exact)


def test_gradient_flows_to_the_reconstruction(images, lpips):
    a, b = images
    a = a.clone().requires_grad_()
    lpips(a, b).sum().backward()
    assert a.grad.isfinite().all()
    assert a.grad.abs().sum() > 0


@pytest.mark.parametrize("value", [None, 0.0, 1.0])
def test_gradient_is_finite_at_identical_images(images, lpips, value):
    a = images[0] if value is None else torch.full_like(images[0], value)
    a = a.clone().requires_grad_()
    lpips(a, a.detach().clone()).sum().backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_lpips_is_torchmetrics_network_in_any_layout(images, lpips, memory_format):
    a, b = images
    a = a.clone().requires_grad_()
    expected = lpips.net(a, b).flatten()
    (gradient,) = torch.autograd.grad(expected.sum(), a)
    lpips.net.to(memory_format=memory_format)
    try:
        distance = lpips(a, b.contiguous(memory_format=memory_format))
        (ours,) = torch.autograd.grad(distance.sum(), a)
    finally:
        lpips.net.to(memory_format=torch.contiguous_format)
    if memory_format == torch.contiguous_format:
        assert torch.equal(distance, expected) and torch.equal(ours, gradient)
    torch.testing.assert_close(distance, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours, gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def test_lpips_compiles_to_one_graph(images, lpips, monkeypatch):
    """Which the ordinary compilation is, but for the options that let a test see it."""
    a, b = images
    exact, graphs, compile = lpips(a, b), [], torch.compile

    def seen(fn, **options):
        assert options == {"dynamic": False}
        return compile(fn, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", seen)
    monkeypatch.setattr(lpips, "_compute", lpips._compute)  # put back afterwards
    lpips.compile()
    assert torch.equal(lpips(a, b), exact)
    a.requires_grad_()
    lpips(a, b).sum().backward()
    assert a.grad.isfinite().all()
    with torch.compiler.set_stance("force_eager"):  # as in validation
        torch.testing.assert_close(lpips(a[:1], b[:1]), exact[:1])  # convolutions of one image may round differently
    assert len(graphs) == 2  # without gradients and with them
    torch._dynamo.reset()


@pytest.mark.usefixtures("with_lpips")
@pytest.mark.parametrize("compiled", [False, True])
def test_lpips_is_compiled_where_the_networks_are(tiny_augvae, lpips, monkeypatch, compiled):
    config = TrainVAEConfig(data=ImageDataConfig(fake_data=True), loss=VAELossConfig(loss_type="lpips_l2"))
    calls = []
    monkeypatch.setattr(lpips, "compile", lambda: calls.append(lpips), raising=False)
    lit = LitAugVAE(tiny_augvae(), config, compiled=compiled)
    with pytest.warns(UserWarning, match=naming("VGG16")):
        lit.configure_model()
    assert calls == [lpips] * compiled


def test_on_a_gpu_lpips_is_channels_last_and_keeps_nothing_of_the_target(monkeypatch):
    kept, seen = {}, []
    with cudnn_convolutions(), fake_cuda() as waits:
        monkeypatch.setattr(torch, "load", lambda *args, **kwargs: {})
        lpips = LPIPS(untrained=True)
        lpips.to(torch.device(DEVICE))
        for module in lpips.net.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda module, args, out: seen.append(out))
        for needed in ((True, False), (True, True)):
            a, b = (torch.empty(2, 3, 64, 64, requires_grad=n) for n in needed)
            with Kept(lpips.net) as held:
                lpips(a, b)
            kept[needed] = held.bytes
    assert set(waits.seen) <= {"to"}  # which moves the network; calls copy nothing
    assert len(seen) == 2 * (2 * 13 + 5)
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in seen)
    assert kept[True, False] < 0.7 * kept[True, True]  # the features of the target and of what is compared with it


@pytest.mark.usefixtures("with_lpips")
def test_lpips_is_in_no_state_dict_and_lightning_does_not_put_it_in_train_mode(tiny_augvae, lpips):
    config = TrainVAEConfig(data=ImageDataConfig(fake_data=True), loss=VAELossConfig(loss_type="lpips_l2"))
    lit = LitAugVAE(tiny_augvae(), config)
    with pytest.warns(UserWarning, match=naming("VGG16")):
        lit.configure_model()
    assert lit.loss.lpips is lpips
    lit.train()
    assert not lpips.net.training
    ours = set(lit.state_dict())
    assert {k.removeprefix("model.") for k in ours if k.startswith("model.")} == set(lit.model.state_dict())
    held = [p for module in lit.modules() for p in module.parameters(recurse=False)]
    theirs = {id(p) for p in lpips.net.parameters()}
    assert not theirs & {id(p) for p in held}
    assert not [k for k in ours if "lpips" in k or "vgg" in k or k.startswith("loss")]


# ----------------------------------------------------------------------------------------------- the backbone's weights


def test_offline_and_uncached_says_which_file_and_which_losses_need_none(tmp_path):
    file = tmp_path / "torch" / "hub" / "checkpoints" / "vgg16-397923af.pth"
    facts = (file, VGG16_Weights.IMAGENET1K_V1.url, "no network", "mse", "l1", "smooth_l1")
    with pytest.raises(ConfigError, match=naming(*facts)) as error:
        fetch_vgg16()
    assert "lpips" not in str(error.value)


def test_a_cached_file_is_not_fetched():
    vgg16_file().parent.mkdir(parents=True)
    vgg16_file().touch()
    fetch_vgg16()


def test_preparing_the_data_fetches_only_what_is_needed(tiny_augvae):
    def prepare(loss_type, fake):
        config = TrainVAEConfig(data=ImageDataConfig(fake_data=fake), loss=VAELossConfig(loss_type=loss_type))
        LitAugVAE(tiny_augvae(), config).prepare_data()

    prepare("mse", False)
    prepare("lpips_l2", True)
    with pytest.raises(ConfigError, match=naming(vgg16_file())):
        prepare("lpips_l1", False)


def test_untrained_stand_in_warns_once_and_is_the_same_everywhere(lpips, images):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=naming("LPIPS", "VGG16", vgg16_file())) as caught:
        loss = LOSSES["lpips_l2"](VAELossConfig(), untrained=True)
    assert len(caught) == 1
    assert torch.equal(torch.get_rng_state(), state)  # it uses no generator but its own
    # `lpips` was made under another seed
    for (name, ours), theirs in zip(loss.lpips.net.state_dict().items(), lpips.net.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_weights_in_the_cache_are_used(monkeypatch, images, lpips, tmp_path):
    monkeypatch.setattr(WeightsEnum, "get_state_dict", READ_CACHE)
    assert vgg16_file().is_relative_to(tmp_path)  # made-up weights must never reach the person's own cache
    generator = torch.Generator().manual_seed(5)
    state = {}
    for i, c_in, c_out in VGG16_CONVS:
        std = (2 / (9 * c_in)) ** 0.5
        state[f"features.{i}.weight"] = torch.randn(c_out, c_in, 3, 3, generator=generator) * std
        state[f"features.{i}.bias"] = torch.zeros(c_out)
    for i, c_in, c_out in [(0, 25088, 4096), (3, 4096, 4096), (6, 4096, 1000)]:  # one number on disk, not 120 million
        state[f"classifier.{i}.weight"] = torch.zeros(1).expand(c_out, c_in)
        state[f"classifier.{i}.bias"] = torch.zeros(c_out)
    vgg16_file().parent.mkdir(parents=True)
    torch.save(state, vgg16_file())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = LOSSES["lpips_l2"](VAELossConfig(), untrained=True)  # trained weights win where they are cached
    found = {tuple(p.shape): p for p in loss.lpips.net.parameters() if p.dim() == 4 and p.shape[-1] == 3}
    assert torch.equal(found[64, 3, 3, 3], state["features.0.weight"])
    a, b = images
    assert not torch.allclose(loss.lpips(a, b), lpips(a, b))
    # the private class that LPIPS is made of is what torchmetrics' public metric computes
    public = LearnedPerceptualImagePatchSimilarity(net_type="vgg")
    torch.testing.assert_close(loss.lpips(a, b).mean(), public(a, b))
