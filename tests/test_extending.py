"""docs/extending.md: its Python blocks run, and what they add works in training, checkpoints and evaluation."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from latent_verse.augvae.losses import LOSSES
from latent_verse.augvae.model import AugVAE
from latent_verse.augvae.quantizer import QUANTIZERS
from latent_verse.biart.sampling import generate
from latent_verse.checkpoints.augvae import load_augvae, save_augvae
from latent_verse.commands import eval_biart, train_vae
from latent_verse.config import ConfigError, setting
from latent_verse.config.datasets import IMAGE_DATASETS, PAIR_DATASETS
from latent_verse.config.evaluate import EvalDataConfig
from latent_verse.config.train import TrainVAEConfig
from latent_verse.data import DataError
from latent_verse.data.datasets import IMAGES, PAIRS
from latent_verse.evaluation import image_tasks
from latent_verse.evaluation.pairs import Pairs
from latent_verse.evaluation.samples import read_image
from latent_verse.metrics import networks
from latent_verse.training.augvae import LitAugVAE
from tests.image_runs import SMALL
from tests.messages import naming
from tests.stand_ins import Colours, Words, write_pairs

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
TEXT = PAGE.read_text(encoding="utf-8")
TABLES = (QUANTIZERS, LOSSES, IMAGE_DATASETS, PAIR_DATASETS, IMAGES, PAIRS)
QUANTISER, LOSS, POSITIONS, DATASET, METRIC = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)  # each is tested below


def blocks(title: str) -> list[str]:
    """A section's Python blocks; tracebacks name the page's own lines."""
    start = TEXT.index(f"## {title}\n")
    section = TEXT[start:].split("\n## ")[0]
    found = re.finditer(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return ["\n" * TEXT.count("\n", 0, start + block.start(1)) + block[1] for block in found]


def run(sources: list[str], **names) -> dict:
    """Runs blocks one after the other; gives what they define."""
    for source in sources:
        exec(compile(source, PAGE, "exec", dont_inherit=True), names)
    return names


@pytest.fixture
def run_section(tmp_path, monkeypatch):
    """Runs a section in an empty folder; the library's tables are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        for table in TABLES:
            stack.enter_context(mock.patch.dict(table))
        yield lambda title: run(blocks(title), __name__="extending")


# -------------------------------------------------------------------------------------------------------- a quantiser


def test_a_new_quantiser_gives_codes_that_stand_for_what_it_decodes(run_section, tiny_config, tiny_images):
    run_section(QUANTISER)
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
    run_section(QUANTISER)
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
    run_section(QUANTISER)
    flags = [*SMALL, "--fake_data", "--quantizer", "fsq", "--codebook_dim", "5", "--codebook_init", "data"]
    assert train_vae.main([*flags, "--log_dir", str(tmp_path), "--name", "fsq"]) == 0
    model = load_augvae(tmp_path / "fsq")
    assert model.config.quantizer == "fsq" and not [k for k in model.state_dict() if k.startswith("quantizers")]


def test_a_quantiser_that_is_not_there_or_does_not_fit_is_refused(run_section, tiny_config):
    with pytest.raises(ConfigError, match=naming("quantizer", "fsq", "ema")):
        AugVAE(tiny_config(quantizer="fsq"))
    run_section(QUANTISER)
    with pytest.raises(ConfigError, match=naming("num_tokens", 24, "fsq", 27)):
        AugVAE(tiny_config(quantizer="fsq", codebook_dim=3))


# ------------------------------------------------------------------------------------------------------------- a loss


def test_a_new_loss_is_logged_term_by_term_and_minimised(run_section, tiny_augvae, tiny_images):
    section = run_section(LOSS)["SpectrumLossConfig"]
    module = LitAugVAE(tiny_augvae(), TrainVAEConfig(loss=section(spectrum_weight=0.3)))
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


# ------------------------------------------------------------------------------------------------ a position encoding


def test_a_new_position_encoding_is_sampled_from_and_acts(run_section, monkeypatch):
    page = run_section(POSITIONS)
    model, sequences = page["model"], page["sequences"]
    assert generate(model, page["text_BL"], "text_to_image", seed=0).shape == (2, 6)
    # with all positions equal, features differ
    monkeypatch.setattr(type(model), "positions", lambda self, places, image_first_B1: torch.zeros(1, 16))
    assert not torch.allclose(model.features(sequences.idx_BT, sequences.seg_BT), page["expected_BTC"], atol=1e-2)


# ---------------------------------------------------------------------------------------------------------- a dataset


def test_a_new_dataset_names_the_setting_of_a_file_that_is_not_there(run_section):
    page = run_section(DATASET)
    assert len(page["datasets"]["train"]) == 20
    with pytest.raises(DataError, match=naming("train_dir", "none.npz")):
        page["open_images"](page["ImageDataConfig"](dataset="npz", train_dir="none.npz"), 16)


def test_evaluation_reads_a_new_dataset(run_section):
    run_section(DATASET)

    @dataclass(frozen=True)
    class WithNpz(EvalDataConfig):  # whose choices were listed before the example came into the table
        dataset: str = setting("npz", "layout", ("npz",))

    pairs = Pairs(WithNpz(test_dir="birds.npz"), 16, 0)
    assert len(pairs) == 20 and pairs.captions(3) == ["a bird, number 3"]
    assert pairs.image(3).shape == (3, 16, 16)


# ----------------------------------------------------------------------------------------------------------- a metric


@pytest.fixture
def colourfulness():
    computation, _ = blocks(METRIC)
    return run([computation])["colourfulness"]


def test_a_new_metric_is_computed(colourfulness):
    grey = torch.full((3, 8, 8), 90, dtype=torch.uint8)
    assert colourfulness(grey) == 0
    halves = torch.zeros(3, 8, 8, dtype=torch.uint8)
    halves[0, :4], halves[1, 4:] = 200, 200  # red above green
    assert colourfulness(halves) == pytest.approx(np.hypot(200, 0) + 0.3 * np.hypot(0, 100))


def test_a_new_metric_is_reported_by_the_lines_of_the_page(colourfulness, tmp_path, monkeypatch):
    _, report = blocks(METRIC)
    head, end, body = inspect.getsource(image_tasks.report_images).partition('\n    """\n')
    source = head + end + textwrap.indent(report, "    ") + body
    edited = run([source], **vars(image_tasks), colourfulness=colourfulness)
    monkeypatch.setattr(image_tasks, "report_images", edited["report_images"])
    monkeypatch.setattr(networks, "open_inception", lambda **options: Colours())
    monkeypatch.setattr(networks, "open_clip_network", lambda *arguments: Words())
    pairs = write_pairs(tmp_path / "pairs", 5)
    flags = ["--generated_dir", pairs, "--test_dir", pairs, "--fid_resolution", 16, "--is_splits", 1, "--gpus", 0]
    assert eval_biart.main([*map(str, flags), "--log_dir", str(tmp_path / "runs"), "--name", "run"]) == 0
    record = json.loads((tmp_path / "runs" / "run" / "metrics.json").read_text())["figures"]["generation/colourfulness"]
    expected = [colourfulness(read_image(file, 16)) for file in sorted(pairs.glob("*.png"))]
    assert record["value"] == pytest.approx(np.mean(expected)) and record["samples"] == 5
    assert "generation/colourfulness" in (tmp_path / "runs" / "run" / "index.html").read_text().replace("<wbr>", "")
