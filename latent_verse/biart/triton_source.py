"""The source of the kernels in `triton_kernels`, which alone imports this file, when the first of them runs.

Shape suffixes: B rows, H heads, D channels of a head, S slots, P the parts that a row's slots are divided into, V
classes, C slots read at a time.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4
TILE_BYTES = 8192  # of keys that a program reads at a time, and of values: four loads of 16 bytes by 128 threads
SLOTS_OF_A_PART = 32  # at least: a part costs D + 2 numbers of workspace, written and read


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    pos_ptr,
    y_ptr,
    work_ptr,
    slots,
    heads,
    scale,
    q_row,
    q_head,
    q_channel,
    k_row,
    k_head,
    k_channel,
    v_row,
    v_head,
    v_channel,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """One head's attention over one part of the filled slots; the first part adds the new token and stores it."""
    head, part = tl.program_id(0), tl.program_id(1)
    row, column = head // heads, head % heads
    d_D = tl.arange(0, WIDTH)
    q_D = tl.load(q_ptr + row * q_row + column * q_head + d_D * q_channel).to(tl.float32) * scale

    # A position out of range must not write outside the cache.
    pos = tl.minimum(tl.load(pos_ptr).to(tl.int32), slots - 1)
    length = tl.cdiv(pos, PARTS)
    start = part * length
    end = tl.minimum(start + length, pos)
    k_cache_ptr += head.to(tl.int64) * slots * WIDTH
    v_cache_ptr += head.to(tl.int64) * slots * WIDTH

    # The maximum is one number, the sums are kept per slot of a tile and added up at the end.
    tile_C = tl.arange(0, TILE)
    maximum = -float("inf")
    sum_C = tl.zeros([TILE], tl.float32)
    y_CD = tl.zeros([TILE, WIDTH], tl.float32)
    if part == 0:  # slot pos is never read, so that no program depends on this one's store
        k_D = tl.load(k_ptr + row * k_row + column * k_head + d_D * k_channel).to(k_cache_ptr.dtype.element_ty)
        v_D = tl.load(v_ptr + row * v_row + column * v_head + d_D * v_channel).to(v_cache_ptr.dtype.element_ty)
        tl.store(k_cache_ptr + pos * WIDTH + d_D, k_D)
        tl.store(v_cache_ptr + pos * WIDTH + d_D, v_D)
        maximum = tl.sum(q_D * k_D.to(tl.float32))
        sum_C = tl.where(tile_C == 0, 1.0, 0.0)
        y_CD = tl.where(tile_C[:, None] == 0, v_D.to(tl.float32)[None, :], 0.0)

    for first in range(start, end, TILE):
        slot_C = first + tile_C
        kept_C = slot_C < end
        at_CD = slot_C[:, None] * WIDTH + d_D[None, :]
        k_CD = tl.load(k_cache_ptr + at_CD, mask=kept_C[:, None], other=0.0).to(tl.float32)
        v_CD = tl.load(v_cache_ptr + at_CD, mask=kept_C[:, None], other=0.0).to(tl.float32)
        score_C = tl.where(kept_C, tl.sum(q_D[None, :] * k_CD, axis=1), -float("inf"))
        higher = tl.maximum(maximum, tl.max(score_C, axis=0))
        p_C = tl.exp2(score_C - higher)
        shrink = tl.exp2(maximum - higher)
        sum_C = sum_C * shrink + p_C
        y_CD = y_CD * shrink + p_C[:, None] * v_CD
        maximum = higher

    total = tl.sum(sum_C, axis=0)
    y_D = tl.sum(y_CD, axis=0)
    if PARTS == 1:
        tl.store(y_ptr + head * WIDTH + d_D, (y_D / total).to(y_ptr.dtype.element_ty))
    else:  # all parts' y, then their maxima, then their sums
        number = head * PARTS + part
        parts = tl.num_programs(0) * PARTS
        tl.store(work_ptr + number * WIDTH + d_D, y_D)
        tl.store(work_ptr + parts * WIDTH + number, maximum)
        tl.store(work_ptr + parts * (WIDTH + 1) + number, total)


