"""The Triton kernels: in Triton's interpreter, compiled for an H100 without one, and on a GPU if there is one."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latent_verse.biart import sampling, triton_kernels
from latent_verse.biart.sampling import choose
from latent_verse.biart.triton_kernels import decode_attention, has_kernels, has_sampling_kernel, sample_classes

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# Triton reads the variable when it is imported, so these tests run in a process of their own: see `interpret`.
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs within test_interpreted_*")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # relative: 1 unit in the last place
SETTINGS = [(None, None), (50, None), (None, 0.9), (200, 0.7)]


@pytest.fixture(autouse=True)
def asked_anew():
    """What a test pretends about the machine must not be remembered."""
    triton_kernels._triton_serves.cache_clear()
    yield
    triton_kernels._triton_serves.cache_clear()


def interpret(marks: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "in_the_interpreter"]
    done = subprocess.run(
        [*command, "-m", marks, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("Triton's interpreter before 3.8 does not work with this NumPy")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
    assert "skipped" not in done.stdout, done.stdout


def test_interpreted_kernels():
    interpret("not slow")


@pytest.mark.slow
def test_interpreted_kernels_at_length():
    interpret("slow")


def made(B, H, D, S, pos, dtype, device="cpu"):
    """Arguments of decode_attention: views of a product; slots that must not be read hold NaN."""
    generator = torch.Generator().manual_seed(pos)
    qkv_B13HD = torch.randn(B, 1, 3, H, D, generator=generator).to(device, dtype)
    caches = [torch.randn(B, H, S, D, generator=generator).to(device, dtype) for _ in "kv"]
    for cache in caches:
        cache[:, :, pos:] = torch.nan
    return *qkv_B13HD[:, 0].unbind(1), *caches, torch.tensor([pos], device=device)


def expected(q, k, v, k_cache, v_cache, pos):
    """y in float64, by the definition; and the caches as they should be afterwards."""
    end = int(pos) + 1
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    k_cache[:, :, end - 1], v_cache[:, :, end - 1] = k, v
    score = torch.einsum("bhd,bhsd->bhs", q.double(), k_cache[:, :, :end].double()) / q.shape[-1] ** 0.5
    return torch.einsum("bhs,bhsd->bhd", score.softmax(-1), v_cache[:, :, :end].double()), k_cache, v_cache


def check(attend, arguments):
    y, k_cache, v_cache = expected(*arguments)
    tolerance = TOLERANCE[arguments[0].dtype]
    torch.testing.assert_close(attend(*arguments).double(), y, atol=tolerance / 4, rtol=tolerance)
    for cache, after in zip(arguments[3:5], (k_cache, v_cache), strict=True):
        torch.testing.assert_close(cache, after, atol=0, rtol=0, equal_nan=True)


def attention_in_the_interpreter(shapes, dtypes, positions_near):
    from latent_verse.biart import triton_source

    for (B, H, D, S), dtype in itertools.product(shapes, dtypes):
        heads, tile = B * H, triton_source.tile(D, dtype.itemsize)
        programs = (1, 16 * heads) if triton_source.parts(heads, S, 16 * heads) > 1 else (1,)
        for pos, number in itertools.product({*positions_near(tile), S - 1} & set(range(S)), programs):
            check(lambda *a, n=number: triton_source.decode_attention(*a, n), made(B, H, D, S, pos, dtype))


@interpreted
def test_attention_in_the_interpreter():
    attention_in_the_interpreter([(2, 1, 64, 100)], [torch.bfloat16], lambda tile: (0, tile))
    attention_in_the_interpreter([(1, 3, 16, 7)], [torch.float32], lambda tile: (1,))


@interpreted
@pytest.mark.slow
def test_attention_of_more_shapes_in_the_interpreter():
    shapes = [(1, 2, 16, 300), (2, 2, 32, 300), (3, 1, 64, 300), (1, 12, 128, 150), (1, 2, 64, 7)]
    attention_in_the_interpreter(shapes, TOLERANCE, lambda tile: (0, 1, tile - 1, tile, tile + 1))


@interpreted
def test_every_slot_is_in_one_part_in_the_interpreter():
    """Each slot's value is one number: their mean is right only if each is counted once."""
    from latent_verse.biart import triton_source

    S, programs = 256, 7
    for pos in (6, 7, 8, 255):
        q, k, v, k_cache, v_cache, pos_1 = made(1, 1, 16, S, pos, torch.float32)
        v_cache[:] = 2.0 ** -torch.arange(S).clamp(max=20)[:, None]
        arguments = (torch.zeros_like(q), k, torch.full_like(v, 3.0), k_cache, v_cache, pos_1)
        y = triton_source.decode_attention(*arguments, programs)
        mean = (v_cache[0, 0, :pos, 0].sum() + 3) / (pos + 1)
        torch.testing.assert_close(y, mean.expand_as(y), rtol=1e-6, atol=0)


