"""Sampling images and texts from BiART, beam search, and likelihoods.

Shape suffixes: B samples, L text tokens, N image codes, K tokens already known, V classes of one modality, W beams,
T positions, R rows of a batch: the B samples, and with guidance the same ones again without their reference.

The network runs in the precision of its weights; everything after the logits is float32.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latent_verse.biart.cuda_graphs import CUDAGraphs, can_capture
from latent_verse.biart.kept import Kept
from latent_verse.biart.model import BiART, KVCache
from latent_verse.biart.sequence import IGNORE, IMAGE_TO_TEXT, TEXT_TO_IMAGE, Direction, Modality, target_modality
from latent_verse.biart.triton_kernels import has_sampling_kernel, sample_classes
from latent_verse.config import SamplingSettings, UserError
from latent_verse.nn.precision import in_float64


class NotFinite(UserError):
    """The model's logits are not finite numbers."""


class Likelihood(NamedTuple):
    """log p in nats: the sum over each sample's tokens, and the terms, 0 after the end of a text."""

    total_B: Tensor
    tokens_BT: Tensor


def check_settings(
    temperature: float, top_k: int | None, top_p: float | None, guidance: float, num_classes: int, null_trained: bool
) -> None:
    """Check the settings of sampling from `num_classes` classes. `null_trained`: training dropped references.

    Raises:
        ValueError: a setting is out of range, or needs training that dropped references.
    """
    SamplingSettings(temperature, top_k, top_p, guidance)
    if top_k is not None and top_k > num_classes:
        raise ValueError(f"top_k is {top_k}; it must be in [1, {num_classes}], the target's vocabulary, or None.")
    if guidance != 1 and not null_trained:
        raise ValueError(
            f"guidance is {guidance}, but this model was trained without reference dropout: "
            "use guidance=1, or train with reference_dropout above 0 (0.1 is usual)."
        )


def choose(
    logits_BV: Tensor,
    u_B: Tensor | None,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    by_kernel: bool = False,
) -> Tensor:
    """Sample class_B from logits: invert the cumulative distribution at u_B, one uniform number in [0, 1) per row.

    top_k keeps the k likeliest classes. top_p then keeps the smallest set of them whose probability reaches p (Holtzman
    et al., 2020). At temperature 0, or without u_B, the likeliest class is taken. `by_kernel` needs
    `has_sampling_kernel`.
    """
    if temperature == 0 or u_B is None:
        return logits_BV.argmax(dim=-1)
    if by_kernel:
        return sample_classes(logits_BV, u_B, temperature, top_k, top_p)
    logits_BV = logits_BV.float()
    # The maximum is subtracted first: a tiny temperature then gives a sharp distribution rather than inf - inf.
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature
    order_BV = None
    if top_k is not None or top_p is not None:
        logits_BV, order_BV = logits_BV.topk(top_k or logits_BV.shape[-1], dim=-1)
    p_BV = logits_BV.softmax(dim=-1)
    cdf_BV = p_BV.cumsum(dim=-1)
    if top_p is None:
        last_B1 = torch.full_like(cdf_BV[:, :1], cdf_BV.shape[-1] - 1, dtype=torch.long)
    else:
        last_B1 = (cdf_BV - p_BV < top_p).sum(dim=-1, keepdim=True) - 1
        last_B1 = last_B1.clamp(min=0)  # rounding must leave at least one class
    point_B1 = u_B[:, None] * cdf_BV.gather(1, last_B1)
    class_B1 = torch.minimum(torch.searchsorted(cdf_BV, point_B1, right=True), last_B1)
    return (class_B1 if order_BV is None else order_BV.gather(1, class_B1))[:, 0]


