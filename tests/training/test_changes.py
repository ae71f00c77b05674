"""Settings that differ from the checkpoint's: what is said is what is done, and none is forgotten."""

from __future__ import annotations

import csv
import re
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.checkpoints.ckpt_files import CheckpointError, check_shape, read_ckpt
from latent_verse.commands import train_vae
from latent_verse.config import AugVAEConfig, ConfigError, as_plain
from latent_verse.config.train import TrainBiARTConfig, TrainVAEConfig
from latent_verse.training.augvae import LitAugVAE
from latent_verse.training.backups import RunFolder
from latent_verse.training.biart import LitBiART
from latent_verse.training.changes import LENGTH_AND_PROCESSES, at_resume, changes
from latent_verse.training.runs import Run
from latent_verse.training.trainer import fit, make_trainer
from tests.biart.tiny_biart import CONFIG
from tests.image_runs import SMALL, write_pictures
from tests.messages import naming

pytestmark = pytest.mark.usefixtures("one_thread")
SECTIONS = ("optim", "trainer", "loss")
EACH_EPOCH = 4  # batches


class Seen(pl.Callback):
    """The parameter groups, without their parameters, of each step."""

    def __init__(self):
        self.groups = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        self.groups[trainer.global_step] = groups


def lit(stage: str, tiny_config, **settings):
    config = TrainVAEConfig(model=tiny_config()) if stage == "augvae" else TrainBiARTConfig()
    t = {"gpus": 0, "epochs": 2, "logger": "csv", "refresh_rate": 0, "num_sanity_val_steps": 0}
    config = replace(config, trainer=replace(config.trainer, **t))
    for name, value in settings.items():
        (section,) = (section for section in SECTIONS if hasattr(getattr(config, section), name))
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    torch.manual_seed(0)
    if stage == "augvae":
        return LitAugVAE(AugVAE(config.model), config), [[torch.rand(2, 3, 16, 16)]] * EACH_EPOCH
    batch = [torch.randint(0, CONFIG.image_vocab, (2, CONFIG.image_len)), torch.randint(0, 5, (2, CONFIG.text_len))]
    return LitBiART(BiART(CONFIG), torch.nn.Identity(), config, {}), [batch] * EACH_EPOCH


def train(folder: Path, module, batches, start_from: Path | None = None) -> dict[int, list[dict]]:
    seen, run = Seen(), Run(folder, "0")
    first_step = read_ckpt(start_from)["global_step"] if start_from else 0
    made = make_trainer(module.config.trainer, RunFolder(run, module.config), [seen], first_step)
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    data = pl.LightningDataModule.from_datasets(batches, batch_size=None)
    data.train_dataloader, data.skipped = lambda: loader, 0
    fit(made, module.config.trainer, run, module, data, start_from, first_step)
    return seen.groups


CHANGED = [
    ("biart", {}, {"learning_rate": 1e-5}),
    ("biart", {"warmup_steps": 3}, {"betas": (0.5, 0.6), "weight_decay": 0.3, "min_lr_ratio": 0.5, "warmup_steps": 6}),
    ("biart", {}, {"epochs": 7}),
    ("biart", {}, {"max_steps": 6}),
    ("biart", {"ema_decay": 0.5}, {"ema_decay": 0.9}),
    ("biart", {"optimizer": "muon"}, {"muon_learning_rate": 1e-2, "muon_momentum": 0.5, "weight_decay": 0.0}),
    ("biart", {}, {"accumulate_grad_batches": 2, "epochs": 4}),
    ("augvae", {}, {"learning_rate": 1e-4, "betas": (0.1, 0.2), "weight_decay": 0.5}),
    ("augvae", {"lr_cosine": True, "warmup_steps": 2}, {"learning_rate": 1e-4, "epochs": 3}),
    ("augvae", {"lr_cosine": True}, {"lr_cosine": False}),
    ("augvae", {}, {"lr_cosine": True, "warmup_steps": 6}),
    ("augvae", {"optimizer": "muon"}, {"learning_rate": 1e-4, "weight_decay": 0.5}),
]


# AugVAE takes longer: one of its cases is enough for a fast run
CASES = [
    pytest.param(*case, marks=[pytest.mark.slow] if i > 7 else [], id=f"{case[0]}-{'-'.join(case[2])}")
    for i, case in enumerate(CHANGED)
]


