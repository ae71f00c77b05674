"""AugVAE: shapes and codes, errors, levels, where attention stands, gradients, single-level forms, storage."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from latent_verse.augvae.layers import AttnBlock, Upsample, make_norm
from latent_verse.augvae.model import AugVAE
from latent_verse.checkpoints.augvae import load_augvae, save_augvae
from latent_verse.config import AugVAEConfig, ConfigError
from tests.messages import naming

SINGLE = [None, 8, 4, 2]

# ---------------------------------------------------------------------------------------------------- shapes and codes


@pytest.mark.parametrize("single_level", SINGLE)
def test_shapes_of_everything(tiny_augvae, tiny_images, single_level):
    model, x = tiny_augvae(single_level=single_level), tiny_images(3)
    levels = (8, 4, 2) if single_level is None else (8, 4, 2)[: (8, 4, 2).index(single_level) + 1]
    code_levels = (8, 4, 2) if single_level is None else (single_level,)
    assert (model.levels, model.code_levels) == (levels, code_levels)
    assert model.num_codes == sum(side * side for side in code_levels)
    assert [tuple(z.shape) for z in model.features(x)] == [(3, 8, side, side) for side in levels]
    encoded = model.encode(x)
    assert [tuple(z.shape) for z in encoded.z_q] == [(3, 8, side, side) for side in levels]
    assert [(tuple(i.shape), i.dtype) for i in encoded.indices] == [((3, s, s), torch.int64) for s in levels]
    reconstruction, embed_loss, perplexity = model(x)
    assert reconstruction.shape == x.shape
    assert embed_loss.shape == perplexity.shape == ()
    assert 1 <= perplexity <= 24


@pytest.mark.parametrize("single_level", SINGLE)
def test_codes_are_the_indices_of_encode_largest_level_first(tiny_augvae, tiny_images, single_level):
    model, x = tiny_augvae(single_level=single_level), tiny_images(3)
    indices = [i.flatten(1) for i in model.encode(x).indices[-len(model.code_levels) :]]
    codes = model.codes(x)
    assert codes.dtype == torch.int64
    assert codes.unique().numel() > 3  # the comparisons below would hold for a constant
    assert torch.equal(codes, torch.cat(indices, dim=1))
    assert [i.shape[1] for i in indices] == [side * side for side in model.code_levels]
    assert list(model.code_levels) == sorted(model.code_levels, reverse=True)


@pytest.mark.parametrize("single_level", SINGLE)
def test_decoding_codes_is_decoding_the_quantised_maps_clamped(tiny_augvae, tiny_images, single_level):
    model, x = tiny_augvae(single_level=single_level).double(), tiny_images(3).double()
    with torch.no_grad():
        model.decoders[-1].conv_out.weight.mul_(20)  # so that some values leave [-1, 1]
        whole = model.decode(model.encode(x).z_q)
    assert whole.abs().max() > 1
    torch.testing.assert_close(model.decode_codes(model.codes(x)), whole.clamp(-1, 1))


def test_decode_takes_the_code_levels_alone(tiny_augvae, tiny_images):
    model = tiny_augvae(single_level=4)
    z_q = model.encode(tiny_images()).z_q
    assert torch.equal(model.decode(z_q), model.decode(z_q[-1:]))


def test_every_image_is_coded_by_itself(tiny_augvae, tiny_images):
    model, x = tiny_augvae(), tiny_images(4)
    assert torch.equal(model.codes(x), torch.cat([model.codes(one[None]) for one in x]))


def test_codes_leave_the_model_as_it_is_in_training_mode(tiny_augvae, tiny_images):
    model = tiny_augvae().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    codes = model.codes(tiny_images())
    model.decode_codes(codes)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model(tiny_images())  # while a training pass does change the book
    assert not torch.equal(model.quantizer.embedding.weight, before["quantizers.0.embedding.weight"])


def test_evaluation_does_not_change_the_codebook(tiny_augvae, tiny_images):
    model = tiny_augvae()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(tiny_images())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("shape", [(2, 3, 15, 16), (2, 3, 32, 32), (2, 1, 16, 16), (3, 16, 16)])
def test_images_of_another_shape_are_refused(tiny_augvae, shape):
    for call in (tiny_augvae(), tiny_augvae().codes):
        with pytest.raises(ValueError, match=naming("images", shape, "(B, 3, 16, 16)")):
            call(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 83), (2, 85), (84,), (1, 84, 1)])
def test_another_number_of_codes_is_refused(tiny_augvae, shape):
    with pytest.raises(ValueError, match=naming("codes", shape, (8, 4, 2), "(B, 84)")):
        tiny_augvae().decode_codes(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("code", [-1, 24])
def test_codes_outside_the_codebook_are_refused(tiny_augvae, code):
    codes = torch.zeros(1, 84, dtype=torch.int64)
    codes[0, 5] = code
    with pytest.raises(ValueError, match=naming("codes", code, 0, 23)):
        tiny_augvae().decode_codes(codes)


IMAGES = {
    "NaN": (lambda x: x * torch.nan, ("nan", [-1, 1])),
    "one NaN": (lambda x: x.index_fill(0, torch.tensor([1]), torch.nan), ("nan", [-1, 1])),
    "infinite": (lambda x: x / 0, ("inf", [-1, 1])),
    "floats of bytes": (lambda x: (x + 1) * 127.5, ("values", [-1, 1], "127.5")),
    "bytes": (lambda x: ((x + 1) * 127.5).byte(), ("torch.uint8", "torch.float32", "127.5")),
    "float64": (lambda x: x.double(), ("torch.float64", "torch.float32")),
    "float16": (lambda x: x.half(), ("torch.float16", "torch.float32")),
    "complex": (lambda x: x.to(torch.complex64), ("torch.complex64", "torch.float32")),
    "whole numbers": (lambda x: x.long(), ("torch.int64", "torch.float32")),
    "another device": (lambda x: x.to("meta"), ("meta", "cpu")),
    "sparse": (lambda x: x.to_sparse(), ("torch.sparse_coo", "torch.Tensor")),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), ("torch.Tensor",)),
    "an array": (lambda x: x.numpy(), ("ndarray", "torch.from_numpy")),
    "a list": (lambda x: x.tolist(), ("list", "torch.Tensor")),
    "nothing": (lambda x: None, ("NoneType", "torch.Tensor")),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images_of_another_kind_have_no_codes(tiny_augvae, tiny_images, case):
    change, facts = IMAGES[case]
    with pytest.raises(ValueError, match=naming("images", *facts)) as error:
        tiny_augvae().codes(change(tiny_images()))
    assert "\n" not in str(error.value)


CODES = {
    "floats": (lambda c: c.float(), ("torch.float32", "torch.int64")),
    "bytes": (lambda c: c.byte(), ("torch.uint8", "torch.int64")),
    "truth values": (lambda c: c.bool(), ("torch.bool", "torch.int64")),
    "complex": (lambda c: c.to(torch.complex64), ("torch.complex64", "torch.int64")),
    "another device": (lambda c: c.to("meta"), ("meta", "cpu")),
    "an array": (lambda c: c.numpy(), ("ndarray", "torch.from_numpy")),
    "a list": (lambda c: c.tolist(), ("list", "torch.Tensor")),
    "nothing": (lambda c: None, ("NoneType", "torch.Tensor")),
}


@pytest.mark.parametrize("case", CODES)
def test_codes_of_another_kind_are_no_image(tiny_augvae, tiny_images, case):
    model, (change, facts) = tiny_augvae(), CODES[case]
    with pytest.raises(ValueError, match=naming("codes", *facts)) as error:
        model.decode_codes(change(model.codes(tiny_images())))
    assert "\n" not in str(error.value)


def test_images_that_resizing_overshot_and_short_codes_are_taken(tiny_augvae, tiny_images):
    model, x = tiny_augvae(), tiny_images().sign() * 1.0009
    codes = model.codes(x)
    assert torch.equal(model.codes(x, validate=False), codes) and codes.dtype == torch.int64
    assert torch.equal(model.decode_codes(codes.int()), model.decode_codes(codes))
    half, h = tiny_augvae().bfloat16(), tiny_images().bfloat16()
    assert half.codes(h).shape == (2, 84)
    assert model.codes(x[:0]).shape == (0, 84)


def test_the_last_code_and_an_empty_batch_are_taken(tiny_augvae):
    model = tiny_augvae()
    assert model.decode_codes(torch.full((1, 84), 23)).shape == (1, 3, 16, 16)
    assert model.codes(torch.zeros(0, 3, 16, 16)).shape == (0, 84)
    assert model.decode_codes(torch.zeros(0, 84, dtype=torch.int64)).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"ch_mult": (1, 2, 4)}, ["ch_mult", [1, 2, 4], "resolution", 16, "attn_resolutions", 8, 4]),
        ({"resolution": 32}, ["ch_mult", "resolution", 32, "attn_resolutions", 8, 16]),
        ({"attn_resolutions": ()}, ["attn_resolutions", []]),
        ({"attn_resolutions": (8, 2)}, ["attn_resolutions", [8, 2]]),
        ({"attn_resolutions": (8, 8)}, ["attn_resolutions", [8, 8]]),
        ({"hidden_dim": 48}, ["hidden_dim", 48, 32]),
        ({"single_level": 16}, ["single_level", 16, [8, 4, 2]]),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(tiny_config, changes, facts):
    with pytest.raises(ConfigError, match=naming(*facts)):
        AugVAE(tiny_config(**changes))


# -------------------------------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize("levels", [(8,), (8, 4), (8, 4, 2), (8, 4, 2, 1)])
def test_any_number_of_levels(tiny_augvae, tiny_images, levels):
    model = tiny_augvae(attn_resolutions=levels)
    assert len(model.encoders) == len(model.decoders) == len(model.quantizers) == len(levels)
    codes = model.codes(tiny_images())
    assert codes.shape == (2, sum(side * side for side in levels))
    assert model.decode_codes(codes).shape == (2, 3, 16, 16)


def test_a_level_quantises_with_the_book_that_the_levels_before_it_changed(tiny_augvae, tiny_images):
    model, x = tiny_augvae().train(), tiny_images()
    books = []
    for quantizer in [model.quantizers[0]]:
        quantizer.register_forward_pre_hook(lambda module, args: books.append(module.embedding.weight.clone()))
    model.encode(x)
    assert len(books) == 3  # one module, called once a level
    assert not torch.equal(books[0], books[1])
    assert not torch.equal(books[1], books[2])


@pytest.mark.parametrize("use_attn", [False, True])
@pytest.mark.parametrize("single_level", SINGLE)
def test_every_trainable_parameter_gets_a_gradient(tiny_augvae, tiny_images, single_level, use_attn):
    model, x = tiny_augvae(single_level=single_level, use_attn=use_attn).train(), tiny_images()
    reconstruction, embed_loss, _ = model(x)
    ((reconstruction - x).square().mean() + embed_loss).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        else:
            assert parameter.grad is None, name
            assert name.endswith(".bias") and name.startswith(("pre_quants.", "post_quants.")), name
    if single_level is None:
        assert all(p.requires_grad for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------- attention


def attention(model: AugVAE) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, AttnBlock)}


def test_attention_stands_at_the_levels_and_in_the_middles(tiny_augvae):
    # Outer: 16 -> 8, attention at 8 (the level it gives). Inner: 8 -> 4 and 4 -> 2, attention at the smaller side.
    # In a decoder up.0 is the larger side, and each stage has one block more.
    expected = {f"{kind}.{i}.mid.attn_1" for kind in ("encoders", "decoders") for i in range(3)}
    expected |= {f"encoders.{i}.down.1.attn.0" for i in range(3)}
    expected |= {f"decoders.{i}.up.1.attn.{b}" for i in range(3) for b in range(2)}
    assert attention(tiny_augvae(use_attn=True)) == expected
    assert attention(tiny_augvae()) == set()


def test_attention_at_the_released_size():
    with torch.device("meta"):
        model = AugVAE(AugVAEConfig(use_attn=True))
    expected = {f"{kind}.{i}.mid.attn_1" for kind in ("encoders", "decoders") for i in range(4)}
    expected |= {f"encoders.{i}.down.{2 if i == 0 else 1}.attn.{b}" for i in range(4) for b in range(2)}
    expected |= {f"decoders.{i}.up.{2 if i == 3 else 1}.attn.{b}" for i in range(4) for b in range(3)}
    assert attention(model) == expected


def test_attention_block_is_softmax_attention_over_positions():
    torch.manual_seed(0)
    block, x = AttnBlock(32, norm="group").double(), torch.randn(2, 32, 3, 3, dtype=torch.float64)
    h = block.norm(x)
    q, k, v = (f(h).reshape(2, 32, 9) for f in (block.q, block.k, block.v))
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / 32**0.5, dim=-1)
    expected = x + block.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(2, 32, 3, 3))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("size", [(4, 4), (1, 1), (3, 5)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_upsampling_is_the_convolution_of_the_enlarged_image(size, memory_format):
    layer = Upsample(6).double().to(memory_format=memory_format)
    x = torch.randn(2, 6, *size, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    enlarged = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected, out = layer.conv(enlarged), layer(x)
    assert out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    needed = (x, layer.conv.weight, layer.conv.bias)
    for ours, plain in zip(*(torch.autograd.grad((y * weights).sum(), needed) for y in (out, expected)), strict=True):
        torch.testing.assert_close(ours, plain)


def test_upsampling_holds_nothing_enlarged_for_the_backward_pass():
    held = []
    x = torch.randn(1, 8, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        Upsample(8)(x)
    assert max(held) == x.numel()


def test_pixel_norm_keeps_far_pixels_apart(tiny_augvae, tiny_images):
    """With it a change in one corner leaves the encoder's other corner as it was; GroupNorm carries it everywhere."""
    x = tiny_images(1)
    changed = x.clone()
    changed[:, :, :2, :2] *= -1
    moved = {}
    for norm in ("group", "pixel"):
        torch.manual_seed(0)
        model = tiny_augvae(norm=norm, num_res_blocks=1, use_attn=False)
        stage = model.encoders[0].down[0]
        with torch.no_grad():
            before, after = (stage(model.encoders[0].conv_in(image)) for image in (x, changed))
        moved[norm] = not torch.equal(before[:, :, -2:, -2:], after[:, :, -2:, -2:])
    assert moved == {"group": True, "pixel": False}
    assert tiny_augvae(norm="pixel").state_dict().keys() == tiny_augvae().state_dict().keys()