@triton.jit
def _combine(y_ptr, work_ptr, PARTS: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr):
    """Add up one head's parts, each scaled to the common maximum."""
    head = tl.program_id(0)
    parts = tl.num_programs(0) * PARTS
    part_P, d_D = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    real_P = part_P < PARTS
    number_P = head * PARTS + part_P
    y_PD = tl.load(work_ptr + number_P[:, None] * WIDTH + d_D[None, :], mask=real_P[:, None], other=0.0)
    maximum_P = tl.load(work_ptr + parts * WIDTH + number_P, mask=real_P, other=-float("inf"))
    sum_P = tl.load(work_ptr + parts * (WIDTH + 1) + number_P, mask=real_P, other=0.0)
    weight_P = tl.exp2(maximum_P - tl.max(maximum_P, axis=0))  # 0 for a part without slots; the first has the new one
    y_D = tl.sum(weight_P[:, None] * y_PD, axis=0) / tl.sum(weight_P * sum_P, axis=0)
    tl.store(y_ptr + head * WIDTH + d_D, y_D.to(y_ptr.dtype.element_ty))


def parts(heads: int, slots: int, programs: int) -> int:
    """How many parts each of `heads` heads is divided into, to make about `programs` programs of it."""
    return max(1, min(programs // heads, slots // SLOTS_OF_A_PART))


def tile(width: int, element_size: int) -> int:
    """How many slots are read at a time: a power of two."""
    return max(16, TILE_BYTES // (width * element_size))


def decode_attention(
    q_BHD: Tensor, k_BHD: Tensor, v_BHD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, pos_1: Tensor, programs: int
) -> Tensor:
    """Launch `_attend`, and `_combine` where there are several parts."""
    B, H, S, D = k_BHSD.shape
    P = parts(B * H, S, programs)
    y_BHD = torch.empty(B, H, D, dtype=q_BHD.dtype, device=q_BHD.device)
    work = torch.empty(B * H * P * (D + 2) if P > 1 else 0, dtype=torch.float32, device=q_BHD.device)
    _attend[(B * H, P)](
        *(q_BHD, k_BHD, v_BHD, k_BHSD, v_BHSD, pos_1, y_BHD, work),
        *(S, H, math.log2(math.e) / math.sqrt(D)),
        *q_BHD.stride(),
        *k_BHD.stride(),
        *v_BHD.stride(),
        PARTS=P,
        WIDTH=D,
        TILE=tile(D, k_BHSD.element_size()),
        num_warps=WARPS,
    )
    if P > 1:
        _combine[(B * H,)](y_BHD, work, PARTS=P, PADDED=triton.next_power_of_2(P), WIDTH=D, num_warps=WARPS)
    return y_BHD


@triton.jit
def _reaches(key_V, weight_V, target, BITS: tl.constexpr, PASSES: tl.constexpr):
    """The smallest key such that all keys up to it weigh at least `target`; with PASSES, more than `target`.

    Found bit by bit, as the largest key below which the weight is less. A sum of more terms is never smaller: all are
    added in one order, and rounding is monotone.
    """
    key = 0
    for i in range(BITS):
        higher = key | (1 << (BITS - 1 - i))
        below = tl.sum(tl.where(key_V < higher, weight_V, 0.0), axis=0)
        if PASSES:  # noqa: SIM108 - a choice when compiling, which Triton sees only in this form
            key = tl.where(below <= target, higher, key)
        else:
            key = tl.where(below < target, higher, key)
    return key


@triton.jit
def _keep(key_V, weight_V, unit_V, target, BITS: tl.constexpr):
    """weight_V with 0 after the first classes, by key and then by index, whose unit_V add up to `target`."""
    key = _reaches(key_V, unit_V, target, BITS, False)
    before = tl.sum(tl.where(key_V < key, unit_V, 0.0), axis=0)
    equal_V = (key_V == key) & (unit_V > 0)
    needed = tl.ceil((target - before) / tl.max(tl.where(equal_V, unit_V, 0.0), axis=0))
    rank_V = tl.cumsum(equal_V.to(tl.int32), axis=0)
    return tl.where((key_V < key) | (equal_V & (rank_V <= needed)), weight_V, 0.0)


@triton.jit
def _sample(
    logits_ptr,
    u_ptr,
    class_ptr,
    temperature,
    top_k,
    top_p,
    row_stride,
    class_stride,
    u_stride,
    classes,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    PADDED: tl.constexpr,
    BITS: tl.constexpr,
):
    """Sample one row's class, the row in registers as far as they reach."""
    row = tl.program_id(0)
    class_V = tl.arange(0, PADDED)
    real_V = class_V < classes
    logit_V = tl.load(
        logits_ptr + row.to(tl.int64) * row_stride + class_V * class_stride, mask=real_V, other=-float("inf")
    ).to(tl.float32)
    # in [0, inf] and without a sign, which -0 has: ordered like the bits that represent it
    deficit_V = tl.abs((tl.max(logit_V, axis=0) - logit_V) / temperature)
    weight_V = tl.where(deficit_V >= 0, tl.exp(-deficit_V), 0.0)  # 0 for NaN, which must not end in a wrong class
    if HAS_TOP_K or HAS_TOP_P:  # noqa: SIM108 - see `_reaches`
        key_V = deficit_V.to(tl.int32, bitcast=True)
    else:
        key_V = class_V
    if HAS_TOP_K:
        weight_V = _keep(key_V, weight_V, real_V.to(tl.float32), top_k, BITS)
    if HAS_TOP_P:
        weight_V = _keep(key_V, weight_V, weight_V, top_p * tl.sum(weight_V, axis=0), BITS)

    point = tl.load(u_ptr + row * u_stride) * tl.sum(weight_V, axis=0)
    last = tl.max(tl.where(weight_V > 0, key_V, 0), axis=0)
    key = tl.minimum(_reaches(key_V, weight_V, point, BITS, True), last)  # u times the sum may round to the sum
    before = tl.sum(tl.where(key_V < key, weight_V, 0.0), axis=0)
    equal_V = (key_V == key) & (weight_V > 0)
    rank_V = tl.cumsum(equal_V.to(tl.int32), axis=0)
    rank = tl.floor((point - before) / tl.max(tl.where(equal_V, weight_V, 0.0), axis=0)) + 1
    rank = tl.minimum(rank, tl.max(rank_V, axis=0))
    chosen = tl.min(tl.where(equal_V & (rank_V == rank), class_V, classes - 1), axis=0)
    tl.store(class_ptr + row, chosen.to(tl.int64))


def sampling_warps(padded: int) -> int:
    """Warps of 32 threads with 32 classes each: with fewer, or with more warps, some of them leave the registers.

    So do some of 32,768 classes, with any number. It remains one kernel, where sorting takes several.
    """
    return max(4, min(32, padded // 1024))


def key_bits(padded: int, by_probability: bool) -> int:
    """The bits of the numbers that order classes: positive float32 numbers, or the classes themselves."""
    return 31 if by_probability else padded.bit_length() - 1


def sample_classes(
    logits_BV: Tensor, u_B: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Launch `_sample`."""
    B, V = logits_BV.shape
    class_B = torch.empty(B, dtype=torch.long, device=logits_BV.device)
    padded = triton.next_power_of_2(V)
    _sample[(B,)](
        *(logits_BV, u_B, class_B, temperature, float(top_k or 0), float(top_p or 0)),
        *(*logits_BV.stride(), u_B.stride(0), V),
        HAS_TOP_K=top_k is not None,
        HAS_TOP_P=top_p is not None,
        PADDED=padded,
        BITS=key_bits(padded, top_k is not None or top_p is not None),
        num_warps=sampling_warps(padded),
    )
    return class_B
