"""Sampling and scoring of tokens with BiART in batches that fit in memory; samples are reproducible by seed.

Shape suffixes: B samples, R references, S samples of each reference, W the samples kept of those, C candidates for each
of them, K known codes, T tokens of a reference or a target, N image codes, L text tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from latent_verse.biart.kept import memory
from latent_verse.biart.model import BiART, KVCache
from latent_verse.biart.sampling import beam_search, check_settings, generate, kept_bytes, log_likelihood
from latent_verse.biart.sequence import Direction, Modality, target_modality
from latent_verse.config import ConfigError, SamplingSettings
from latent_verse.config.generate import GenerateSamplingConfig
from latent_verse.config.messages import shown
from latent_verse.config.settings import check, is_a
from latent_verse.data.transforms import mix_seed
from latent_verse.nn.compilation import why_not_compiled
from latent_verse.nn.memory import machine_bytes
from latent_verse.progress import progress_bar

BATCH_BYTES = 4 * 2**30  # most that one batch's largest tensors may take; a GPU uses FREE_SHARE instead
FREE_SHARE = 0.8  # of the memory that is free: small tensors, workspaces and CUDA graphs need the rest
LARGEST_CALL = 2**22  # samples, of which all codes are in memory at once
LARGEST_BATCH = 256  # beyond it, reading the weights is at most 5 % of the work
# Decoding steps of one call from which on a GPU compiles its step. From estimates, not measured yet: a compiled step is
# 0.1 to 0.15 ms faster, and compiling takes 20 s, or 2 s where Inductor has it in its cache.
COMPILED_FROM = 2**16


@dataclass(frozen=True)
class Sampler:
    """BiART with what many samples need: batches by memory, a seed for each sample, re-ranking, a progress bar."""

    biart: BiART
    null_trained: bool  # training dropped references, which guidance and sampling without a reference need
    batch_size: int | None = None  # samples at a time; None chooses by memory
    progress: bool = False  # show a progress bar on stderr, if that is a terminal

    def checked(
        self,
        direction: Direction,
        num: int,
        rerank: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        guidance: float,
    ) -> SamplingSettings:
        """The settings of `num` samples for each reference.

        Raises:
            ConfigError: one is out of range, has no effect, or needs a model that was trained differently.
        """
        sampling = SamplingSettings(temperature, top_k, top_p, guidance)
        modality = target_modality(direction)
        classes = self.biart.vocab.num_classes(modality)
        try:
            check_settings(**sampling.arguments(), num_classes=classes, null_trained=self.null_trained)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        name = f"num_{'images' if modality == 'image' else 'captions'}"
        check(GenerateSamplingConfig, name, num=num)
        check(GenerateSamplingConfig, rerank=rerank)
        for setting, value in ((f"{name} (generate.py: num)", num), ("rerank", rerank)):
            if sampling.is_greedy and value > 1:
                raise ConfigError(f"{setting} has no effect at temperature 0, which is greedy: raise temperature.")
        return sampling

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
        if (total := samples * len(reference_RT)) > LARGEST_CALL:
            of = f"{len(reference_RT)} x num {num}" + (f" x rerank {rerank}" if rerank > 1 else "")
            raise ConfigError(f"{of} is {total} samples; one call makes at most {LARGEST_CALL}. Make several.")
        keys_RT = reference_RT if prefix_RK is None else torch.cat([reference_RT, prefix_RK], dim=1)
        seeds = sample_seeds(seed, keys_RT, samples)
        reference_BT = repeat(reference_RT, "R T -> (R S) T", S=samples)
        prefix_BK = None if prefix_RK is None else repeat(prefix_RK, "R K -> (R S) K", S=samples)
        modality = target_modality(direction)
        tokens, known = self.biart.vocab.length(modality), 0 if prefix_RK is None else prefix_RK.shape[1]
        cache_bytes = self._cache_bytes(reference_RT.shape[1] + known, 1 if sampling.guidance == 1 else 2)
        device = self.biart.device
        size = self._batch_size(len(reference_BT), cache_bytes, kept_bytes(device))  # for which `generate` makes room
        compiled = self._compiles(math.ceil(len(reference_BT) / size) * (tokens - known))
        what, total = f"sampling {modality}s", len(reference_BT) * tokens
        with progress_bar(what=what, total=total, unit="token", shown=self.progress) as bar:

            def run(rows: slice) -> Tensor:
                def show(step: int, _: int) -> None:
                    done = rows.start * tokens + step * (rows.stop - rows.start)
                    bar.update(max(0, done - bar.n))  # rows that the batch before had too do not count again

                target_BT = generate(
                    self.biart,
                    reference_BT[rows],
                    direction,
                    **sampling.arguments(),
                    seed=seeds[rows],
                    prefix_BK=None if prefix_BK is None else prefix_BK[rows],
                    reference_dropout_trained=self.null_trained,
                    progress=show,
                    compiled=compiled,
                )
                show(tokens, tokens)  # texts may end early
                return target_BT

            target_BT = self._in_batches(len(reference_BT), size, run, equal=device.type == "cuda")
        if rerank <= 1:
            return rearrange(target_BT, "(R S) T -> R S T", S=samples)
        log_p_B = self.log_p(reference_BT, target_BT, "image")
        best_RW1 = rearrange(log_p_B, "(R W C) -> R W C", W=num, C=rerank).argmax(dim=-1, keepdim=True)
        target_RWCT = rearrange(target_BT, "(R W C) T -> R W C T", W=num, C=rerank)
        return target_RWCT.take_along_dim(best_RW1[..., None], dim=2).squeeze(2)

    def beam_search(self, codes_BN: Tensor, beams: int) -> Tensor:
        """The likeliest caption that beam search finds for each image's codes, text_BL on the CPU.

        Raises:
            ConfigError: one image's beams take more memory than there is.
        """
        bytes_each = self._cache_bytes(codes_BN.shape[1], beams + 1)  # the cache of the image, then of its beams
        device = self.biart.device
        most = memory(device)[1] if device.type == "cuda" else machine_bytes()
        if bytes_each > most:
            need = f"{bytes_each / 2**30:.0f} GiB of memory for one image, and there are {most / 2**30:.0f} GiB"
            raise ConfigError(f"beams is {beams}, which takes {need}. Lower it.")
        with progress_bar(what="searching captions", total=len(codes_BN), unit="image", shown=self.progress) as bar:

            def run(rows: slice) -> Tensor:
                text_BL, _ = beam_search(self.biart, codes_BN[rows], beams)
                bar.update(len(text_BL))
                return text_BL

            return self._in_batches(len(codes_BN), self._batch_size(len(codes_BN), bytes_each), run)

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
        with progress_bar(what="scoring", total=len(text_BL), unit="pair", shown=self.progress) as bar:

            def run(rows: slice) -> Tensor:
                total_B = log_likelihood(self.biart, text_BL[rows], codes_BN[rows], given, alone).total_B
                bar.update(len(total_B))
                return total_B

            return self._in_batches(len(text_BL), self._batch_size(len(text_BL), bytes_each), run)

    def rows_at_a_time(self, bytes_each: int, kept: int = 0) -> int:
        """`batch_size`, which must be at least 1, or as many rows as fit if each takes `bytes_each`; `batch_bytes`."""
        if self.batch_size is not None:
            return min(whole("batch_size", self.batch_size, 1), LARGEST_CALL)
        device = self.biart.device
        rows = max(1, min(LARGEST_BATCH, batch_bytes(device, kept) // bytes_each))
        # What is free on a GPU varies a little from call to call, but a decoder is kept for one number of rows.
        return 2 ** (rows.bit_length() - 1) if device.type == "cuda" else rows

    def _batch_size(self, rows: int, bytes_each: int, kept: int = 0) -> int:
        """The rows of each batch, if as few as possible share them equally."""
        return math.ceil(rows / math.ceil(rows / self.rows_at_a_time(bytes_each, kept)))

    def _in_batches(self, rows: int, size: int, run: Callable[[slice], Tensor], equal: bool = False) -> Tensor:
        """What `run` gives for all rows, `size` at a time, on the CPU. Batches are halved if a GPU's memory runs out.

        Args:
            equal: all batches have the same number of rows, because a decoder is kept for it: the last one begins with
                rows of the one before, which give the same again.
        """
        done, parts = 0, []
        while done < rows:
            start = min(done, rows - size) if equal else done
            batch = slice(start, min(start + size, rows))
            try:
                parts.append(run(batch).cpu()[done - start :])
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size = math.ceil(size / 2)
            else:
                done = batch.stop
        return torch.cat(parts)

    def _compiles(self, steps: int) -> bool:
        """Whether so many decoding steps pay for compiling one."""
        device = self.biart.device
        return device.type == "cuda" and steps >= COMPILED_FROM and not why_not_compiled(device)

    def _cache_bytes(self, prompt: int, copies: int) -> int:
        """Of `copies` sequences: keys and values, and what the MLP of one block takes to read the prompt's tokens."""
        c, dtype = self.biart.config, self.biart.head.weight.dtype
        return copies * (KVCache.row_bytes(c, dtype) + 10 * prompt * c.n_embd * dtype.itemsize)