@pytest.mark.parametrize(("stage", "then", "now"), CASES)
def test_a_resumed_optimiser_is_where_the_settings_would_have_put_it(stage, then, now, tmp_path, tiny_config, capsys):
    """Its groups are those of a run that had these settings from the first step on."""
    train(tmp_path / "first", *lit(stage, tiny_config, **{**then, "epochs": 1}))
    (last,) = (tmp_path / "first" / "checkpoints").glob("last-*.ckpt")
    settings = {"epochs": 2, **then, **now}
    capsys.readouterr()
    resumed = train(tmp_path / "second", *lit(stage, tiny_config, **settings), last)
    said = capsys.readouterr().out
    whole = train(tmp_path / "whole", *lit(stage, tiny_config, **{**settings, "accumulate_grad_batches": 1}))
    for groups in (group for of_step in (*resumed.values(), *whole.values()) for group in of_step):
        groups.pop("initial_lr", None)  # a schedule's, of which the checkpoint may have had none, or the reverse
    assert resumed and min(resumed) == EACH_EPOCH
    if "accumulate_grad_batches" not in now:
        assert resumed == {step: groups for step, groups in whole.items() if step >= EACH_EPOCH}
    for name, value in now.items():
        assert naming("Changed", name, list(value) if isinstance(value, tuple) else value).search(said), name
    assert said.count("Changed") == len(now) + ("epochs" not in now)


def test_nothing_is_said_or_changed_where_no_setting_is(tmp_path, tiny_config, capsys):
    module, batches = lit("augvae", tiny_config)
    train(tmp_path / "first", module, batches)
    (last,) = (tmp_path / "first" / "checkpoints").glob("last-*.ckpt")
    assert changes(last, module.config) == []


@pytest.mark.parametrize(("then", "now"), [(1e-3, 1e-3), (1e-3, 4e-3)])
def test_a_rate_that_lr_decay_has_halved_stays_halved(tmp_path, tiny_config, then, now, monkeypatch):
    def halved(self, metrics):
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.25

    monkeypatch.setattr(torch.optim.lr_scheduler.ReduceLROnPlateau, "step", halved)
    first = train(tmp_path / "first", *lit("augvae", tiny_config, lr_decay=True, learning_rate=then, epochs=1))
    (last,) = (tmp_path / "first" / "checkpoints").glob("last-*.ckpt")
    second = train(tmp_path / "second", *lit("augvae", tiny_config, lr_decay=True, learning_rate=now), last)
    assert second[EACH_EPOCH][0]["lr"] == pytest.approx(first[0][0]["lr"] * 0.25 * now / then, rel=1e-12)


@pytest.mark.parametrize(
    ("then", "now", "facts"),
    [
        ({}, {"optimizer": "muon"}, ["optimizer", "muon", "adamw"]),
        ({"optimizer": "muon"}, {"optimizer": "adamw"}, ["optimizer", "muon", "adamw"]),
        ({}, {"ema_decay": 0.9}, ["ema_decay", 0.9, 0.0]),
        ({"ema_decay": 0.9}, {"ema_decay": 0.0}, ["ema_decay", 0.9, 0.0]),
    ],
)
def test_what_the_checkpoint_has_no_state_for_is_refused(tmp_path, tiny_config, then, now, facts):
    train(tmp_path / "first", *lit("biart", tiny_config, **then, epochs=1))
    (last,) = (tmp_path / "first" / "checkpoints").glob("last-*.ckpt")
    with pytest.raises(CheckpointError, match=naming(last, *facts)) as error:
        train(tmp_path / "second", *lit("biart", tiny_config, **{**then, **now}), last)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("--epochs 1 --max_steps 60", "--epochs 2 --max_steps 60"),
        ("--epochs 9 --max_steps 2", "--epochs 9 --max_steps 5"),
    ],
)
def test_a_run_that_either_limit_ended_goes_on_when_that_is_raised(tmp_path, then, now, capsys):
    """The message names the limit; the rest is as if it had been that high from the start."""
    flags = [*SMALL, "--train_dir", str(write_pictures(tmp_path / "train", 12)), "--log_dir", str(tmp_path), "--backup"]
    assert train_vae.main([*flags, *now.split(), "--name", "straight"]) == 0
    capsys.readouterr()
    assert train_vae.main([*flags, *then.split(), "--name", "parts"]) == 0
    raised, other = ("--epochs", "--max_steps")[:: 1 if "60" in now else -1]
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "Stopped" in line)
    assert naming(raised).search(said) and other not in said.split("Raise")[1]
    assert train_vae.main([*flags, *now.split(), "--name", "parts"]) == 0
    losses = []
    for name in ("straight", "parts"):
        rows = csv.DictReader((tmp_path / name / "logs" / "metrics.csv").open())
        losses.append([(row["step"], row["epoch"], row["train/total_loss"]) for row in rows if row["train/total_loss"]])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("batch_size", "steps"),
    [(2, 2 + 6), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((6, 1 + 2), (12, 1 + 1), (4, 1 + 3)))],
)
def test_an_epoch_goes_on_after_as_many_samples_with_another_batch_size(tmp_path, killed, batch_size, steps):
    """8 of 12 images were used: those left make 2, 0 or 1 batches, and the epoch ends with its validation."""
    data = {split: write_pictures(tmp_path / split, count) for split, count in (("train", 12), ("val", 4))}
    flags = [
        *SMALL,
        "--train_dir",
        str(data["train"]),
        "--val_dir",
        str(data["val"]),
        "--log_dir",
        str(tmp_path / "runs"),
    ]
    flags += ["--epochs", "2"]
    with killed(LitAugVAE, step=2):
        train_vae.main([*flags, "--name", "cut", "--backup", "--backup_steps", "1"])
    newest = tmp_path / "runs" / "cut" / "backups" / "step=2.ckpt"
    more = ["--resume", "--ckpt_path", str(newest), "--batch_size", str(batch_size), "--name", "rest"]
    seen, original = [], LitAugVAE.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LitAugVAE, "training_step", lambda self, b, i: seen.append(i) or original(self, b, i))
        assert train_vae.main([*flags, *more]) == 0
    log = (tmp_path / "runs" / "rest" / "logs" / "metrics.csv").read_text().splitlines()
    validated = [row for row in log[1:] if row.split(",")[log[0].split(",").index("val/total_loss")]]
    assert len(validated) == 2 or batch_size > 4
    if batch_size <= 4:
        assert len(seen) == steps