def test_pixel_norm_is_layer_norm_over_channels():
    norm, x = make_norm("pixel", 5), torch.randn(2, 5, 3, 4)
    nn.init.normal_(norm.weight)
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    expected = (x - mean) / (var + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)


def test_dropout_acts_in_training_only(tiny_augvae, tiny_images):
    model, x = tiny_augvae(dropout=0.5), tiny_images()
    assert torch.equal(model.features(x)[0], model.features(x)[0])
    model.train()
    assert not torch.equal(model.features(x)[0], model.features(x)[0])


# -------------------------------------------------------------------------------------------------------- single level


@pytest.mark.parametrize("level", [8, 4, 2])
def test_to_single_level_copies_what_it_keeps(tiny_augvae, tiny_images, level):
    model, x = tiny_augvae(use_attn=True), tiny_images()
    single = model.to_single_level(level)
    assert single.config.single_level == level
    assert model.config.single_level is None
    assert not single.training and model.to_single_level(level).train().training
    depth = len(single.encoders)
    assert depth == (8, 4, 2).index(level) + 1 == len(single.decoders)
    pairs = [(single.encoders[i], model.encoders[i]) for i in range(depth)]
    pairs += [(single.decoders[-1 - i], model.decoders[-1 - i]) for i in range(depth)]
    pairs += [(getattr(single, n), getattr(model, n)) for n in ("pre_quants", "post_quants", "quantizers")]
    for ours, theirs in pairs:
        for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
            assert name == other
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr(), name
    for ours, theirs in zip(single.encode(x).indices, model.encode(x).indices, strict=False):
        assert torch.equal(ours, theirs)
    with torch.no_grad():  # independent: the source does not follow
        single.encoders[0].conv_in.weight.zero_()
    assert model.encoders[0].conv_in.weight.any()