def uniforms(seeds: Sequence[int], length: int, device: torch.device | None = None) -> Tensor:
    """u_BN in [0, 1). Row i depends on seeds[i] only, not on the batch or the device."""
    return torch.stack([torch.rand(length, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(device)


def _sample_seeds(seed: int | Sequence[int] | None, batch: int) -> list[int]:
    if seed is None:
        return torch.randint(2**62, (batch,)).tolist()
    if isinstance(seed, int):
        return [seed + i for i in range(batch)]
    if len(seed) != batch:
        raise ValueError(f"There are {len(seed)} seeds for {batch} samples: give one for each, or a single number.")
    return list(seed)


@contextlib.contextmanager
def _evaluating(model: BiART) -> Iterator[None]:
    """No gradients and no dropout inside; the model's mode is restored afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _new_cache(model: BiART, rows: int, device: torch.device, bucket: int | None = None) -> KVCache:
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.head.weight.dtype
    return KVCache(model.config, rows, device, dtype, bucket)


def _check_finite(bad: Tensor) -> None:
    if bool(bad):
        raise NotFinite(
            "the model's logits are not finite: its weights are damaged, or overflow in this precision. "
            "Try dtype float32, or an earlier checkpoint."
        )


def guide(logits_RV: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: null + guidance * (given - null), of rows with and then without their reference."""
    given_BV, null_BV = logits_RV.chunk(2)
    return null_BV + guidance * (given_BV - null_BV)


class Plan(NamedTuple):
    """What a decoder is made for. Calls of `generate` with the same model and plan use the same one."""

    batch: int
    direction: Direction
    temperature: float
    top_k: int | None
    top_p: float | None
    guidance: float
    compiled: bool
    bucket: int | None

    @property
    def rows(self) -> int:
        """How many sequences are read: with guidance each also without its reference."""
        return self.batch if self.guidance == 1 else 2 * self.batch


class Decoder:
    """Samples a batch of targets, a token at a time: `start`, then `step` for each further token.

    What a step reads and writes are tensors that stay in their places, so that a CUDA graph can replay the step, in
    later calls of `generate` too. The model is passed to each call: a decoder that is kept must not keep the model.
    """

    def __init__(self, model: BiART, plan: Plan):
        self.plan, self.vocab, self.modality = plan, model.vocab, target_modality(plan.direction)
        self.device = device = model.device
        batch, total = plan.batch, self.vocab.length(self.modality)
        # each number of slots would be compiled by itself
        self.cache = _new_cache(model, plan.rows, device, self.vocab.input_len if plan.compiled else plan.bucket)
        self.weight_VC = model.head_weight(self.modality)
        self.seg_R1 = torch.ones(plan.rows, 1, dtype=torch.long, device=device)
        self.u_BN = None if plan.temperature == 0 else torch.empty(batch, total, device=device)
        self.target_BN = torch.empty(batch, total, dtype=torch.long, device=device)
        self.id_B = torch.empty(batch, dtype=torch.long, device=device)  # of the last token, in the joint vocabulary
        self.done_B = torch.empty(batch, dtype=torch.bool, device=device)  # whose text has ended
        self.bad = torch.empty((), dtype=torch.bool, device=device)  # whether logits were not finite
        self.pos_1 = torch.empty(1, dtype=torch.long, device=device)  # of the last token in the sequence ...
        self.step_1 = torch.empty(1, dtype=torch.long, device=device)  # ... and of the next one in the target
        self._by_kernel = has_sampling_kernel(device, self.vocab.num_classes(self.modality))
        self._run = CUDAGraphs(device, can_capture(model, device))
        self._sample, self._decode_block = Decoder._sample_token, BiART.decode_block
        if plan.compiled:
            # Dynamo compiles a function only so often, for all decoders together: twice for each number of rows
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            self._sample = torch.compile(self._sample, dynamic=False)
            self._decode_block = torch.compile(self._decode_block, dynamic=False)

    @property
    def bytes(self) -> int:
        """The size of the cache; all else is small."""
        return self.cache.k_LBHSD.nbytes + self.cache.v_LBHSD.nbytes

    def start(
        self, model: BiART, idx_RT: Tensor, seg_RT: Tensor, prefix_BK: Tensor, seeds: Sequence[int] | None
    ) -> None:
        """Read the prompts, which end with the prefix, and sample the next token."""
        known, total = prefix_BK.shape[1], self.target_BN.shape[1]
        self.position = idx_RT.shape[1]  # of the last token, as pos_1 on the device
        self.pos_1.fill_(self.position)
        self.step_1.fill_(known)
        self.target_BN.fill_(self.vocab.pad if self.modality == "text" else 0)
        self.target_BN[:, :known] = prefix_BK
        self.done_B.fill_(False)
        self.bad.fill_(False)
        if self.u_BN is not None and seeds is not None:
            self.u_BN.copy_(uniforms(seeds, total))
        if self.modality == "text":  # a copy, of weights that may have changed
            self.weight_VC.copy_(model.head_weight("text"))
        feature_RC = model.prefill(idx_RT, seg_RT, self.cache)[:, -1]
        # a copy with the strides of a step's, or sampling would be compiled twice
        self._sample(self, feature_RC.clone(memory_format=torch.contiguous_format))

    def step(self, model: BiART) -> None:
        """Read the token just sampled, and sample the next one."""
        slots = self.cache.slots(self.position)
        self._run(slots, lambda: self._step(model, slots))
        self.position += 1

    def _step(self, model: BiART, slots: int) -> None:
        idx_R1 = (self.id_B if self.plan.guidance == 1 else self.id_B.repeat(2))[:, None]
        feature_R1C = model.decode(idx_R1, self.seg_R1, self.cache, self.pos_1, slots, self._decode_block)
        self.pos_1.add_(1)
        self.step_1.add_(1)
        self._sample(self, feature_R1C[:, 0])

    def _sample_token(self, feature_RC: Tensor) -> None:
        plan, end = self.plan, self.vocab.text_vocab
        logits_BV = F.linear(feature_RC, self.weight_VC).float()
        if plan.guidance != 1:
            logits_BV = guide(logits_BV, plan.guidance)
        self.bad.logical_or_(~logits_BV.isfinite().all())
        u_B = None if self.u_BN is None else self.u_BN.index_select(1, self.step_1)[:, 0]
        class_B = choose(logits_BV, u_B, plan.temperature, plan.top_k, plan.top_p, self._by_kernel)
        if self.modality == "text":
            class_B = class_B.masked_fill(self.done_B, end)
            self.done_B.logical_or_(class_B == end)
        self.id_B.copy_(self.vocab.to_ids(class_B, self.modality))
        self.target_BN.index_copy_(1, self.step_1, (self.id_B if self.modality == "text" else class_B)[:, None])


_kept = Kept()


def forget_decoders(model: BiART | None = None) -> None:
    """Free the caches and CUDA graphs that `generate` keeps on a GPU for its next calls, of a model or of all."""
    _kept.drop(model)


def kept_bytes(device: torch.device) -> int:
    """How much of a GPU's memory `generate` keeps for its next calls. It frees this where it needs it for a batch."""
    return _kept.bytes(device)


def _started(model: BiART, plan: Plan, *prompt: Any) -> Decoder:
    """A decoder that has read its prompt: the kept one, if there is one."""

    def start() -> Decoder:
        decoder = None
        if can_capture(model, model.device):
            decoder = _kept.take(model, plan)
            if decoder is None:
                row = KVCache.row_bytes(model.config, model.head.weight.dtype)
                # reading the prompt takes up to half as much again
                _kept.make_room(model.device, plan.rows * row * 3 // 2)
        decoder = decoder or Decoder(model, plan)
        decoder.start(model, *prompt)
        return decoder

    try:
        return start()
    except torch.OutOfMemoryError:
        if not len(_kept):
            raise
    _kept.drop()  # not while the exception holds what was allocated
    return start()


def generate(
    model: BiART,
    reference: Tensor,
    direction: Direction,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float = 1.0,
    seed: int | Sequence[int] | None = None,
    prefix_BK: Tensor | None = None,
    reference_dropout_trained: bool = True,
    progress: Callable[[int, int], None] | None = None,
    compiled: bool = False,
    bucket: int | None = None,
) -> Tensor:
    """Sample one target for every reference -> codes_BN, or text_BL (text ids, padded after the end), int64.

    On a GPU, cache and CUDA graphs are kept for the next call with the same model, batch, direction and settings.

    Args:
        reference: text_BL (text_to_image) or codes_BN (image_to_text), or `Vocabulary.null_reference` to do without.
        temperature, top_k, top_p: see `choose`.
        guidance: see `guide`; twice the work unless it is 1.
        seed: sample i has a random stream of its own, from seed + i, or from seed[i] of a sequence, so that neither the
            size of the batch nor the other samples change it. None takes torch's global generator.
        prefix_BK: the first K tokens of the target, which are kept.
        reference_dropout_trained: whether training dropped references, which guidance needs.
        progress: is called with (step, total) after every token.
        compiled: compile a step for this batch and these settings, which takes some seconds and pays for many batches.
            `latent_verse.nn.compilation` says whether a machine can. On a CPU, where nothing is kept, for each call.
        bucket: see `KVCache`; ignored if compiled.

    Raises:
        NotFinite: the logits are not finite.
        ValueError: settings (see `check_settings`) or ids are out of range.
    """
    vocab, modality = model.vocab, target_modality(direction)
    check_settings(temperature, top_k, top_p, guidance, vocab.num_classes(modality), reference_dropout_trained)
    device, batch, total = model.device, len(reference), vocab.length(modality)
    reference = reference.to(device)
    prefix_BK = reference.new_zeros(batch, 0) if prefix_BK is None else prefix_BK.to(device)
    known = prefix_BK.shape[1]
    idx_RT, seg_RT = vocab.prompt(reference, direction, prefix_BK)
    if guidance != 1:
        null = vocab.null_reference(batch, direction, device)
        null_idx_BT, null_seg_BT = vocab.prompt(null, direction, prefix_BK)
        idx_RT, seg_RT = torch.cat([idx_RT, null_idx_BT]), torch.cat([seg_RT, null_seg_BT])
    if known == total or batch == 0:
        return F.pad(prefix_BK.long(), (0, total - known))
    seeds = None if temperature == 0 else _sample_seeds(seed, batch)
    plan = Plan(batch, direction, temperature, top_k, top_p, guidance, compiled, bucket)

    # How often to ask whether all captions have ended: on a GPU, asking takes longer than a few needless steps.
    ask_every = 8 if device.type == "cuda" else 1
    # What inference mode makes could not be changed outside of it, but a decoder may be kept.
    with torch.inference_mode(False), _evaluating(model):
        decoder = _started(model, plan, idx_RT, seg_RT, prefix_BK, seeds)
        _check_finite(decoder.bad)  # once now and once at the end: asking after every token would wait for the device
        if progress is not None:
            progress(known + 1, total)
        for step in range(known + 1, total):
            if modality == "text" and (step - known) % ask_every == 0 and bool(decoder.done_B.all()):
                break
            decoder.step(model)
            if progress is not None:
                progress(step + 1, total)
        target_BN = decoder.target_BN.clone()  # before waiting for it: another thread may take the decoder afterwards
        _check_finite(decoder.bad)
        if can_capture(model, device):
            _kept.put(model, plan, decoder)
    return target_BN


def beam_search(
    model: BiART, codes_BN: Tensor, beam_size: int = 4, length_penalty: float = 0.0, bucket: int | None = None
) -> tuple[Tensor, Tensor]:
    """The likeliest caption that `beam_size` beams find: text_BL (padded after the end), and its score_B.

    The score is log p(text | image) / tokens**length_penalty, the end of the text counted: 0 compares sums, 1 means per
    token, which favours longer captions. With as many beams as there are unfinished captions the search is exact.

    Raises:
        NotFinite: the logits are not finite.
        ValueError: beam_size, length_penalty or a code is out of range.
    """
    vocab, V, L = model.vocab, model.vocab.text_vocab, model.vocab.text_len
    if beam_size < 1:
        raise ValueError(f"beam_size is {beam_size}; it must be at least 1.")
    if length_penalty < 0:
        raise ValueError(f"length_penalty is {length_penalty}; it must be 0 or above.")
    device, batch = model.device, len(codes_BN)
    idx_BT, seg_BT = vocab.prompt(codes_BN.to(device), IMAGE_TO_TEXT)
    position = prompt = idx_BT.shape[1]
    with _evaluating(model):
        weight_VC = model.head_weight("text")
        first = _new_cache(model, batch, device, bucket)
        feature_BC = model.prefill(idx_BT, seg_BT, first)[:, -1]
        # Each image is read once; then every beam gets a copy of its keys and values, which no step changes.
        cache = _new_cache(model, batch * beam_size, device, bucket)
        for of_beams, read in ((cache.k_LBHSD, first.k_LBHSD), (cache.v_LBHSD, first.v_LBHSD)):
            of_beams.unflatten(1, (batch, beam_size))[..., :prompt, :] = read[:, :, None, :, :prompt]
        cache.image_first_B1.fill_(True)
        del first, read
        feature_RC = feature_BC.repeat_interleave(beam_size, dim=0)

        pos_1 = torch.tensor([position], device=device)
        row_B1 = torch.arange(batch, device=device)[:, None] * beam_size
        seg_R1 = torch.ones(batch * beam_size, 1, dtype=torch.long, device=device)
        text_BWL = torch.full((batch, beam_size, L), vocab.pad, device=device)
        best_BL, best_B = text_BWL[:, 0].clone(), torch.full((batch,), -math.inf, device=device)
        sum_BW = torch.full((batch, beam_size), -math.inf, device=device)
        sum_BW[:, 0] = 0  # all beams are still the same, empty caption

        def best_with(score_BW: Tensor) -> tuple[Tensor, Tensor]:
            """The best caption of those that ended before and those of text_BWL, which have score_BW, and its score."""
            score_B, beam_B = score_BW.max(dim=1)
            text_BL = text_BWL[torch.arange(batch, device=device), beam_B]
            better_B = score_B > best_B
            return torch.where(better_B[:, None], text_BL, best_BL), torch.where(better_B, score_B, best_B)

        for step in range(L):
            log_p_RV = F.linear(feature_RC, weight_VC).float().log_softmax(dim=-1)
            _check_finite(~log_p_RV.isfinite().all())
            score_BWV = sum_BW[:, :, None] + log_p_RV.view(batch, beam_size, V + 1)
            best_BL, best_B = best_with(score_BWV[:, :, V] / (step + 1) ** length_penalty)
            open_BM = score_BWV[:, :, :V].flatten(1)
            sum_BM, flat_BM = open_BM.topk(min(beam_size, open_BM.shape[1]), dim=1)
            sum_BW = F.pad(sum_BM, (0, beam_size - sum_BM.shape[1]), value=-math.inf)
            flat_BW = F.pad(flat_BM, (0, beam_size - flat_BM.shape[1]))
            parent_BW, token_BW = flat_BW // V, flat_BW % V
            text_BWL = text_BWL.gather(1, parent_BW[:, :, None].expand(-1, -1, L))
            text_BWL[:, :, step] = token_BW
            # A sum can only fall. Divided by the longest length, it bounds the score that a beam can still reach.
            if step + 1 == L or bool((best_B >= sum_BW.amax(dim=1) / L**length_penalty).all()):
                break
            cache.reorder((row_B1 + parent_BW).flatten(), slice(prompt, position))
            feature_RC = model.decode(token_BW.view(-1, 1), seg_R1, cache, pos_1, cache.slots(position))[:, 0]
            position += 1
            pos_1.add_(1)
        if step + 1 == L:  # captions that fill text_len have no end token
            best_BL, best_B = best_with(sum_BW / L**length_penalty)
    return best_BL, best_B


def log_likelihood(model: BiART, text_BL: Tensor, codes_BN: Tensor, given: Modality, alone: bool = False) -> Likelihood:
    """log p(codes | text) for given="text", log p(text and its end | codes) for given="image"; in nats.

    Args:
        alone: drop what is given, as reference dropout does in training: log p of the target by itself.

    Raises:
        NotFinite: the logits are not finite.
        ValueError: `given` is neither of the two, or ids are out of range.
    """
    if given not in ("text", "image"):
        raise ValueError(f"given is {given!r}; it must be 'text' or 'image'.")
    direction: Direction = TEXT_TO_IMAGE if given == "text" else IMAGE_TO_TEXT
    device, modality = model.device, target_modality(direction)
    sequences = model.vocab.pack(text_BL.to(device), codes_BN.to(device), direction, reference_dropout=float(alone))
    class_BT = sequences.classes(modality)
    with _evaluating(model):
        feature_BTC = model.features(sequences.idx_BT, sequences.seg_BT)
        feature_BTC = feature_BTC[:, model.vocab.positions(direction, modality)]
        tokens_BT = -model.token_losses(feature_BTC, class_BT, model.head_weight(modality))
    tokens_BT = tokens_BT.masked_fill(class_BT == IGNORE, 0.0)
    total_B = in_float64(tokens_BT).sum(dim=1).float()  # of 1,024 terms: the differences that rank images are small
    _check_finite(~total_B.isfinite().all())
    return Likelihood(total_B.to(device), tokens_BT)
