"""Quantisers turn AugVAE's vectors into codes and back. `QUANTIZERS` is the table of them.

"ema" is the release's, whose codebook is an exponential moving average (van den Oord et al. 2017, appendix A.1). It
makes no one-hot matrix and holds only a slice of the N x K distance matrix at a time. Distances and statistics are
float32 (float64 for float64 input) under any autocast.

Shapes: N vectors, K codes, D code dimension; B batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from latent_verse.config import AugVAEConfig, ConfigError
from latent_verse.nn.precision import LOW_PRECISION, full_float32, in_float64, keeping_float32

# Elements of the distance matrix held at a time: a part of it, within these bounds. 4 MiB of float32 fit in the caches
# of a CPU and 32 MiB in those of a large GPU, which would wait for kernel launches if there were fewer. Only larger
# products than a CPU's keep a GPU busy: it holds a quarter, which is still a sixteenth of what one-hot holds.
PARTS = {"cpu": 16, "cuda": 4}
AT_LEAST, AT_MOST = 2**18, {"cpu": 2**20, "cuda": 2**23}
# Codes compared at a time. If a codebook exceeds a CPU's caches, slices have few rows, and each reads all of it.
CODES = {"cpu": 2**12}
LARGE_MAP = 2**18  # elements of one image's map from which `add_vectors` transposes image by image
BLOCK = 64  # columns of the distance matrix that `least` compares together


def world_size() -> int:
    """The number of processes that train together; 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def least(x_NK: torch.Tensor, values_N: torch.Tensor, index_N: torch.Tensor) -> None:
    """Write each row's minimum and its index (int64), the first of equal ones. K must be a multiple of BLOCK.

    On a CPU, `min` with indices uses no vector instructions, but `amin` does: the minimum of each block, then the best
    block, then the index within it are 3 to 6 times faster.
    """
    if x_NK.device.type != "cpu":
        torch.min(x_NK, dim=1, out=(values_N, index_N))
        return
    blocks_NGB = x_NK.unflatten(1, (-1, BLOCK))
    block_N = blocks_NGB.amin(2).min(dim=1).indices
    torch.min(blocks_NGB[torch.arange(len(x_NK)), block_N], dim=1, out=(values_N, index_N))
    index_N += block_N * BLOCK


