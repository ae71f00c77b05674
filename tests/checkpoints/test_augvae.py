"""checkpoints/: every file an AugVAE can be in gives the same model; every other file a clear refusal."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file

from latent_verse.augvae.model import AugVAE
from latent_verse.checkpoints.augvae import load_augvae, load_for_training
from latent_verse.checkpoints.biart import export_bundle
from latent_verse.checkpoints.ckpt_files import (
    CheckpointError,
    check_resumable,
    find_checkpoint,
    fingerprint,
    in_order,
    read_ckpt,
)
from latent_verse.config import ConfigError, as_plain
from latent_verse.config.train import (
    EvalVAEConfig,
    FrozenVAEConfig,
    TrainBiARTConfig,
    TrainerConfig,
    TrainVAEConfig,
    VAEOptimConfig,
)
from latent_verse.config.train_rules import with_evaluated_shape
from latent_verse.training.augvae import LitAugVAE
from latent_verse.training.biart_setup import frozen_vae
from tests.messages import naming
from tests.small_checkpoints import own_ckpt
from tests.tiny_lverse import make_lverse

SINGLE = pytest.mark.parametrize("single_level", [None, 8, 4, 2])


def released_ckpt(model: AugVAE, file: Path, **changes) -> Path:
    """A file as the release's Lightning 1.5 wrote it.

    Settings are a pickled Namespace (with much else in it), keys have no prefix, tensors that levels share are stored
    once for each level, and the frozen LPIPS network is there. AugVAE-SL kept AugVAE-ML's settings.
    """
    config = as_plain(model.config)
    del config["single_level"], config["restart_threshold"]
    args = argparse.Namespace(**config, train_dir="/data", gpus=8, resize_ratio=0.75, loss_type="lpips_l2", seed=42)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["loss.net.slice1.0.weight"] = torch.randn(64, 3, 3, 3)
    state["loss.scaling_layer.shift"] = torch.randn(1, 3, 1, 1)
    content = {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "1.5.10",
        "state_dict": state,
        "hyper_parameters": {"args": args, "batch_size": 8, "learning_rate": 4.5e-6},
        "hparams_name": "kwargs",
        "optimizer_states": [],
    }
    torch.save(content | changes, file)
    return file


def safetensors_folder(model: AugVAE, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def assert_same(ours: AugVAE, source: AugVAE, x: torch.Tensor) -> None:
    assert not ours.training
    assert ours.config == source.config
    for a, b in zip(ours(x), source.eval()(x), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours.codes(x), source.codes(x))
    assert ours.state_dict().keys() == source.state_dict().keys()
    for name, value in source.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    # tensors that the levels share still are one
    assert len({id(c.weight) for c in ours.pre_quants}) == len({id(c.weight) for c in ours.post_quants}) == 1
    assert len({id(q.embedding) for q in ours.quantizers}) == 1


def refusal(path, *facts) -> str:
    """The message, which names all of `facts`, that loading `path` fails with."""
    with pytest.raises(CheckpointError, match=naming(*facts)) as error:
        load_augvae(path)
    return str(error.value)


# ------------------------------------------------------------------------------------------- every file gives the model


@SINGLE
@pytest.mark.parametrize("write", [own_ckpt, released_ckpt, safetensors_folder])
def test_every_kind_of_file_gives_the_same_model(tiny_augvae, tiny_images, tmp_path, write, single_level):
    model = tiny_augvae(single_level=single_level, quant_beta=0.5, quant_ema_decay=0.9)
    path = write(model, tmp_path / "some.ckpt")
    for given in (path, str(path)):
        assert_same(load_augvae(given), model, tiny_images())


@pytest.mark.parametrize("write", [own_ckpt, released_ckpt, safetensors_folder])
def test_attention_and_restarts_survive(tiny_augvae, tiny_images, tmp_path, write):
    model = tiny_augvae(use_attn=True, single_level=4)
    assert_same(load_augvae(write(model, tmp_path / "some.ckpt")), model, tiny_images())


@pytest.mark.parametrize("single_level", [8, 4, 2])
@pytest.mark.parametrize("as_dict", [False, True])
def test_released_single_level_files_whose_settings_name_the_level_alone(
    tiny_augvae, tiny_images, tmp_path, single_level, as_dict
):
    model = tiny_augvae(single_level=single_level)
    args = {k: v for k, v in as_plain(model.config).items() if k not in ("single_level", "restart_threshold")}
    args["attn_resolutions"] = [single_level]
    settings = args if as_dict else {"args": argparse.Namespace(**args)}
    file = released_ckpt(model, tmp_path / "sl.ckpt", hyper_parameters=settings)
    assert_same(load_augvae(file), model, tiny_images())


def test_lightnings_own_file_and_run_folder(tiny_augvae, tiny_images, tmp_path):
    """Through a real Trainer: nothing but weights and plain types is in the file."""
    model, x = tiny_augvae().train(), tiny_images(4)
    lit = LitAugVAE(model, TrainVAEConfig(model=model.config))
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(lit, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2))
    run = tmp_path / "run"
    trainer.save_checkpoint(run / "checkpoints" / "last-epoch=0-step=1.ckpt")
    for path in (run, run / "checkpoints", run / "checkpoints" / "last-epoch=0-step=1.ckpt"):
        assert_same(load_augvae(path), model.to(memory_format=torch.contiguous_format), x)
    check_resumable(run / "checkpoints" / "last-epoch=0-step=1.ckpt", "augvae")
    described = read_ckpt(run / "checkpoints" / "last-epoch=0-step=1.ckpt")["latent_verse"]
    assert json.loads(json.dumps(described["run"])) == described["run"]


def test_a_run_folder_gives_its_best_or_else_its_newest(tiny_augvae, tmp_path):
    for i, name in enumerate(["last-epoch=9-step=9", "last-epoch=10-step=10"]):
        own_ckpt(tiny_augvae(seed=i), tmp_path / "run" / "checkpoints" / f"{name}.ckpt")
    assert find_checkpoint(tmp_path / "run").name == "last-epoch=10-step=10.ckpt"
    own_ckpt(tiny_augvae(seed=2), tmp_path / "run" / "checkpoints" / "best-epoch=2-step=2.ckpt")
    assert find_checkpoint(tmp_path / "run").name == "best-epoch=2-step=2.ckpt"
    expected = tiny_augvae(seed=2).quantizer.embedding.weight
    assert torch.equal(load_augvae(tmp_path / "run").quantizer.embedding.weight, expected)


def test_the_newest_is_that_of_the_highest_step(tiny_augvae, tmp_path):
    steps = {"best-epoch=9-step=9.ckpt": 9, "last-epoch=1-step=11.ckpt": 11, "best-epoch=10-step=10.ckpt": 10}
    files = [own_ckpt(tiny_augvae(), tmp_path / name, global_step=step) for name, step in steps.items()]
    for order in (files, files[::-1]):
        assert [p.name for p in in_order(order, {})] == sorted(steps, key=steps.__getitem__, reverse=True)
    assert in_order([], {}) == []
    assert in_order([own_ckpt(tiny_augvae(), tmp_path / "model.ckpt")], {})[0].name == "model.ckpt"  # there is no other
    shutil.copy(files[0], tmp_path / "last-epoch=99-step=99.ckpt")  # a name says less than what is stored
    assert in_order([*files, tmp_path / "last-epoch=99-step=99.ckpt"], {})[0] == files[1]


def test_a_folder_gives_its_only_checkpoint_whatever_its_name(tiny_augvae, tiny_images, tmp_path):
    model = tiny_augvae()
    own_ckpt(model, tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert_same(load_augvae(tmp_path / "run"), model, tiny_images())
    own_ckpt(model, tmp_path / "run" / "checkpoints" / "last-v1.ckpt")
    for path in ("run", "run/checkpoints"):  # of two, none is the newest
        refusal(tmp_path / path, "last.ckpt", "last-v1.ckpt", "step=N")
    own_ckpt(model, tmp_path / "run" / "checkpoints" / "last-step=3.ckpt")
    for name in ("best-a.ckpt", "best-b.ckpt"):  # a step goes before a name
        own_ckpt(model, tmp_path / "run" / "checkpoints" / name)
    assert find_checkpoint(tmp_path / "run").name == "last-step=3.ckpt"
    model.save_pretrained(tmp_path / "saved")  # a folder with weights of its own stands for these
    own_ckpt(tiny_augvae(seed=9), tmp_path / "saved" / "old.ckpt")
    assert_same(load_augvae(tmp_path / "saved"), model, tiny_images())


def test_the_weights_file_of_a_folder_stands_for_the_folder(tiny_augvae, tiny_images, tmp_path):
    model = tiny_augvae()
    model.save_pretrained(tmp_path)
    assert_same(load_augvae(tmp_path / "model.safetensors"), model, tiny_images())
    assert_same(AugVAE.from_pretrained(tmp_path), model, tiny_images())


def test_a_bundle_gives_its_augvae_everywhere(tiny_augvae, tiny_images, tmp_path):
    """Also to --pretrained_path of train_vae and to --vae_path of train_biart."""
    model = make_lverse(tiny_augvae(single_level=4))
    model.save_pretrained(tmp_path / "bundle")
    for load in (load_augvae, AugVAE.from_pretrained):
        assert_same(load(tmp_path / "bundle"), model.vae, tiny_images())
    optim = VAEOptimConfig(pretrained_path=str(tmp_path / "bundle"))
    _, trained_on = load_for_training(TrainVAEConfig(optim=optim), set())
    assert fingerprint(trained_on) == model.fingerprints["vae"]
    config = TrainBiARTConfig(vae=FrozenVAEConfig(vae_path=str(tmp_path / "bundle")))
    assert fingerprint(frozen_vae(config)[1]) == model.fingerprints["vae"]


def test_a_hub_id(tiny_augvae, tiny_images, tmp_path, monkeypatch):
    model = tiny_augvae()
    model.save_pretrained(tmp_path / "cache")
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, sorted(allow_patterns)))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: None)
    assert_same(load_augvae("someone/augvae"), model, tiny_images())
    assert asked == [("someone/augvae", ["config.json", "model.safetensors", "vae/*"])]  # vae/: of a bundle


def test_training_what_was_loaded_leaves_the_file_alone(tiny_augvae, tmp_path):
    file = own_ckpt(tiny_augvae(), tmp_path / "a.ckpt")
    before = file.read_bytes()
    model = load_augvae(file).train()  # memory-mapped: training must not write into the file
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert file.read_bytes() == before


def test_saving_over_a_folder_replaces_it_whole(tiny_augvae, tmp_path):
    tiny_augvae(seed=1).save_pretrained(tmp_path)
    tiny_augvae(seed=2, single_level=4).save_pretrained(tmp_path)
    assert load_augvae(tmp_path).config.single_level == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


# ------------------------------------------------------------------------------------------------------ untrusted files


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("place", ["hyper_parameters", "state_dict", "whole", "namespace"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused(tiny_augvae, tmp_path, place, legacy):
    proof, file = tmp_path / "proof", tmp_path / "evil.ckpt"
    evil = Payload(proof)
    content = torch.load(released_ckpt(tiny_augvae(), file), weights_only=False)
    if place == "hyper_parameters":
        content["hyper_parameters"]["args"] = evil
    elif place == "namespace":
        content["hyper_parameters"]["args"].callback = evil
    elif place == "state_dict":
        content["state_dict"]["more"] = evil
    torch.save(evil if place == "whole" else content, file, _use_new_zipfile_serialization=not legacy)
    refusal(file, file, "system", "code")
    assert not proof.exists()
    torch.load(file, weights_only=False)  # the payload does work
    assert proof.exists()


def test_only_namespace_is_allowed_and_only_while_reading(tiny_augvae, tmp_path):
    file = released_ckpt(tiny_augvae(), tmp_path / "a.ckpt", hparams=Path("a"))
    refusal(file, file, "pathlib", "code")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.ckpt")
    refusal(tmp_path / "module.ckpt", tmp_path / "module.ckpt", "torch.nn.modules.linear.Linear", "code")


def test_plain_types_beyond_tensors_are_read(tiny_augvae, tmp_path):
    more = {"set": {1, 2}, "bytes": b"abc", "namespace": argparse.Namespace(a=1)}
    assert read_ckpt(own_ckpt(tiny_augvae(), tmp_path / "a.ckpt", more=more))["more"] == more


def test_what_harmless_files_hold_is_not_accused(tiny_augvae, tmp_path):
    """A file is refused for what it holds only if that is why it could not be read."""
    whole = own_ckpt(tiny_augvae(), tmp_path / "whole.ckpt", more={1, 2})
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(tmp_path / "lacks.ckpt", "w") as rest:
        for name in archive.namelist():
            if not name.endswith("data/0"):  # the first tensor
                rest.writestr(name, archive.read(name))
    assert "code" not in refusal(tmp_path / "lacks.ckpt", tmp_path / "lacks.ckpt", "complete", "data/0")
    torch.save({"state_dict": {}, "repeated": [{"x": "x"}, b"y"]}, tmp_path / "new.ckpt", pickle_protocol=4)
    with pytest.warns(UserWarning, match="pickle protocol 4"):
        message = refusal(tmp_path / "new.ckpt", tmp_path / "new.ckpt", "refused", "code")
    assert "global" not in message.lower()


# -------------------------------------------------------------------------------------------------------- damaged files


def test_a_damaged_list_of_an_archives_files(tiny_augvae, tmp_path):
    file = own_ckpt(tiny_augvae(), tmp_path / "damaged.ckpt")
    file.write_bytes(file.read_bytes().replace(b"PK\x01\x02", b"PK\x00\x00"))
    refusal(file, file, "complete")


@pytest.mark.parametrize("write", [own_ckpt, released_ckpt])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files(tiny_augvae, tmp_path, write, share):
    file = write(tiny_augvae(), tmp_path / "cut.ckpt")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    refusal(file, file, "complete")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(100)])
def test_files_that_are_no_checkpoint(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    refusal(tmp_path / "a.ckpt", tmp_path / "a.ckpt", "complete")


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], torch.zeros(3), {"weight": torch.zeros(3)}])
def test_files_of_torch_that_are_no_lightning_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    refusal(tmp_path / "a.ckpt", tmp_path / "a.ckpt", "state_dict")


def test_checkpoints_of_other_models(tiny_augvae, tmp_path):
    torch.save({"state_dict": {"layer.weight": torch.zeros(3)}}, tmp_path / "resnet.ckpt")
    torch.save({"state_dict": {"a": torch.zeros(3)}, "hyper_parameters": {"lr": 1}}, tmp_path / "other.ckpt")
    for file in (tmp_path / "resnet.ckpt", tmp_path / "other.ckpt"):
        refusal(file, file, "neither", "AugVAE")
    file = own_ckpt(tiny_augvae(), tmp_path / "biart.ckpt", latent_verse={"kind": "biart", "model": {}})
    refusal(file, file, "biart", "AugVAE")


@pytest.mark.parametrize("left", [0, 1])
def test_an_intact_file_that_cannot_be_opened(tiny_augvae, tmp_path, left):
    file = own_ckpt(tiny_augvae(), tmp_path / "a.ckpt")
    load_augvae(file)  # whatever else it opens is open or read by now
    limits, held = resource.getrlimit(resource.RLIMIT_NOFILE), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limits[0]), limits[1]))
    try:
        with pytest.raises(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(left):
            os.close(held.pop())
        message = refusal(file, file, "Too many open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for number in held:
            os.close(number)
    assert "\n" not in message
    assert left or "complete" not in message  # with one left it opens, and PyTorch fails at mapping it


def test_a_damaged_file_says_what_was_found(tmp_path):
    file = tmp_path / "a.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(999)}}, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:-100])
    refusal(file, file, "complete", "expected 100 more bytes")


# -------------------------------------------------------------------------------------- keys and shapes that do not fit


@pytest.mark.parametrize("write", [own_ckpt, released_ckpt])
def test_missing_unknown_and_misshaped_keys_are_listed(tiny_augvae, tmp_path, write):
    file = write(tiny_augvae(), tmp_path / "a.ckpt")
    content = torch.load(file, weights_only=False)
    prefix = "model." if write is own_ckpt else ""
    state = content["state_dict"]
    del state[f"{prefix}encoders.1.conv_in.bias"]
    state[f"{prefix}encoders.7.extra"] = torch.zeros(1)
    state[f"{prefix}decoders.0.conv_out.bias"] = torch.zeros(5)
    torch.save(content, file)
    # a released file's number of encoders tells nothing of AugVAE-ML: the key is unknown, not a level more
    wrong = ("missing encoders.1.conv_in.bias", "unknown encoders.7.extra", "decoders.0.conv_out.bias", (5,), (16,))
    assert refusal(file, file, *wrong).count("\n") == 3


def test_only_keys_of_loss_are_dropped_from_released_files(tiny_augvae, tmp_path):
    file = released_ckpt(tiny_augvae(), tmp_path / "a.ckpt")
    content = torch.load(file, weights_only=False)
    content["state_dict"]["lossy.weight"] = content["state_dict"]["discriminator.weight"] = torch.zeros(1)
    torch.save(content, file)
    refusal(file, file, "unknown lossy.weight", "unknown discriminator.weight")


def test_a_long_list_of_keys_is_cut(tiny_augvae, tmp_path):
    file = own_ckpt(tiny_augvae(), tmp_path / "a.ckpt", state_dict={})
    lines = refusal(file).splitlines()
    assert len(lines) == 22
    assert lines[-1].strip() == f"and {len(tiny_augvae().state_dict()) - 20} more"


def test_settings_that_describe_no_augvae(tiny_augvae, tmp_path):
    model = tiny_augvae()
    file = own_ckpt(model, tmp_path / "a.ckpt")
    content = torch.load(file, weights_only=False)
    for change in ({"no_such_setting": 1}, {"hidden_dim": 33}, {"double_z": True}):
        described = content["latent_verse"] | {"model": as_plain(model.config) | change}
        torch.save(content | {"latent_verse": described}, file)
        refusal(file, file, *change)
    file = released_ckpt(model, tmp_path / "b.ckpt", hyper_parameters={"args": argparse.Namespace(seed=1)})
    refusal(file, file, "hyper_parameters", "ch_mult", "resolution")


# --------------------------------------------------------------------------------------------- absent files and folders


def test_an_absent_file_names_its_neighbours(tiny_augvae, tmp_path):
    for name in ("one.ckpt", "two.ckpt"):
        own_ckpt(tiny_augvae(), tmp_path / name)
    refusal(tmp_path / "three.ckpt", tmp_path / "three.ckpt", "one.ckpt", "two.ckpt")


def test_paths_that_cannot_be_hub_ids_are_not_looked_up(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    for path in (tmp_path / "absent", "absent", "./a/b", "../a", "a/b/c", "a/b.ckpt", "results/model.safetensors"):
        refusal(path, Path(path))


@pytest.mark.parametrize("absent", ["config.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file(tiny_augvae, tmp_path, absent):
    tiny_augvae().save_pretrained(tmp_path)
    (tmp_path / absent).unlink()
    refusal(tmp_path, tmp_path, absent)


def test_an_empty_folder(tmp_path):
    refusal(tmp_path, tmp_path, "config.json")
    for there in ("nothing", "notes.txt"):
        with pytest.raises(CheckpointError, match=naming(tmp_path, "folder", there)) as error:
            export_bundle(tmp_path, tmp_path / "bundle")
        assert "exist" not in str(error.value)
        (tmp_path / "notes.txt").touch()


def test_a_path_that_the_system_refuses():
    with pytest.raises(ConfigError, match=naming("path", 255)):
        load_augvae("a" * 300 + ".ckpt")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_damaged_safetensors(tiny_augvae, tmp_path, share):
    tiny_augvae().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    refusal(tmp_path, tmp_path, "damaged")


@pytest.mark.parametrize("text", ["", "{", "[1]", "5", '{"format": "latent_verse/augvae"}'])
def test_damaged_config_json(tiny_augvae, tmp_path, text):
    tiny_augvae().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    refusal(tmp_path, tmp_path)


def test_config_json_of_another_program(tiny_augvae, tmp_path):
    tiny_augvae().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    refusal(tmp_path, tmp_path / "config.json", None, "latent_verse/augvae")


def test_safetensors_keys_that_do_not_fit(tiny_augvae, tmp_path):
    tiny_augvae().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = next(k for k in stored if k.startswith("encoders.1"))
    del stored[name]
    save_file(stored | {"extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    refusal(tmp_path, tmp_path / "model.safetensors", f"missing {name}", "unknown extra")


def test_the_hub_out_of_reach(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route to host\nwith a second line")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert "second line" not in refusal("someone/augvae", "someone/augvae", "no route to host")


# ------------------------------------------------------------------------------------------------------- starting a run


def training_config(config, path, **optim) -> TrainVAEConfig:
    return TrainVAEConfig(model=config, optim=VAEOptimConfig(pretrained_path=str(path), **optim))


def test_training_starts_anew_or_from_weights(tiny_augvae, tiny_config, tmp_path):
    model = tiny_augvae()
    file = own_ckpt(model, tmp_path / "a.ckpt")
    _, new = load_for_training(TrainVAEConfig(model=tiny_config()), set())
    assert new.training
    # settings that say how to train are the run's, where given
    config = training_config(tiny_config(quant_beta=0.7, dropout=0.1), file)
    run, again = load_for_training(config, {"quant_beta"})
    assert again.training
    assert again.config == run.model == dataclasses.replace(model.config, quant_beta=0.7)
    assert again.quantizers[0].beta == 0.7
    assert torch.equal(again.quantizer.embedding.weight, model.quantizer.embedding.weight)


def test_fine_tuning_starts_from_the_level(tiny_augvae, tiny_config, tmp_path):
    model = tiny_augvae()
    file = released_ckpt(model, tmp_path / "ml.ckpt")
    config = training_config(tiny_config(attn_resolutions=(4,)), file, finetune=True)
    run, single = load_for_training(config, {"attn_resolutions", "hidden_dim"})
    assert run.model == dataclasses.replace(model.config, attn_resolutions=(4,))  # the recipe, to be run again
    assert single.config == dataclasses.replace(model.config, single_level=4)
    assert torch.equal(single.encoders[1].conv_in.weight, model.encoders[1].conv_in.weight)
    with pytest.raises(ConfigError, match=naming("attn_resolutions", 16, [8, 4, 2], file)):
        load_for_training(training_config(tiny_config(attn_resolutions=(16,)), file, finetune=True), set())
    file = own_ckpt(single, tmp_path / "sl.ckpt")
    with pytest.raises(ConfigError, match=naming(file, "AugVAE-SL", 4, "finetune")):
        load_for_training(training_config(tiny_config(attn_resolutions=(4,)), file, finetune=True), set())


def test_settings_that_contradict_the_weights_are_listed(tiny_augvae, tiny_config, tmp_path):
    file = own_ckpt(tiny_augvae(), tmp_path / "a.ckpt")
    config = training_config(tiny_config(num_tokens=99, z_channels=32), file)
    with pytest.raises(ConfigError, match=naming(file, "num_tokens", 99, 24)) as error:
        load_for_training(config, {"num_tokens"})
    assert "z_channels" not in str(error.value)  # it was not given
    assert load_for_training(config, {"hidden_dim"})[1].config.num_tokens == 24


@pytest.mark.parametrize(("given", "refused"), [({"resolution"}, True), ({"img_size"}, False), (set(), False)])
def test_evaluation_takes_the_checkpoints_shape(tiny_config, given, refused):
    config = EvalVAEConfig(trainer=TrainerConfig(ckpt_path="a.ckpt"))  # of 256 px
    if refused:
        with pytest.raises(ConfigError, match=naming("resolution", 256, "a.ckpt", 16)):
            with_evaluated_shape(config, tiny_config(), given)
    else:
        assert with_evaluated_shape(config, tiny_config(), given).model == tiny_config()


def test_resuming_from_what_cannot_be_resumed(tiny_augvae, tmp_path):
    check_resumable(own_ckpt(tiny_augvae(), tmp_path / "a.ckpt"), "augvae")
    with pytest.raises(CheckpointError, match=naming(tmp_path / "a.ckpt", "augvae", "biart", "--vae_path")):
        check_resumable(tmp_path / "a.ckpt", "biart")
    with pytest.raises(CheckpointError, match=naming(tmp_path / "b.ckpt", "--pretrained_path")):
        check_resumable(released_ckpt(tiny_augvae(), tmp_path / "b.ckpt"), "augvae")