@pytest.mark.parametrize("level", [8, 4, 2])
def test_single_level_decodes_through_a_connector_where_a_level_is_missing(tiny_augvae, level):
    connectors = tiny_augvae(single_level=level).connectors
    kinds = [type(c) for c in connectors]
    # the deepest level's first decoder reads z channels as it did before
    assert kinds == [nn.Identity if level == 2 and i == 0 else nn.Conv2d for i in range(len(connectors))]
    assert all((c.in_channels, c.out_channels) == (16, 32) for c in connectors if isinstance(c, nn.Conv2d))


def test_to_single_level_keeps_mode_and_type(tiny_augvae):
    single = tiny_augvae().double().train().to_single_level(4)
    assert single.training
    assert single.pre_quants[0].weight.dtype == single.quantizer.embedding.weight.dtype == torch.float64


def test_single_level_of_what_is_not_there_is_refused(tiny_augvae):
    with pytest.raises(ConfigError, match=naming("single_level", 16)):
        tiny_augvae().to_single_level(16)
    with pytest.raises(ValueError, match=naming(4, "AugVAE-ML")):
        tiny_augvae(single_level=4).to_single_level(4)


# --------------------------------------------------------------------------------------------------- types and storage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_codebook_in_float32(tiny_augvae, tiny_images, dtype):
    model = tiny_augvae().to(dtype)
    book = {n: b.dtype for n, b in model.quantizer.embedding.named_buffers()}
    assert book == dict.fromkeys(("weight", "cluster_size", "embed_avg"), torch.float32)
    assert model.encoders[0].conv_in.weight.dtype == dtype
    x = tiny_images().to(dtype)
    reconstruction, embed_loss, _ = model.train()(x)
    assert reconstruction.dtype == dtype
    assert embed_loss.dtype == torch.float32
    assert reconstruction.isfinite().all()
    assert model.eval().decode_codes(model.codes(x)).dtype == dtype


