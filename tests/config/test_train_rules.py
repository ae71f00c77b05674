"""What the settings of training mean together: the original's names, contradictions, lengths, and smoke tests."""

from __future__ import annotations

import pytest

from latent_verse.commands import train_vae
from latent_verse.config import ConfigError
from latent_verse.config.cli import parse
from latent_verse.config.train import (
    EvalVAEConfig,
    TrainBiARTConfig,
    TrainVAEConfig,
)
from latent_verse.config.train_rules import (
    batch_limit,
    resolve_eval_vae,
    resolve_train_biart,
    resolve_train_vae,
)
from tests.config.resolved import ROOT, SHIPPED, data, evaluate, train, trainer
from tests.messages import naming


@pytest.mark.parametrize(("percent", "share"), [(25, 0.25), (100, None), (99.5, 0.995), (0, 0.0), (1, 0.01)])
def test_val_percent_check_is_a_percentage(percent, share):
    limit = trainer(val_percent_check=percent).limit_val_batches
    assert limit == share
    assert limit is None or isinstance(limit, float)  # Lightning takes an int as a count


def test_val_percent_check_out_of_range_or_with_another_limit():
    for percent in (-1, 101):
        with pytest.raises(ConfigError, match=naming("val_percent_check", percent, 0, 100)):
            trainer(val_percent_check=percent)
    with pytest.raises(ConfigError, match=naming("val_percent_check", "limit_val_batches")):
        trainer(val_percent_check=50.0, limit_val_batches=3)


@pytest.mark.parametrize(("value", "limit"), [(None, None), (0.5, 0.5), (1.0, 1), (7.0, 7), (0.0, 0.0)])
def test_batch_limits_are_counts_or_shares(value, limit):
    assert batch_limit("limit_train_batches", value) == limit
    assert type(batch_limit("limit_train_batches", value)) is type(limit)


@pytest.mark.parametrize("value", [1.5, -1, -0.5])
def test_batch_limits_that_are_neither(value):
    with pytest.raises(ConfigError, match=naming("limit_train_batches", value)):
        trainer(limit_train_batches=value)


def test_debug_shortens_the_run_but_not_what_is_shorter():
    t = trainer(debug=True)
    assert (t.limit_train_batches, t.limit_val_batches, t.backup_steps, t.image_log_steps) == (100, 100, 10, 10)
    t = trainer(debug=True, limit_train_batches=3, limit_val_batches=2, backup_steps=5, image_log_steps=4)
    assert (t.limit_train_batches, t.limit_val_batches, t.backup_steps, t.image_log_steps) == (3, 2, 5, 4)
    assert trainer(debug=True, val_percent_check=50).limit_val_batches == 0.5


@pytest.mark.parametrize(
    ("given", "lightning"),
    [("16", "16-mixed"), ("bf16", "bf16-mixed"), ("32", "32-true"), ("64", "64-true"), ("bf16-true", "bf16-true")],
)
def test_precision_names(given, lightning):
    assert trainer(precision=given).precision == lightning


def test_gpu_dist():
    assert trainer(gpu_dist=True).strategy == "ddp"
    assert trainer(gpu_dist=True, strategy="fsdp").strategy == "fsdp"
    assert trainer(gpu_dist=None, gpus=4).strategy == "auto"
    assert trainer(gpu_dist=False, gpus=1).strategy == "auto"
    for several in ({"gpus": 2}, {"nodes": 2}):
        with pytest.raises(ConfigError, match=naming("gpu_dist", "gpus")):
            trainer(gpu_dist=False, **several)


def test_resume_needs_a_checkpoint():
    assert trainer(resume=True, ckpt_path="a.ckpt").resume
    with pytest.raises(ConfigError, match=naming("resume", "ckpt_path")):
        trainer(resume=True)


