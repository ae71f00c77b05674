"""What the Trainer is given, by default and by the settings."""

from __future__ import annotations

import functools
import io
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from latent_verse.augvae import layers
from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.commands import train_biart, train_vae
from latent_verse.config import ConfigError
from latent_verse.config.train import (
    BiARTLossConfig,
    EvalVAEConfig,
    ImageDataConfig,
    TrainBiARTConfig,
    TrainerConfig,
    TrainVAEConfig,
    VAEOptimConfig,
)
from latent_verse.training import trainer
from latent_verse.training.augvae import LitAugVAE, LitAugVAEEvaluation
from latent_verse.training.backups import Backup, Interrupted, RunFolder
from latent_verse.training.biart import LitBiART
from latent_verse.training.runs import Run
from latent_verse.training.trainer import compiles, make_trainer, quiet_lightning
from tests.biart.tiny_biart import CONFIG
from tests.messages import naming


@pytest.mark.parametrize(
    ("setting", "value", "attribute", "found"),
    [
        ("gradient_clip_val", 0.25, "gradient_clip_val", 0.25),
        ("gradient_clip_val", None, "gradient_clip_val", None),
        ("accumulate_grad_batches", 3, "accumulate_grad_batches", 3),
        ("epochs", 7, "max_epochs", 7),
        ("max_steps", 11, "max_steps", 11),
        ("limit_train_batches", 0.5, "limit_train_batches", 0.5),
        ("limit_val_batches", 4, "limit_val_batches", 4),
        ("num_sanity_val_steps", 2, "num_sanity_val_steps", 2),
        ("log_every_n_steps", 13, "log_every_n_steps", 13),
        ("precision", "bf16-mixed", "precision", "bf16-mixed"),
        ("debug", True, "_detect_anomaly", True),
    ],
)
def test_settings_reach_the_trainer(setting, value, attribute, found, tmp_path):
    t = TrainerConfig(gpus=0, logger="csv", refresh_rate=0, **{setting: value})
    made = make_trainer(t, RunFolder(Run(tmp_path / "run", "0"), TrainVAEConfig(trainer=t)))
    assert getattr(made, attribute) == found
    assert not (tmp_path / "run").exists()  # nothing is written before all processes have met


def test_what_lightning_refuses_is_a_mistake_of_the_user(tmp_path):
    if torch.backends.mps.is_available():
        pytest.skip("this machine has what the test asks for")
    t = TrainerConfig(accelerator="mps", logger="csv", refresh_rate=0)
    with pytest.raises(ConfigError, match="MPS"):
        make_trainer(t, RunFolder(Run(tmp_path / "run", "0"), TrainVAEConfig(trainer=t)))


@pytest.mark.parametrize("error", ["UsageError", "AuthenticationError"])
def test_weights_and_biases_without_a_key_is_refused_before_anything_is_made(error, tmp_path, monkeypatch, capsys):
    errors = SimpleNamespace(
        **{name: type(name, (Exception,), {}) for name in ("Error", "UsageError", "AuthenticationError")}
    )
    asked = []

    def login():
        asked.append(True)
        raise getattr(errors, error)("No API key configured.\nmore")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(setup=list, login=login, errors=errors))
    for main in (train_vae.main, train_biart.main):
        asked.clear()
        monkeypatch.setenv("WANDB_MODE", "online")
        flags = ["--fake_data", "--log_dir", str(tmp_path / "runs"), "--logger", "wandb"]
        assert main([*flags, "--gpus", "0"]) == 2 and asked
        said = capsys.readouterr().err
        assert naming("wandb", "No API key configured", "wandb login", "WANDB_MODE=offline").search(said)
        assert said.count("\n") == 1 and not (tmp_path / "runs").exists()
    asked.clear()
    trainer.log_in(TrainerConfig(logger="csv"))
    for mode in ("offline", "dryrun", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        trainer.log_in(TrainerConfig(logger="wandb"))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("LOCAL_RANK", "1")
    trainer.log_in(TrainerConfig(logger="wandb"))
    assert not asked


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wrong_settings_of_weights_and_biases_are_one_line(mode, monkeypatch):
    errors = SimpleNamespace(UsageError=KeyError, AuthenticationError=KeyError)

    def setup():
        raise ValueError("1 error\nbase_url\n  should be a URL")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(setup=setup, errors=errors))
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(ConfigError, match=naming("wandb", "base_url", "should be a URL")) as caught:
        trainer.log_in(TrainerConfig(logger="wandb"))
    assert "\n" not in str(caught.value)


def run_with(fake_data=False, **settings) -> TrainVAEConfig:
    return TrainVAEConfig(data=ImageDataConfig(fake_data=fake_data), trainer=TrainerConfig(**settings))


