"""Reconstruction metrics against hand computation, over unequal and empty batches; what is missing is named."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latent_verse.augvae.quantizer import perplexity
from latent_verse.metrics import networks
from latent_verse.metrics.codebook_usage import CodebookUsage
from latent_verse.metrics.reconstruction import ReconstructionMetrics, table
from latent_verse.metrics.running import Mean
from tests.messages import naming

LEVELS, K = (4, 2), 16


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)


def images(n=5, side=16):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, side, side, generator=generator) * 2 - 1
    noise = torch.randn(n, 3, side, side, generator=generator)
    strength = torch.linspace(0.02, 0.6, n)[:, None, None, None]  # very unequal: a mean over batches would show
    return x, x + strength * noise


def codes(n):
    generator = torch.Generator().manual_seed(n)
    return [torch.randint(K, (n, side, side), generator=generator) for side in LEVELS]


def measure(x, reconstruction, sizes, **arguments):
    metrics = ReconstructionMetrics(LEVELS, K, x.shape[-1], **arguments)
    for a, b in zip(x.split(sizes), reconstruction.split(sizes), strict=True):
        metrics.update(a, b, codes(len(a)))
    return metrics.compute()


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Wang et al. 2004, values in [0, 1]: Gaussian window of 11, sigma 1.5, borders reflected; one value per image."""
    offsets = torch.arange(11, dtype=a.dtype) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11)

    def local(t):
        return F.conv2d(F.pad(t, (5, 5, 5, 5), mode="reflect"), window, groups=3)

    mu_a, mu_b = local(a), local(b)
    var_a, var_b, cov = local(a * a) - mu_a**2, local(b * b) - mu_b**2, local(a * b) - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    values = ((2 * mu_a * mu_b + c1) * (2 * cov + c2)) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return values.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("sizes", [[5], [2, 2, 1], [0, 3, 0, 2, 0], [1, 1, 1, 1, 1]])
def test_metrics_are_means_over_images_however_they_are_batched(sizes):
    x, reconstruction = images()
    assert reconstruction.abs().max() > 1  # clamped before it is compared
    out = measure(x, reconstruction, sizes)
    a, b = (x.double() + 1) / 2, (reconstruction.clamp(-1, 1).double() + 1) / 2
    mse = (a - b).square().mean(dim=(1, 2, 3))
    assert out["images"] == 5
    assert out["mse"] == pytest.approx(mse.mean().item(), rel=1e-5)
    assert out["l1"] == pytest.approx((a - b).abs().mean().item(), rel=1e-5)
    assert out["psnr"] == pytest.approx((10 * torch.log10(1 / mse)).mean().item(), rel=1e-5)
    assert out["psnr"] != pytest.approx(10 * math.log10(1 / mse.mean()), rel=1e-2)  # not that of the mean
    assert out["ssim"] == pytest.approx(ssim(a, b).mean().item(), rel=1e-4)


def test_known_values():
    x = torch.zeros(2, 3, 16, 16)
    out = measure(x, x + 0.2, [2])  # 0.1 apart on [0, 1]
    assert out["psnr"] == pytest.approx(20, abs=1e-3)
    assert out["l1"] == pytest.approx(0.1, rel=1e-5)
    assert out["mse"] == pytest.approx(0.01, rel=1e-5)
    assert measure(x, x, [2])["ssim"] == pytest.approx(1, abs=1e-6)


def test_half_precision_reconstructions_are_compared_in_float32():
    x, reconstruction = images()
    low = reconstruction.bfloat16()
    assert measure(x, low, [5])["mse"] == pytest.approx(measure(x, low.float(), [5])["mse"], rel=1e-6)


def test_missing_networks_are_named_and_never_zero():
    out = measure(*images(), [5])
    assert not {"lpips", "rfid"} & out.keys()
    assert out["missing"].keys() == {"lpips", "rfid"}
    assert "vgg16-397923af.pth" in out["missing"]["lpips"] and "https://" in out["missing"]["lpips"]
    assert str(networks.inception_weights().file) in out["missing"]["rfid"]
    printed = table(out, "title")
    assert printed.splitlines()[0] == "title"
    for name in ("lpips", "rfid"):
        (line,) = (line for line in printed.splitlines() if line.split()[0] == name)
        assert line.split()[1:3] == ["missing", "needs"]
        assert "0.0000" not in line
    assert "psnr" in printed and f"{out['psnr']:.4f}" in printed


def test_fake_data_leaves_the_networks_out():
    out = measure(*images(), [5], with_networks=False)
    assert out["missing"].keys() == {"lpips", "rfid"}
    assert all(naming("fake data").search(reason) for reason in out["missing"].values())


def test_images_smaller_than_the_window_have_no_ssim():
    out = measure(*images(side=8), [5])
    assert "ssim" not in out
    assert naming(8).search(out["missing"]["ssim"])
    assert out["psnr"] > 0


# ----------------------------------------------------------------------------------------------------------------- FID


