"""checkpoints/: whatever is wrong in a file, every reader says so in one line, and builds and allocates nothing."""

from __future__ import annotations

import json
import os
import random
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.checkpoints.augvae import load_augvae
from latent_verse.checkpoints.biart import load_pretrained
from latent_verse.checkpoints.bundle import load_bundle
from latent_verse.checkpoints.ckpt_files import CheckpointError, read_ckpt
from latent_verse.config import ConfigError, UserError
from latent_verse.inference.pipeline import LVerse
from tests.messages import naming
from tests.small_checkpoints import WEIGHT, changed, flip, many, one_line, put, replaced_by
from tests.tiny_lverse import make_lverse


def expanded(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of this shape with a single number in memory and in a file."""
    return torch.zeros(1).expand(shape)


@pytest.fixture
def unbuilt(monkeypatch):
    """Fails a test that makes a network, unless on the meta device, or more than 10 blocks of one."""

    def guard(network: type) -> None:
        make = network.__init__

        def made(self, config):
            assert torch.empty(0).is_meta, "built before it was checked"
            assert getattr(config, "n_layer", 1) < 1000 and getattr(config, "num_res_blocks", 1) < 1000
            make(self, config)

        monkeypatch.setattr(network, "__init__", made)

    guard(AugVAE)
    guard(BiART)


KINDS = {
    "state_dict a list": (put("state_dict", value=[1, 2]), "state_dict", "list"),
    "state_dict text": (put("state_dict", value="weights"), "state_dict", "str"),
    "a weight is an int": (put("state_dict", WEIGHT, value=5), WEIGHT, "int"),
    "a weight is None": (put("state_dict", WEIGHT, value=None), WEIGHT, "NoneType"),
    "a weight is a list": (put("state_dict", WEIGHT, value=many()), WEIGHT, "list"),
    "a name is a number": (put("state_dict", 7, value=torch.zeros(3)), "state_dict", "int"),
    "latent_verse text": (put("latent_verse", value="augvae"), "latent_verse", "str"),
    "latent_verse a list": (put("latent_verse", value=[1]), "latent_verse", "list"),
    "kind a list": (put("latent_verse", "kind", value=many()), "kind", "list"),
    "hyper_parameters a list": (put("hyper_parameters", value=[1]), "hyper_parameters", "list"),
    "callbacks text": (put("callbacks", value="none"), "callbacks", "str"),
    "step text": (put("global_step", value="5"), "global_step", "str"),
    "step negative": (put("global_step", value=-1), "global_step"),
    "step huge": (put("global_step", value=10**30), "global_step"),
    "step a float": (put("global_step", value=1.5), "global_step", "float"),
    "step NaN": (put("global_step", value=float("nan")), "global_step", "float"),
    "epoch text": (put("epoch", value="one"), "epoch", "str"),
}
TENSORS = {
    "NaN": (put("state_dict", WEIGHT, value=torch.full((32,), torch.nan)), "finite"),
    "one NaN": (put("state_dict", WEIGHT, value=torch.tensor([0.0] * 31 + [torch.nan])), "finite"),
    "inf": (put("state_dict", WEIGHT, value=torch.tensor([0.0] * 31 + [torch.inf])), "finite"),
    "-inf": (put("state_dict", WEIGHT, value=torch.tensor([-torch.inf] + [0.0] * 31)), "finite"),
    "half NaN": (put("state_dict", WEIGHT, value=torch.full((32,), torch.nan).bfloat16()), "finite"),
    "beyond float32": (put("state_dict", WEIGHT, value=torch.full((32,), 1e300, dtype=torch.float64)), "finite"),
    "sparse": (put("state_dict", WEIGHT, value=torch.sparse_coo_tensor([[0]], [1.0], (32,))), "sparse_coo"),
    "huge, sparse": (put("state_dict", WEIGHT, value=torch.sparse_coo_tensor([[0]], [1.0], (10**12,))), "sparse_coo"),
    "complex": (put("state_dict", WEIGHT, value=torch.zeros(32, dtype=torch.complex64)), "complex64"),
    "8 bits": (put("state_dict", WEIGHT, value=torch.zeros(32).to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    "without storage": (put("state_dict", WEIGHT, value=torch.empty(10**12, device="meta")), "meta"),
    "expanded": (put("state_dict", WEIGHT, value=expanded((32,))), (32,)),
    "hugely expanded": (put("state_dict", WEIGHT, value=expanded((10**6, 10**6))), (10**6, 10**6)),
}  # fmt: skip
SETTINGS: dict[str, object] = {
    "num_res_blocks": 10**6,
    "num_tokens": 10**12,
    "hidden_dim": 32 * 10**9,
    "z_channels": 10**18,
    "codebook_dim": 10**30,
    "resolution": 16 * 2**40,
    "ch_mult": [1] * 10**5,
    "attn_resolutions": [8, "4", 2],
    "in_channels": "3",
    "out_channels": 3.0,
    "use_attn": "no",
    "norm": ["group"],
    "quantizer": "e" * 10**6,
    "quant_beta": float("nan"),
    "dropout": None,
    "single_level": many(),
}


@pytest.mark.parametrize("case", [*KINDS, *TENSORS])
def test_content_of_another_kind(file, unbuilt, case):
    change, *facts = (KINDS | TENSORS)[case]
    changed(file, change)
    one_line(load_augvae, file, *facts)
    one_line(read_ckpt, file, *facts)


def test_a_quantised_or_nested_weight(file, unbuilt):
    quantised = torch.quantize_per_tensor(torch.zeros(32), 0.1, 0, torch.qint8)
    for weight in (quantised, torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])):
        changed(file, put("state_dict", WEIGHT, value=weight))
        one_line(load_augvae, file, WEIGHT)


def test_weights_of_whole_numbers(file, unbuilt):
    changed(file, put("state_dict", WEIGHT, value=torch.zeros(32, dtype=torch.int64)))
    with pytest.raises(CheckpointError, match=naming(file, WEIGHT.removeprefix("model."), "torch.int64")):
        load_augvae(file)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_the_weights_do_not_have(file, unbuilt, name):
    changed(file, put("latent_verse", "model", name, value=SETTINGS[name]))
    with pytest.raises(CheckpointError, match=naming(file)) as error:
        load_augvae(file)
    assert len(str(error.value)) < 3000 and str(error.value).count("\n") <= 21


@pytest.mark.parametrize("settings", [[["hidden_dim", 32]], "tiny", {7: 32}, {"n" * 1000: 1}])
def test_settings_that_are_none(file, unbuilt, settings):
    changed(file, put("latent_verse", "model", value=settings))
    one_line(load_augvae, file)


def test_one_tensor_under_many_names_takes_no_more_memory_than_it_has(file, unbuilt):
    big = torch.zeros(10**6)
    changed(file, lambda content: content["state_dict"].update({f"model.{i}": big for i in range(1000)}))
    one_line(load_augvae, file, "state_dict")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tensor_larger_than_what_is_stored_of_it(tmp_path, legacy):
    """What its pickle says is more than its storage holds."""
    file, weight = tmp_path / "a.ckpt", torch.zeros(4)
    storage = torch.storage.TypedStorage(wrap_storage=weight.untyped_storage(), dtype=torch.float32, _internal=True)

    class Beyond:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (storage, 0, (10**12,), (1,), False, {})

    torch.save({"state_dict": {"a": Beyond()}}, file, _use_new_zipfile_serialization=not legacy)
    one_line(read_ckpt, file)


def test_a_compressed_archive_is_not_unpacked(file):
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    one_line(read_ckpt, file, "compressed")


# ------------------------------------------------------------------------------------------------------ flipped bytes


def test_a_changed_byte_is_noticed_or_changes_nothing(tiny_augvae, file):
    """A zip archive has a few bytes that mean nothing: padding between its parts."""
    before, whole = load_augvae(file).state_dict(), file.read_bytes()
    rng, noticed = random.Random(0), 0
    inside = whole.index(before["quantizers.0.embedding.weight"].numpy().tobytes()) + 5
    for position in (inside, *(rng.randrange(len(whole)) for _ in range(25))):
        file.write_bytes(whole)
        flip(file, position)
        try:
            after = load_augvae(file).state_dict()
        except CheckpointError as error:
            assert naming(file).search(str(error)) and "\n" not in str(error)
            noticed += 1
        else:
            assert position != inside
            assert all(torch.equal(after[name], before[name]) for name in before)
    assert noticed > 20


@pytest.mark.parametrize("damage", ["flipped", "other weights"])
def test_changed_weights_of_a_saved_augvae(tiny_augvae, tmp_path, damage):
    tiny_augvae().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "flipped":
        flip(weights, weights.stat().st_size - 7)
    else:
        save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    one_line(load_augvae, tmp_path, weights, "crc32")
    about = json.loads((tmp_path / "config.json").read_text())
    del about["crc32"]  # as an earlier version wrote it
    (tmp_path / "config.json").write_text(json.dumps(about))
    load_augvae(tmp_path)


def test_a_saved_augvae_in_half_precision(tiny_augvae, tmp_path):
    tiny_augvae().bfloat16().save_pretrained(tmp_path)
    assert load_augvae(tmp_path).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ what is no file


@pytest.mark.parametrize("load", [load_augvae, load_pretrained, load_bundle, read_ckpt])
def test_pipes_and_paths_that_the_system_refuses(tmp_path, monkeypatch, load):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    os.mkfifo(tmp_path / "pipe.ckpt")
    one_line(load, tmp_path / "pipe.ckpt")
    for path in (tmp_path / ("a" * 300), tmp_path / ("a" * 300 + ".ckpt"), Path("a\0b"), Path("a\0b.ckpt")):
        with pytest.raises(UserError) as error:
            load(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", [None, 5, ["a"], "", "~nobody-of-this-name/a"])
def test_what_is_no_path_is_one_line(tiny_augvae, path):
    model = make_lverse(tiny_augvae(single_level=4))
    load = [LVerse.from_pretrained] if path is not None else []  # None takes the model that comes along
    for use in (load_augvae, load_pretrained, *load, model.save_pretrained, model.vae.save_pretrained):
        with pytest.raises(ConfigError, match=naming("empty" if path == "" else path)) as error:
            use(path)
        assert "\n" not in str(error.value)


def test_devices_and_precisions_that_cannot_be_used(tiny_augvae, tmp_path):
    make_lverse(tiny_augvae(single_level=4)).save_pretrained(tmp_path)
    for given in (
        {"device": "bogus"},
        {"device": "privateuseone"},
        {"device": 1.5},
        {"device": "cuda:99"},
        {"dtype": "float8_e4m3fn"},
    ):
        with pytest.raises(ConfigError, match=naming(*given, *given.values())) as error:
            LVerse.from_pretrained(tmp_path, **given)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_special_files_in_a_folder(tiny_augvae, tmp_path, name, kind):
    tiny_augvae().save_pretrained(tmp_path)
    replaced_by(tmp_path / name, kind)
    one_line(load_augvae, tmp_path, name)


def test_a_mistyped_path_names_what_is_there(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results" / "shapes-vae").mkdir(parents=True)
    for load in (load_augvae, load_pretrained):
        one_line(load, "results/shape-vae", "shapes-vae", "results/shape-vae")
        one_line(load, "result", "results")


def test_a_bundle_in_place_of_an_augvae_whose_augvae_is_damaged(tiny_augvae, tmp_path):
    make_lverse(tiny_augvae(single_level=4)).save_pretrained(tmp_path)
    load_augvae(tmp_path)
    (tmp_path / "vae" / "model.safetensors").unlink()
    one_line(load_augvae, tmp_path, tmp_path / "vae", "model.safetensors")


# ----------------------------------------------------------------------------------------------------------- moved runs
