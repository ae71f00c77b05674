"""AugVAE computes what the released code computes: forward passes, codes, six training steps, in float64."""

from __future__ import annotations

import re
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from latent_verse.augvae.model import AugVAE
from latent_verse.config import AugVAEConfig
from tests.augvae.parity_values import ADAMW, CONFIG, RELEASED, SEEDS


def noise(key: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)


def recipe(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a state-dict entry, from its name alone. Tensors that the levels share are those of level 0."""
    key = re.sub(r"^(pre_quants|post_quants)\.\d+\.weight$", r"\1.0.weight", key)
    key = re.sub(r"^quantizers\.\d+\.", "quantizers.0.", key)
    module, _, kind = key.rpartition(".")
    if kind == "cluster_size":
        return 0.5 + np.abs(noise(key, shape))
    if kind == "embed_avg":
        sizes = recipe(f"{module}.cluster_size", shape[:1])
        return recipe(f"{module}.weight", shape) * sizes[:, None]
    if module.endswith("embedding"):
        return noise(key, shape)
    if "norm" in module.rpartition(".")[2]:
        return 0.1 * noise(key, shape) + (1 if kind == "weight" else 0)
    if kind == "bias":
        return 0.05 * noise(key, shape)
    return noise(key, shape) / np.sqrt(np.prod(shape[1:]))


def images(seed: int) -> torch.Tensor:
    side = CONFIG["resolution"] // 4
    small = torch.from_numpy(np.random.RandomState(seed).standard_normal((2, 3, side, side)))
    return torch.tanh(F.interpolate(small, scale_factor=4, mode="bilinear", align_corners=False))


def parity_model(name: str) -> AugVAE:
    model = AugVAE(AugVAEConfig(**CONFIG, single_level=RELEASED[name]["single_level"])).double()
    state = {k: torch.from_numpy(np.asarray(recipe(k, tuple(v.shape)))) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


def assert_statistics(tensor: torch.Tensor, released: tuple, rel: float) -> None:
    mean, std, first = released
    # a mean is a sum of numbers of either sign: its rounding scales with their size, not with its own
    assert tensor.mean().item() == pytest.approx(mean, rel=rel, abs=rel * std)
    assert tensor.std(correction=0).item() == pytest.approx(std, rel=rel)
    assert tensor.flatten()[:8].tolist() == pytest.approx(first, rel=rel)


@torch.no_grad()
def assert_forward(model: AugVAE, released: dict, rel: float) -> None:
    x = images(1)
    encoded = model.encode(x)
    assert encoded.embed_loss.item() == pytest.approx(released["embed_loss"], rel=rel)
    assert encoded.perplexity.item() == pytest.approx(released["perplexity"], rel=rel)
    seen = [(codes.shape[-1], int(codes.sum()), codes[0].flatten()[:16].tolist()) for codes in encoded.indices]
    assert seen == released["levels"]
    assert_statistics(model.decode(encoded.z_q), released["reconstruction"], rel)
    codes = model.codes(x)
    assert (codes.shape[1], int(codes.sum())) == released["sequence"]
    # decode_codes clamps to [-1, 1]; the released values are of the image before that
    clamp = torch.Tensor.clamp
    unclamped = []
    try:
        torch.Tensor.clamp = lambda self, *args, **kwargs: (unclamped.append(self), clamp(self, *args, **kwargs))[1]
        decoded = model.decode_codes(codes)
    finally:
        torch.Tensor.clamp = clamp
    assert_statistics(unclamped[-1], released["decode_from_sequence"], rel)
    assert torch.equal(decoded, unclamped[-1].clamp(-1, 1))
    reconstruction, embed_loss, perplexity = model(x)
    assert torch.equal(reconstruction, model.decode(encoded.z_q))
    assert (embed_loss, perplexity) == (encoded.embed_loss, encoded.perplexity)


@pytest.mark.parametrize("name", RELEASED)
def test_forward_pass_is_the_releases(name):
    model = parity_model(name)
    assert len(model.state_dict()) == RELEASED[name]["keys"]
    assert_forward(model, RELEASED[name]["forward"], rel=1e-9)


@pytest.mark.parametrize("name", RELEASED)
def test_six_training_steps_are_the_releases(name):
    released = RELEASED[name]
    model = parity_model(name).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW)
    for seed, expected in zip(SEEDS, released["steps"], strict=True):
        x = images(seed)
        reconstruction, embed_loss, perplexity = model(x)
        rec_loss = F.mse_loss(reconstruction, x)
        total = rec_loss + embed_loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        got = [value.item() for value in (total, rec_loss, embed_loss, perplexity)]
        assert got == pytest.approx(expected, rel=1e-7), f"step on seed {seed}"
    after = released["after_training"]
    assert_statistics(model.quantizer.embedding.weight, after["codebook"], rel=1e-7)
    assert_statistics(model.quantizer.embedding.cluster_size, after["cluster_size"], rel=1e-7)
    assert_forward(model.eval(), after["forward"], rel=1e-7)