def test_max_steps_of_zero_is_no_limit_and_no_length():
    with pytest.raises(ConfigError, match=naming("max_steps", 0, -1)):
        trainer(max_steps=0)


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ({}, "imagefolder"),
        *(({"dataset": name}, name) for name in ("imagefolder", "flat", "webdataset", "fake")),
        ({"fake_data": True}, "fake"),
        ({"web_dataset": True}, "webdataset"),
        ({"fake_data": True, "dataset": "fake"}, "fake"),
        ({"web_dataset": True, "dataset": "webdataset"}, "webdataset"),
        # the smoke test of any recipe
        ({"fake_data": True, "web_dataset": True}, "fake"),
        ({"fake_data": True, "dataset": "imagefolder"}, "fake"),
        ({"fake_data": True, "dataset": "webdataset"}, "fake"),
        ({"fake_data": True, "web_dataset": True, "dataset": "webdataset"}, "fake"),
    ],
    ids=str,
)
def test_layout_by_any_of_its_names(settings, layout):
    d = data(**settings)
    assert d.dataset == layout
    assert (d.fake_data, d.web_dataset) == (layout == "fake", layout == "webdataset")


@pytest.mark.parametrize("dataset", ["imagefolder", "flat", "fake"])
def test_layouts_that_contradict(dataset):
    with pytest.raises(ConfigError, match=naming("dataset", dataset, "web_dataset")):
        data(dataset=dataset, web_dataset=True)


def test_img_size_is_resolution():
    assert data(img_size=256).img_size == 256
    with pytest.raises(ConfigError, match=naming("img_size", 128, "resolution", 256)):
        data(img_size=128)
    with pytest.raises(ConfigError, match=naming("img_size", 256, "resolution", 128)):
        train("--resolution", "128", "--attn_resolutions", "32", "16", "--img_size", "256")


def test_images_must_be_given_unless_they_are_fake():
    for argv in ([], ["--val_dir", "x"]):
        config, given = parse(TrainVAEConfig, argv, "")
        with pytest.raises(ConfigError, match=naming("train_dir", "--fake_data")):
            resolve_train_vae(config, given)
    config, given = parse(TrainVAEConfig, ["--fake_data"], "")
    resolve_train_vae(config, given)


def test_rules_are_those_of_the_settings_that_hold():
    """A smoke test of a recipe replaces its data; an export trains nothing."""
    flags = ["--dataset", "codes", "--train_dir", "x", "--vae_path", "y", "--extract_codes", "z"]
    config, given = parse(TrainBiARTConfig, flags, "")
    with pytest.raises(ConfigError, match=naming("extract_codes", "dataset", "codes")):
        resolve_train_biart(config, given)
    config, given = parse(TrainBiARTConfig, [*flags, "--fake_data"], "")
    assert resolve_train_biart(config, given).data.dataset == "fake"
    flags = ["--guidance", "2", "--reference_dropout", "0", "--crops_per_image", "5", "--export", "a"]
    config, given = parse(TrainBiARTConfig, [*flags, "--ckpt_path", "b"], "")
    resolve_train_biart(config, given)
    config, given = parse(TrainBiARTConfig, flags, "")
    with pytest.raises(ConfigError, match=naming("export", "ckpt_path")):
        resolve_train_biart(config, given)


