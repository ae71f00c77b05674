"""checkpoints/: whatever is wrong in a file, every reader says so in one line, and builds and allocates nothing."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import struct
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.checkpoints import ckpt_files
from latent_verse.checkpoints.augvae import load_augvae
from latent_verse.checkpoints.biart import export_bundle, load_pretrained
from latent_verse.checkpoints.bundle import load_bundle
from latent_verse.checkpoints.ckpt_files import CheckpointError, find_checkpoint, read_ckpt
from latent_verse.commands import train_biart
from latent_verse.config import ConfigError, UserError
from latent_verse.inference.pipeline import LVerse
from tests.messages import naming
from tests.small_checkpoints import changed, flip, own_ckpt, put
from tests.tiny_lverse import make_lverse

TINY = (
    "--n_layer 1 --n_head 2 --n_embd 16 --tokenizer bpe --bpe_vocab_size 300 --text_len 8 --batch_size 4 --fake_data "
    "--num_workers 0 --gpus 0 --logger csv --refresh_rate 0 --num_samples 0 --ema_decay 0.9"
).split()
WEIGHT = "model.encoders.0.conv_in.bias"  # (32,)


def one_line(load, file, *facts) -> str:
    """The message that loading a damaged file fails with: one line, not long, that names it and `facts`."""
    with pytest.raises(CheckpointError, match=naming(file, *facts)) as error:
        load(file)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600, message
    return message


def many() -> list:
    """A list of 2**60 items, in a few bytes of a file: each of 60 lists holds the one before it twice."""
    items: list = [0]
    for _ in range(60):
        items = [items, items]
    return items


def expanded(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of this shape with a single number in memory and in a file."""
    return torch.zeros(1).expand(shape)


@pytest.fixture
def file(tiny_augvae, tmp_path) -> Path:
    return own_ckpt(tiny_augvae(), tmp_path / "a.ckpt")


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


# -------------------------------------------------------------------------------------------------- which file is taken


def run_of(tiny_augvae, folder: Path, scores: dict[str, float | None], steps: dict[str, int]) -> Path:
    """A run folder with checkpoints of these names."""
    for i, (name, step) in enumerate(steps.items()):
        model = tiny_augvae(seed=i)
        file = own_ckpt(model, folder / "checkpoints" / f"{name}.ckpt", global_step=step)
        if scores.get(name) is not None:
            changed(file, put("latent_verse", "score", value={"val/total_loss": scores[name]}))
    return folder


def test_the_best_is_that_of_the_smallest_stored_score(tiny_augvae, tmp_path):
    """A run that was copied and continued has several; names and steps say nothing of the score."""
    scores = {"best-epoch=9-step=9": 0.5, "best-epoch=3-step=3": 0.2, "best-epoch=5-step=5-v1": 0.1}
    steps = {"best-epoch=9-step=9": 9, "best-epoch=3-step=3": 3, "best-epoch=5-step=5-v1": 5, "last-epoch=9-step=9": 9}
    run = run_of(tiny_augvae, tmp_path, scores, steps)
    assert find_checkpoint(run).name == "best-epoch=5-step=5-v1.ckpt"
    (run / "checkpoints" / "best-epoch=5-step=5-v1.ckpt").unlink()
    assert find_checkpoint(run).name == "best-epoch=3-step=3.ckpt"


def test_older_files_have_the_score_in_the_state_of_modelcheckpoint(tiny_augvae, tmp_path):
    run = run_of(tiny_augvae, tmp_path, {}, {"best-epoch=9-step=9": 9, "best-epoch=3-step=3": 3})
    assert find_checkpoint(run).name == "best-epoch=9-step=9.ckpt"  # nothing else is known: the newest by step
    for name, score in (("best-epoch=9-step=9", 0.5), ("best-epoch=3-step=3", 0.2)):
        states = {
            "ModelCheckpoint{'monitor': 'val/total_loss'}": {
                "monitor": "val/total_loss",
                "current_score": torch.tensor(score),
            },
            "ModelCheckpoint{'monitor': None}": {"monitor": None, "current_score": None},
        }
        changed(run / "checkpoints" / f"{name}.ckpt", put("callbacks", value=states))
    assert find_checkpoint(run).name == "best-epoch=3-step=3.ckpt"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "NaN"])