def sorted_choice(logits_V, u, temperature, top_k, top_p):
    """The class by sorting, in float64, and how far the nearest boundary between two choices is."""
    scaled_V = ((logits_V.float() - logits_V.float().amax()) / temperature).double()
    order_V = torch.arange(len(scaled_V))
    if top_k is not None or top_p is not None:
        scaled_V, order_V = scaled_V.sort(descending=True, stable=True)
        scaled_V = scaled_V[:top_k]
    p_V = scaled_V.softmax(0)
    cdf_V = p_V.cumsum(0)
    near, last = 1.0, len(cdf_V) - 1
    if top_p is not None:
        last = max(int((cdf_V - p_V < top_p).sum()) - 1, 0)
        near = float((cdf_V - top_p).abs().min())
    point = u * float(cdf_V[last])
    at = min(int(torch.searchsorted(cdf_V, torch.tensor(point, dtype=torch.float64), right=True)), last)
    return int(order_V[at]), min(near, float((cdf_V - point).abs().min()))


def samples_as_by_sorting(sample, rows, V, settings, device="cpu", scales=(0.2, 3.0, 12.0)):
    """Compare; what differs must be within rounding of a boundary, and that must be rare."""
    torch.manual_seed(V)
    near = 0
    for scale, temperature, (top_k, top_p) in itertools.product(scales, (1.0, 0.7), settings):
        logits_BV, u_B = torch.randn(rows, V) * scale, torch.rand(rows)
        found_B = sample(logits_BV.to(device), u_B.to(device), temperature, top_k, top_p)
        assert found_B.dtype == torch.long
        for logits_V, u, found in zip(logits_BV, u_B.tolist(), found_B.tolist(), strict=True):
            wanted, margin = sorted_choice(logits_V, u, temperature, top_k, top_p)
            assert found == wanted or margin < 1e-6, (scale, temperature, top_k, top_p, found, wanted, margin)
            near += found != wanted
    assert near <= max(1, 2 * len(scales) * rows * len(settings) // 50)


def edge_cases(sample, device="cpu"):
    def classes(logits, temperature=1.0, top_k=None, top_p=None, points=(0.0, 0.3, 0.6, 1 - 2**-24)):
        logits_BV = torch.tensor([logits] * len(points), device=device)
        return sample(logits_BV, torch.tensor(points, device=device), temperature, top_k, top_p).tolist()

    inf, nan = float("inf"), float("nan")
    equal, one_hot = [0.5] * 10, [-inf, -inf, 2.0, -inf, -inf]
    assert classes(equal) == [0, 3, 6, 9]
    assert classes(equal, top_k=5) == [0, 1, 3, 4]  # the first of equal ones
    assert classes(equal, top_p=0.45) == [0, 1, 3, 4]
    assert classes(equal, top_p=1.0) == classes(equal, top_k=10) == [0, 3, 6, 9]
    assert classes(equal, top_p=1e-30) == classes(equal, top_k=1) == [0] * 4
    for settings in ((None, None), (1, None), (3, None), (None, 1.0), (None, 1e-3), (5, 0.5), (5, 1.0)):
        assert classes(one_hot, 1.0, *settings) == [2] * 4, settings
        # a tiny temperature
        assert classes([0.1, 0.3, 0.2, -5.0, 0.0], 1e-30, *settings) == [1] * 4, settings
        for bad in (
            [nan] * 5,
            [0.0, nan, 1.0, 2.0, nan],
            [-inf] * 5,
            [inf, 0.0, inf, 1.0, 2.0],
            [nan, inf, -inf, 0, 0],
        ):
            assert set(classes(bad, 1.0, *settings)) <= set(range(5)), (bad, settings)
    # top_k cuts through equal classes, and top_p cuts what top_k left: 2/5, 2/5, 1/5 of it
    two, one = 1.0, 1.0 - 0.6931472
    assert classes([one, two, one, two, one], top_k=3) == [1, 1, 3, 0]
    assert classes([one, two, one, two, one], top_k=3, top_p=0.6) == [1, 1, 3, 3]
    assert classes([one, two, one, two, one], top_k=3, top_p=0.3) == [1] * 4
    assert classes([0.0, -inf, 0.0], top_k=3) == [0, 0, 2, 2]  # never one without probability


@interpreted
def test_sampling_in_the_interpreter():
    from latent_verse.biart import triton_source

    samples_as_by_sorting(triton_source.sample_classes, 1, 1000, SETTINGS, scales=(3.0,))
    inf, nan = float("inf"), float("nan")
    rows_BV = torch.tensor([[1.0, 1, 1, 1, 1], [-inf, -inf, 2, -inf, -inf], [nan, inf, -inf, 0, 0], [nan] * 5])
    found = triton_source.sample_classes(rows_BV, torch.tensor([0.7, 0.7, 0.7, 1 - 2**-24]), 1.0, 4, 0.7)
    assert found[:2].tolist() == [2, 2] and set(found[2:].tolist()) <= set(range(5))
    signs_BV = torch.tensor([[0.0, -0.0], [-0.0, 0.0]])  # equal, though their bits are not
    assert triton_source.sample_classes(signs_BV, torch.tensor([0.7, 0.7]), 1.0, 2, None).tolist() == [1, 1]


@interpreted
@pytest.mark.slow
def test_sampling_of_more_rows_in_the_interpreter():
    from latent_verse.biart import triton_source

    settings = [*SETTINGS, (None, 1.0), (None, 1e-6), (1, None), (1000, None), (1000, 0.99)]
    samples_as_by_sorting(triton_source.sample_classes, 4, 1000, settings)
    samples_as_by_sorting(triton_source.sample_classes, 1, 8192, SETTINGS)
    samples_as_by_sorting(triton_source.sample_classes, 1, 16385, SETTINGS[2:], scales=(3.0,))
    edge_cases(triton_source.sample_classes)


def test_the_plain_choice_is_that_by_sorting():
    samples_as_by_sorting(choose, 8, 1000, SETTINGS)


def test_the_plain_attention_is_by_the_definition():
    for dtype, pos in itertools.product(TOLERANCE, (0, 1, 6)):
        check(decode_attention, made(2, 3, 16, 7, pos, dtype))


@pytest.mark.slow
def test_compiled_layers_do_not_copy_the_cache():
    """The operator writes into views of one tensor; a compiler that keeps operators pure would copy all of it."""
    from torch._inductor.utils import run_and_get_code

    def layers(x_BC, k_LBHSD, v_LBHSD, pos_1):
        for k_BHSD, v_BHSD in zip(k_LBHSD, v_LBHSD, strict=True):
            q, k, v = x_BC.view(2, 3, 3, 16).unbind(1)
            y_BHD = decode_attention(q, k, v, k_BHSD, v_BHSD, pos_1)
            x_BC = x_BC + y_BHD.flatten(1).repeat(1, 3)
        return x_BC

    torch.manual_seed(0)
    x_BC, cache = torch.randn(2, 144), torch.randn(3, 2, 3, 8, 16)
    pos_1 = torch.tensor([5])
    plain, compiled = [cache.clone(), cache.clone()], [cache.clone(), cache.clone()]
    with torch.no_grad():
        wanted = layers(x_BC, *plain, pos_1)
        torch._dynamo.reset()
        found, sources = run_and_get_code(torch.compile(layers, fullgraph=True), x_BC, *compiled, pos_1)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(one, other)
    assert sum(s.count("= torch.ops.latent_verse.decode_attention.default(") for s in sources) == 3
    assert not any(str(cache.numel()) in s or "clone" in s for s in sources)


def compiled_for_an_h100(kernel, types, constants, warps):
    """(registers, bytes spilled, bytes of shared memory, PTX) of a kernel with arguments aligned as a launch's."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    if not ptxas.exists():
        pytest.skip("this Triton has no compiler for NVIDIA's GPUs")
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    # as the launch finds: pointers and lengths that are multiples of 16
    even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] in ("i32", "*i64")}
    even |= {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    even = {at: value for at, value in even.items() if names[at[0]] not in ("heads",)}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, even)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    command = [ptxas, "-arch=sm_90a", "-v", "-o", os.devnull, "/dev/stdin"]
    said = subprocess.run(command, input=made.asm["ptx"], capture_output=True, text=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    spilled = sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", said)))
    return registers, spilled, made.metadata.shared, made.asm["ptx"]


TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ATTENTION_SHAPES = [
    (64, torch.bfloat16),
    *(pytest.param(D, dtype, marks=pytest.mark.slow) for D, dtype in itertools.product((16, 64, 128, 256), TOLERANCE)),
]


@pytest.mark.parametrize("D, dtype", ATTENTION_SHAPES)
def test_attention_compiles_for_an_h100_without_spills_and_reads_16_bytes_at_a_time(D, dtype):
    pytest.importorskip("triton")
    from latent_verse.biart import triton_source

    name = "*" + TRITON_TYPES[dtype]
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr", "y_ptr"), name)
    types = {**pointers, "pos_ptr": "*i64", "work_ptr": "*fp32", "scale": "fp32"}
    tile = triton_source.tile(D, dtype.itemsize)
    constants = {"q_channel": 1, "k_channel": 1, "v_channel": 1, "PARTS": 32, "WIDTH": D, "TILE": tile}
    registers, spilled, shared, ptx = compiled_for_an_h100(triton_source._attend, types, constants, triton_source.WARPS)
    assert spilled == 0 and registers <= 128 and shared < 48 * 1024, (registers, spilled, shared)
    threads = 32 * triton_source.WARPS
    wide = re.findall(r"ld\.global\.v(\d)\.b(\d+)", ptx)
    tiles = [1 for count, bits in wide if int(count) * int(bits) == 128]
    assert len(tiles) >= 2 * max(1, tile * D * dtype.itemsize // (16 * threads)), wide


SAMPLING_SHAPES = [
    (8192, False, True),
    *(
        pytest.param(*shape, marks=pytest.mark.slow)
        for shape in itertools.product((1024, 8192, 16384, 32768), (False, True), (False, True))
    ),
]


@pytest.mark.parametrize("V, top_k, top_p", SAMPLING_SHAPES)
def test_sampling_compiles_for_an_h100_with_rows_of_16384_classes_in_registers(V, top_k, top_p):
    pytest.importorskip("triton")
    from latent_verse.biart import triton_source

    types = {"logits_ptr": "*bf16", "u_ptr": "*fp32", "class_ptr": "*i64"}
    types |= dict.fromkeys(("temperature", "top_k", "top_p"), "fp32")
    constants = {"class_stride": 1, "u_stride": 1, "HAS_TOP_K": top_k, "HAS_TOP_P": top_p, "PADDED": V}
    constants["BITS"] = triton_source.key_bits(V, top_k or top_p)
    warps = triton_source.sampling_warps(V)
    registers, spilled, shared, ptx = compiled_for_an_h100(triton_source._sample, types, constants, warps)
    assert (spilled == 0 or V > 16384) and shared < 48 * 1024, (registers, spilled, shared)
    assert "ld.global.v4.b32" in ptx


def test_there_are_no_kernels_on_a_cpu():
    assert not has_kernels(torch.device("cpu"), torch.float32, 64)
    assert not has_sampling_kernel(torch.device("cpu"), 8192)


def test_kernels_need_a_new_gpu_that_triton_serves_a_type_and_a_width(monkeypatch):
    device, lacks, capability = torch.device("cuda"), [""], [(9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(triton_kernels, "why_not_compiled", lambda device: lacks[0])
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.empty(size))
    monkeypatch.setattr(triton_kernels, "sample_classes", lambda *arguments: None)
    triton_kernels._triton_serves.cache_clear()
    assert has_kernels(device, torch.bfloat16, 64) and has_sampling_kernel(device, 8192)
    assert not has_kernels(device, torch.float64, 64) and not has_kernels(device, torch.bfloat16, 48)
    assert not has_sampling_kernel(device, triton_kernels.MOST_CLASSES + 1)
    for lacks[0], capability[0] in (("no compiler", (9, 0)), ("", (7, 5))):
        triton_kernels._triton_serves.cache_clear()
        assert not has_kernels(device, torch.bfloat16, 64) and not has_sampling_kernel(device, 8192)
    lacks[0], capability[0] = "", (9, 0)
    triton_kernels._triton_serves.cache_clear()

    def fails(*arguments):
        raise RuntimeError("libcuda.so cannot be found")

    monkeypatch.setattr(triton_kernels, "sample_classes", fails)
    with pytest.warns(UserWarning, match="libcuda.so cannot be found"):
        assert not has_kernels(device, torch.bfloat16, 64)
    assert not has_sampling_kernel(device, 8192)  # without another warning
    triton_kernels._triton_serves.cache_clear()


def test_choosing_takes_the_kernel_where_there_is_one(monkeypatch):
    monkeypatch.setattr(sampling, "sample_classes", lambda *arguments: arguments[2:])
    logits_BV, u_B = torch.randn(2, 8), torch.rand(2)
    assert choose(logits_BV, u_B, 0.5, 3, 0.9, by_kernel=True) == (0.5, 3, 0.9)
    assert torch.equal(choose(logits_BV, None, 0.5, by_kernel=True), logits_BV.argmax(-1))
    assert choose(logits_BV, u_B, 0.5).shape == (2,)


def test_importing_the_kernels_does_not_import_triton():
    code = "import sys, latent_verse.biart.sampling; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("B, H, D, S", [(1, 12, 64, 1100), (2, 3, 16, 7), (40, 16, 64, 300), (1, 2, 256, 200)])
def test_attention_on_a_gpu(B, H, D, S, dtype):
    for pos in {0, 1, S // 2, S - 1}:
        check(decode_attention, made(B, H, D, S, pos, dtype, "cuda"))


@gpu
def test_one_cuda_graph_attends_at_all_positions():
    S = 500
    arguments = made(2, 12, 64, S, 0, torch.bfloat16, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        decode_attention(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = decode_attention(*arguments)

    def replay(*new):
        for own, given in zip(arguments, new, strict=True):
            own.copy_(given)
        graph.replay()
        new[3].copy_(arguments[3])
        new[4].copy_(arguments[4])
        return y

    for pos in (0, 1, 63, 64, 300, S - 1):
        check(replay, made(2, 12, 64, S, pos, torch.bfloat16, "cuda"))


@gpu
def test_sampling_on_a_gpu():
    samples_as_by_sorting(sample_classes, 16, 8192, SETTINGS, "cuda")
    samples_as_by_sorting(sample_classes, 16, 1000, SETTINGS, "cuda")
    edge_cases(sample_classes, "cuda")