class Brightness(nn.Module):
    """One feature an image: its mean 8-bit value."""

    num_features = 1

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        assert x_BCHW.dtype == torch.uint8
        return x_BCHW.float().mean(dim=(1, 2, 3))[:, None]


@pytest.fixture
def brightness(monkeypatch):
    monkeypatch.setattr(networks, "open_inception", Brightness)


def flat_images(levels: list[int]) -> torch.Tensor:
    """Images of one 8-bit value each, in [-1, 1]."""
    return (torch.tensor(levels, dtype=torch.float32) / 255 * 2 - 1)[:, None, None, None].expand(-1, 3, 16, 16)


@pytest.mark.parametrize("sizes", [[4], [3, 1], [2, 0, 2]])
def test_rfid_of_one_feature_is_the_closed_form(brightness, sizes):
    real, made = [100, 110, 120, 150], [60, 100, 130, 200]
    out = measure(flat_images(real), flat_images(made), sizes)
    a, b = torch.tensor(real, dtype=torch.float64), torch.tensor(made, dtype=torch.float64)
    assert out["rfid"] == pytest.approx(((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2).item(), rel=1e-4)
    assert "rfid" not in out["missing"]


def test_rfid_of_a_shift_is_its_square_and_of_the_same_is_zero(brightness):
    real = [100, 110, 120, 150]
    shifted = flat_images([v + 7 for v in real])
    assert measure(flat_images(real), shifted, [4])["rfid"] == pytest.approx(49, rel=1e-4)
    same = measure(flat_images(real), flat_images(real), [4])["rfid"]
    assert same == pytest.approx(0, abs=1e-3)


def test_rfid_of_a_single_image_is_missing(brightness):
    out = measure(flat_images([100]), flat_images([100]), [1])
    assert "rfid" not in out
    assert naming(2, 1).search(out["missing"]["rfid"])


# -------------------------------------------------------------------------------------------------- use of the codebook


def test_codebook_usage_counts_over_batches_and_by_level():
    usage = CodebookUsage((4, 2), 6)
    usage.update([torch.tensor([[[0, 0], [1, 1]]]), torch.tensor([5])])
    usage.update([torch.tensor([[[0, 0], [2, 2]]]), torch.tensor([5])])
    out = usage.compute()
    assert out["codes_used_4"] == 3.0
    assert out["codes_used_2"] == 1.0
    assert out["perplexity_4"] == pytest.approx(perplexity(torch.tensor([4, 2, 2])).item())
    assert out["perplexity_2"] == pytest.approx(1)
    usage.reset()
    usage.update([torch.zeros(0, dtype=torch.int64)] * 2)
    assert usage.compute()["codes_used_4"] == 0.0


def test_codebook_usage_is_in_the_results_and_empty_batches_add_nothing():
    x, reconstruction = images()
    whole, parts = measure(x, reconstruction, [5]), measure(x, reconstruction, [0, 5, 0])
    counts = torch.bincount(codes(5)[0].flatten(), minlength=K)
    assert whole["codes_used_4"] == (counts > 0).sum()
    assert whole["perplexity_4"] == pytest.approx(perplexity(counts).item())
    assert {k: v for k, v in whole.items() if "_2" in k or "_4" in k} == {
        k: v for k, v in parts.items() if "_2" in k or "_4" in k
    }


def test_a_mean_weighs_its_values_and_shows_nan():
    mean = Mean()
    mean.update(torch.tensor(2.0), weight=3)
    mean.update(torch.tensor([4.0, 8.0]), weight=torch.tensor(0.5))
    assert mean.compute().item() == pytest.approx((6 + 6) / 4)
    exact = Mean()
    exact.update(torch.tensor(1.0, dtype=torch.bfloat16), weight=257)  # which is no bfloat16
    assert exact.sum.item() == 257
    mean.update(torch.tensor(float("nan")))
    assert mean.compute().isnan()
    mean.reset()
    mean.update(torch.empty(0))
    assert mean.compute().isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_metrics_survive_a_run_in_half_precision(dtype):
    """Lightning casts a module with all it holds; sums in half precision would stop growing after some 256 images."""
    metrics = ReconstructionMetrics((2,), 4, 4, with_networks=False).to(dtype)
    x = torch.zeros(8, 3, 4, 4, dtype=dtype)
    for error in [0.5] * 150 + [0.25] * 150:
        metrics.update(x, x + error, [torch.zeros(8, 2, 2, dtype=torch.int64)])
    out = metrics.compute()
    assert out["images"] == 2400
    assert out["l1"] == pytest.approx(0.375 / 2, rel=1e-4)
    assert out["mse"] == pytest.approx((0.25**2 + 0.125**2) / 2, rel=1e-4)
    metrics.psnr.reset()
    assert metrics.psnr.sum.dtype == torch.float32


def test_a_metric_that_is_not_finite_is_not_printed_as_a_figure():
    (_, psnr, ssim) = table({"psnr": float("nan"), "ssim": 0.5}, "title").splitlines()
    assert psnr.split()[:2] == ["psnr", "n/a"] and ssim.split()[:2] == ["ssim", "0.5000"]
