"""A GPU that computes nothing: PyTorch's fake tensors on "cuda", for tests where there is none.

Operators check devices, compute shapes and dtypes, and follow autocast as on a GPU, but there are no values. This shows
two mistakes that a CPU hides: tensors left on the CPU, and places where the program waits for the device: to read a
value, or to copy from memory that is not pinned. The backward pass needs a driver and cannot run.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
DEVICE = "cuda:0"
PACKAGE = "latent_verse"


@functools.cache
def _why_not() -> str:
    """Why this PyTorch has no fake CUDA tensors; empty if it has."""
    try:
        with FakeTensorMode():
            nn.Linear(1, 1, device=DEVICE)
    except (RuntimeError, AssertionError) as error:  # built without CUDA; PyTorch 2.9 without a driver
        return f"no fake CUDA tensors: {str(error).splitlines()[0]}"
    return ""


class Waits(TorchDispatchMode):
    """Counts, by function of the package, copies between host and device, and supplies the values that are read.

    Each copy makes the program wait, but for one from pinned memory that says non_blocking. Whether memory is pinned is
    not known here, so these count as well.

    Args:
        says: the values that functions read, by the function's name; True for all others, which is what checks expect.
    """

    def __init__(self, says: dict[str, object]):
        super().__init__()
        self.says = says
        self.seen: Counter[str] = Counter()

    @contextlib.contextmanager
    def during_a_run(self) -> Iterator[None]:
        """Count anew, and as in a program: tensors made without a device are on the CPU."""
        self.seen.clear()
        with torch.device("cpu"):
            yield

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].device.type == "cuda":
            return self.says.get(self._note(), True)
        if self._copies(func, args, kwargs):
            self._note()
        return func(*args, **kwargs)

    @staticmethod
    def _copies(func, args, kwargs) -> bool:
        given = {t.device.type for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        if func is aten._to_copy.default:
            return {args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type} == {"cpu", "cuda"}
        if func is aten.lift_fresh.default:  # torch.tensor(..., device="cuda") where there is a driver
            return "cuda" in given
        # Numbers on the CPU become arguments of kernels that fill or are elementwise; where, indexing and others copy.
        elementwise = torch.Tag.pointwise in func.tags and func not in (aten.where.self, aten.copy_.default)
        return given == {"cpu", "cuda"} and not elementwise and func is not aten.fill_.Tensor

    def _note(self) -> str:
        frame = sys._getframe()
        while frame and not frame.f_globals.get("__name__", "").startswith(PACKAGE):
            frame = frame.f_back
        name = frame.f_code.co_name if frame else "?"
        self.seen[name] += 1
        return name


def convert(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, but by assigning data: swapping fake tensors, as it does, is forbidden."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = fn(parameter.data)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


@contextlib.contextmanager
def fake_cuda(says: dict[str, object] | None = None, autocast: torch.dtype | None = None) -> Iterator[Waits]:
    """Inside, tensors made without a device or on DEVICE are on a GPU that computes nothing.

    Afterwards, processes forked from this one cannot run a backward pass (PyTorch 2.14), so conftest.py runs these
    tests last.
    """
    if _why_not():
        pytest.skip(_why_not())
    before, dtype = nn.Module._apply, torch.get_autocast_dtype("cuda")
    nn.Module._apply = convert
    FakeTensor.__deepcopy__ = lambda tensor, memo: tensor.detach().clone()  # a plain tensor's reads its memory
    torch.set_autocast_enabled("cuda", autocast is not None)  # torch.autocast refuses without a driver
    torch.set_autocast_dtype("cuda", autocast or torch.bfloat16)
    torch.autocast_increment_nesting()
    waits = Waits(says or {})
    try:
        with FakeTensorMode(), torch.device(DEVICE), waits:
            yield waits
    finally:
        nn.Module._apply = before
        del FakeTensor.__deepcopy__
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", dtype)


@contextlib.contextmanager
def cudnn_convolutions() -> Iterator[None]:
    """Inside, convolutions of fake tensors give channels-last maps where cuDNN does.

    Without a driver, PyTorch expects its own slow kernels, which give NCHW.
    """
    backends = torch._C._ConvBackend

    def cudnn(*args, transposed: bool = False, **kwargs):
        return backends.CudnnTranspose if transposed else backends.Cudnn

    FakeTensorMode.cache_clear()  # it remembers layouts
    try:
        with mock.patch.object(torch._C, "_select_conv_backend", cudnn):
            yield
    finally:
        FakeTensorMode.cache_clear()


class Kept:
    """Bytes that a forward pass keeps for the backward pass, without parameters."""

    def __init__(self, module: nn.Module):
        self._own = {p.untyped_storage()._cdata for p in module.parameters()}
        self._kept: dict[int, torch.Tensor] = {}

    def __enter__(self) -> Kept:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self._kept[tensor.untyped_storage()._cdata] = tensor  # the tensor too, so that no other gets its address
        return tensor

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for key, t in self._kept.items() if key not in self._own)