def test_double_precision_takes_the_codebook_along(tiny_augvae):
    assert tiny_augvae().double().quantizer.embedding.weight.dtype == torch.float64


def test_device_and_dtype_are_those_of_the_weights(tiny_augvae):
    model = tiny_augvae()
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    model = model.to(device="meta", dtype=torch.bfloat16)
    assert (model.device, model.dtype) == (torch.device("meta"), torch.bfloat16)


@pytest.mark.parametrize("single_level", SINGLE)
def test_save_pretrained_round_trip(tiny_augvae, tiny_images, tmp_path, single_level):
    model = tiny_augvae(single_level=single_level, quant_beta=0.5, use_attn=True).train()
    assert AugVAE.save_pretrained is save_augvae and AugVAE.from_pretrained is load_augvae
    model.save_pretrained(tmp_path / "a" / "b")
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]
    again = AugVAE.from_pretrained(tmp_path / "a" / "b")
    assert again.config == model.config
    assert not again.training
    x = tiny_images()
    for ours, theirs in zip(again(x), model.eval()(x), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(again.codes(x), model.codes(x))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    # still shared after loading
    assert len({id(c.weight) for c in again.pre_quants}) == 1
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text())["config"]["single_level"] == single_level


def test_initialise_codebook_takes_vectors_of_all_levels(tiny_augvae, tiny_images):
    model, x = tiny_augvae(num_tokens=400), tiny_images()
    vectors = torch.cat([z.permute(0, 2, 3, 1).reshape(-1, 8) for z in model.features(x)])
    model.initialise_codebook(x)
    # 168 vectors for 400 codes: each is a code, and each code is one of them
    codes = model.quantizer.embedding.weight
    distance = torch.cdist(vectors, codes, compute_mode="donot_use_mm_for_euclid_dist")  # exact
    assert distance.min(0).values.max() < 1e-3
    assert distance.min(1).values.max() < 1e-3


def test_the_model_never_changes_its_config(tiny_augvae, tiny_images):
    model = tiny_augvae(single_level=4)
    with pytest.raises(AttributeError):
        model.config.single_level = 8