def test_networks_are_compiled_on_a_gpu(monkeypatch, tiny_config):
    monkeypatch.setattr(trainer, "why_not_compiled", lambda device: "")
    assert compiles(run_with(compile=True)) and compiles(run_with(compile=True, fake_data=True))
    assert not compiles(run_with(gpus=0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert compiles(run_with())
    assert not LitAugVAE(AugVAE(tiny_config()), run_with()).compiled  # only the programs decide for themselves
    assert not compiles(run_with(compile=False))
    assert not compiles(run_with(fake_data=True))
    assert not compiles(run_with(strategy="fsdp"))
    assert not compiles(run_with(debug=True))


@pytest.mark.parametrize(("gpus", "device"), [(1, "cuda"), (0, "cpu")])
def test_what_they_lack_is_said_in_one_line_and_they_run_uncompiled(gpus, device, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(trainer, "why_not_compiled", lambda device: asked.append(device.type) or "there is no Python.h")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert not compiles(run_with(compile=True, gpus=gpus))
    said = capsys.readouterr().out
    assert naming("compiled", "Python.h").search(said) and said.count("\n") == 1
    assert not compiles(run_with(gpus=gpus))
    assert capsys.readouterr().out == (said if gpus else "")  # by default a CPU is not asked
    assert not compiles(run_with(gpus=gpus, compile=False)) and not capsys.readouterr().out
    assert asked == [device] * (1 + gpus)


def test_training_is_compiled_and_validation_is_not(tiny_config, tiny_images, monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=backend))
    config = TrainVAEConfig(model=tiny_config(), trainer=TrainerConfig(compile=True))
    module = LitAugVAE(AugVAE(config.model), config)
    module.configure_model()
    module.eval()
    with torch.no_grad():
        module.validation_step([tiny_images()], 0)
    assert not compiled
    module.train()
    module.training_step([tiny_images()], 0)["loss"].backward()
    assert compiled
    torch._dynamo.reset()


class Graphs(list):
    """What a run compiles, as (code, whether a size is symbolic), by a backend that runs graphs as they are."""

    def __init__(self, monkeypatch):
        compile, of_module = torch.compile, torch.nn.Module.compile
        monkeypatch.setattr(torch, "compile", functools.partial(compile, backend=self.backend))
        monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(of_module, backend=self.backend))

    def backend(self, graph, inputs):
        sizes = [size for x in inputs for size in (x.shape if isinstance(x, torch.Tensor) else (x,))]
        self.append((graph.code, not all(type(size) is int for size in sizes)))
        return graph.forward


def fit(module, train: list, val: list, folder, **settings):
    """Two epochs, each with a validation, by the Trainer that the programs make."""
    t = replace(module.config.trainer, gpus=0, logger="csv", refresh_rate=0, epochs=2, **settings)
    made = make_trainer(t, RunFolder(Run(folder / "run", "0"), module.config))
    made.fit(module, *(torch.utils.data.DataLoader(batches, batch_size=None) for batches in (train, val)))


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_network_of_augvae_is_compiled_once(checkpointing, tiny_config, tmp_path, monkeypatch):
    """Its codebook starts from data, training is in bf16, and validation has a smaller last batch."""
    if not checkpointing:  # half of the blocks are enough
        monkeypatch.setattr(layers, "Middle", lambda *args: torch.nn.Identity())
    model = tiny_config(resolution=32, attn_resolutions=(16, 8, 4, 2), num_res_blocks=1)
    t = TrainerConfig(compile=True, activation_checkpointing=checkpointing)
    config = TrainVAEConfig(model=model, optim=VAEOptimConfig(codebook_init="data"), trainer=t)
    torch._dynamo.reset()
    graphs = Graphs(monkeypatch)
    batches = [[torch.rand(size, 3, 32, 32) * 2 - 1] for size in (3, 3, 2)]
    fit(LitAugVAE(AugVAE(model), config), batches[:2], batches[1:], tmp_path, precision="bf16-mixed")
    torch._dynamo.reset()
    assert [symbolic for _, symbolic in graphs] == [False] * 8  # 4 encoders and 4 decoders


@pytest.mark.parametrize(
    ("batch_size", "share", "losses"),
    # each modality has a graph for each number of rows: 2 both ways; 1 and 2; 1, 3 and 2; 2, 6, 3 and 5
    [(4, 0.5, 2), (3, 0.5, 4), (4, 0.3, 6), (8, 0.3, 8)],
)
def test_biart_is_compiled_for_static_shapes(batch_size, share, losses, tmp_path, monkeypatch):
    """Two graphs for the blocks, the first and all others; 2 to 8 for losses, 2 if directions share a batch evenly."""
    t = TrainerConfig(compile=True, activation_checkpointing=losses == 2)
    config = TrainBiARTConfig(loss=BiARTLossConfig(text_to_image_share=share), trainer=t)
    torch._dynamo.reset()
    graphs = Graphs(monkeypatch)
    batches = [
        [torch.randint(0, CONFIG.image_vocab, (size, CONFIG.image_len)), torch.zeros(size, CONFIG.text_len).long()]
        for size in [batch_size] * 5 + [1]
    ]
    module = LitBiART(BiART(CONFIG), torch.nn.Identity(), config, {})
    fit(module, batches[:5], batches[4:], tmp_path, precision="bf16-mixed")
    torch._dynamo.reset()
    assert not any(symbolic for _, symbolic in graphs)
    assert sum("cross_entropy" in code for code, _ in graphs) == losses
    assert sum("scaled_dot_product_attention" in code for code, _ in graphs) == 2
    assert len(graphs) == losses + 2


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_is_tuned_for_batches_of_training_only(deterministic, tiny_config, tmp_path, monkeypatch):
    """By the flag that convolutions see: at the start of the codebook, in training, in validation."""
    seen = []
    forward = torch.nn.Conv2d.forward

    def noted(self, x):
        seen.append((torch.is_grad_enabled(), self.training, len(x), torch.backends.cudnn.benchmark))
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", noted)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    data, t = ImageDataConfig(batch_size=3), TrainerConfig(deterministic=deterministic)
    config = TrainVAEConfig(model=tiny_config(), data=data, optim=VAEOptimConfig(codebook_init="data"), trainer=t)
    batches = [[torch.rand(size, 3, 16, 16) * 2 - 1] for size in (3, 3, 2)]
    try:
        fit(LitAugVAE(AugVAE(config.model), config), batches[:2], batches[1:], tmp_path)
        assert torch.are_deterministic_algorithms_enabled() is deterministic
    finally:
        torch.use_deterministic_algorithms(False)
    on = not deterministic
    starting, training, whole, smaller = ((False, True, 3), (True, True, 3), (False, False, 3), (False, False, 2))
    assert {(*at, flag) for *at, flag in seen} == {(*starting, False), (*training, on), (*whole, on), (*smaller, False)}
    assert torch.backends.cudnn.benchmark is on


@pytest.mark.parametrize(
    ("device", "evaluates", "memory_format"),
    [
        ("cpu", False, torch.contiguous_format),
        ("cpu", True, torch.channels_last),
        ("cuda", False, torch.channels_last),
        ("cuda", True, torch.channels_last),
    ],
)
def test_memory_format_of_weights_and_activations(tiny_config, tiny_images, device, evaluates, memory_format):
    """Channels last but where a CPU trains; the networks' answer is the same."""
    torch.manual_seed(0)
    if evaluates:
        config = EvalVAEConfig(model=tiny_config(), data=ImageDataConfig(fake_data=True))
        module = LitAugVAEEvaluation(AugVAE(tiny_config()), config)
    else:
        module = LitAugVAE(AugVAE(tiny_config()), TrainVAEConfig(model=tiny_config()))
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    module.eval()
    with torch.no_grad():
        expected, *_ = module.model(tiny_images())
        module.configure_model()
        formats = set()
        for layer in module.model.modules():
            if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3):
                assert layer.weight.is_contiguous(memory_format=memory_format)
                layer.register_forward_hook(lambda _, x, y: formats.add(y.is_contiguous(memory_format=memory_format)))
        _, reconstruction = module.reconstruct(tiny_images())
    assert formats == {True}
    torch.testing.assert_close(reconstruction, expected, rtol=1e-3, atol=1e-4)