@pytest.mark.parametrize("name", ["best-epoch=5-step=5", "best-epoch=5-step=5-v1"])
def test_a_damaged_best_yields_to_the_next_with_one_warning(tiny_augvae, tmp_path, damage, name):
    scores = {name: 0.1, "best-epoch=3-step=3": 0.2}
    run = run_of(tiny_augvae, tmp_path, scores, {name: 5, "best-epoch=3-step=3": 3, "last-epoch=9-step=9": 9})
    file = run / "checkpoints" / f"{name}.ckpt"
    damaged(file, damage)
    with pytest.warns(UserWarning, match=naming(file, "best-epoch=3-step=3.ckpt")) as said:
        model = load_augvae(run)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    expected = tiny_augvae(seed=1)
    assert torch.equal(model.quantizer.embedding.weight, expected.quantizer.embedding.weight)
    damaged(run / "checkpoints" / "best-epoch=3-step=3.ckpt", damage)
    with pytest.warns(UserWarning, match=naming("last-epoch=9-step=9.ckpt")):
        assert find_checkpoint(run).name == "last-epoch=9-step=9.ckpt"
    damaged(run / "checkpoints" / "last-epoch=9-step=9.ckpt", damage)
    with pytest.raises(CheckpointError, match=naming(file)) as error:
        load_augvae(run)
    assert "\n" not in str(error.value)


