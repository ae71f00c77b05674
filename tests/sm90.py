"""The code that PyTorch's compiler generates for an H100, without one: Inductor's kernels and calls, as source.

`generate(make)` traces what make() returns on fake CUDA tensors (see fake_cuda.py), derives the backward pass on the
CPU, because autograd on "cuda" needs a driver, and lowers both graphs for sm_90. Nothing is compiled to machine code.

    def make():
        block = Block(config)
        return block, (torch.empty(8, 64, 256, requires_grad=True),)

    forward, backward = generate(make, autocast=torch.bfloat16)
    forward.kernels    # {name: source of a Triton kernel}
    forward.launches   # names of all kernels and external calls (extern_kernels.mm, torch.ops. ...), in order
    forward.bytes      # for each launch of a Triton kernel the bytes of the tensors it reads and writes; 0 for others
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import fake_cuda

DEVICE = "cuda:0"
# an H100's properties, as far as Inductor asks for them
H100 = types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block_optin=232448, shared_memory_per_block=49152, L2_cache_size=50 * 2**20, gcnArchName="",
)  # fmt: skip


class _Generated(Exception):
    """Carries the source out of Inductor before it would compile it."""


@dataclass
class Code:
    """What Inductor wrote for one graph."""

    source: str
    kernels: dict[str, str] = field(default_factory=dict)
    launches: list[str] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    @property
    def triton_launches(self) -> list[str]:
        """The launches of generated kernels: pointwise, reductions, and copies."""
        return [name for name in self.launches if name.startswith("triton_")]

    @property
    def triton_bytes(self) -> int:
        """Bytes that the generated kernels read and write: each of a kernel's buffers counts once."""
        return sum(b for name, b in zip(self.launches, self.bytes, strict=True) if name.startswith("triton_"))


@contextlib.contextmanager
def _pretending() -> Iterator[None]:
    """Inside, Inductor believes that there is an H100 with Triton, and stops once it has generated the source."""
    import torch._inductor.graph as graph
    import torch._inductor.scheduler as scheduler
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime.hints import DeviceProperties

    def stop(self):
        wrapper, _ = self.codegen()
        moved = [
            node.get_read_write_buffers_sizes()
            for node in self.scheduler.nodes
            if not isinstance(node, (scheduler.ExternKernelSchedulerNode, scheduler.NopKernelSchedulerNode))
        ]
        raise _Generated(wrapper if isinstance(wrapper, str) else wrapper.value, moved)

    patches = [
        mock.patch.object(CudaInterface, "is_available", staticmethod(lambda: True)),
        mock.patch.object(CudaInterface, "get_device_properties", staticmethod(lambda device=None: H100)),
        mock.patch.object(CudaInterface, "is_bf16_supported", staticmethod(lambda including_emulation=False: True)),
        mock.patch.object(CudaInterface, "get_compute_capability", staticmethod(lambda device=None: 90)),
        mock.patch.object(CudaInterface, "is_triton_capable", staticmethod(lambda device=None: True)),
        mock.patch.object(CudaInterface, "raise_if_triton_unavailable", staticmethod(lambda device=None: None)),
        mock.patch.object(CudaInterface.Worker, "get_device_properties", staticmethod(lambda device=None: H100)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: H100),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(scheduler, "has_triton", lambda: True),
        mock.patch.object(torch.version, "hip", None),
        mock.patch.object(graph.GraphLowering, "compile_to_module", stop),
        torch._inductor.config.patch(
            fx_graph_cache=False,
            fx_graph_remote_cache=False,
            compile_threads=1,
            shape_padding=False,
            benchmark_kernel=False,
        ),
    ]
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    stub = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    patches.append(mock.patch.object(driver, "_active", stub))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        if hasattr(DeviceProperties.create, "cache_clear"):
            DeviceProperties.create.cache_clear()
        yield


class _FusedAttention(torch.overrides.TorchFunctionMode):
    """Attention as a GPU runs it: flash in half precision without a mask, otherwise the memory-efficient kernel.

    Without a driver, PyTorch would choose the plain formulation.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    @staticmethod
    def _attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if torch.is_autocast_enabled("cuda"):
            q, k, v = (t.to(torch.get_autocast_dtype("cuda")) for t in (q, k, v))
        if attn_mask is None and q.dtype in (torch.bfloat16, torch.float16):
            flash = torch.ops.aten._scaled_dot_product_flash_attention.default
            return flash(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
        return efficient(q, k, v, attn_mask, q.requires_grad, dropout_p, is_causal, scale=scale)[0]


def _on(device: str, graph: torch.fx.GraphModule) -> None:
    """Rewrite the devices in a graph's arguments."""
    move = lambda a: torch.device(device) if isinstance(a, torch.device) else a  # noqa: E731
    for node in graph.graph.nodes:
        node.args, node.kwargs = (torch.fx.node.map_aggregate(a, move) for a in (node.args, dict(node.kwargs)))
        for kept in ("val", "tensor_meta", "eager_input_vals"):
            node.meta.pop(kept, None)
    graph.recompile()