def test_a_signal_is_not_broadcast_before_every_step_and_one_before_training_counts():
    made = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert callable(made.fit_loop._iteration_based_training)  # Lightning's; see make_trainer
    loop = made.fit_loop.epoch_loop
    assert callable(loop._broadcast_sigterm_tensor)  # Lightning's, which would wait for the device
    backup = Backup(None, None)
    made._signal_connector.received_sigterm = True
    backup.on_train_start(made, None)
    backup.teardown(made, None, "fit")
    assert backup.told_to_stop
    assert "_broadcast_sigterm_tensor" in vars(loop) and loop._broadcast_sigterm_tensor() is None


def test_a_signal_before_the_first_step_ends_a_run_that_has_saved_nothing(tmp_path):
    backup = Backup(SimpleNamespace(run=Run(tmp_path / "run", "0")), None)
    backup.told_to_stop = True
    trainer_ = SimpleNamespace(world_size=1, global_step=0)
    with pytest.raises(Interrupted, match=naming("step 0", "no state")):
        backup.on_train_epoch_start(trainer_, None)


def test_what_was_said_is_in_a_file_or_pipe_before_training_begins(tmp_path, monkeypatch):
    """A run that is killed has said where its folder is."""
    there = []
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    loops = SimpleNamespace(
        fit=lambda *_, **__: there.append(sys.stdout.buffer.getvalue()), global_step=1, current_epoch=1
    )
    print("Run folder: a")
    trainer.fit(loops, TrainerConfig(), Run(tmp_path, "0"), SimpleNamespace(config=None), None)
    assert there == [b"Run folder: a\n"]


def test_warnings_that_users_can_do_nothing_about_are_hidden():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet_lightning()
        warnings.warn("`torch.distributed.all_gather_into_tensor` is deprecated. Please use another.", FutureWarning)  # noqa: B028
        warnings.warn("a file cannot be read", UserWarning)  # noqa: B028
    assert [str(w.message) for w in shown] == ["a file cannot be read"]