FAKE_LIMITS = {"epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1}


def limits(config: TrainVAEConfig) -> dict:
    return {name: getattr(config.trainer, name) for name in FAKE_LIMITS}


def test_fake_data_is_bounded():
    assert limits(train("--fake_data")) == FAKE_LIMITS == limits(train("--dataset", "fake", "--log_images"))
    assert limits(train()) == {"epochs": 100, "limit_train_batches": None, "limit_val_batches": None}


@pytest.mark.parametrize(
    ("argv", "changed"),
    [
        (["--epochs", "7"], {"epochs": 7}),
        (["--limit_train_batches", "9"], {"limit_train_batches": 9}),
        (["--limit_val_batches", "0.5"], {"limit_val_batches": 0.5}),
        (["--val_percent_check", "50"], {"limit_val_batches": 0.5}),
        (["--debug"], {"limit_train_batches": 100, "limit_val_batches": 100}),
        (["--max_steps", "20"], {}),
    ],
)
def test_a_limit_of_ones_own_lifts_them(argv, changed):
    unbounded = {"epochs": 100, "limit_train_batches": None, "limit_val_batches": None}
    assert limits(train("--fake_data", *argv)) == unbounded | changed


def test_the_seed_command_stays_a_smoke_test(monkeypatch):
    """Its YAML gives epochs: 30, which is meant for real images."""
    file = str(ROOT / "configs" / "imagenet_augvae_ml.yaml")
    monkeypatch.setattr(train_vae, "run", lambda config, given, prog: limits(config))
    assert train_vae.main(["--fake_data", "--configs", file]) == FAKE_LIMITS
    assert train_vae.main(["--fake_data", "--configs", file, "--epochs", "3"])["epochs"] == 3


def test_deepsparks_command_line():
    file = str(ROOT / "configs" / "imagenet_augvae_ml.yaml")
    config = train("--config", file, "--val_dir", "v", "--gpus", "8", "--batch_size", "4", "--epochs", "2")
    assert (config.trainer.gpus, config.data.batch_size, config.trainer.epochs) == (8, 4, 2)
    assert (config.data.train_dir, config.data.val_dir, config.trainer.gpu_dist) == ("somewhere", "v", None)


@pytest.mark.parametrize(
    ("argv", "facts"),
    [
        ("--lr_decay --lr_cosine", ["lr_decay", "lr_cosine"]),
        ("--warmup_steps 5", ["warmup_steps", 5, "lr_cosine"]),
        ("--finetune --attn_resolutions 32", ["finetune", "pretrained_path"]),
        ("--finetune --pretrained_path x", ["finetune", "attn_resolutions", [64, 32, 16, 8]]),
        ("--double_z", ["double_z"]),
        ("--ch_mult 1 2", ["ch_mult", [1, 2], "resolution", 256, "attn_resolutions", 64, 128]),
        ("--ch_mult=", ["ch_mult", []]),
        ("--resolution 128", ["ch_mult", "resolution", 128, "attn_resolutions", 64, 32]),
        ("--hidden_dim 100", ["hidden_dim", 100, 32]),
        ("--attn_resolutions 64 16", ["attn_resolutions", [64, 16]]),
        ("--single_level 4", ["single_level", 4, [64, 32, 16, 8]]),
        # double_z cannot work in fine-tuning either
        ("--finetune --pretrained_path x --attn_resolutions 32 --double_z", ["double_z"]),
        ("--precision foo", ["precision", "foo", "bf16"]),
        ("--accelerator foo", ["accelerator", "foo", "cpu"]),
        ("--betas 0.9 1.5", ["betas", [0.9, 1.5]]),
        ("--betas 0.9", ["betas", 0.9, "--betas"]),
        ("--betas 0.9 0.95 0.99", ["betas", 0.9, 0.95, 0.99, "--betas"]),
        ("--learning_rate nan", ["learning_rate", "nan", "--learning_rate"]),
        ("--p_loss_weight inf", ["p_loss_weight", "inf", "--p_loss_weight"]),
        ("--betas 0.9 nan", ["betas", "nan"]),
        ("--in_channels 1", ["in_channels", 1, 3]),
        ("--limit_train_batches 0", ["limit_train_batches", 0]),
        ("--optimizer muon --strategy fsdp", ["optimizer", "muon", "strategy", "fsdp"]),
    ],
    ids=str,
)
def test_settings_that_could_never_work(argv, facts):
    with pytest.raises(ConfigError, match=naming(*facts)):
        train(*argv.split())


def test_fine_tuning_names_only_its_level():
    config = train("--finetune", "--pretrained_path", "x", "--attn_resolutions", "32")
    assert config.model.attn_resolutions == (32,)


def test_evaluation_needs_a_checkpoint_and_images():
    for argv, facts in (
        (["--val_dir", "x"], ["ckpt_path"]),
        (["--ckpt_path", "x"], ["test_dir", "val_dir", "--fake_data"]),
        (["--ckpt_path", "x", "--train_dir", "y"], ["test_dir", "val_dir", "--fake_data"]),
    ):
        config, _ = parse(EvalVAEConfig, argv, "")
        with pytest.raises(ConfigError, match=naming(*facts)):
            resolve_eval_vae(config)
    for argv in (["--fake_data"], ["--test_dir", "t"], ["--val_dir", "v"]):
        config, _ = parse(EvalVAEConfig, ["--ckpt_path", "x", *argv], "")
        resolve_eval_vae(config)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda p: p.name)
def test_training_files_serve_evaluation(file):
    assert evaluate("-c", str(file)).trainer.ckpt_path == "a.ckpt"
