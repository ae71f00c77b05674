"""What a GPU would be given, without one: nothing is left on the CPU, nothing waits, and so much memory is taken.

See tests/fake_cuda.py for what such a run can show and what it cannot.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.augvae import SHAPES
from benchmarks.measure import PeakBytes
from benchmarks.plain import BETA, DECAY, EPS, one_hot_forward, plain_augvae
from latent_verse.augvae.model import AugVAE
from latent_verse.augvae.quantizer import Codebook, EMAQuantizer
from latent_verse.biart import model as network
from latent_verse.biart import sampling
from latent_verse.biart.model import BiART, loss_weights
from latent_verse.biart.sequence import DIRECTIONS, TEXT_TO_IMAGE
from latent_verse.biart.triton_kernels import decode_attention
from latent_verse.config import PRESETS, AugVAEConfig, BiARTConfig
from latent_verse.config.train import (
    BiARTLossConfig,
    TrainBiARTConfig,
    TrainerConfig,
    TrainVAEConfig,
    VAELossConfig,
    VAEOptimConfig,
)
from latent_verse.metrics.reconstruction import ReconstructionMetrics
from latent_verse.nn.activation_checkpointing import checkpoint_activations
from latent_verse.training.augvae import LitAugVAE
from latent_verse.training.biart import LitBiART
from latent_verse.training.divergence import Divergence
from latent_verse.training.optimizer import MuonAdamW, adamw, warm_up_then_cosine
from latent_verse.training.pace import gradient_norm
from tests.fake_cuda import DEVICE, Kept, fake_cuda
from tests.sm90 import generate

BIART = BiARTConfig(text_vocab=40, image_vocab=24, text_len=6, image_len=16, n_layer=2, n_head=2, n_embd=32)
PRECISIONS = pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bf16"])


def on_gpu(*tensors: torch.Tensor) -> bool:
    return all(t.device == torch.device(DEVICE) for t in tensors)


def images(batch: int, side: int) -> torch.Tensor:
    return torch.empty(batch, 3, side, side)


@pytest.mark.parametrize(("wait", "copies"), [
    (lambda x: x.cpu(), 1),
    (lambda x: x.sum().item(), 1),
    (lambda x: torch.rand(4).to(x.device), 1),
    (lambda x: torch.empty_like(x).copy_(torch.rand(4)), 1),
    (lambda x: torch.tensor([1, 2], device=x.device), 1),
    (lambda x: x[torch.arange(2)], 1),
    (lambda x: torch.where(x > 0, x, torch.tensor(1.0)), 1),
    (lambda x: x.mul(torch.tensor(2.0)) + torch.full((4,), 3, device=x.device), 0),
    (lambda x: x.fill_(1)[1:].zero_(), 0),
])  # fmt: skip
def test_copies_between_host_and_device_are_counted(wait, copies):
    with fake_cuda() as waits:
        x = torch.empty(4)
        with waits.during_a_run():
            wait(x)
    assert waits.seen.total() == copies


# ------------------------------------------------------------------------------------------------- AugVAE: what it does


@PRECISIONS
@pytest.mark.parametrize("single_level", [None, 4])
@pytest.mark.parametrize("restart_threshold", [0.0, 0.5])
def test_augvae_trains_without_waiting(tiny_config, autocast, single_level, restart_threshold):
    config = TrainVAEConfig(
        model=tiny_config(single_level=single_level, restart_threshold=restart_threshold),
        loss=VAELossConfig(loss_type="mse"),
        trainer=TrainerConfig(activation_checkpointing=True, log_images=True),
    )
    logged = {}
    with fake_cuda(autocast=autocast) as waits:
        module = LitAugVAE(AugVAE(config.model), config).train()
        module.log = lambda name, value, **kwargs: logged.update({name: value})
        module.configure_model()
        batch = [images(2, 16)]
        with waits.during_a_run():
            out = module.training_step(batch, 0)
            assert on_gpu(*out.values(), *logged.values()) and logged
            assert module.model.encoders[0].conv_in.weight.is_contiguous(memory_format=torch.channels_last)
            module.eval().validation_step(batch, 0)
    assert not waits.seen
    # statistics of the codebook are float32, and what the last convolution gives is autocast's dtype
    assert module.model.quantizer.embedding.embed_avg.dtype == torch.float32
    assert out["xrec"].dtype == (autocast or torch.float32)


def test_augvae_looks_at_its_codebook_once_to_start_it_from_data(tiny_config):
    config = TrainVAEConfig(model=tiny_config(), optim=VAEOptimConfig(codebook_init="data"))
    with fake_cuda() as waits:
        module = LitAugVAE(AugVAE(config.model), config)
        module._trainer = type("Trainer", (), {"global_step": 0})()
        batch = [images(8, 16)]
        with waits.during_a_run():
            for batch_idx in range(3):
                module.on_train_batch_start(batch, batch_idx)
    assert waits.seen == {"is_fresh": 1}


def test_augvae_is_evaluated_without_waiting(tiny_augvae):
    model = tiny_augvae()
    with fake_cuda() as waits:
        model = AugVAE(model.config).eval()
        metrics = ReconstructionMetrics(model.levels, model.config.num_tokens, 16, with_networks=False)
        metrics.to(DEVICE)
        x_BCHW = images(2, 16)
        with waits.during_a_run():
            encoded = model.encode(x_BCHW)
            metrics.update(x_BCHW, model.decode(encoded.z_q), encoded.indices)
            codes = model.codes(x_BCHW, validate=False)
            assert not waits.seen and on_gpu(codes)
            model.codes(x_BCHW)  # values can be checked by waiting alone
            of_images = waits.seen.total()
            assert on_gpu(model.decode_codes(codes))  # which looks whether codes are the codebook's
    assert set(waits.seen) == {"_extremes"} and waits.seen.total() == 2 * of_images


@pytest.mark.parametrize("make", [
    lambda kernels, rest: MuonAdamW(kernels, [{"params": rest, "weight_decay": 0.1}], 1e-3, 1e-2, 0.1),
    lambda kernels, rest: adamw([*kernels, *rest], lr=1e-3),
])  # fmt: skip
def test_optimisers_step_without_waiting(tiny_config, make):
    with fake_cuda() as waits:
        model = AugVAE(tiny_config())
        kernels = [p for p in model.parameters() if p.ndim == 4]
        optimizer = make(kernels, [p for p in model.parameters() if p.ndim != 4])
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        schedule = warm_up_then_cosine(optimizer, 1, lambda: 10)
        with waits.during_a_run():
            for _ in range(2):
                assert on_gpu(gradient_norm(optimizer))
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
        assert all(on_gpu(*[v for v in state.values() if v.ndim]) for state in optimizer.state.values())
    assert not waits.seen


# -------------------------------------------------------------------------------------------------- BiART: what it does


@PRECISIONS
@pytest.mark.parametrize("pos_by_modality", [False, True])
@pytest.mark.parametrize("from_images", [False, True])
def test_biart_trains_without_waiting(tiny_config, autocast, pos_by_modality, from_images):
    config = TrainBiARTConfig(
        loss=BiARTLossConfig(reference_dropout=0.1, word_dropout=0.1, code_dropout=0.1, text_loss_weight=2.0),
        trainer=TrainerConfig(activation_checkpointing=True),
    )
    sizes = {**vars(BIART), "pos_by_modality": pos_by_modality}
    with fake_cuda(autocast=autocast) as waits:
        vae = AugVAE(tiny_config(single_level=4))
        module = LitBiART(BiART(BiARTConfig(**sizes)), vae, config, {}).train()
        module.configure_model()
        x = images(4, 16) if from_images else torch.empty(4, 16, dtype=torch.int16)
        batch = [x, torch.full((4, 6), module.model.vocab.pad)]
        logged = {}
        module.log = lambda name, value, **kwargs: logged.update({name: value})
        module._trainer = SimpleNamespace(world_size=1, global_step=0)
        with waits.during_a_run():
            total = module.training_step(batch, 0)
            assert on_gpu(total, *logged.values()) and len(logged) > 1
            module.validation_step(batch, 0)
    assert not waits.seen


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"top_k": 5, "seed": 1}, {"top_p": 0.9, "guidance": 2.0, "seed": 1}]
)
def test_sampling_waits_no_more_for_more_tokens(direction, settings, monkeypatch):
    monkeypatch.setattr(sampling, "can_capture", lambda model, device: False)  # streams need a driver
    says, seen = {"generate": False, "_check_finite": False, "prompt": False}, []
    # check_text asks two questions with opposite answers: is everything allowed, does anything follow a pad?
    monkeypatch.setattr("latent_verse.biart.sequence.Vocabulary.check_text", lambda *args, **kwargs: None)
    for longer in (1, 4):
        sizes = {**vars(BIART), "image_len": 16 * longer, "text_len": 6 * longer}
        with fake_cuda(says) as waits:
            model = BiART(BiARTConfig(**sizes))
            length = sizes["text_len"] if direction == TEXT_TO_IMAGE else sizes["image_len"]
            reference = torch.empty(2, length, dtype=torch.long)
            with waits.during_a_run():
                assert on_gpu(sampling.generate(model, reference, direction, **settings))
        seen.append(waits.seen)
    assert seen[0]["_check_finite"] == 2  # after the first token and the last
    if direction == TEXT_TO_IMAGE:
        assert seen[0] == seen[1]
    else:  # at every eighth token it asks whether all captions have ended
        assert seen[1].pop("generate") - seen[0].pop("generate", 0) == 2
        assert seen[0] == seen[1]


class Dispatched(TorchDispatchMode):
    """Counts the operators that Python calls, and those of them that launch a kernel or more."""

    NO_KERNEL = frozenset(
        "prim alias detach empty expand permute select slice t transpose unbind unsqueeze view".split()
    )

    def __init__(self):
        super().__init__()
        self.operators, self.launches = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if namespace != "prim":
            self.operators += 1
            self.launches += name.strip("_").removeprefix("unsafe_") not in self.NO_KERNEL
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("preset", "kernels", "at_most"),
    [
        ("12x768", False, (426, 186)), ("12x768", True, (378, 142)),
        ("24x1024", False, (798, 330)), ("24x1024", True, (726, 262)),
    ],
)  # fmt: skip
def test_operators_and_kernels_of_a_token(preset, kernels, at_most, monkeypatch):
    """Of a step that is neither compiled nor a graph, at batch 1 with top_p; a graph is one launch."""
    monkeypatch.setattr("latent_verse.biart.sequence.Vocabulary.check_text", lambda *args, **kwargs: None)
    monkeypatch.setattr(sampling, "can_capture", lambda model, device: False)
    monkeypatch.setattr(network, "has_kernels", lambda device, dtype, head_dim: kernels)
    monkeypatch.setattr(sampling, "has_sampling_kernel", lambda device, classes: kernels)

    def fused(q, k, v, attn_mask, dropout_p, is_causal):  # one kernel, which PyTorch would choose, had it a driver
        return q.clone()

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", fused)
    counts = []
    with fake_cuda({"_check_finite": False, "prompt": False}):
        model = BiART(BiARTConfig(**PRESETS[preset])).bfloat16()
        known = torch.zeros(1, 1020, dtype=torch.long)
        with Dispatched() as seen:
            sampling.generate(
                model, torch.zeros(1, 64, dtype=torch.long), TEXT_TO_IMAGE, top_p=0.9, seed=1, prefix_BK=known,
                progress=lambda *_: counts.append((seen.operators, seen.launches)),
            )  # fmt: skip
    operators, launches = (after - before for before, after in zip(counts[1], counts[2], strict=True))
    assert operators <= at_most[0] and launches <= at_most[1]


def test_the_operator_of_decoding_says_what_it_changes():
    q, k, v = torch.randn(2, 3, 3, 16).unbind(1)
    caches = (torch.randn(2, 3, 7, 16) for _ in "kv")
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(decode_attention, (q, k, v, *caches, torch.tensor([6])), test_utils=checks)


@pytest.mark.parametrize("preset", ["12x768", "24x1024"])
@pytest.mark.parametrize("batch", [1, 64])
def test_a_compiled_block_decodes_in_eight_launches(preset, batch):
    """Four products, attention (two kernels if it divides its slots), and what is fused: norms with sums, and GELU."""
    config = BiARTConfig(**PRESETS[preset])

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = network.Block(config).bfloat16().eval()

        def forward(self, x_B1C, branch_B1C, k_BHSD, v_BHSD, pos_1):
            return self.block(x_B1C, branch_B1C, network.Past(k_BHSD, v_BHSD, pos_1, 1, None, by_kernel=True))

    def make():
        width, heads, bf16 = config.n_embd, config.n_head, torch.bfloat16
        x, branch = (torch.empty(batch, 1, width, dtype=bf16) for _ in range(2))
        k, v = (torch.empty(batch, heads, 1089, width // heads, dtype=bf16) for _ in range(2))
        return Step(), (x, branch, k, v, torch.zeros(1, dtype=torch.long))

    code, _ = generate(make, grad=False)
    assert code.launches.count("extern_kernels.addmm") == 4
    assert code.launches.count("torch.ops.latent_verse.decode_attention.default") == 1
    assert len(code.launches) == 8  # in particular none copies the cache
    assert code.triton_bytes <= batch * config.n_embd * 2 * (3 + 5 + 8) + 8 * 2 * config.n_embd


def test_scores_and_beams_stay_on_the_device(monkeypatch):
    monkeypatch.setattr("latent_verse.biart.sequence.Vocabulary.check_text", lambda *args, **kwargs: None)
    with fake_cuda({"_check_finite": False, "beam_search": False, "prompt": False}) as waits:
        model = BiART(BIART)
        text_BL, codes_BN = torch.empty(2, 6, dtype=torch.long), torch.empty(2, 16, dtype=torch.long)
        with waits.during_a_run():
            for given in ("text", "image"):
                assert on_gpu(*sampling.log_likelihood(model, text_BL, codes_BN, given))
            assert on_gpu(*sampling.beam_search(model, codes_BN, beam_size=2))


# ------------------------------------------------------------------------------------------------------- what they take


@pytest.mark.parametrize("D", [32, 256])
@pytest.mark.parametrize(("N", "K"), [
    *((N, 2**13) for N in (2**10, 2**13, 2**17)),
    *((2**13, K) for K in (2**10, 2**16)),
])  # fmt: skip
def test_the_quantiser_takes_an_eighth_of_one_hots_memory(N, K, D):
    taken = {}
    for way in ("ours", "one-hot"):
        with fake_cuda():
            book = Codebook(K, D, DECAY, EPS, 0.0)
            z_BDHW = torch.empty(1, N, 1, D).permute(0, 3, 1, 2)  # channels last
            quantise = EMAQuantizer(book, BETA).train()
            with PeakBytes() as count:
                quantise(z_BDHW) if way == "ours" else one_hot_forward(book, z_BDHW)
        taken[way] = count.peak
    assert taken["ours"] <= 1.01 * taken["one-hot"] / 8  # K / D = 4 is the least of these: one-hot is 16 K, ours 8 D


class Launches(TorchDispatchMode):
    """Counts an operator's calls."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.number = operator, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is self.operator
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("N", "slices"), [(2**8, 1), (2**10, 4), (2**11, 4), (2**15, 4), (2**17, 16)])
def test_the_quantiser_searches_in_few_slices(N, slices):
    """K = 1024: a quarter of the distances at a time, at least 1 MiB and at most 32 MiB of them."""
    with fake_cuda():
        book, z_ND = Codebook(2**10, 8, DECAY, EPS, 0.0), torch.empty(N, 8)
        with Launches(torch.ops.aten.addmm.out) as launches:
            book.nearest(z_ND)
    assert launches.number == slices


