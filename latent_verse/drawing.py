"""Drawing and scoring many samples with BiART: in chunks that fit in memory, with a progress bar, the same by seed.

Integers in, integers out; pictures and texts are `pipeline.py`'s. Shape suffixes: B samples, R references, D draws of
each, W those wanted, K known codes, N image codes, L text tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from latent_verse.biart.model import BiART
from latent_verse.biart.sampling import beam_search, check_settings, generate, log_likelihood
from latent_verse.biart.sequence import TEXT_TO_IMAGE, target_modality
from latent_verse.config import ConfigError
from latent_verse.data.transforms import mix_seed

CHUNK_BYTES = 4 * 2**30  # of keys and values, or of logits, that one chunk may take
LARGEST_CHUNK = 256


class Drawing:
    """BiART with what drawing many samples needs. `LVerse` adds pictures and texts.

    Attributes:
        null_trained: whether training dropped references, which guidance and drawing without a text need.
        batch_size: samples at a time; None chooses by memory.
        progress: show a progress bar on stderr.
    """

    def __init__(self, biart: BiART, null_trained: bool):
        self.biart, self.null_trained = biart, null_trained
        self.batch_size: int | None = None
        self.progress = False

    def _settings(self, direction, draws, temperature, top_k, top_p, guidance, rerank=0) -> dict[str, Any]:
        """The settings that `generate` takes. ConfigError for unusable ones, before anything is computed."""
        modality = target_modality(direction)
        num_classes = self.biart.vocab.num_classes(modality)
        try:
            check_settings(temperature, top_k, top_p, guidance, num_classes, self.null_trained)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        name = f"{'num_images' if modality == 'image' else 'num_captions'} (generate.py: num)"
        if draws < 1:
            raise ConfigError(f"{name} is {draws}; it must be at least 1.")
        if rerank < 0:
            raise ConfigError(f"rerank is {rerank}; give the pictures to choose each from, or 0.")
        if temperature == 0:
            for setting, given in ((name, draws > 1), ("rerank", rerank > 1), ("top_k", top_k), ("top_p", top_p)):
                if given:
                    raise ConfigError(f"{setting} has no effect at temperature 0, which is greedy: raise temperature.")
        return {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance}

    def _draw(self, reference_R, direction, wanted, rerank, seed, settings, prefix_RK=None) -> Tensor:
        """`wanted` targets for each reference, (R, D, N or L) on the CPU, in chunks; the best of `rerank` for each."""
        draws = wanted * max(rerank, 1)
        keys = reference_R if prefix_RK is None else torch.cat([reference_R, prefix_RK], dim=1)
        seeds = sample_seeds(seed, keys, draws)
        reference_B = reference_R.repeat_interleave(draws, dim=0)
        prefix_BK = None if prefix_RK is None else prefix_RK.repeat_interleave(draws, dim=0)
        size = self._draw_chunk(1 if settings["guidance"] == 1 else 2)
        done, parts = 0, []
        with self._bar("drawing" if direction == TEXT_TO_IMAGE else "writing", len(reference_B)) as advance:
            for part in reference_B.split(size):
                rows = slice(done, done + len(part))
                drawn = generate(
                    self.biart,
                    part,
                    direction,
                    seed=seeds[rows],
                    prefix_BK=None if prefix_BK is None else prefix_BK[rows],
                    reference_dropout_trained=self.null_trained,
                    progress=lambda step, total, rows=rows: advance(
                        rows.start + (rows.stop - rows.start) * step / total
                    ),
                    **settings,
                )
                done = rows.stop
                advance(done)  # texts may end early
                parts.append(drawn.cpu())
        drawn_RDN = torch.cat(parts).unflatten(0, (len(reference_R), draws))
        if rerank <= 1:
            return drawn_RDN
        score_B = self.log_p(reference_B, drawn_RDN.flatten(0, 1), "image")
        best_RW = score_B.view(-1, wanted, rerank).argmax(dim=-1) + torch.arange(wanted) * rerank
        return drawn_RDN[torch.arange(len(best_RW))[:, None], best_RW]

    def _beam_search(self, codes_BN: Tensor, beams: int) -> Tensor:
        """The captions (B, L) that `beam_search` finds, on the CPU, in chunks."""
        parts = self._chunks(codes_BN, self._draw_chunk(beams), "writing")
        return torch.cat([beam_search(self.biart, part, beams)[0].cpu() for part in parts])

    def log_p(self, text_BL: Tensor, codes_BN: Tensor, given: str, alone: bool = False) -> Tensor:
        """log_likelihood's totals, (B,) on the CPU, in chunks. `alone`: of the target without what is given."""
        vocab, width = self.biart.vocab, self.biart.config.n_embd
        target = "text" if given == "image" else "image"
        logits = vocab.length(target) * vocab.num_classes(target)
        size = self._chunk(4 * (3 * logits + 10 * vocab.input_len * width))  # their softmax as well; a block's MLP
        rows = torch.arange(len(text_BL))
        parts = self._chunks(rows, size, "scoring")
        return torch.cat(
            [log_likelihood(self.biart, text_BL[r], codes_BN[r], given, alone).total_B.cpu() for r in parts]
        )

    # --------------------------------------------------------------------------------------------- chunks and progress

    def _chunk(self, bytes_each: int) -> int:
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be at least 1, or None.")
        return self.batch_size or max(1, min(LARGEST_CHUNK, CHUNK_BYTES // bytes_each))

    def _draw_chunk(self, rows_each: int) -> int:
        c = self.biart.config
        width = self.biart.head.weight.element_size()
        return self._chunk(rows_each * 2 * c.n_layer * self.biart.vocab.input_len * c.n_embd * width)

    def _chunks(self, rows: Tensor, size: int, what: str) -> Iterator[Tensor]:
        with self._bar(what, len(rows)) as advance:
            done = 0
            for part in rows.split(size):
                yield part
                done += len(part)
                advance(done)

    @contextlib.contextmanager
    def _bar(self, what: str, total: int) -> Iterator[Callable[[float], None]]:
        """A function to be told how many of `total` are done; it moves a bar where `progress` asks for one."""
        if not self.progress:
            yield lambda done: None
            return
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)


def sample_seeds(seed: int | None, references: Tensor, draws: int) -> list[int]:
    """A seed for each of `draws` samples of each reference (rows), from `seed`, the reference and the sample's number.

    A reference that occurs again counts on, so that its samples are new ones. Raises ConfigError for a negative seed.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must be 0 or above.")
    numbers: Counter = Counter()
    seeds = []
    for row in references.cpu().numpy():
        key = int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8], "big")
        seeds += [mix_seed(seed, key, numbers[key] + n) for n in range(draws)]
        numbers[key] += draws
    return seeds