def with_another(config, section: str, leaf: str):
    """The settings with another value of one of them; None if it can have one value only."""
    part = getattr(config, section)
    value, (field,) = getattr(part, leaf), [f for f in fields(part) if f.name == leaf]
    options = [*(field.metadata["choices"] or ()), True, False, 1, 2, 0.25, 0.75, 64, 512, "other"]
    for option in [*([(each, each) for each in options] if isinstance(value, tuple) else ()), *options]:
        with suppress(ConfigError, TypeError):
            changed = replace(config, **{section: replace(part, **{leaf: option})})
            if getattr(getattr(changed, section), leaf) != value:
                return changed
    return None


@pytest.mark.parametrize("config", [TrainVAEConfig(), TrainBiARTConfig()], ids=["vae", "biart"])
def test_each_setting_that_differs_from_the_checkpoint_is_said_or_refused(config, tmp_path):
    """Alone, and once; not said are those that decide nothing of what is computed, and what other tests see refused."""
    own = {"model": as_plain(config.model), "run": as_plain(config)}
    torch.save({"state_dict": {}, "latent_verse": own}, file := tmp_path / "a.ckpt")
    assert changes(file, config) == []
    each = [(section.name, f.name) for section in fields(config) for f in fields(getattr(config, section.name))]
    for section, leaf in each:
        now = with_another(config, section, leaf)
        if now is None:
            assert leaf in ("double_z", "out_channels", "in_channels")
            continue
        effect = at_resume(section, leaf, config)
        if leaf in ("optimizer", "ema_decay"):  # 0 before: there are no averages
            with pytest.raises(CheckpointError, match=naming(file, leaf)):
                changes(file, now)
            continue
        said = changes(file, now)
        if effect in ("applied", "no effect") or leaf in LENGTH_AND_PROCESSES:
            assert len(said) == 1 and said[0].startswith(f"{leaf}: "), (leaf, said)
            assert ("no effect" in said[0]) == (effect == "no effect")
        else:
            assert said == [], leaf
        if effect == "refused" and isinstance(config.model, AugVAEConfig):
            with pytest.raises(CheckpointError, match=naming(file, leaf)):
                check_shape(own, now.model, file)


def test_the_page_of_settings_lists_each_once_with_what_happens_to_it():
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    kinds = {
        "Refused": "refused",
        "Applied by `--resume`, refused by a rerun": "applied",
        "Applied by both": "applied by reruns",
        "Without effect": "no effect",
    }
    listed: dict[tuple[str, str], str] = {}
    for part in page.split("\n## ")[1:]:
        kind = kinds[part.split("\n", 1)[0]]
        for section, names in re.findall(r"^\| `(\w+)` \| (.*) \|$", part, re.MULTILINE):
            found = [(section, name) for name in re.findall(r"`(\w+)`", names)]
            assert not set(found) & listed.keys() and len(set(found)) == len(found)
            listed |= dict.fromkeys(found, kind)
    expected = {}
    for config in (TrainVAEConfig(), TrainBiARTConfig()):
        for section in fields(config):
            for f in fields(getattr(config, section.name)):
                expected[section.name, f.name] = at_resume(section.name, f.name, config)
    assert listed == expected
