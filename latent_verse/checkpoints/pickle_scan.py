"""What a checkpoint's pickles ask for, read before any of it is made.

PyTorch's `weights_only` keeps a file from running code. Some of what it still calls takes what the file says as it is:
`bytearray(10**11)` is 100 GB in a file of 30 bytes, and to encode a text in punycode takes the square of its length.
"""

from __future__ import annotations

import codecs
import io
import mmap
import pickletools
from pathlib import Path

import torch

from latent_verse.checkpoints.checks import CheckpointError
from latent_verse.config.messages import shown

ENCODE = "_codecs encode"  # how bytes are stored, by LATIN1 alone
LATIN1 = ("iso8859-1", "ascii")  # as `codecs.lookup` names them
_TENSORS = (
    *("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state"),
    *("sparse_tensor", "qtensor", "nested_tensor", "meta_tensor_no_storage"),  # `checks.check_tensor` names them
)
# as pickles write them: module, space, name
ALLOWED = {
    *("argparse Namespace", "collections OrderedDict", "collections Counter", "builtins set", "__builtin__ set"),
    *(f"torch._utils _rebuild_{kind}" for kind in _TENSORS),
    *("torch Size", "torch device", "torch.serialization _get_layout", "torch.nn.parameter Parameter", ENCODE),
    "torch.storage UntypedStorage",
}
LEGACY = (
    5  # pickles in a file that is no zip archive, before the numbers: its mark, version, machine, content, storages
)


def check_pickles(file: Path) -> None:
    """Refuse a file whose pickles ask for more than the tensors and plain types of a checkpoint. Nothing is made of it.

    Raises:
        CheckpointError: it does, naming the first.
        Exception: whatever Python and PyTorch raise on a damaged file.
    """
    with file.open("rb") as opened:
        if opened.read(4) == b"PK\3\4":  # how torch.load tells them; its own reader, as zipfile may see other parts
            _check(io.BytesIO(torch._C.PyTorchFileReader(str(file)).get_record("data.pkl")), file)
            return
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:  # reads no more than there is
            for _ in range(LEGACY):
                _check(data, file)


def _check(pickled: io.BytesIO | mmap.mmap, file: Path) -> None:
    start, names = pickled.tell(), set()
    for opcode, value, _ in pickletools.genops(pickled):  # type: ignore[arg-type]  # it has read and readline
        if opcode.name != "GLOBAL" or value in names:
            continue
        names.add(value)
        if value not in ALLOWED and not _is_of_torch(str(value)):
            remedy = "only tensors and plain types are read: others could run code, or take any memory"
            raise CheckpointError(f"{file} is refused: it holds {shown(str(value).replace(' ', '.'))}; {remedy}.")
    if ENCODE in names:
        pickled.seek(start)
        for _, value, _ in pickletools.genops(pickled):  # type: ignore[arg-type]
            if isinstance(value, str) and _is_other_codec(value):
                raise CheckpointError(f"{file} is refused: it holds bytes in the encoding {shown(value)}, not latin1.")


def _is_of_torch(name: str) -> bool:
    """Whether this is a type of numbers, a scheme of quantisation, or a storage, which tensors are stored with."""
    module, _, name = name.partition(" ")
    found = getattr(torch, name, None) if module in ("torch", "torch.cuda") else None
    return isinstance(found, (torch.dtype, torch.qscheme)) or (found is not None and name.endswith("Storage"))


def _is_other_codec(text: str) -> bool:
    """Whether a text names an encoding other than LATIN1. Numbers, which storages are called, name only code pages."""
    try:
        return not text.isdecimal() and codecs.lookup(text).name not in LATIN1
    except (LookupError, ValueError):
        return False