def _fakes(mode: FakeTensorMode, like: Sequence[object], device: str) -> list:
    """Tensors of the same shapes, strides and types in another mode and on another device."""
    with mode:
        return [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device, requires_grad=t.requires_grad)
            if isinstance(t, torch.Tensor) else t
            for t in like
        ]  # fmt: skip


def generate(make: Callable[[], tuple[Callable, tuple]], autocast: torch.dtype | None = None, grad: bool = True):
    """(forward Code, backward Code or None) of make()'s (module or function, inputs), made on fake CUDA tensors.

    All tensors must be inputs, parameters or made inside: a function must hold none. Activation checkpointing is off.

    Args:
        autocast: the type of torch.autocast("cuda") around the function.
        grad: also derive the backward pass, for all parameters and for the inputs that require gradients.
    """
    from functorch.compile import aot_function, make_boxed_func
    from torch._inductor import compile_fx
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode(), torch.device(DEVICE):
        with mock.patch.object(nn.Module, "_apply", fake_cuda.convert):
            fn, inputs = make()
        names, values = (
            zip(*fn.named_parameters(), strict=True)
            if isinstance(fn, nn.Module) and list(fn.parameters())
            else ((), ())
        )

        def pure(*args):
            weights, args = args[: len(names)], args[len(names) :]
            if not names:
                return fn(*args)
            return torch.func.functional_call(fn, dict(zip(names, weights, strict=True)), args)

        flat = [*(v.detach().requires_grad_(v.requires_grad) for v in values), *inputs]
        needs = [isinstance(t, torch.Tensor) and t.requires_grad for t in flat]
        dtype = torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", autocast is not None)  # torch.autocast refuses without a driver
        torch.set_autocast_dtype("cuda", autocast or torch.bfloat16)
        torch.set_autocast_cache_enabled(False)
        try:
            with torch.no_grad(), _FusedAttention():
                traced = make_fx(pure, tracing_mode="fake", _allow_non_fake_inputs=True)(*flat)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", dtype)
            torch.set_autocast_cache_enabled(True)

    _on("cpu", traced)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list):
        graphs.append((graph, inputs))
        return make_boxed_func(graph)

    cpu_mode = FakeTensorMode()
    fakes = [t.requires_grad_(n) if n else t for t, n in zip(_fakes(cpu_mode, flat, "cpu"), needs, strict=True)]
    with cpu_mode:
        joint = aot_function(
            traced, fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table(),
            **({"partition_fn": compile_fx.partition_fn} if grad else {"keep_inference_input_mutations": True}),
        )  # fmt: skip
        with torch.set_grad_enabled(grad):
            out = joint(*fakes)
            if grad:
                outs = [o for o in (out if isinstance(out, (tuple, list)) else [out]) if o.requires_grad]
                torch.autograd.backward(outs, [torch.empty_like(o) for o in outs])
    codes = []
    for i, (graph, at) in enumerate(graphs):
        codes.append(_lower(graph, at, is_backward=i == 1))
    return (*codes, None)[:2]


def _lower(graph: torch.fx.GraphModule, inputs: Sequence, is_backward: bool) -> Code:
    from torch._inductor import compile_fx
    from torch._inductor.virtualized import V

    _on(DEVICE, graph)
    mode = FakeTensorMode()
    fakes = _fakes(mode, inputs, DEVICE)
    with mode, V.set_fake_mode(mode):
        torch.fx.passes.fake_tensor_prop.FakeTensorProp(graph, mode=mode).propagate(*fakes)
    with _pretending(), mode, torch.no_grad():
        try:
            compile_fx.compile_fx_inner(graph, fakes, is_backward=is_backward)
        except BaseException as error:
            cause = error
            while cause is not None and not isinstance(cause, _Generated):
                cause = getattr(cause, "inner_exception", None) or cause.__cause__ or cause.__context__
            if cause is None:
                raise
            return _parse(*cause.args)
    raise RuntimeError("Inductor generated nothing.")


def _parse(source: str, moved: list[int]) -> Code:
    """Find kernels and launches in the source; `moved` has the bytes of each generated kernel's buffers, in order."""
    code, left = Code(source), list(moved)
    for match in re.finditer(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", source, re.M | re.S):
        code.kernels[match[1]] = match[2]
    call = source[source.index("def call(") :]
    for match in re.finditer(r"^ +(?:\w[\w, ]* = )?(\w+\.run|extern_kernels\.\w+|torch\.ops\.\S+?)\(", call, re.M):
        code.launches.append(match[1].removesuffix(".run"))
        code.bytes.append(left.pop(0) if match[1].startswith("triton_") and left else 0)
    if left or len(code.triton_launches) != len(moved):
        raise RuntimeError(f"{len(moved)} nodes became {len(code.triton_launches)} launches of generated kernels.")
    return code
