"""The state dict of AugVAE has exactly the keys and shapes of the released checkpoints.

The layout is written down twice, apart from the model's code: as a grammar below, and as hashes of the released files'
sorted "key shape" lines.
"""

from __future__ import annotations

import hashlib

import pytest
import torch

from latent_verse.augvae.model import AugVAE
from latent_verse.config import AugVAEConfig

RELEASED = {
    None: (610, "56b16d0ffabb57a9b90f4886a9390a9efa63417e2d0200f4825d237db0de9844"),
    32: (346, "071542518f4ab581c90492cc708239cf977af757d363e6e53c26436146b91586"),
}

Layout = dict[str, tuple[int, ...]]


def conv(name: str, i: int, o: int, k: int = 3) -> Layout:
    return {f"{name}.weight": (o, i, k, k), f"{name}.bias": (o,)}


def norm(name: str, c: int) -> Layout:
    return {f"{name}.weight": (c,), f"{name}.bias": (c,)}


def res(name: str, i: int, o: int) -> Layout:
    shortcut = conv(f"{name}.nin_shortcut", i, o, 1) if i != o else {}
    return (
        norm(f"{name}.norm1", i)
        | conv(f"{name}.conv1", i, o)
        | norm(f"{name}.norm2", o)
        | conv(f"{name}.conv2", o, o)
        | shortcut
    )


def mid(name: str, c: int) -> Layout:
    return res(f"{name}.mid.block_1", c, c) | res(f"{name}.mid.block_2", c, c)


def encoder(name: str, c_in: int, widths: list[int]) -> Layout:
    """`widths`: of each stage; the first convolution is 128 wide, every stage but the last downsamples."""
    out = conv(f"{name}.conv_in", c_in, 128)
    for s, (i, o) in enumerate(zip([128, *widths], widths, strict=False)):
        out |= res(f"{name}.down.{s}.block.0", i, o) | res(f"{name}.down.{s}.block.1", o, o)
        if s < len(widths) - 1:
            out |= conv(f"{name}.down.{s}.downsample.conv", o, o)
    return (
        out | mid(name, widths[-1]) | norm(f"{name}.norm_out", widths[-1]) | conv(f"{name}.conv_out", widths[-1], 256)
    )


def decoder(name: str, c_in: int, c_out: int, widths: list[int]) -> Layout:
    """`widths`: from up.0, the last to run, upwards; every stage but up.0 upsamples."""
    top = widths[-1]
    out = conv(f"{name}.conv_in", c_in, top) | mid(name, top)
    for s, (i, o) in enumerate(zip([*widths[1:], top], widths, strict=True)):
        out |= res(f"{name}.up.{s}.block.0", i, o)
        for b in (1, 2):
            out |= res(f"{name}.up.{s}.block.{b}", o, o)
        if s:
            out |= conv(f"{name}.up.{s}.upsample.conv", o, o)
    return out | norm(f"{name}.norm_out", widths[0]) | conv(f"{name}.conv_out", widths[0], c_out)


OUTER, INNER = [128, 256, 512], [256, 512]


def released_layout(single_level: int | None) -> Layout:
    """Four levels: 64, 32, 16, 8."""
    out: Layout = {}
    for i in range(4):
        out |= conv(f"pre_quants.{i}", 256, 256, 1) | conv(f"post_quants.{i}", 256, 256, 1)
        book = f"quantizers.{i}.embedding"
        out |= {f"{book}.weight": (8192, 256), f"{book}.cluster_size": (8192,), f"{book}.embed_avg": (8192, 256)}
    encoders = [encoder("encoders.0", 3, OUTER)] + [encoder(f"encoders.{i}", 256, INNER) for i in (1, 2, 3)]
    inputs = [256, 512, 512, 512]  # the smallest level's decoder reads its codes alone
    if single_level == 32:  # two encoders down, the last two decoders up, a connector for each
        encoders, inputs = encoders[:2], inputs[2:]
        out |= conv("connectors.0", 256, 512, 1) | conv("connectors.1", 256, 512, 1)
    for part in encoders:
        out |= part
    for i, c_in in enumerate(inputs[:-1]):
        out |= decoder(f"decoders.{i}", c_in, 256, INNER)
    return out | decoder(f"decoders.{len(inputs) - 1}", inputs[-1], 3, OUTER)


def sha256(layout: Layout) -> str:
    lines = sorted(f"{key} {'x'.join(map(str, shape))}" for key, shape in layout.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def model_layout(single_level: int | None) -> Layout:
    with torch.device("meta"):
        model = AugVAE(AugVAEConfig(single_level=single_level))
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("single_level", RELEASED)
def test_state_dict_has_the_releases_keys_and_shapes(single_level):
    ours, released = model_layout(single_level), released_layout(single_level)
    differ = {
        k: (ours.get(k), released.get(k)) for k in ours.keys() | released.keys() if ours.get(k) != released.get(k)
    }
    assert not differ
    assert (len(ours), sha256(ours)) == RELEASED[single_level]


@pytest.mark.parametrize("single_level", [64, 16, 8])
def test_other_single_levels_keep_the_encoders_down_to_it_and_the_decoders_from_it(single_level):
    layout, whole = model_layout(single_level), released_layout(None)
    depth = [64, 32, 16, 8].index(single_level) + 1
    kept = {"encoders.": 0, "decoders.": 4 - depth}
    for prefix, first in kept.items():
        ours = {k: v for k, v in layout.items() if k.startswith(prefix)}
        shifted = {}
        for i in range(depth):
            old, new = f"{prefix}{first + i}.", f"{prefix}{i}."
            shifted |= {new + k.removeprefix(old): v for k, v in whole.items() if k.startswith(old)}
        assert ours == shifted
    # the smallest level's decoder reads z channels, as in AugVAE-ML: nothing stands before it
    first = 1 if single_level == 8 else 0
    connectors = {k for k in layout if k.startswith("connectors.")}
    assert connectors == {f"connectors.{i}.{kind}" for i in range(first, depth) for kind in ("weight", "bias")}


def test_levels_share_weights_but_not_biases():
    with torch.device("meta"):
        model = AugVAE(AugVAEConfig())
    for convs in (model.pre_quants, model.post_quants):
        assert len({id(c.weight) for c in convs}) == 1
        assert len({id(c.bias) for c in convs}) == 4
    assert len({id(q.embedding.weight) for q in model.quantizers}) == 1
