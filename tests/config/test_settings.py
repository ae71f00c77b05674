"""What a setting may be: its range, where it is declared, how it is saved and read again; the shipped files."""

from __future__ import annotations

import dataclasses
import math

import pytest

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
    idle_flags_vae,
    resolve_eval_vae,
    resolve_train_biart,
    resolve_train_vae,
)
from latent_verse.config.yaml_files import to_yaml
from latent_verse.demo.run import DemoConfig
from latent_verse.evaluation.shapes_truth import ShapesEvalConfig, ShapesSamplingConfig
from tests.config.resolved import ROOT, SHIPPED, data, train, trainer
from tests.messages import naming

SCRIPTS = [TrainVAEConfig, EvalVAEConfig, TrainBiARTConfig, EvalBiARTConfig, GenerateConfig]
PROGRAMS = [*SCRIPTS, ShapesEvalConfig, DemoConfig]


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
