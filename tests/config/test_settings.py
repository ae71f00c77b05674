"""Rules across settings: the original's names put into ours, contradictions refused; the shipped files."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from latent_verse.commands import train_vae
from latent_verse.config import AugVAEConfig, BiARTConfig, ConfigError, SamplingSettings, as_plain, training_only
from latent_verse.config.cli import leaves, parse
from latent_verse.config.evaluate import EvalBiARTConfig, GenerationConfig, resolve_eval_biart
from latent_verse.config.generate import GenerateConfig, GenerateSamplingConfig, resolve_generate
from latent_verse.config.settings import is_count, is_number, item_type
from latent_verse.config.train import (
    EvalVAEConfig,
    ImageDataConfig,
    SamplingConfig,
    TrainBiARTConfig,
    TrainerConfig,
    TrainVAEConfig,
)
from latent_verse.config.train_rules import (
    batch_limit,
    idle_flags_vae,
    resolve_data,
    resolve_eval_vae,
    resolve_train_biart,
    resolve_train_vae,
    resolve_trainer,
)
from latent_verse.config.yaml_files import to_yaml
from latent_verse.demo.run import DemoConfig
from latent_verse.evaluation.shapes_truth import ShapesEvalConfig, ShapesSamplingConfig
from tests.messages import naming

SCRIPTS = [TrainVAEConfig, EvalVAEConfig, TrainBiARTConfig, EvalBiARTConfig, GenerateConfig]
PROGRAMS = [*SCRIPTS, ShapesEvalConfig, DemoConfig]
ROOT = Path(__file__).parents[2]
SHIPPED = sorted(p for p in (ROOT / "configs").glob("*.yaml") if p.name.startswith(("imagenet_augvae", "tiny_augvae")))


def train(*argv: str) -> TrainVAEConfig:
    """As train_vae.py: parsed and checked. Images are given, so that nothing else is wrong."""
    config, given = parse(TrainVAEConfig, ["--train_dir", "somewhere", *argv], "")
    return resolve_train_vae(config, given)


def evaluate(*argv: str) -> EvalVAEConfig:
    config, _ = parse(EvalVAEConfig, ["--ckpt_path", "a.ckpt", "--val_dir", "somewhere", *argv], "")
    return resolve_eval_vae(config)


def trainer(**settings) -> TrainerConfig:
    return resolve_trainer(TrainerConfig(**settings))


def data(resolution=256, **settings) -> ImageDataConfig:
    return resolve_data(ImageDataConfig(**settings), resolution)


# -------------------------------------------------------------------------------------------------------------- ranges


@pytest.mark.parametrize("cls", PROGRAMS)
def test_a_value_out_of_the_range_that_its_setting_declares_is_refused(cls):
    ranges = [(f, *bound) for _, f, _ in leaves(cls) for bound in f.metadata["bounds"].items()]
    assert len(ranges) > 3
    for f, name, bound in ranges:
        outside = {"at least": bound - 1, "above": bound, "at most": bound + 1, "below": bound}[name]
        words = [f"--{f.name}", *[str(outside)] * (2 if f.name == "betas" else 1)]
        with pytest.raises(ConfigError, match=naming(f.name, outside, f"--{f.name}", f"{name} {bound}")):
            parse(cls, words, "")


def test_a_value_out_of_range_is_refused_in_python_too():
    with pytest.raises(ConfigError, match=naming("batch_size", 0, "at least 1")):
        ImageDataConfig(batch_size=0)
    with pytest.raises(ConfigError, match=naming("ch_mult", [1, 0], "at least 1")):
        AugVAEConfig(ch_mult=(1, 0))
    with pytest.raises(ConfigError, match=naming("norm", "grup", "group", "pixel")):
        AugVAEConfig(norm="grup")
    with pytest.raises(ConfigError, match=naming("dropout", "nan")):
        dataclasses.replace(AugVAEConfig(), dropout=math.nan)


def test_every_number_that_takes_memory_or_processes_has_a_largest_value():
    """By a large margin above what the paper, or a large run, takes."""
    unbounded = {
        *("max_steps epochs warmup_steps accumulate_grad_batches num_sanity_val_steps".split()),  # lengths: only time
        *("log_every_n_steps image_log_steps refresh_rate backup_steps sample_every_n_epochs".split()),  # intervals
        *("eval_captions caption_pictures likelihood_pairs class_pictures round_trip_pairs".split()),  # at most all
        *("eval_images save_images samples count train_pairs".split()),  # at most all
        *("single_level img_size attn_resolutions rows top_k loss_chunk seed".split()),  # bounded by other settings
    }
    numbers = {f.name: f for cls in PROGRAMS for _, f, hint in leaves(cls) if item_type(hint) is int}
    assert {name for name, f in numbers.items() if "at most" not in f.metadata["bounds"]} == unbounded
    BiARTConfig(
        text_vocab=50_000, image_vocab=16_384, text_len=1024, image_len=4096, n_layer=96, n_head=96, n_embd=12288
    )
    AugVAEConfig(
        resolution=1024, ch_mult=(1, 1, 2, 2, 4), attn_resolutions=(64, 32), num_tokens=16_384, hidden_dim=1024
    )
    ImageDataConfig(batch_size=4096, num_workers=64, prefetch_factor=16, shuffle_buffer=10**6, dataset_size=5 * 10**9)
    TrainerConfig(gpus=8, nodes=1024)


@pytest.mark.parametrize(
    ("cls", "argv", "facts"),
    [
        (GenerateConfig, "--beams 100000", ["beams", 100000, 1024]),
        (GenerateConfig, "--num 100000000", ["num", 100000000, 65536]),
        (GenerateConfig, "--rerank 100000000", ["rerank", 100000000, 4096]),
        (EvalBiARTConfig, "--beams 100000", ["beams", 100000, 1024]),
        (TrainBiARTConfig, "--n_layer 1000000", ["n_layer", 1000000, 1024]),
        (TrainVAEConfig, "--num_tokens 1000000000000", ["num_tokens", 1000000000000, 2**24]),
        (TrainVAEConfig, "--gpus 100000", ["gpus", 100000, 128]),
    ],
)
def test_a_value_that_takes_all_memory_is_refused_before_anything_is_computed(cls, argv, facts):
    with pytest.raises(ConfigError, match=naming(*facts)):
        parse(cls, argv.split(), "")


def test_processes_on_the_cpu_are_at_most_what_it_has_use_for(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert trainer(accelerator="cpu", gpus=16).gpus == 16 and trainer(gpus=64).gpus == 64
    with pytest.raises(ConfigError, match=naming("gpus", 17, "cpu", 16)):
        trainer(accelerator="cpu", gpus=17)
    config, given = parse(EvalBiARTConfig, "--model m --fake_data --accelerator cpu --gpus 17".split(), "")
    with pytest.raises(ConfigError, match=naming("gpus", 17, "cpu", 16)):
        resolve_eval_biart(config, given)
    monkeypatch.setattr("os.cpu_count", lambda: 96)
    assert trainer(accelerator="cpu", gpus=64).gpus == 64


def test_generated_datasets_are_bounded_and_others_as_large_as_they_are():
    assert data(dataset="webdataset", dataset_size=10**10).dataset_size == 10**10
    with pytest.raises(ConfigError, match=naming("dataset_size", 10**9, "fake", 10**8)):
        data(dataset="fake", dataset_size=10**9)


def test_sampling_is_declared_once():
    """Each script's section is the one dataclass: the same names, ranges and contradictions."""
    sections = [SamplingConfig, GenerationConfig, GenerateSamplingConfig, ShapesSamplingConfig]
    for section in sections:
        assert issubclass(section, SamplingSettings)
        for wrong in ({"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}, {"guidance": -1}):
            ((name, value),) = wrong.items()
            with pytest.raises(ConfigError, match=naming(name, value)):
                section(**wrong)
        for name, value in (("top_k", 5), ("top_p", 0.5)):
            with pytest.raises(ConfigError, match=naming(name, "temperature")):
                section(temperature=0, **{name: value})
        given = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "guidance": 2.0}
        assert section(**given).arguments().items() >= given.items()
    assert GenerateSamplingConfig(seed=3).arguments()["seed"] == 3
    # the images to choose from are sampled by top_k
    assert ShapesSamplingConfig(temperature=0, top_k=5, rerank=4).top_k == 5


def test_settings_that_change_only_how_a_model_trains():
    assert {"dropout", "quant_beta", "restart_threshold"} < training_only(AugVAEConfig)
    assert not {"resolution", "ch_mult", "norm", "num_tokens", "single_level"} & training_only(AugVAEConfig)
    assert training_only(BiARTConfig) == {"embd_pdrop", "resid_pdrop", "attn_pdrop"}


@pytest.mark.parametrize("resolve", [resolve_train_vae, resolve_eval_vae, resolve_train_biart])
def test_shell_commands_are_taken_from_flags_only(resolve, tmp_path):
    """A YAML file may be someone else's: neither the command nor the permission counts in it."""
    kind = {resolve_train_vae: TrainVAEConfig, resolve_eval_vae: EvalVAEConfig}.get(resolve, TrainBiARTConfig)
    need = ["--vae_path", "v"] if kind is TrainBiARTConfig else ["--ckpt_path", "v"] if kind is EvalVAEConfig else []
    need += ["--dataset", "webdataset"] + (["--train_dir", "t"] if kind is not EvalVAEConfig else [])
    pipe, file = "pipe:cat a.tar", tmp_path / "shared.yaml"
    cases = [
        ("", ["--val_dir", pipe], ["val_dir", pipe, "--allow_pipe"]),
        (f"val_dir: '{pipe}'", ["--allow_pipe"], ["val_dir", file]),
        ("allow_pipe: true", ["--val_dir", pipe], ["allow_pipe", file, "--allow_pipe"]),
        (f"val_dir: '{pipe}'\nallow_pipe: true", [], ["val_dir", file]),
        ("", ["--val_dir", pipe, "--allow_pipe"], None),
    ]
    for text, flags, facts in cases:
        file.write_text(text)
        config, given = parse(kind, ["-c", str(file), *need, *flags], "")
        if facts is None:
            assert resolve(config, given).data.allow_pipe
            continue
        with pytest.raises(ConfigError, match=naming(*facts)):
            resolve(config, given)


# ------------------------------------------------------------------------------------------------------- shipped files


@pytest.mark.parametrize("file", SHIPPED, ids=lambda p: p.name)
def test_shipped_configurations_are_runs_that_work(file):
    config, given = parse(TrainVAEConfig, ["--config", str(file)], "")
    config = resolve_train_vae(config, given)
    if config.optim.finetune:
        assert config.optim.pretrained_path
        (level,) = config.model.attn_resolutions
        # the AugVAE-ML that it starts from is shipped as well, has that level, and agrees in all else
        ml, _ = parse(TrainVAEConfig, ["-c", str(file).replace("_sl", "_ml")], "")
        dataclasses.replace(ml.model, single_level=level).validate()
        same = dataclasses.replace(config.model, attn_resolutions=ml.model.attn_resolutions)
        assert same == ml.model
        assert config.optim.pretrained_path == f"{config.trainer.log_dir}/{file.stem.replace('_sl', '_ml')}"


@pytest.mark.parametrize("name", ["imagenet_augvae_ml", "imagenet_augvae_sl", "tiny_augvae_ml", "tiny_augvae_sl"])
def test_the_files_that_the_readme_names_are_there(name):
    assert ROOT / "configs" / f"{name}.yaml" in SHIPPED


def test_the_released_recipe():
    config, _ = parse(TrainVAEConfig, ["-c", str(ROOT / "configs" / "imagenet_augvae_ml.yaml")], "")
    m = config.model
    assert m == AugVAEConfig()
    assert (m.num_tokens, m.codebook_dim, m.ch_mult, m.attn_resolutions) == (8192, 256, (1, 2, 4), (64, 32, 16, 8))
    assert (m.quant_beta, m.quant_ema_decay, m.quant_ema_eps, m.restart_threshold) == (0.25, 0.99, 1e-5, 0)
    assert (config.loss.loss_type, config.loss.p_loss_weight) == ("lpips_l2", 0.1)
    assert (config.optim.learning_rate, config.optim.lr_decay, config.optim.codebook_init) == (4.5e-6, True, "normal")
    assert (config.data.batch_size, config.data.num_workers) == (8, 16)
    assert (config.trainer.epochs, config.trainer.log_images, config.trainer.backup) == (30, True, True)


# --------------------------------------------------------------------------------------------------------- the trainer


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


# ------------------------------------------------------------------------------------------------------------ the data


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


# --------------------------------------------------------------------------------------------------------- train_vae


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
    monkeypatch.setattr(train_vae, "run", lambda config, given: limits(config))
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


# ---------------------------------------------------------------------------------------------------------- eval_vae


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


# ------------------------------------------------------------------------------------------------------ the dataclasses


def test_as_plain_holds_plain_types_only():
    def check(value):
        assert type(value) in (dict, list, str, int, float, bool, type(None))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(item)

    plain = as_plain(EvalVAEConfig())
    check(plain)
    assert plain["model"]["ch_mult"] == [1, 2, 4]
    assert AugVAEConfig(**plain["model"]) == AugVAEConfig()


@pytest.mark.parametrize("cls", PROGRAMS)
def test_a_configuration_cannot_be_written_into(cls):
    config = cls()
    for section, f, _ in leaves(cls):
        for owner, name in ((config, section), (getattr(config, section), f.name)):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(owner, name, None)


def test_resolving_gives_a_new_configuration():
    config, given = parse(TrainVAEConfig, ["--fake_data", "--debug", "--precision", "bf16"], "")
    before = to_yaml(config)
    assert resolve_train_vae(config, given) != config and to_yaml(config) == before


def test_a_resolved_configuration_that_is_saved_and_read_again_is_the_same(tmp_path):
    saved = tmp_path / "config.yaml"
    for argv in (["--gpu_dist", "--precision", "16"], ["--web_dataset"], ["--debug", "--val_percent_check", "20"]):
        config = train(*argv)
        saved.write_text(to_yaml(config))
        assert train("-c", str(saved), "--train_dir", "somewhere") == config


def test_flags_without_effect_are_named():
    config, given = parse(
        TrainVAEConfig, ["--fake_data", "--backup_steps", "5", "--p_loss_weight", "2", "--strategy", "ddp"], ""
    )
    named = idle_flags_vae(resolve_train_vae(config, given), given, uses_lpips=False)
    assert [line.split(":")[0] for line in named] == ["backup_steps", "p_loss_weight", "strategy"]
    for gpus, idle in (("0", ["deterministic"]), ("1", [])):  # a CPU's steps repeat anyway
        config, given = parse(TrainVAEConfig, ["--fake_data", "--deterministic", "--gpus", gpus], "")
        named = idle_flags_vae(resolve_train_vae(config, given), given, uses_lpips=False)
        assert [line.split(":")[0] for line in named] == idle
    config, given = parse(
        TrainVAEConfig, ["--fake_data", "--backup", "--backup_steps", "5", "--loss_type", "lpips_l1"], ""
    )
    assert idle_flags_vae(resolve_train_vae(config, given), given, uses_lpips=True) == []


def test_percentage_survives_the_saved_file(tmp_path):
    config = train("--val_percent_check", "50", "--train_dir", "t")
    assert config.trainer.limit_val_batches == 0.5
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert train("-c", str(saved)).trainer.limit_val_batches == 0.5


def test_a_yaml_list_of_shards(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("train_dir: [a.tar, b.tar]\n")
    config, _ = parse(TrainVAEConfig, ["-c", str(file), "--dataset", "webdataset"], "")
    assert config.data.train_dir == "a.tar,b.tar"


def test_generating_captions_is_greedy_unless_a_temperature_is_given():
    def temperature(*argv: str) -> float:
        return resolve_generate(*parse(GenerateConfig, ["--model", "m", *argv], ""))[0].draw.temperature

    assert temperature("--image", "a.png") == 0 and temperature("--text", "a") == 1
    assert temperature("--image", "a.png", "--temperature", "1") == 1


@pytest.mark.parametrize("cls", SCRIPTS)
def test_the_home_folder_in_paths_is_expanded_when_they_are_read(cls, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = [(section, f.name) for section, f, _ in leaves(cls) if f.metadata["path"]]
    assert len(paths) >= 5
    (tmp_path / "a.yaml").write_text("".join(f'{name}: "~/a"\n' for _, name in paths))
    config, _ = parse(cls, ["-c", str(tmp_path / "a.yaml")], "")
    for section, name in paths:
        assert getattr(getattr(config, section), name) in ("/home/me/a", ("/home/me/a",)), name


def test_the_home_folder_is_expanded_in_the_image_to_score_but_not_in_texts(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config, _ = resolve_generate(*parse(GenerateConfig, ["--model", "m", "--score", "~/a.png", "~/a"], ""))
    assert config.what.score == ("/home/me/a.png", "~/a")


def test_counts_and_numbers_that_a_file_may_hold():
    assert all(map(is_count, (0, 1, 2**53)))
    assert not any(map(is_count, (-1, 2**53 + 1, 1.0, True, "1", None, 10**5000)))
    assert all(map(is_number, (0, -1, 1.5, -(2**53))))
    assert not any(map(is_number, (math.nan, math.inf, True, "1", None, 10**5000)))