def batch_bytes(device: torch.device, kept: int = 0) -> int:
    """Bytes that one batch may take: BATCH_BYTES, on a GPU FREE_SHARE of what PyTorch can allocate there.

    `kept` is what decoders hold that the batch takes over or replaces, so that a second call has batches of the same
    size, and so a decoder for them.
    """
    if device.type != "cuda":
        return BATCH_BYTES
    return int(FREE_SHARE * (memory(device)[0] + kept))


def sample_seeds(seed: int | None, reference_RT: Tensor, samples: int) -> list[int]:
    """A seed for each of `samples` samples of each reference, from `seed`, the reference and the sample's number.

    A reference that occurs again continues the numbers: its samples are new. None takes torch's global generator.

    Raises:
        ConfigError: the seed is negative, or not a whole number.
    """
    seed = int(torch.randint(2**62, ())) if seed is None else whole("seed", seed, 0)
    numbers: Counter[int] = Counter()
    seeds = []
    for row in reference_RT.cpu().numpy():
        key = int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8], "big")
        seeds += [mix_seed(seed, key, numbers[key] + n) for n in range(samples)]
        numbers[key] += samples
    return seeds


def whole(name: str, value: object, least: int, most: float = math.inf, of: str = "") -> int:
    """The value of an argument that has to be a whole number in this range.

    Raises:
        ConfigError: it is another, or of another type.
    """
    if not is_a(value, int) or not least <= value <= most:  # type: ignore[operator]
        wanted = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
        raise ConfigError(f"{name} is {shown(value)}; it must be a whole number {wanted}{of}.")
    return int(value)  # type: ignore[call-overload]
