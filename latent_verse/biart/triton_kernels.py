"""Two kernels for sampling on a GPU, in Triton, each with a plain PyTorch reference.

`decode_attention` is a decoding step's attention, the same launch at every position. `sample_classes` samples from rows
of logits without sorting them. Their source is in `triton_source`, so that importing this file does not import Triton.

Shape suffixes: B rows, H heads, D channels of a head, S slots, V classes.
"""

from __future__ import annotations

import functools
import warnings
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_verse.nn.compilation import why_not_compiled

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (16, 32, 64, 128, 256)
MOST_CLASSES = 32768  # of which a row's classes beyond 16,384 leave the registers for the cache
PROGRAMS_PER_SM = 3  # so that about 25 KB are on their way to each, which hides the memory's latency


def has_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `decode_attention` has a kernel for a cache on `device` with this dtype and width of a head."""
    return dtype in DTYPES and head_dim in WIDTHS and _triton_serves(device)


def has_sampling_kernel(device: torch.device, classes: int) -> bool:
    """Whether `sample_classes` has a kernel for rows of this many logits on `device`."""
    return classes <= MOST_CLASSES and _triton_serves(device)


@functools.cache
def _triton_serves(device: torch.device) -> bool:
    """Whether Triton works on a GPU. A kernel is tried, as a driver, compiler or cache may be there and still fail."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability(device) < (8, 0) or why_not_compiled(device):
        return False
    try:
        sample_classes(torch.zeros(1, 16, device=device), torch.zeros(1, device=device), 1.0, None, None)
    except Exception as error:  # Triton's, the compiler's and the file system's
        warnings.warn(f"Sampling runs without Triton's kernels, which fail here: {error}", stacklevel=3)
        return False
    return True


@torch.library.custom_op("latent_verse::decode_attention", mutates_args=("k_BHSD", "v_BHSD"), device_types="cuda")
def decode_attention(
    q_BHD: Tensor, k_BHD: Tensor, v_BHD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, pos_1: Tensor
) -> Tensor:
    """One token's attention over itself and all positions before it -> y_BHD.

    Stores the token's key and value in slot pos_1, which is read on the device, and attends over slots 0 to pos_1. The
    softmax is float32. On CUDA the launch depends on the shapes alone, so that a CUDA graph serves all positions.

    Args:
        q_BHD, k_BHD, v_BHD: of any strides, such as views of one product.
        k_BHSD, v_BHSD: one layer of a `KVCache`, contiguous. Slots after pos_1 may hold anything.
        pos_1: the token's position, in [0, S).
    """
    from latent_verse.biart import triton_source

    with torch.cuda.device(q_BHD.device):
        sms = torch.cuda.get_device_properties(q_BHD.device).multi_processor_count
        return triton_source.decode_attention(q_BHD, k_BHD, v_BHD, k_BHSD, v_BHSD, pos_1, PROGRAMS_PER_SM * sms)


@decode_attention.register_fake
def _(q_BHD: Tensor, k_BHD: Tensor, v_BHD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, pos_1: Tensor) -> Tensor:
    return torch.empty(q_BHD.shape, dtype=q_BHD.dtype, device=q_BHD.device)


@decode_attention.register_kernel("cpu")
def _(q_BHD: Tensor, k_BHD: Tensor, v_BHD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, pos_1: Tensor) -> Tensor:
    """The plain way: `Attention` over all slots, with a mask."""
    k_BHSD.index_copy_(2, pos_1, k_BHD[:, :, None].to(k_BHSD.dtype))
    v_BHSD.index_copy_(2, pos_1, v_BHD[:, :, None].to(v_BHSD.dtype))
    filled_S = torch.arange(k_BHSD.shape[2]) <= pos_1
    k, v = (cache.to(q_BHD.dtype).masked_fill(~filled_S[:, None], 0.0) for cache in (k_BHSD, v_BHSD))
    y_BH1D = F.scaled_dot_product_attention(q_BHD[:, :, None], k, v, attn_mask=filled_S[None])
    return y_BH1D[:, :, 0].contiguous()


@torch.library.custom_op("latent_verse::sample_classes", mutates_args=(), device_types="cuda")
def sample_classes(
    logits_BV: Tensor, u_B: Tensor, temperature: float, top_k: Optional[int], top_p: Optional[float]
) -> Tensor:
    """What `sampling.choose` gives at a temperature above 0 -> class_B, by bisection and without sorting.

    Of classes with equal logits the first comes first; in `torch.topk` their order is unspecified.
    """
    from latent_verse.biart import triton_source

    with torch.cuda.device(logits_BV.device):
        return triton_source.sample_classes(logits_BV, u_B, temperature, top_k, top_p)


@sample_classes.register_fake
def _(logits_BV: Tensor, u_B: Tensor, temperature: float, top_k: Optional[int], top_p: Optional[float]) -> Tensor:
    return torch.empty(len(logits_BV), dtype=torch.long, device=logits_BV.device)