def damaged(file: Path, how: str) -> None:
    whole = file.read_bytes()
    if how == "cut":  # as a copy that was interrupted
        file.write_bytes(whole[: len(whole) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "NaN":
        changed(file, put("state_dict", WEIGHT, value=torch.full((32,), torch.nan)))
    else:
        flip(file, len(whole) // 2)


def test_a_damaged_file_that_was_named_names_whole_ones_beside_it(tiny_augvae, tmp_path):
    run = run_of(tiny_augvae, tmp_path, {}, {"best-epoch=3-step=3": 3, "last-epoch=9-step=9": 9, "last-step=1": 1})
    for name in ("best-epoch=3-step=3.ckpt", "last-step=1.ckpt"):
        damaged(run / "checkpoints" / name, "cut")
    named = run / "checkpoints" / "best-epoch=3-step=3.ckpt"
    message = one_line(load_augvae, named, "last-epoch=9-step=9.ckpt")
    assert "last-step=1.ckpt" not in message


def test_a_copy_by_another_name_is_read(tiny_augvae, tmp_path):
    run = run_of(tiny_augvae, tmp_path, {}, {"last-epoch=9-step=9": 9})
    file = run / "checkpoints" / "last-epoch=9-step=9.ckpt"
    file.rename(file.with_name("last-epoch=9-step=9 (copy).ckpt"))
    assert find_checkpoint(run).name == "last-epoch=9-step=9 (copy).ckpt"


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
    for use in (load_augvae, load_pretrained, LVerse.from_pretrained, model.save_pretrained, model.vae.save_pretrained):
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


def replaced_by(file: Path, kind: str) -> None:
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")


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


# ------------------------------------------------------------------------------------------------------------- bundles


@pytest.fixture
def bundle(tiny_augvae, tmp_path) -> Path:
    make_lverse(tiny_augvae(single_level=4)).save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


BUNDLE_JSON = {
    "a list": ("config.json", lambda content: [content]),
    "biart a list": ("config.json", lambda content: content | {"biart": [1]}),
    "n_layer": ("config.json", lambda content: content | {"biart": content["biart"] | {"n_layer": 10**6}}),
    "n_embd": ("config.json", lambda content: content | {"biart": content["biart"] | {"n_embd": 2 * 10**12}}),
    "text_len": ("config.json", lambda content: content | {"biart": content["biart"] | {"text_len": 10**12}}),
    "image_len": ("config.json", lambda content: content | {"biart": content["biart"] | {"image_len": 2**62}}),
    "text_vocab": ("config.json", lambda content: content | {"biart": content["biart"] | {"text_vocab": 1e3}}),
    "n_head": ("config.json", lambda content: content | {"biart": content["biart"] | {"n_head": "2"}}),
    "embd_pdrop": ("config.json", lambda content: content | {"biart": content["biart"] | {"embd_pdrop": float("nan")}}),
    "info a list": ("config.json", lambda content: content | {"info": [["reference_dropout", 0.1]]}),
    "reference_dropout": ("config.json", lambda content: content | {"info": {"reference_dropout": "0.1"}}),
    "dropout NaN": ("config.json", lambda content: content | {"info": {"reference_dropout": float("nan")}}),
    "text_too_long": ("config.json", lambda content: content | {"info": {"text_too_long": ["truncate"]}}),
    "fingerprints": ("config.json", lambda content: content | {"fingerprints": "all"}),
    "format": ("config.json", lambda content: content | {"format": {"a": 1}}),
    "vae num_tokens": (
        "vae/config.json",
        lambda content: content | {"config": content["config"] | {"num_tokens": 2147483648}},
    ),
    "vae a list": ("vae/config.json", lambda content: content | {"config": [1]}),
    "vae format": ("vae/config.json", lambda content: content | {"format": [1]}),
    "tokenizer a list": ("tokenizer/tokenizer_config.json", lambda content: [content]),
    "tokenizer's name": ("tokenizer/tokenizer_config.json", lambda content: content | {"name": ["bpe"]}),
    "tokenizer's fingerprint": ("tokenizer/tokenizer_config.json", lambda content: content | {"fingerprint": [1]}),
}


@pytest.mark.parametrize("case", BUNDLE_JSON)
def test_json_of_a_bundle(bundle, unbuilt_biart, case):
    name, change = BUNDLE_JSON[case]
    (bundle / name).write_text(json.dumps(change(json.loads((bundle / name).read_text()))))
    for load in (LVerse.from_pretrained, load_pretrained):
        with pytest.raises(CheckpointError, match=naming(bundle)) as error:
            load(bundle)
        assert len(str(error.value)) < 3000


@pytest.fixture
def unbuilt_biart(monkeypatch):
    """Fails a test that makes a large BiART."""
    make = BiART.__init__

    def made(self, config):
        assert config.n_layer < 1000
        make(self, config)

    monkeypatch.setattr(BiART, "__init__", made)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "\x00", "nul", '"text"', "12"])
@pytest.mark.parametrize(
    "name", ["config.json", "vae/config.json", "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json"]
)
def test_text_of_a_bundle_that_is_no_object(bundle, name, text):
    (bundle / name).write_text(text)
    one_line(LVerse.from_pretrained, bundle)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
@pytest.mark.parametrize(
    "name", ["config.json", "biart.safetensors", "vae/model.safetensors", "tokenizer/tokenizer.json"]
)
def test_special_files_in_a_bundle(bundle, name, kind):
    replaced_by(bundle / name, kind)
    one_line(LVerse.from_pretrained, bundle, name.split("/")[-1])


HEADERS = {
    "shape": lambda head, name: head[name].update(shape=[10**12]),
    "overflow": lambda head, name: head[name].update(shape=[2**63, 2]),
    "negative": lambda head, name: head[name].update(shape=[-1]),
    "type": lambda head, name: head[name].update(dtype="X"),
    "beyond": lambda head, name: head[name].update(data_offsets=[0, 10**15]),
    "backwards": lambda head, name: head[name].update(data_offsets=[100, 0]),
    "another": lambda head, name: head[name].update(dtype="F16"),
    "whole numbers": lambda head, name: head[name].update(dtype="I32"),
    "text": lambda head, name: head.update({name: "tensor"}),
}


@pytest.mark.parametrize("weights", ["biart.safetensors", "vae/model.safetensors"])
@pytest.mark.parametrize("case", [*HEADERS, "length"])
def test_headers_of_safetensors_that_lie(bundle, weights, case):
    file = bundle / weights
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    head, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    if case == "length":
        file.write_bytes(struct.pack("<Q", 2**60) + data[8:])
    else:
        HEADERS[case](head, next(name for name in head if name != "__metadata__"))
        text = json.dumps(head).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    with pytest.raises(CheckpointError, match=naming(bundle)):
        LVerse.from_pretrained(bundle)


@pytest.mark.parametrize("weights", ["biart.safetensors", "vae/model.safetensors"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_of_a_bundle_that_are_not_finite(bundle, weights, value):
    state = load_file(bundle / weights)
    name = next(iter(state))
    state[name] = state[name].clone()
    state[name].view(-1)[-1] = value
    save_file(state, bundle / weights)
    one_line(LVerse.from_pretrained, bundle, bundle / weights, "finite", name)
    with pytest.raises(CheckpointError, match=naming("finite")):
        load_pretrained(bundle)


def test_information_of_another_kind(tiny_augvae):
    for value in ("0.1", None, [0.1], float("nan"), 2):
        with pytest.raises(ValueError, match=naming("reference_dropout")):
            make_lverse(tiny_augvae(single_level=4), reference_dropout=value)


# ------------------------------------------------------------------------------------------------- checkpoints of BiART


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The run folder of a smoke test."""
    folder = tmp_path_factory.mktemp("runs")
    assert train_biart.main([*TINY, "--log_dir", str(folder), "--name", "run"]) == 0
    return folder / "run"


@pytest.fixture
def checkpoint(trained, tmp_path) -> Path:
    (file,) = trained.glob("checkpoints/best-*.ckpt")
    return Path(shutil.copy(file, tmp_path / "b.ckpt"))


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (put("latent_verse", "model", "n_layer", value=10**6), ()),
        (put("latent_verse", "model", "image_vocab", value=10**12), ()),
        (put("latent_verse", "model", value="BiART"), ("settings", "str")),
        (put("latent_verse", "run", value=[1]), ()),
        (put("latent_verse", "run", "optim", value=None), ()),
        (lambda content: content["latent_verse"]["run"].pop("optim"), ("optim",)),
        (put("latent_verse", "run", "loss", "reference_dropout", value="0.1"), ("reference_dropout",)),
        (put("latent_verse", "run", "text", "text_too_long", value=many()), ("text_too_long",)),
        (put("latent_verse", "vae", value=None), ()),
        (put("latent_verse", "vae", "path", value=5), ("AugVAE",)),
        (put("latent_verse", "vae", "fingerprint", value=[1]), ("AugVAE",)),
        (put("latent_verse", "tokenizer", value="bpe"), ("tokenizer",)),
        (put("latent_verse", "tokenizer", "files", value=["tokenizer.json"]), ("tokenizer",)),
        (put("latent_verse", "tokenizer", "files", "tokenizer.json", value=5), ("tokenizer",)),
        (put("latent_verse", "tokenizer", "files", "tokenizer.json", value="[" * 10**5), ("tokenizer.json",)),
        (put("latent_verse", "tokenizer", "files", value={}), ("tokenizer_config.json",)),
        (put("state_dict", "ema.head.weight", value=lambda w: w * torch.nan), ("finite", "ema.head.weight")),
        (put("state_dict", "model.head.weight", value=lambda w: w * torch.nan), ("finite", "model.head.weight")),
        (put("state_dict", "ema.head.weight", value=5), ("ema.head.weight",)),
    ],
)
def test_content_of_a_biart_checkpoint(checkpoint, unbuilt_biart, change, facts):
    changed(checkpoint, change)
    for load in (load_pretrained, lambda file: export_bundle(file, checkpoint.parent / "bundle")):
        with pytest.raises(CheckpointError, match=naming(checkpoint, *facts)) as error:
            load(checkpoint)
        assert len(str(error.value)) < 3000
    assert not (checkpoint.parent / "bundle").exists()


def test_the_home_folder_is_found_in_python_too(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_pretrained("~/b.ckpt").where == checkpoint
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    best = checkpoint.rename(tmp_path / "run" / "checkpoints" / "best-epoch=0-step=1.ckpt")
    assert load_pretrained("~/run").where == best
    with pytest.raises(CheckpointError, match=naming(best, "smoke test")):  # found, though without its AugVAE
        export_bundle("~/run", "~/bundle")


def test_a_checkpoint_at_the_root_of_a_file_system(checkpoint):
    found = dataclasses.replace(load_pretrained(checkpoint), where=Path("/x.ckpt"))
    with pytest.raises(CheckpointError, match=naming("/x.ckpt", "--vae_path")):
        found.augvae()


def test_a_file_outside_is_never_written(checkpoint, tmp_path):
    """Names of a packed tokenizer's files are not paths."""
    changed(checkpoint, put("latent_verse", "tokenizer", "files", "../outside.json", value="{}"))
    load_pretrained(checkpoint)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.ckpt"]


def test_reading_needs_no_temporary_directory(checkpoint, trained, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    assert load_pretrained(checkpoint).tokenizer.fingerprint == load_pretrained(trained).tokenizer.fingerprint


# ----------------------------------------------------------------------------------------------------------- moved runs


def test_runs_that_were_moved_find_their_augvae(tiny_augvae, checkpoint, tmp_path, monkeypatch):
    """Recorded is where AugVAE was, from the folder of then; it is found beside, and known by its weights."""
    from latent_verse.checkpoints.ckpt_files import fingerprint

    vae = tiny_augvae(single_level=4)
    then = tmp_path / "then" / "results"
    own_ckpt(vae, then / "vae" / "checkpoints" / "best-epoch=0-step=1.ckpt")
    place = then / "biart" / "checkpoints" / "best-epoch=0-step=2.ckpt"
    place.parent.mkdir(parents=True)

    def record(path: str):
        def change(content):
            content["latent_verse"]["vae"] = {"path": path, "fingerprint": fingerprint(vae)}

        return change

    (tmp_path / "now").mkdir()
    monkeypatch.chdir(tmp_path / "now")
    for path in (
        "results/vae",
        str(then / "vae"),
        str(then / "vae" / "checkpoints" / "best-epoch=0-step=1.ckpt"),
        "../then/results/vae",
    ):
        moved = tmp_path / "elsewhere"
        changed(checkpoint, record(path), to=place)
        shutil.copytree(then, moved)
        if path == "results/vae":  # another one is there by now
            own_ckpt(tiny_augvae(seed=9, single_level=4), Path("results/vae/checkpoints/best-epoch=0-step=1.ckpt"))
        (tmp_path / "then").rename(tmp_path / "gone")
        found = load_pretrained(moved / "biart").augvae()
        assert fingerprint(found) == fingerprint(vae)
        (tmp_path / "gone").rename(tmp_path / "then")
        shutil.rmtree(moved)


# ------------------------------------------------------------------------------------------------- what pickles ask for


def pickled(name: str, *arguments: object) -> bytes:
    """A pickle of the call of `module name` with a text or number for each argument."""
    data = b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n("
    for value in arguments:
        raw = str(value).encode() if isinstance(value, str) else int(value).to_bytes(8, "little")
        data += (b"X" + struct.pack("<I", len(raw)) if isinstance(value, str) else b"\x8a\x08") + raw
    return data + b"tR."


ASKING = {
    "memory": (pickled("builtins bytearray", 3 << 30), "bytearray"),
    "memory, by its old name": (pickled("__builtin__ bytearray", 3 << 30), "bytearray"),
    "memory of a storage": (pickled("torch.storage TypedStorage", 1 << 30), "TypedStorage"),
    "memory of a tensor": (pickled("torch FloatTensor", 1 << 30), "FloatTensor"),
    "time": (pickled("_codecs encode", "".join(map(chr, range(0x4E00, 0x9E00))) * 6, "punycode"), "punycode"),
    "time, by another spelling": (pickled("_codecs encode", "", "-" * 50 + "punycode"), "punycode"),
    "code": (pickled("os system", "touch harmed"), "os.system"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("form", ["pickle", "archive", "second pickle"])
@pytest.mark.parametrize("asking", ASKING)
def test_a_pickle_that_asks_for_memory_time_or_code_is_refused_before_it_is_loaded(file, monkeypatch, asking, form):
    data, fact = ASKING[asking]
    if form == "archive":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
    else:  # a file of torch.save's older form holds five, one after the other
        file.write_bytes(data if form == "pickle" else b"\x80\x02K\x01." + data)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it was loaded"))
    one_line(read_ckpt, file, fact)


@pytest.mark.parametrize("legacy", [False, True])
def test_whatever_a_whole_checkpoint_may_hold_is_read(tiny_augvae, file, legacy):
    """torch.save's older form, bytes, and the settings of released files."""
    content = torch.load(file, weights_only=False) | {
        "hyper_parameters": {"args": argparse.Namespace(resolution=16, name="utf-8")},
        "types": [torch.float16, torch.Size([2]), torch.device("cpu"), {1, 2}, Counter("aab"), OrderedDict(a=1)],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    read = read_ckpt(file)
    assert read["types"] == content["types"] and read["hyper_parameters"] == content["hyper_parameters"]
    assert list(read["state_dict"]) == list(content["state_dict"])
    del content["hyper_parameters"]
    torch.save(content | {"bytes": b"\xff\x00a"}, file, _use_new_zipfile_serialization=not legacy)
    assert read_ckpt(file)["bytes"] == b"\xff\x00a"


def test_files_that_are_known_to_be_whole_are_remembered_up_to_a_number(tiny_augvae, tmp_path, monkeypatch):
    """What they say of themselves holds a tokenizer."""
    monkeypatch.setattr(ckpt_files, "_whole", {})
    monkeypatch.setattr(ckpt_files, "KNOWN", 2)
    files = [own_ckpt(tiny_augvae(), tmp_path / f"{i}.ckpt") for i in range(4)]
    for file in files:
        read_ckpt(file)
    assert len(ckpt_files._whole) == 2
    monkeypatch.setattr(ckpt_files, "_content", lambda file: pytest.fail("it was read again"))
    assert all(ckpt_files.described(file)["kind"] == "augvae" for file in files[2:])