def kept_by_augvae(batch: int, plain: bool = False, autocast: torch.dtype | None = None, again: bool = False) -> int:
    """Bytes kept of the released AugVAE-ML's forward pass."""
    with fake_cuda(autocast=autocast):
        model = AugVAE(AugVAEConfig(**SHAPES["released"])).train()
        model = plain_augvae(model).train() if plain else model.to(memory_format=torch.channels_last)
        if again:
            checkpoint_activations(model)
        with Kept(model) as kept:
            x_BCHW = images(batch, 256)
            reconstruction, embed_loss, _ = model(x_BCHW)
            (reconstruction - x_BCHW).square().mean() + embed_loss
        return kept.bytes


def test_a_batch_four_times_as_large_fits():
    """Of what grows with the batch, bf16 and activation checkpointing keep less than a quarter."""
    plain, ours = (
        kept_by_augvae(4, **how) - kept_by_augvae(2, **how)
        for how in ({"plain": True}, {"autocast": torch.bfloat16, "again": True})
    )
    assert plain > 4 * ours > 2 * 2**30


def flash(q, k, v, attn_mask, dropout_p, is_causal):
    """The attention that PyTorch would choose, had it a driver to ask."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]


def test_biart_trains_32_sequences_in_40_gb(monkeypatch):
    """24x1024 in bf16, eager, when the backward pass begins: weights, AdamW's averages and what was kept."""
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", flash)
    held = []
    for again in (False, True):
        with fake_cuda(autocast=torch.bfloat16):
            model = BiART(BiARTConfig(**PRESETS["24x1024"])).train()
            if again:
                checkpoint_activations(model)
            vocab = model.vocab
            text_BL = torch.full((32, vocab.text_len), 5)
            sequences = vocab.pack(text_BL, torch.zeros(32, vocab.image_len, dtype=torch.long), 16, validate=False)
            with Kept(model) as kept:
                model.loss(sequences, loss_weights(0.1))
            held.append(kept.bytes + 12 * model.num_parameters())
    assert held[0] < 40e9
    assert held[1] < 0.8 * held[0]


