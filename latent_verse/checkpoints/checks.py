"""What a checkpoint's or bundle's content has to be, checked before anything is built from it or restored.

A file may declare what it likes. What it declares is compared with the tensors that it holds, so that nothing it says
takes more memory or time than a small multiple of its own size.
"""

from __future__ import annotations

import math
import os
import typing
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from latent_verse.config import ConfigError, UserError
from latent_verse.config.messages import reason
from latent_verse.config.settings import Settings, is_number
from latent_verse.files import FileError, read_json_object

LONGEST = 200  # of texts and lists among a model's settings
SHARED = 16  # tensors that the levels of an AugVAE share are in a file once, but counted once for each level
SPARE = 100  # networks may have this many blocks more than the file has tensors: missing keys are better listed
SHOWN = 20  # of a list of problems
WEIGHTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)

Section = TypeVar("Section", bound=Settings)
Network = TypeVar("Network", bound=nn.Module)


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, of another kind, or does not fit. The message names the file and the remedy."""


def number_in(value: Any) -> Any:
    """The number that a tensor of one number holds; any other value as it is."""
    if isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu":
        return value.item() if value.numel() == 1 else value
    return value


def json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint's folder.

    Raises:
        CheckpointError: it cannot be read, or holds no object.
    """
    try:
        return read_json_object(file)
    except FileError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def settings_from(section: type[Section], values: object, file: str | os.PathLike) -> Section:
    """The settings of a model, of which `file` holds the plain values.

    Raises:
        CheckpointError: they are not settings of this section, or out of their ranges.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is damaged: its model's settings are a {type(values).__name__}, not a dict.")
    kinds = typing.get_type_hints(section)
    for name, value in values.items():
        if not isinstance(name, str) or len(name) > LONGEST:
            raise CheckpointError(f"{file} is damaged: a setting of its model has no name.")
        if name in kinds and not _is_a(value, kinds[name]):
            shown = f" ({value})" if isinstance(value, (bool, float)) else ""
            raise CheckpointError(f"{file} is damaged: its {name} is of the wrong kind, {type(value).__name__}{shown}.")
    try:
        return section(**values)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{file}: its settings are not of a model this version can build: {error}") from error


def _is_a(value: object, kind: Any) -> bool:
    """Whether a value that was read is one of a setting's kind: int, float, bool, str, and tuples and Optional."""
    parts = typing.get_args(kind)
    if type(None) in parts:
        return value is None or _is_a(value, parts[0])
    if parts:  # Tuple[int, ...]
        short = isinstance(value, (list, tuple)) and len(value) <= LONGEST
        return short and all(_is_a(item, parts[0]) for item in typing.cast(list, value))
    if kind is str:
        return isinstance(value, str) and len(value) <= LONGEST
    if kind is float:
        return is_number(value)
    return type(value) is kind and (kind is bool or is_number(value))


def check_tensors(tensors: object, file: str | os.PathLike, what: str = "state_dict") -> None:
    """Refuse anything but ordinary, finite tensors on the CPU, by their names, whose every element is in the file.

    Raises:
        CheckpointError: naming the first that is not.
    """
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{file} is damaged: its {what} is a {type(tensors).__name__}, not a dict of tensors.")
    size, total = os.path.getsize(file), 0
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{file} is damaged: its {what} has a name of type {type(name).__name__}.")
        total += check_tensor(tensor, file, f"{what}: {name[:LONGEST]}")
    if total > SHARED * max(size, 2**16):
        raise CheckpointError(f"{file} is damaged: its {what} declares {total} bytes, in a file of {size}.")