def count(indices: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """How often each of K = num_tokens codes occurs, (K,) int64. torch.bincount would wait for the GPU."""
    flat_N = indices.flatten()
    return flat_N.new_zeros(num_tokens).scatter_add_(0, flat_N, flat_N.new_ones(()).expand_as(flat_N))


def to_vectors(z_BDHW: torch.Tensor) -> torch.Tensor:
    """Maps (B, D, H, W) -> their vectors (B * H * W, D), row by row, float32 where z is half precision.

    Contiguous: what follows reads whole vectors, and is several times slower over a view.
    """
    z_ND = rearrange(z_BDHW, "b d h w -> (b h w) d").contiguous()
    return z_ND.float() if z_ND.dtype in LOW_PRECISION else z_ND


def add_vectors(z_BDHW: torch.Tensor, x_ND: torch.Tensor) -> torch.Tensor:
    """Maps plus vectors (B * H * W, D), in the maps' memory format. The vectors take no gradient.

    On a CPU, large maps of different layouts add slowly, as addresses that are powers of two apart share few cache
    lines: transposing one of them first, image by image, is 4 to 6 times faster at 64 x 64 x 256.
    """
    B, D, H, W = z_BDHW.shape
    x_BND = x_ND.view(B, H * W, D)
    if z_BDHW.device.type != "cpu" or D * H * W < LARGE_MAP or not z_BDHW.is_contiguous():
        return z_BDHW + x_BND.transpose(1, 2).unflatten(2, (H, W))
    sum_BDHW = torch.empty_like(z_BDHW)
    for map_DN, vectors_ND in zip(sum_BDHW.flatten(2), x_BND, strict=True):
        map_DN.copy_(vectors_ND.t())
    return sum_BDHW.add_(z_BDHW)


def perplexity(counts: torch.Tensor) -> torch.Tensor:
    """exp(entropy) of how often codes were used, (...) float64; counts (..., K). The original's formula (eps 1e-10)."""
    counts = in_float64(counts)
    p = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.exp(-(p * torch.log(p + 1e-10)).sum(-1))


class Quantizer(nn.Module):
    """The base class of `QUANTIZERS`. All levels share one instance, with K = `codebook_size` codes."""

    codebook_size: int

    def forward(self, z_BDHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantise maps of any floating-point type; in training mode a codebook may learn from them.

        Returns:
            z_q (B, D, H, W) of z's type, whose gradient reaches z; codes (B, H, W) int64; loss (), to be added.
        """
        raise NotImplementedError

    def nearest(self, z_ND: torch.Tensor) -> torch.Tensor:
        """Vectors of float32 or float64, as `to_vectors` makes them -> codes (N,) int64. Nothing is learnt."""
        raise NotImplementedError

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (...) int64 -> their vectors (..., D)."""
        raise NotImplementedError

    @property
    def is_fresh(self) -> bool:
        """Whether `initialise` is of use: there is a codebook, and it has seen no data."""
        return False

    def initialise(self, z_ND: torch.Tensor) -> None:
        """Start the codebook, where there is one, from encoder outputs. A collective under torch.distributed."""


class Codebook(nn.Module):
    """K = num_tokens code vectors of length D = dim, and the two moving averages whose ratio they are.

    State-dict names are the release's: `weight` (K, D), `cluster_size` (K,), `embed_avg` (K, D). All stay float32 when
    the model is cast to half precision.

    Args:
        decay: of the moving averages, per update.
        eps: Laplace smoothing of the cluster sizes.
        restart_threshold: codes with a smaller cluster size are moved onto encoder outputs; 0 never does.
    """

    weight: torch.Tensor
    cluster_size: torch.Tensor
    embed_avg: torch.Tensor

    def __init__(self, num_tokens: int, dim: int, decay: float, eps: float, restart_threshold: float):
        super().__init__()
        self.decay, self.eps, self.restart_threshold = decay, eps, restart_threshold
        weight_KD = torch.randn(num_tokens, dim)
        self.register_buffer("weight", weight_KD)
        self.register_buffer("cluster_size", torch.zeros(num_tokens))
        self.register_buffer("embed_avg", weight_KD.clone())

    def _apply(self, fn, recurse=True):
        return super()._apply(keeping_float32(fn), recurse)

    @torch.no_grad()
    def nearest(self, z_ND: torch.Tensor) -> torch.Tensor:
        """Index of the nearest code by Euclidean distance, (N,) int64. |z|^2, the same for all codes, is left out."""
        K = len(self.weight)
        columns = CODES.get(z_ND.device.type, K)
        with full_float32(z_ND.device.type):  # bf16 picks other codes for 1.3 % of vectors at K = 8192
            found = [(*self._nearest_among(z_ND, first, first + columns), first) for first in range(0, K, columns)]
        if len(found) == 1:
            return found[0][1]
        part_N = torch.stack([distance_N for distance_N, _, _ in found]).min(dim=0).indices
        return torch.stack([index_N + first for _, index_N, first in found]).gather(0, part_N[None])[0]

    def _nearest_among(self, z_ND: torch.Tensor, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared distance less |z|^2 to the nearest of codes `first` to `end`, and its index among them, (N,) each."""
        codes_KD = self.weight[first:end]
        N, K, kind = len(z_ND), len(codes_KD), z_ND.device.type
        norm_K = torch.linalg.vector_norm(codes_KD, dim=1).square()
        part = max(N * K // PARTS.get(kind, 16), AT_LEAST)
        rows = max(1, min(N, min(part, AT_MOST.get(kind, AT_LEAST)) // K))
        # One buffer for all slices: on a CPU, new memory costs more than the sums. It holds whole blocks for `least`.
        buffer_NK = z_ND.new_empty(rows, -(-K // BLOCK) * BLOCK)
        buffer_NK[:, K:] = torch.inf
        distance_N, index_N = z_ND.new_empty(N), torch.empty(N, dtype=torch.int64, device=z_ND.device)
        for start in range(0, N, rows):
            part_ND = z_ND[start : start + rows]
            distance_NK = buffer_NK[: len(part_ND)]
            torch.addmm(norm_K, part_ND, codes_KD.t(), alpha=-2, out=distance_NK[:, :K])
            least(distance_NK, distance_N[start : start + rows], index_N[start : start + rows])
        return distance_N, index_N

    @torch.no_grad()
    def update(self, z_ND: torch.Tensor, indices_N: torch.Tensor) -> None:
        """One step of the moving averages from the vectors and codes of all processes. A collective: all then agree."""
        K, D = self.weight.shape
        # one tensor for both statistics, so that one all-reduce is enough
        stats = z_ND.new_zeros(K * D + K)
        sums_KD, counts_K = stats[: K * D].view(K, D), stats[K * D :]
        sums_KD.index_add_(0, indices_N, z_ND)  # contiguous: with gaps between rows, a CPU takes nine times as long
        counts_K.copy_(count(indices_N, K))
        if world_size() > 1:
            dist.all_reduce(stats)
        self.cluster_size.lerp_(counts_K.to(self.cluster_size.dtype), 1 - self.decay)
        self.embed_avg.lerp_(sums_KD.to(self.embed_avg.dtype), 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed_K = (self.cluster_size + self.eps) / (total + K * self.eps) * total
        torch.div(self.embed_avg, smoothed_K[:, None], out=self.weight)
        if self.restart_threshold > 0:
            self._restart(z_ND)

    @torch.no_grad()
    def initialise(self, z_ND: torch.Tensor) -> None:
        """Set every code to a random vector of z_ND, which repeat if there are too few. A collective, as `update`."""
        candidates_MD = self._candidates(z_ND, len(self.weight))
        order_K = torch.arange(len(self.weight), device=z_ND.device) % len(candidates_MD)
        self.weight.copy_(candidates_MD[order_K])
        self.cluster_size.fill_(1.0)
        self.embed_avg.copy_(self.weight)

    @property
    def is_fresh(self) -> bool:
        """True until the first update or initialisation: as released, cluster sizes start at zero."""
        return not bool(self.cluster_size.any())

    def _candidates(self, z_ND: torch.Tensor, at_most: int) -> torch.Tensor:
        """Random vectors of all processes, (M, D): every process gathers the same."""
        processes = world_size()
        n = min(len(z_ND), -(-at_most // processes))
        picked = z_ND[torch.randperm(len(z_ND), device=z_ND.device)[:n]].to(self.weight.dtype).contiguous()
        if processes == 1:
            return picked
        gathered = picked.new_empty(processes * n, picked.shape[1])
        dist.all_gather_into_tensor(gathered, picked)
        return gathered

    def _restart(self, z_ND: torch.Tensor) -> None:
        """Move codes that are no longer used onto encoder outputs, with averages to match (Jukebox, section 3.2)."""
        dead_K = torch.lt(self.cluster_size, self.restart_threshold)
        candidates_MD = self._candidates(z_ND, 256)
        rank_K = dead_K.cumsum(0) - 1  # the nth dead code takes the nth candidate: no size depends on the data
        dead_K &= rank_K < len(candidates_MD)  # the others wait for the next batch
        fresh_KD = candidates_MD[rank_K.clamp(0, len(candidates_MD) - 1)]
        # start with the average cluster size, or the code would be dead again at the next batch
        use = self.cluster_size.mean().clamp(min=self.restart_threshold)
        self.weight.copy_(torch.where(dead_K[:, None], fresh_KD, self.weight))
        self.cluster_size.copy_(torch.where(dead_K, use, self.cluster_size))
        self.embed_avg.copy_(torch.where(dead_K[:, None], fresh_KD * use, self.embed_avg))


class EMAQuantizer(Quantizer):
    """Nearest code, straight-through gradient, commitment loss times beta; in training mode the codebook learns."""

    def __init__(self, embedding: Codebook, beta: float):
        super().__init__()
        self.embedding = embedding  # the release's name
        self.codebook_size = len(embedding.weight)
        self.beta = beta

    @classmethod
    def from_config(cls, c: AugVAEConfig) -> EMAQuantizer:
        codebook = Codebook(c.num_tokens, c.codebook_dim, c.quant_ema_decay, c.quant_ema_eps, c.restart_threshold)
        return cls(codebook, c.quant_beta)

    @torch.compiler.disable  # collectives and in-place statistics; the convolutions around it are what compiles
    def forward(self, z_BDHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (B, D, H, W), dtype = z_BDHW.shape, z_BDHW.dtype
        if dtype in LOW_PRECISION:
            z_BDHW = z_BDHW.float()
        z_ND = to_vectors(z_BDHW)
        indices_N = self.embedding.nearest(z_ND.detach())
        to_code_ND = self.lookup(indices_N).sub_(z_ND)  # before the update, as the original
        if self.training:
            self.embedding.update(z_ND.detach(), indices_N)
        # the mean square, by way of each vector's length: no N x D tensor of squares is made
        loss = self.beta * torch.linalg.vector_norm(to_code_ND, dim=1).square().mean() / D
        quantised_BDHW = add_vectors(z_BDHW, to_code_ND.detach())
        return quantised_BDHW.to(dtype), indices_N.view(B, H, W), loss

    def nearest(self, z_ND: torch.Tensor) -> torch.Tensor:
        return self.embedding.nearest(z_ND)

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        return F.embedding(codes, self.embedding.weight)

    @property
    def is_fresh(self) -> bool:
        return self.embedding.is_fresh

    def initialise(self, z_ND: torch.Tensor) -> None:
        self.embedding.initialise(z_ND)


# AugVAEConfig.quantizer -> what makes it
QUANTIZERS: dict[str, Callable[[AugVAEConfig], Quantizer]] = {"ema": EMAQuantizer.from_config}


def make_quantizer(config: AugVAEConfig) -> Quantizer:
    """The quantiser that `config.quantizer` names.

    Raises:
        ConfigError: there is none, or it does not have num_tokens codes.
    """
    name = config.quantizer
    if name not in QUANTIZERS:
        raise ConfigError(f"quantizer is {name!r}; it must be one of: {', '.join(QUANTIZERS)}.")
    quantizer = QUANTIZERS[name](config)
    if quantizer.codebook_size != config.num_tokens:
        raise ConfigError(
            f"num_tokens is {config.num_tokens}, but with codebook_dim {config.codebook_dim} the quantizer {name} has "
            f"{quantizer.codebook_size} codes. Set num_tokens: {quantizer.codebook_size}."
        )
    return quantizer
