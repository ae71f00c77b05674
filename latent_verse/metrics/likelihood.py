"""Metrics of a bidirectional likelihood model: retrieval, zero-shot classification and held-out likelihoods.

No other network is involved: all is the model's own log p(text | image) and log p(image | text), in nats.

Shapes: I images, T texts (captions or class names), N codes of an image, L text tokens, B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.config import ConfigError
from latent_verse.metrics.processes import Ranks

RECALLS = (1, 5, 10)
NO_PRIOR = (
    "prior_weight {} with prior: null needs training with reference_dropout. Give --prior pool, or prior_weight 0."
)


class LikelihoodModel(Protocol):
    """What these metrics need of an `LVerse`, which lies in a room above."""

    vae: AugVAE
    biart: BiART
    null_trained: bool  # with reference_dropout, so that it has log p without a reference

    def log_p(self, text_BL: Tensor, codes_BN: Tensor, given: str, alone: bool = False) -> Tensor:
        """log p(text | codes) for given="image", log p(codes | text) for "text"; `alone`: without the reference."""
        ...


@dataclass
class Scores:
    """log p of every image with every text in nats, float64, and what the corrections need."""

    text_given_image_IT: Tensor
    image_given_text_IT: Tensor
    text_alone_T: Tensor | None  # log p without a reference; None for a model that never learnt it
    image_alone_I: Tensor | None
    tokens_T: Tensor  # tokens of each text, its end included


def token_counts(model: LikelihoodModel, text_TL: Tensor) -> Tensor:
    """The number of tokens that each text's log p sums over, the end included if there is room for it."""
    return ((text_TL != model.biart.vocab.pad).sum(1) + 1).clamp(max=text_TL.shape[1])


def score_all(
    model: LikelihoodModel, codes_IN: Tensor, text_TL: Tensor, ranks: Ranks, given: Sequence[str] = ("image", "text")
) -> Scores:
    """Score every image with every text, shared among processes; the matrix of a likelihood not `given` is empty."""
    rows: dict[int, list[Tensor]] = {}
    T = len(text_TL)
    for i in ranks.follow(ranks.mine(len(codes_IN)), "scoring"):
        codes_TN = codes_IN[i].expand(T, -1)
        rows[i] = [model.log_p(text_TL, codes_TN, g).double() for g in given]
    rows = ranks.gather(rows)
    matrices = {g: torch.stack([row[n] for row in rows.values()]) for n, g in enumerate(given)}
    nothing = torch.empty(len(codes_IN), 0, dtype=torch.float64)
    text_T = image_I = None
    if model.null_trained:
        one_IN, one_TL = codes_IN[:1], text_TL[:1]
        if "image" in given:
            text_T = model.log_p(text_TL, one_IN.expand(T, -1), "image", alone=True).double()
        if "text" in given:
            image_I = model.log_p(one_TL.expand(len(codes_IN), -1), codes_IN, "text", alone=True).double()
    tokens_T = token_counts(model, text_TL)
    return Scores(matrices.get("image", nothing), matrices.get("text", nothing), text_T, image_I, tokens_T)


def corrected(scores: Scores, given: str, length_power: float, prior_weight: float, prior: str) -> Tensor:
    """The matrix (I, T) to rank by: log p, corrected by the candidate's prior and by the text's length.

    For given="image": (log p(text | image) - w log p(text)) / tokens^length_power, w being prior_weight. For
    given="text": log p(image | text) - w log p(image), as all images have one length. The prior "null" is the model's
    log p without a reference, "pool" the mean likelihood over the references of the pool.

    Raises:
        ConfigError: prior null with a model that was trained without reference_dropout.
    """
    matrix_IT = scores.text_given_image_IT if given == "image" else scores.image_given_text_IT
    if prior_weight:
        if prior == "pool":
            over = 0 if given == "image" else 1  # the references: images of a text, texts of an image
            alone = matrix_IT.logsumexp(over, keepdim=True) - math.log(matrix_IT.shape[over])
        else:
            alone = scores.text_alone_T if given == "image" else scores.image_alone_I
            if alone is None:
                raise ConfigError(NO_PRIOR.format(prior_weight))
            alone = alone[None] if given == "image" else alone[:, None]
        matrix_IT = matrix_IT - prior_weight * alone
    return matrix_IT / scores.tokens_T**length_power if given == "image" else matrix_IT


