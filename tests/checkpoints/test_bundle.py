"""A bundle whose files are damaged, mixed or of another kind: one line, and nothing is built."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_verse.checkpoints.biart import load_pretrained
from latent_verse.checkpoints.ckpt_files import CheckpointError
from latent_verse.inference.pipeline import LVerse
from tests.messages import naming
from tests.small_checkpoints import one_line, replaced_by
from tests.tiny_lverse import make_lverse


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