def check_tensor(tensor: object, file: str | os.PathLike, name: str) -> int:
    """As `check_tensors`, for one of them. Returns its bytes."""
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{file} is damaged: {name} is a {type(tensor).__name__}, not a tensor.")
    ordinary = tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)
    if not ordinary or tensor.device.type != "cpu" or tensor.dtype not in WEIGHTS + OTHERS:
        kind = tensor.dtype if tensor.layout is torch.strided else tensor.layout
        raise CheckpointError(f"{file} is refused: {name} is not an ordinary tensor ({kind}, {tensor.device}).")
    needed = tensor.numel() * tensor.element_size()
    if needed > tensor.untyped_storage().nbytes():
        shape = tuple(tensor.shape)
        raise CheckpointError(f"{file} is damaged: {name} has shape {shape}, but the file holds only part of it.")
    if not is_finite(tensor):
        remedy = "Did training diverge? Take an earlier checkpoint."
        raise CheckpointError(f"{file} holds values that are not finite ({name}). {remedy}")
    return needed


def check_finite(model: nn.Module, file: str | os.PathLike) -> None:
    """Refuse to write weights that are not finite, or that are quantised, which no file of ours holds.

    Raises:
        CheckpointError: naming the first, and the `file` or folder that is left as it is.
    """
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            remedy = "Save the model before it is quantised, and quantise what is loaded."
            raise CheckpointError(f"{file} is not written: the weights are quantised ({name}). {remedy}")
        if not is_finite(tensor):
            raise CheckpointError(f"{file} is not written: the weights hold values that are not finite ({name}).")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite; nor, in float64, beyond float32, which networks load. One pass on a CPU.

    A CPU takes up to twenty times as long to look at each number. Of a sharded tensor, this process's shard counts.
    """
    local = tensor.detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    if not local.is_floating_point() or local.numel() == 0:
        return True
    if local.element_size() < 4:  # a CPU is slow to sum half precision
        return all(math.isfinite(end.item()) for end in torch.aminmax(local))
    total = local.sum(dtype=torch.float32)
    return math.isfinite(total.item()) or bool(local.float().isfinite().all())  # the sum of large numbers overflows


def crc32(file: Path) -> int:
    """The checksum of a file's bytes; read a part at a time."""
    found = 0
    with file.open("rb") as opened:
        while part := opened.read(2**20):
            found = zlib.crc32(part, found)
    return found


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a .safetensors file, in memory.

    Raises:
        CheckpointError: it is damaged, or see `check_tensors`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {reason(error)}") from error
    check_tensors(tensors, file, "weights")
    return tensors


def skeleton(
    network: Callable[[Any], Network], config: Any, blocks: int, tensors: Iterable[str], file: str | os.PathLike
) -> Network:
    """The network of a configuration on the meta device: names and shapes, without memory.

    Args:
        blocks: at most how many blocks it has: each takes time to make.
        tensors: those of the file, which are as many or more.

    Raises:
        CheckpointError: it cannot be built, or would have many more blocks than the file has tensors.
    """
    stored = sum(1 for _ in tensors)
    if blocks > stored + SPARE:
        raise CheckpointError(f"{file} is damaged: it declares {blocks} blocks, but holds {stored} tensors.")
    try:
        with torch.device("meta"):
            return network(config)
    except (ConfigError, RuntimeError, OverflowError, TypeError, ValueError) as error:
        why = reason(error)
        raise CheckpointError(f"{file}: its settings are not of a model this version can build: {why}") from error


def check_fits(model: nn.Module, state: Mapping[str, torch.Tensor], file: str | os.PathLike) -> None:
    """Check that `state`, which `file` holds, has the keys and shapes of `model`, which may be on the meta device.

    Raises:
        CheckpointError: keys are missing, unknown or of another shape or kind of number; the message lists them.
    """
    wanted = model.state_dict()
    problems = [f"missing {k}" for k in wanted if k not in state]
    problems += [f"unknown {k[:LONGEST]}" for k in state if k not in wanted]
    for k, there, here in ((k, state[k], wanted[k]) for k in wanted if k in state):
        if there.shape != here.shape:
            problems.append(f"{k} has shape {tuple(there.shape)}, not {tuple(here.shape)}")
        elif there.dtype != here.dtype and not (there.is_floating_point() and here.is_floating_point()):
            problems.append(f"{k} is {there.dtype}, not {here.dtype}")
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(f"{file} does not fit the model:\n  " + "\n  ".join(problems[:SHOWN]) + more)
