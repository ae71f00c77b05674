"""How much of a codebook is in use: codes used and perplexity at each level, over many batches and processes."""

from __future__ import annotations

import torch
from torchmetrics import Metric

from latent_verse.augvae.quantizer import count, perplexity


class CodebookUsage(Metric):
    """Counts how often each of `num_tokens` codes is used at each level, over all batches and processes."""

    full_state_update = False
    counts_LK: torch.Tensor

    def __init__(self, levels: tuple[int, ...], num_tokens: int):
        super().__init__()
        self.levels = levels
        self.add_state("counts_LK", torch.zeros(len(levels), num_tokens, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, indices: list[torch.Tensor]) -> None:
        """Add the codes of a batch: one int64 tensor of any shape per level."""
        K = self.counts_LK.shape[1]
        self.counts_LK += torch.stack([count(level, K) for level in indices])

    def compute(self) -> dict[str, float]:
        """{"codes_used_R": codes used at least once, "perplexity_R": ...} for each level's resolution R."""
        used = (self.counts_LK > 0).sum(1).tolist()
        spread = perplexity(self.counts_LK.cpu()).tolist()  # in float64, which mps lacks
        out = {}
        for level, n, p in zip(self.levels, used, spread, strict=True):
            out[f"codes_used_{level}"] = float(n)
            out[f"perplexity_{level}"] = p
        return out
