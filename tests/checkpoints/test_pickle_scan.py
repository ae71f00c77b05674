"""What a pickle asks for is refused before it is loaded, unless a whole checkpoint may hold it."""

from __future__ import annotations

import argparse
import struct
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch

from latent_verse.checkpoints.ckpt_files import read_ckpt
from tests.small_checkpoints import one_line


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