@pytest.mark.parametrize(("autocast", "expected"), [
    (None, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32),
])  # fmt: skip
def test_the_residual_stream_follows_autocast(autocast, expected):
    with fake_cuda(autocast=autocast):
        model = BiART(BIART)
        seen = []
        for block in model.blocks:
            block.register_forward_hook(lambda block, args, outputs: seen.extend([args[0], outputs[0]]))
        features_BTC = model.features(torch.zeros(2, 23, dtype=torch.long), torch.zeros(2, 23, dtype=torch.long))
        assert {t.dtype for t in (*seen, features_BTC)} == {expected} and on_gpu(features_BTC)


@pytest.mark.parametrize(("again", "most"), [(False, 36), (True, 24)])
def test_bytes_that_an_eager_block_keeps(again, most):
    """Of each token and channel, in bf16."""
    shape, kept = {**PRESETS["24x1024"], "image_len": 64, "text_vocab": 100, "image_vocab": 100}, []
    for n_layer, batch in ((2, 2), (2, 4), (3, 2), (3, 4)):
        with fake_cuda(autocast=torch.bfloat16), pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.nn.functional.scaled_dot_product_attention", flash)
            model = BiART(BiARTConfig(**{**shape, "n_layer": n_layer})).train()
            if again:
                checkpoint_activations(model)
            idx_BT = torch.zeros(batch, model.vocab.input_len, dtype=torch.long)
            with Kept(model) as count:
                model.features(idx_BT, idx_BT)
            kept.append(count.bytes)
    (few, more), (few_deeper, more_deeper) = kept[:2], kept[2:]
    found = (more_deeper - few_deeper - more + few) / (2 * model.vocab.input_len * 1024)
    assert found < most + 0.1  # attention's sums and the norms' statistics