def ranks_of_truth(matrix_QC: Tensor, right_QC: Tensor) -> Tensor:
    """For each query the rank, from 1, of its best right candidate. A wrong one of the same score comes first."""
    best_Q = matrix_QC.masked_fill(~right_QC, -math.inf).amax(1)
    return 1 + ((matrix_QC >= best_Q[:, None]) & ~right_QC).sum(1)


def retrieval(matrix_IT: Tensor, owner_T: Tensor) -> dict[str, dict[str, float]]:
    """{"image_to_text": {"r@1", "r@5", "r@10", "median_rank"}, "text_to_image": ...} from one matrix.

    owner_T: the image that each text belongs to. Image to text is right where any of the image's texts is found.
    """
    right_IT = owner_T[None] == torch.arange(len(matrix_IT))[:, None]
    sides = {"image_to_text": (matrix_IT, right_IT), "text_to_image": (matrix_IT.T, right_IT.T)}
    out = {}
    for direction, (matrix_QC, right_QC) in sides.items():
        rank_Q = ranks_of_truth(matrix_QC, right_QC)
        out[direction] = {f"r@{k}": (rank_Q <= k).double().mean().item() for k in RECALLS}
        out[direction]["median_rank"] = rank_Q.double().quantile(0.5).item()
    return out


@dataclass
class HeldOut:
    """log p of pairs in nats, float64 (B,), and the counts to divide it by."""

    text_given_image_B: Tensor
    image_given_text_B: Tensor
    text_alone_B: Tensor | None
    image_alone_B: Tensor | None
    tokens_B: Tensor
    codes: int
    dimensions: int

    def bits(self) -> dict[str, tuple[float, float]]:
        """{name: (bits, standard error)} per token, code and image dimension (3 R R); the error of one pair is NaN."""
        bits, out = math.log(2), {}
        tokens = self.tokens_B.sum().item()
        for name, log_p_B in (("text_given_image", self.text_given_image_B), ("text_alone", self.text_alone_B)):
            if log_p_B is not None:
                out[f"{name}/bits_per_token"] = self._ratio(-log_p_B / bits, self.tokens_B.double(), tokens)
        for name, log_p_B in (("image_given_text", self.image_given_text_B), ("image_alone", self.image_alone_B)):
            if log_p_B is not None:
                mean, error = (-log_p_B / bits).mean().item(), _standard_error(-log_p_B / bits)
                out[f"{name}/bits_per_code"] = (mean / self.codes, error / self.codes)
                out[f"{name}/bits_per_dimension"] = (mean / self.dimensions, error / self.dimensions)
        return out

    @staticmethod
    def _ratio(bits_B: Tensor, tokens_B: Tensor, tokens: float) -> tuple[float, float]:
        """A ratio of sums, and its error by the delta method: a long caption weighs more than a short one."""
        ratio = bits_B.sum().item() / tokens
        rest_B = bits_B - ratio * tokens_B
        return ratio, _standard_error(rest_B) * len(bits_B) / tokens


def _standard_error(values_B: Tensor) -> float:
    return (values_B.std() / math.sqrt(len(values_B))).item() if len(values_B) > 1 else math.nan


def held_out(model: LikelihoodModel, codes_BN: Tensor, text_BL: Tensor, ranks: Ranks) -> HeldOut:
    """log p of pairs, shared among processes, in both directions, and of each half alone if the model learnt that."""
    mine = list(ranks.mine(len(codes_BN)))
    parts = []
    for given, alone in (("image", False), ("text", False), ("image", True), ("text", True)):
        if alone and not model.null_trained:
            parts.append(None)
            continue
        values = model.log_p(text_BL[mine], codes_BN[mine], given, alone).tolist() if mine else []
        found = ranks.gather(dict(zip(mine, values, strict=True)))
        parts.append(torch.tensor(list(found.values()), dtype=torch.float64))
    return HeldOut(*parts, token_counts(model, text_BL), codes_BN.shape[1], 3 * model.vae.config.resolution**2)
