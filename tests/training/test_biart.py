"""LitBiART's losses, shares, averages and optimisers, and MuonAdamW; whole runs are in test_train_biart.py."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from latent_verse.biart.model import BiART, loss_weights
from latent_verse.biart.sequence import IMAGE_TO_TEXT, TEXT_TO_IMAGE
from latent_verse.config import BiARTConfig
from latent_verse.config.train import TrainBiARTConfig
from latent_verse.training.biart import LitBiART
from latent_verse.training.optimizer import MuonAdamW, adamw, orthogonalise, warm_up_then_cosine


class Codes:
    """Stands in for AugVAE."""

    config = None

    def eval(self):
        return self

    def requires_grad_(self, wanted):
        return self

    def to(self, device):
        return self


def lit(**settings) -> tuple[LitBiART, list[torch.Tensor]]:
    """With settings of the loss, the optimiser and the trainer; and a batch of six."""
    config = TrainBiARTConfig()
    for name, value in settings.items():
        (section,) = (s for s in ("loss", "optim", "trainer") if hasattr(getattr(config, s), name))
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    shape = {"text_vocab": 11, "image_vocab": 7, "text_len": 3, "image_len": 5, "n_layer": 1, "n_head": 2, "n_embd": 16}
    torch.manual_seed(0)
    model, codes = BiART(BiARTConfig(**shape)), torch.Generator().manual_seed(0)
    batch = [torch.randint(0, 7, (6, 5), generator=codes), model.vocab.pad_text([[1, 2]] * 3 + [[4]] * 3)]
    return LitBiART(model, Codes(), config, {}), batch


def run(module: LitBiART, batches: list, val: list | None = None, callback=None, **settings) -> pl.Trainer:
    """Train on whole batches, in their order, or without any validate on `val`; returns the Trainer."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps")
    settings = {"max_epochs": 1, "callbacks": [callback] if callback else None} | settings
    trainer = pl.Trainer(accelerator="cpu", **dict.fromkeys(quiet, False), **settings)
    loaders = [data and torch.utils.data.DataLoader(data, batch_size=None) for data in (batches, val)]
    if batches:
        trainer.fit(module, *loaders)
    else:
        trainer.validate(module, loaders[1], verbose=False)
    return trainer