@pytest.mark.slow
def test_compiled_blocks_make_each_sum_and_its_norm_in_one_pass():
    shape, size = (32, 1089, 1024), 32 * 1089 * 1024

    def make():
        inputs = (torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        return BiART(BiARTConfig(**{**PRESETS["24x1024"], "n_layer": 1, "text_vocab": 9})).blocks[0], tuple(inputs)

    forward, _ = generate(make, autocast=torch.bfloat16, grad=False)
    passes = [name for name, moved in zip(forward.launches, forward.bytes, strict=True) if moved > size]
    assert len(passes) == 3  # the first sum and norm, the second, and GELU; the rest are casts of weights
    assert sum(name.startswith(("triton_per", "triton_red")) for name in passes) == 2
    assert forward.triton_bytes < 35 * size  # 16 for both sums and norms, 16 for GELU


def test_a_loss_that_is_not_finite_is_noted_without_waiting_and_read_where_metrics_are():
    with fake_cuda({"_stop_if_noted": 2**62}) as waits:
        divergence = Divergence(None)
        device = SimpleNamespace(root_device=torch.device(DEVICE))
        trainer = SimpleNamespace(
            strategy=device, world_size=1, global_step=0, max_steps=-1, log_every_n_steps=10, is_last_batch=False,
            accumulate_grad_batches=1,
        )  # fmt: skip
        divergence.setup(trainer, None, "fit")
        parameter = torch.nn.Parameter(torch.empty(3))
        parameter.grad, loss = torch.empty(3), torch.empty(())
        with waits.during_a_run():
            for batch_idx in range(20):
                divergence.on_before_backward(trainer, None, loss)
                divergence.on_before_optimizer_step(trainer, None, torch.optim.SGD([parameter]))
                trainer.global_step += 1
                divergence.on_train_batch_end(trainer, None, None, None, batch_idx)
            assert on_gpu(divergence._first)
    assert waits.seen == {"_stop_if_noted": 2}
