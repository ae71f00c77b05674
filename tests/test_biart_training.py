"""LitBiART's weights, shares and padding, and the optimiser MuonAdamW; whole runs are in test_train_biart.py."""

from __future__ import annotations

import copy

import pytest
import torch

from latent_verse.biart.model import BiART
from latent_verse.biart.sequence import IMAGE_TO_TEXT, TEXT_TO_IMAGE
from latent_verse.biart.training import LitBiART
from latent_verse.config import BiARTConfig
from latent_verse.config_biart import TrainBiARTConfig
from latent_verse.optimizer import MuonAdamW, adamw, orthogonalise, warm_up_then_cosine


class Codes:
    """Stands in for AugVAE."""

    config = None

    def eval(self):
        return self

    def requires_grad_(self, wanted):
        return self


def lit(**loss) -> tuple[LitBiART, list[torch.Tensor]]:
    config = TrainBiARTConfig()
    for name, value in loss.items():
        setattr(config.loss, name, value)
    shape = {"text_vocab": 11, "image_vocab": 7, "text_len": 3, "image_len": 5, "n_layer": 1, "n_head": 2, "n_embd": 16}
    torch.manual_seed(0)
    batch = [torch.randint(0, 7, (6, 5)), torch.tensor([[1, 2, -1]] * 3 + [[4, -1, -1]] * 3)]
    return LitBiART(BiART(BiARTConfig(**shape)), Codes(), config, {}), batch


def test_modality_weights_are_exact():
    module, batch = lit(reference_weight=0.3)
    sequences = module.pack(batch, 2)
    plain, means = module.loss(module.model, sequences)
    assert torch.allclose(plain, module.model.loss(sequences, 0.3)[0])
    module.config.loss.text_loss_weight, module.config.loss.image_loss_weight = 4.0, 0.5
    total, weighted_means = module.loss(module.model, sequences)
    share = {TEXT_TO_IMAGE: 2 / 6, IMAGE_TO_TEXT: 4 / 6}
    weights = {
        f"{TEXT_TO_IMAGE}/image": 0.5,
        f"{TEXT_TO_IMAGE}/text": 4 * 0.3,
        f"{IMAGE_TO_TEXT}/text": 4.0,
        f"{IMAGE_TO_TEXT}/image": 0.5 * 0.3,
    }
    expected = sum(share[name.split("/")[0]] * weight * means[name] for name, weight in weights.items())
    assert torch.allclose(total, expected, rtol=1e-5)
    assert all(torch.allclose(weighted_means[name], means[name], rtol=1e-5) for name in means)


@pytest.mark.parametrize(("share", "size"), [(0.5, 8), (0.5, 1), (0.3, 4), (1.0, 5), (0.0, 5)])
def test_the_share_of_directions_holds_to_the_row(share, size):
    module, _ = lit(text_to_image_share=share)
    rows = [module.rows_text_to_image(size, i) for i in range(20)]
    assert sum(rows) == round(20 * size * share) and max(rows) - min(rows) <= 1
    if float(size * share).is_integer():
        assert len(set(rows)) == 1  # static shapes


def test_captions_are_padded_with_the_models_own_pad():
    module, batch = lit()
    sequences = module.pack(batch, 6)
    vocab = module.model.vocab
    assert sequences.idx_BT[0, :4].tolist() == [vocab.begin_text, 1, 2, vocab.pad]
    assert sequences.text_BL[0].tolist() == [1, 2, vocab.text_vocab]  # the first pad is the end of the text


def test_orthogonalise_presses_singular_values_towards_one():
    torch.manual_seed(0)
    for shape in ((3, 20, 8), (2, 8, 20)):
        g = torch.randn(shape)
        values = torch.linalg.svdvals(orthogonalise(g))
        assert values.min() > 0.6 and values.max() < 1.25
        both = torch.linalg.svd(g, full_matrices=False)
        ideal = both.U @ both.Vh
        assert torch.nn.functional.cosine_similarity(orthogonalise(g).flatten(), ideal.flatten(), dim=0) > 0.98


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
def test_fused_adamw_takes_the_plain_steps_and_lets_gradients_be_clipped(grouped):
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
    # Lightning would refuse gradient_clip_val in mixed precision
    assert not one._step_supports_amp_scaling
    other.load_state_dict(one.state_dict())  # checkpoints of one serve the other


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