class AfterEachBatch(pl.Callback):
    """Keeps what `look(trainer, module)` returns after each training batch."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(self.look(trainer, pl_module))


def test_settings_reach_the_weights_of_the_loss():
    module, batch = lit(reference_weight=0.3, text_loss_weight=4.0, image_loss_weight=0.5)
    total, means = module.loss(module.model, module.pack(batch, 2))
    weights = {
        f"{TEXT_TO_IMAGE}/image": 2 / 6 * 0.5,
        f"{TEXT_TO_IMAGE}/text": 2 / 6 * 4 * 0.3,
        f"{IMAGE_TO_TEXT}/text": 4 / 6 * 4.0,
        f"{IMAGE_TO_TEXT}/image": 4 / 6 * 0.5 * 0.3,
    }
    torch.testing.assert_close(total, sum(weight * means[name] for name, weight in weights.items()))


@pytest.mark.parametrize(("share", "size"), [(0.5, 8), (0.5, 1), (0.3, 4), (1.0, 5), (0.0, 5)])
def test_the_share_of_directions_holds_to_the_row(share, size):
    module, _ = lit(text_to_image_share=share)
    rows = [module.rows_text_to_image(size, i) for i in range(20)]
    assert sum(rows) == round(20 * size * share) and max(rows) - min(rows) <= 1
    if float(size * share).is_integer():
        assert len(set(rows)) == 1  # static shapes


def test_orthogonalise_presses_singular_values_towards_one():
    torch.manual_seed(0)
    for shape in ((3, 20, 8), (2, 8, 20)):
        g = torch.randn(shape)
        values = torch.linalg.svdvals(orthogonalise(g))
        assert values.min() > 0.6 and values.max() < 1.25
        both = torch.linalg.svd(g, full_matrices=False)
        ideal = both.U @ both.Vh
        assert torch.nn.functional.cosine_similarity(orthogonalise(g).flatten(), ideal.flatten(), dim=0) > 0.98


def newton_schulz(g_NRC):
    """The iteration as Jordan wrote it, in float64."""
    x = g_NRC.double()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


@pytest.mark.parametrize("shape", [(2, 24, 216), (3, 16, 32), (3, 16, 31), (2, 40, 10), (2, 12, 12), (1, 1, 9)])
@pytest.mark.parametrize("kind", ["random", "of rank 2", "singular values of 1 to 1e-8", "one large row", "zero"])
def test_orthogonalise_is_newton_schulz_whatever_the_shape(shape, kind):
    torch.manual_seed(0)
    n, rows, columns = shape
    g = torch.randn(shape)
    if kind == "of rank 2":
        g = torch.randn(n, rows, 2) @ torch.randn(n, 2, columns)
    elif kind == "singular values of 1 to 1e-8":
        parts = torch.linalg.svd(g, full_matrices=False)
        g = parts.U @ torch.diag_embed(torch.logspace(0, -8, min(rows, columns)).expand(n, -1)) @ parts.Vh
    elif kind == "one large row":
        g[:, 0] *= 1e6
    elif kind == "zero":
        g.zero_()
    plain, ours = newton_schulz(g), orthogonalise(g)
    assert ours.dtype == torch.float32 and ours.shape == g.shape
    assert (ours - plain).norm() <= 1e-3 * plain.norm()  # a wrong iteration is off by 0.1 and more


def test_muon_steps_as_torchs_own():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch without Muon")
    torch.manual_seed(0)
    start = torch.randn(12, 6)
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    bias = torch.nn.Parameter(torch.zeros(6))
    one = MuonAdamW([mine], [{"params": [bias], "weight_decay": 0.0}], lr=0.1, muon_lr=0.05, weight_decay=0.1)
    two = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        gradient = torch.randn(12, 6)
        mine.grad, theirs.grad, bias.grad = gradient.clone(), gradient.clone(), torch.ones(6)
        one.step()
        two.step()
    assert torch.allclose(mine, theirs, atol=5e-3)  # theirs is bfloat16
    assert torch.allclose(bias, torch.full((6,), -0.4), atol=1e-4)


def test_muon_adamw_comes_back_from_its_state_dict():
    def new():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
        rest = [{"params": [layer.bias for layer in net], "weight_decay": 0.0}]
        return net, MuonAdamW([layer.weight for layer in net], rest, lr=0.02, muon_lr=0.05, weight_decay=0.1)

    def steps(net, optimizer, numbers):
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for number in numbers:
            optimizer.zero_grad()
            net(torch.full((3, 4), float(number))).square().sum().backward()
            optimizer.step()
            schedule.step()
        return [group["lr"] for group in optimizer.param_groups]

    whole, optimizer = new()
    steps(whole, optimizer, range(3))
    state, weights = copy.deepcopy(optimizer.state_dict()), {k: v.clone() for k, v in whole.state_dict().items()}
    rates = steps(whole, optimizer, range(3, 6))
    assert rates[1] < 0.02  # AdamW's groups follow the schedule
    again, optimizer = new()
    again.load_state_dict(weights)
    optimizer.load_state_dict(state)
    steps(again, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("grouped", [False, True])
def test_fused_adamw_takes_the_plain_steps(grouped):
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    mine, plain = ([{"params": list(net.parameters())}] if grouped else list(net.parameters()) for net in nets)
    one, other = adamw(mine, **settings), torch.optim.AdamW(plain, **settings)
    assert one.param_groups[0]["fused"] and not other.param_groups[0]["fused"]
    x = torch.randn(32, 8)
    for _ in range(20):
        for net, optimizer in zip(nets, (one, other), strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(list(nets[0].parameters()), list(nets[1].parameters()), rtol=1e-5, atol=1e-7)
    other.load_state_dict(one.state_dict())  # checkpoints of one serve the other


# ------------------------------------------------------------------------------- from the settings to the training step


def weights(network) -> list[torch.Tensor]:
    return [p.detach().clone() for p in network.parameters()]


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 4), (2, 2)])
def test_averaged_weights_are_those_of_a_hand_computation(accumulate, steps):
    """Decays 1/10 and 2/11 while they are below ema_decay, then that; one average a step, not one a batch."""
    module, batch = lit(ema_decay=0.2, learning_rate=0.05)
    expected = weights(module.model)
    assert all(torch.equal(a, b) for a, b in zip(weights(module.ema), expected, strict=True))
    watch = AfterEachBatch(lambda trainer, module: (weights(module.model), weights(module.ema)))
    run(module, [batch] * 4, callback=watch, accumulate_grad_batches=accumulate)
    stepped = watch.seen[accumulate - 1 :: accumulate]
    assert len(stepped) == steps
    for decay, (now, averaged) in zip((1 / 10, 2 / 11, 0.2, 0.2), stepped, strict=False):
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, now, strict=True)]
        torch.testing.assert_close(averaged, expected)
    assert (averaged[0] - now[0]).abs().max() > 1e-3  # two different things by now
    assert not any(p.requires_grad for p in module.ema.parameters())


@pytest.mark.parametrize("averaged", [False, True])
def test_validation_uses_the_averaged_weights_where_there_are_any(averaged):
    module, batch = lit(ema_decay=0.9 if averaged else 0)
    for seed, network in enumerate((module.model, module.ema)[: 1 + averaged]):
        torch.manual_seed(seed)
        for parameter in network.parameters():
            parameter.data.normal_(std=0.3)
    found = run(module, [], [batch]).callback_metrics
    network = module.ema if averaged else module.model
    assert module.network is network
    for rows, direction in ((6, TEXT_TO_IMAGE), (0, IMAGE_TO_TEXT)):
        _, means = network.loss(module.pack(batch, rows), loss_weights(0.1))
        for name, mean in means.items():
            torch.testing.assert_close(found[f"val/{name}_loss"], mean)
            assert name.startswith(direction)


@pytest.mark.parametrize(
    ("changes", "weights_of"),
    [
        ({}, {"text_to_image/image": 0.5, "text_to_image/text": 0.05, "image_to_text/text": 0.5}),
        ({"text_to_image_share": 0.25}, {"text_to_image/image": 0.25, "image_to_text/text": 0.75}),
        ({"text_to_image_share": 1.0}, {"text_to_image/image": 1.0, "image_to_text/text": 0.0}),
        (
            {"text_to_image_share": 0.8, "text_loss_weight": 2.0, "image_loss_weight": 0.5, "reference_weight": 0.3},
            {
                "text_to_image/image": 0.8 * 0.5,
                "text_to_image/text": 0.8 * 2 * 0.3,
                "image_to_text/text": 0.2 * 2,
                "image_to_text/image": 0.2 * 0.5 * 0.3,
            },
        ),
    ],
)
def test_the_loss_of_validation_weighs_directions_by_their_shares(changes, weights_of):
    """And is a mean over all tokens, though batches differ in size and captions in length."""
    module, (codes, text) = lit(**changes)
    found = run(module, [], [[codes[:4], text[:4]], [codes[4:], text[4:]], [codes[:0], text[:0]]]).callback_metrics
    share = changes.get("text_to_image_share", 0.5)
    defaults = {f"{TEXT_TO_IMAGE}/text": 0.1 * share, f"{IMAGE_TO_TEXT}/image": 0.1 * (1 - share)}
    means = {}
    with torch.no_grad():
        for rows in (6, 0):  # all pairs in one batch, the one way and the other
            means |= module.model.loss(module.pack([codes, text], rows), loss_weights(0.1))[1]
    expected = sum((defaults | weights_of)[name] * mean for name, mean in means.items())
    assert len(means) == 4
    torch.testing.assert_close(found["val/total_loss"], expected)
    torch.testing.assert_close({name: found[f"val/{name}_loss"] for name in means}, means)


def record_packed(monkeypatch) -> dict[bool, list]:
    """What the network learns (True) and is validated on (False)."""
    seen = {True: [], False: []}
    loss = BiART.loss

    def recorded(self, sequences, *args):
        seen[self.training].append(sequences)
        return loss(self, sequences, *args)

    monkeypatch.setattr(BiART, "loss", recorded)
    return seen


@pytest.mark.parametrize(
    ("dropouts", "shares"),  # of captions and images given, then of images and captions to be generated
    [
        ({}, (0, 0, 0, 0)),
        ({"reference_dropout": 1.0}, (1, 1, 0, 0)),
        ({"reference_dropout": 0.25}, (0.25, 0.25, 0, 0)),
        ({"word_dropout": 0.5}, (0, 0, 0, 0.5)),
        ({"word_dropout": 0.2}, (0, 0, 0, 0.2)),
        ({"code_dropout": 0.4}, (0, 0, 0.4, 0)),
    ],
)
def test_dropouts_hide_their_share_in_training_and_nothing_in_validation(monkeypatch, dropouts, shares):
    module, _ = lit(**{"reference_dropout": 0.0} | dropouts)
    vocab, many = module.model.vocab, 800  # so that what is found is within 0.04 of its share
    batch = [torch.randint(0, 7, (many, 5)), torch.randint(0, 11, (many, 3))]
    seen = record_packed(monkeypatch)
    run(module, [batch], [batch])
    (packed,), (validated,) = seen[True], seen[False]
    hidden_BT = packed.idx_BT == vocab.null
    assert not hidden_BT[:, 0].any()
    rows = {TEXT_TO_IMAGE: slice(0, many // 2), IMAGE_TO_TEXT: slice(many // 2, many)}
    parts = [(TEXT_TO_IMAGE, "text"), (IMAGE_TO_TEXT, "image"), (TEXT_TO_IMAGE, "image"), (IMAGE_TO_TEXT, "text")]
    for (direction, modality), share in zip(parts, shares, strict=True):
        found = hidden_BT[rows[direction], vocab.positions(direction, modality)][:, 1:].float().mean()  # [0] begins it
        assert found.item() == pytest.approx(share, abs=0.04 if 0 < share < 1 else 0)
    assert len(validated.idx_BT) == 2 * many and not (validated.idx_BT == vocab.null).any()


@pytest.mark.parametrize("text_loss_weight", [1.0, 3.0])
def test_loss_chunk_bounds_the_logits_and_changes_no_value(monkeypatch, text_loss_weight):
    found, largest = [], []
    cross_entropy = torch.nn.functional.cross_entropy

    def recorded(logits, *args, **kwargs):
        largest[-1] = max(largest[-1], len(logits))
        return cross_entropy(logits, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", recorded)
    for chunk in (None, 4):
        module, batch = lit(loss_chunk=chunk, text_loss_weight=text_loss_weight)
        largest.append(0)
        total, means = module.loss(module.model, module.pack(batch, 2))
        total.backward()
        found.append((total.detach(), means, [p.grad for p in module.model.parameters()]))
    assert largest == [4 * 5, 4]  # image to text, 4 rows of 5 codes, or a chunk
    torch.testing.assert_close(found[1], found[0])


# ------------------------------------------------------------------------------- from the settings to the optimiser


def groups_of(module) -> list[dict]:
    module.trainer = SimpleNamespace(estimated_stepping_batches=10)
    (optimizer,), _ = module.configure_optimizers()
    return optimizer.param_groups


def names_of(module, group: dict) -> set[str]:
    ids = {id(p) for p in group["params"]}
    return {name for name, p in module.model.named_parameters() if id(p) in ids}


MATRICES = {f"blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")}


def test_settings_reach_adamw():
    module, _ = lit(learning_rate=0.02, weight_decay=0.3, betas=(0.7, 0.8))
    decayed, rest = groups_of(module)
    assert [group["weight_decay"] for group in (decayed, rest)] == [0.3, 0.0]
    for group in (decayed, rest):
        assert group["lr"] == 0.02 and group["betas"] == (0.7, 0.8)
    assert names_of(module, decayed) == MATRICES | {"head.weight"}
    everything = {name for name, _ in module.model.named_parameters()}
    assert names_of(module, rest) == everything - names_of(module, decayed)


@pytest.mark.parametrize(("muon_rate", "found"), [(None, 0.02), (0.05, 0.05)])
def test_settings_reach_muon_and_the_adamw_beside_it(muon_rate, found):
    settings = {"learning_rate": 0.02, "muon_learning_rate": muon_rate, "weight_decay": 0.3, "betas": (0.7, 0.8)}
    module, _ = lit(optimizer="muon", muon_momentum=0.6, **settings)
    matrices, head, rest = groups_of(module)
    assert matrices["muon"] and not head["muon"] and not rest["muon"]
    assert (matrices["lr"], matrices["weight_decay"], matrices["momentum"]) == (found, 0.3, 0.6)
    assert [group["lr"] for group in (head, rest)] == [0.02, 0.02]
    assert [group["betas"] for group in (head, rest)] == [(0.7, 0.8)] * 2
    assert [group["weight_decay"] for group in (head, rest)] == [0.3, 0.0]
    assert names_of(module, matrices) == MATRICES and names_of(module, head) == {"head.weight"}
    everything = {name for name, _ in module.model.named_parameters()}
    assert names_of(module, rest) == everything - MATRICES - {"head.weight"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_settings_reach_the_schedule_which_ends_with_the_run(optimizer):
    module, batch = lit(optimizer=optimizer, learning_rate=0.02, warmup_steps=1, min_lr_ratio=0.2)
    rates = []
    step = module.optimizer_step

    def recorded(epoch, batch_idx, optimizer, *args, **kwargs):
        rates.append([group["lr"] / 0.02 for group in optimizer.param_groups])
        return step(epoch, batch_idx, optimizer, *args, **kwargs)

    module.optimizer_step = recorded
    last = AfterEachBatch(lambda trainer, module: trainer.optimizers[0].param_groups[0]["lr"] / 0.02)
    run(module, [batch] * 3, callback=last, max_epochs=3)  # 9 steps: 1 of warm-up and 8 of decay
    assert [set(groups) for groups in rates] == [{groups[0]} for groups in rates]
    factors = [groups[0] for groups in rates]
    assert factors[:2] == pytest.approx([0.5, 1.0]) and factors[5] == pytest.approx(0.6)
    assert last.seen[-1] == pytest.approx(0.2)


# ------------------------------------------------------------------------------------------------------------ schedule


@pytest.mark.parametrize(
    ("warmup", "total", "floor", "factors"),
    [
        # 3 steps of warm-up, 12 of decay: cosines of 0, 60, 90, 120 and 180 degrees
        (3, 15, 0.2, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 7: 0.8, 9: 0.6, 11: 0.4, 15: 0.2, 16: 0.2, 40: 0.2}),
        (0, 12, 0.0, {0: 1.0, 4: 0.75, 6: 0.5, 8: 0.25, 12: 0.0, 13: 0.0}),
        (4, 10, 1.0, {0: 0.2, 2: 0.6, 4: 1.0, 7: 1.0, 10: 1.0}),
        (4, 4, 0.1, {3: 0.8, 4: 1.0, 5: 0.1}),  # ends with the warm-up
        (2, float("inf"), 0.1, {1: 2 / 3, 2: 1.0, 1000: 1.0}),  # a run without an end
    ],
)
def test_the_rate_warms_up_and_falls_along_a_cosine(warmup, total, floor, factors):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8.0)
    schedule = warm_up_then_cosine(optimizer, warmup, lambda: total, floor)
    rates = []
    for _ in range(max(factors) + 1):
        rates += [optimizer.param_groups[0]["lr"]]
        optimizer.step()
        schedule.step()
    assert {step: rates[step] / 8 for step in factors} == pytest.approx(factors)


def test_how_long_the_run_is_is_not_asked_before_the_warm_up_has_ended():
    def total():
        raise AssertionError("the data is loaded too early")

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = warm_up_then_cosine(optimizer, 2, total)
    for _ in range(2):
        optimizer.step()
        schedule.step()
    with pytest.raises(AssertionError, match="too early"):
        schedule.step()


@pytest.mark.parametrize("loss_chunk", [None, 4])
def test_compiled_training_is_the_same_and_leaves_validation_alone(monkeypatch, loss_chunk):
    """Also where the share of rows text to image changes from batch to batch. Losses by chunks are not compiled."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    steps = {}
    for compile in (False, True):
        module, batch = lit(compile=compile, loss_chunk=loss_chunk, text_loss_weight=2.0)
        run(module, [], val=[batch])
        assert not graphs
        losses = []
        for rows in (3, 2, 4, 3):
            total, _ = module.loss(module.model, module.pack(batch, rows))
            losses.append(total)
        torch.stack(losses).sum().backward()
        steps[compile] = [*losses, *(p.grad for p in module.model.parameters())]
    assert any("cross_entropy" in code for code in graphs) is (loss_chunk is None)
    assert any("scaled_dot_product_attention" in code for code in graphs)
    torch.testing.assert_close(steps[True], steps[False])
    torch._dynamo.reset()
