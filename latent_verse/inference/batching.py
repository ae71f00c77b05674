"""Sampling and scoring of tokens with BiART in batches that fit in memory; samples are reproducible by seed.

Shape suffixes: B samples, R references, S samples of each reference, W the samples kept of those, C candidates for each
of them, K known codes, T tokens of a reference or a target, N image codes, L text tokens.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from latent_verse.biart.model import BiART
from latent_verse.biart.sampling import beam_search, check_settings, generate, log_likelihood
from latent_verse.biart.sequence import Direction, Modality, target_modality
from latent_verse.config import ConfigError, SamplingSettings
from latent_verse.data.transforms import mix_seed
from latent_verse.progress import progress_bar

BATCH_BYTES = 4 * 2**30  # that the largest tensors of one batch may take
LARGEST_BATCH = 256


@dataclass(frozen=True)
class Sampler:
    """BiART with what many samples need: batches by memory, a seed for each sample, re-ranking, a progress bar."""

    biart: BiART
    null_trained: bool  # training dropped references, which guidance and sampling without a reference need
    batch_size: int | None = None  # samples at a time; None chooses by memory
    progress: bool = False  # show a progress bar on stderr, if that is a terminal

    def check(self, direction: Direction, num: int, sampling: SamplingSettings, rerank: int = 0) -> None:
        """Check the settings of `num` samples for each reference.

        Raises:
            ConfigError: one is out of range, has no effect, or needs a model that was trained differently.
        """
        modality = target_modality(direction)
        classes = self.biart.vocab.num_classes(modality)
        try:
            check_settings(**sampling.arguments(), num_classes=classes, null_trained=self.null_trained)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        name = f"num_{'images' if modality == 'image' else 'captions'} (generate.py: num)"
        if num < 1:
            raise ConfigError(f"{name} is {num}; it must be at least 1.")
        if rerank < 0:
            raise ConfigError(f"rerank is {rerank}; give the number of images to choose each from, or 0.")
        for setting, value in ((name, num), ("rerank", rerank)):
            if sampling.is_greedy and value > 1:
                raise ConfigError(f"{setting} has no effect at temperature 0, which is greedy: raise temperature.")

    def sample(
        self,
        reference_RT: Tensor,
        direction: Direction,
        num: int,
        sampling: SamplingSettings,
        seed: int | None,
        rerank: int = 0,
        prefix_RK: Tensor | None = None,
    ) -> Tensor:
        """`num` targets for each reference, (R, num, N or L) int64 on the CPU.

        Args:
            rerank: above 1, each image is the best of this many samples by log p(text | image).
            prefix_RK: the first tokens of the targets, kept as they are.

        Raises:
            ConfigError: the seed or batch_size is out of range.
        """
        samples = num * max(rerank, 1)
        keys_RT = reference_RT if prefix_RK is None else torch.cat([reference_RT, prefix_RK], dim=1)
        seeds = sample_seeds(seed, keys_RT, samples)
        reference_BT = repeat(reference_RT, "R T -> (R S) T", S=samples)
        prefix_BK = None if prefix_RK is None else repeat(prefix_RK, "R K -> (R S) K", S=samples)
        modality = target_modality(direction)
        tokens, parts = self.biart.vocab.length(modality), []
        what, total = f"sampling {modality}s", len(reference_BT) * tokens
        with progress_bar(what=what, total=total, unit="token", shown=self.progress) as bar:
            for rows in self._batches(len(reference_BT), self._cache_bytes(1 if sampling.guidance == 1 else 2)):
                target_BT = generate(
                    self.biart,
                    reference_BT[rows],
                    direction,
                    **sampling.arguments(),
                    seed=seeds[rows],
                    prefix_BK=None if prefix_BK is None else prefix_BK[rows],
                    reference_dropout_trained=self.null_trained,
                    progress=lambda *_, size=rows.stop - rows.start: bar.update(size),
                )
                bar.update(rows.stop * tokens - bar.n)  # a prefix is not sampled, and texts may end early
                parts.append(target_BT.cpu())
        target_BT = torch.cat(parts)
        if rerank <= 1:
            return rearrange(target_BT, "(R S) T -> R S T", S=samples)
        log_p_B = self.log_p(reference_BT, target_BT, "image")
        best_RW1 = rearrange(log_p_B, "(R W C) -> R W C", W=num, C=rerank).argmax(dim=-1, keepdim=True)
        target_RWCT = rearrange(target_BT, "(R W C) T -> R W C T", W=num, C=rerank)
        return target_RWCT.take_along_dim(best_RW1[..., None], dim=2).squeeze(2)

    def beam_search(self, codes_BN: Tensor, beams: int) -> Tensor:
        """The likeliest caption that beam search finds for each image's codes, text_BL on the CPU."""
        parts = []
        with progress_bar(what="searching captions", total=len(codes_BN), unit="image", shown=self.progress) as bar:
            for rows in self._batches(len(codes_BN), self._cache_bytes(beams)):
                parts.append(beam_search(self.biart, codes_BN[rows], beams)[0].cpu())
                bar.update(rows.stop - rows.start)
        return torch.cat(parts)

    def log_p(self, text_BL: Tensor, codes_BN: Tensor, given: Modality, alone: bool = False) -> Tensor:
        """The totals of `log_likelihood` in nats, (B,) float32 on the CPU.

        Args:
            given: "image" scores the text, "text" the codes.
            alone: score the target without what is given.
        """
        vocab, width = self.biart.vocab, self.biart.config.n_embd
        target: Modality = "text" if given == "image" else "image"
        logits = vocab.length(target) * vocab.num_classes(target)
        bytes_each = 4 * (3 * logits + 10 * vocab.input_len * width)  # with their softmax; the MLP of one block
        parts = []
        with progress_bar(what="scoring", total=len(text_BL), unit="pair", shown=self.progress) as bar:
            for rows in self._batches(len(text_BL), bytes_each):
                parts.append(log_likelihood(self.biart, text_BL[rows], codes_BN[rows], given, alone).total_B.cpu())
                bar.update(rows.stop - rows.start)
        return torch.cat(parts)

    def rows_at_a_time(self, bytes_each: int) -> int:
        """`batch_size`, which must be at least 1, or as many rows as fit if each takes `bytes_each`."""
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be at least 1, or None.")
        return self.batch_size or max(1, min(LARGEST_BATCH, BATCH_BYTES // bytes_each))

    def _batches(self, rows: int, bytes_each: int) -> Iterator[slice]:
        size = self.rows_at_a_time(bytes_each)
        return (slice(start, min(start + size, rows)) for start in range(0, rows, size))

    def _cache_bytes(self, rows_each: int) -> int:
        """Keys and values of `rows_each` sequences."""
        c = self.biart.config
        return rows_each * 2 * c.n_layer * self.biart.vocab.input_len * c.n_embd * self.biart.head.weight.element_size()


def sample_seeds(seed: int | None, reference_RT: Tensor, samples: int) -> list[int]:
    """A seed for each of `samples` samples of each reference, from `seed`, the reference and the sample's number.

    A reference that occurs again continues the numbers: its samples are new. None takes torch's global generator.

    Raises:
        ConfigError: the seed is negative.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must be 0 or above.")
    numbers: Counter[int] = Counter()
    seeds = []
    for row in reference_RT.cpu().numpy():
        key = int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8], "big")
        seeds += [mix_seed(seed, key, numbers[key] + n) for n in range(samples)]
        numbers[key] += samples
    return seeds
