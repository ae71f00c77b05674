"""docs/extending.md: its Python blocks run, and what they add works in training, checkpoints and evaluation."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from latent_verse.augvae.losses import LOSSES
from latent_verse.augvae.model import AugVAE
from latent_verse.augvae.quantizer import QUANTIZERS
from latent_verse.checkpoints.augvae import load_augvae, save_augvae
from latent_verse.commands import train_vae
from latent_verse.config import ConfigError
from latent_verse.config.train import TrainVAEConfig, VAELossConfig
from latent_verse.training.augvae import LitAugVAE
from tests.image_runs import SMALL

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
SECTIONS = re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)


@pytest.fixture
def run_section():
    """Runs a section's Python blocks, one after the other; gives what they define. Tables are as before afterwards."""

    def run(title: str) -> dict:
        text, names = PAGE.read_text(), {"__name__": "extending"}
        start = text.index(f"## {title}\n")
        end = text.find("\n## ", start)
        for block in re.finditer(r"^```python\n(.*?)^```", text[start : end if end > 0 else None], re.M | re.S):
            above = text.count("\n", 0, start + block.start(1))  # so that a traceback names the page's own line
            exec(compile("\n" * above + block[1], PAGE, "exec"), names)
        assert len(names) > 2, f"section {title} has no Python block"
        return names

    with mock.patch.dict(QUANTIZERS), mock.patch.dict(LOSSES):
        yield run


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_runs(run_section, title):
    run_section(title)


# -------------------------------------------------------------------------------------------------------- a quantiser


def test_a_new_quantiser_gives_codes_that_stand_for_what_it_decodes(run_section, tiny_config, tiny_images):
    run_section("A quantiser")
    torch.manual_seed(0)
    model = AugVAE(tiny_config(quantizer="fsq", codebook_dim=3, num_tokens=64)).eval()
    with torch.no_grad():
        model.pre_quants[0].weight.mul_(5)  # so that vectors reach all values
        encoded = model.encode(tiny_images())
    codes = model.codes(tiny_images())
    assert torch.equal(codes, torch.cat([level.flatten(1) for level in encoded.indices], dim=1))
    assert codes.unique().numel() > 10 and 0 <= codes.min() <= codes.max() < 64
    torch.testing.assert_close(model.decode_codes(codes), model.decode(encoded.z_q).clamp(-1, 1))
    every = torch.arange(64)  # lookup and nearest are each other's inverse
    assert torch.equal(model.quantizer.nearest(torch.atanh(0.999 * model.quantizer.lookup(every))), every)


def test_a_new_quantiser_learns_and_is_saved_and_loaded(run_section, tiny_config, tiny_images, tmp_path):
    run_section("A quantiser")
    torch.manual_seed(0)
    config = TrainVAEConfig(model=tiny_config(quantizer="fsq", codebook_dim=3, num_tokens=64))
    module = LitAugVAE(AugVAE(config.model), config)
    module.log = lambda *args, **kwargs: None  # there is no Trainer
    module.configure_model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = module.training_step([tiny_images()], 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        assert module.model.encoders[-1].conv_out.weight.grad.any()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    save_augvae(module.model, tmp_path)
    again = load_augvae(tmp_path)
    assert again.config == config.model
    assert torch.equal(again.codes(tiny_images()), module.model.eval().codes(tiny_images()))


def test_a_new_quantiser_needs_no_other_edit_to_be_trained_by_the_script(run_section, tmp_path):
    run_section("A quantiser")
    flags = [*SMALL, "--fake_data", "--quantizer", "fsq", "--codebook_dim", "5", "--codebook_init", "data"]
    assert train_vae.main([*flags, "--log_dir", str(tmp_path), "--name", "fsq"]) == 0
    model = load_augvae(tmp_path / "fsq")
    assert model.config.quantizer == "fsq" and not [k for k in model.state_dict() if k.startswith("quantizers")]


def test_a_quantiser_that_is_not_there_or_does_not_fit_is_refused(run_section, tiny_config):
    with pytest.raises(ConfigError, match=r"quantizer.*'fsq'.*ema"):
        AugVAE(tiny_config(quantizer="fsq"))
    run_section("A quantiser")
    with pytest.raises(ConfigError, match=r"num_tokens.* 24.*fsq.* 27 "):
        AugVAE(tiny_config(quantizer="fsq", codebook_dim=3))


# ------------------------------------------------------------------------------------------------------------- a loss


def test_a_new_loss_is_logged_term_by_term_and_minimised(run_section, tiny_augvae, tiny_images):
    run_section("A loss")
    module = LitAugVAE(tiny_augvae(), TrainVAEConfig(loss=VAELossConfig(loss_type="mse_spectrum")))
    logged: dict[str, float] = {}
    module.log = lambda name, value, **kwargs: logged.update({name: float(value.detach())})
    module.log_dict = logged.update
    module.configure_model()
    loss = module.training_step([tiny_images()], 0)["loss"]
    parts = [logged[f"train/{name}"] for name in ("rec_loss", "spectrum_loss", "embed_loss")]
    assert all(value > 0 for value in parts) and loss.item() == pytest.approx(sum(parts))
    module.eval().validation_step([tiny_images()], 0)
    module.on_validation_epoch_end()
    assert logged["val/spectrum_loss"] > 0
