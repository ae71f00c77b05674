"""BiART, one transformer for text→image and image→text (paper section 3.2), built like minGPT.

Shape suffixes: B batch, T positions, C channels (n_embd), H heads, D = C / H, V classes, M tokens, S slots, F = 4 C.

Unlike minGPT it has a segment embedding, attention by `scaled_dot_product_attention`, and a head that computes the
logits of one modality only, since the layout (`sequence.py`) says which modality comes next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latent_verse.biart.sequence import DIRECTIONS, IGNORE, MODALITIES, Modality, Sequences, Vocabulary, target_modality
from latent_verse.biart.triton_kernels import decode_attention, has_kernels
from latent_verse.config import BiARTConfig
from latent_verse.nn.activation_checkpointing import ActivationCheckpointing
from latent_verse.nn.memory import check_memory
from latent_verse.nn.precision import LayerNorm, as_residual_stream


def loss_weights(reference_weight: float, text: float = 1.0, image: float = 1.0) -> dict[str, float]:
    """For `BiART.loss`: `text` and `image` where the modality is the target, `reference_weight` times it elsewhere."""
    own = {"text": text, "image": image}
    return {
        f"{direction}/{modality}": own[modality] * (1.0 if modality == target_modality(direction) else reference_weight)
        for direction in DIRECTIONS
        for modality in MODALITIES
    }


class KVCache:
    """Keys and values of all blocks, allocated once as in gpt-fast.

    Args:
        bucket: a decoding step is given a multiple of this many slots. 1, the default on a CPU, gives it only filled
            ones. A larger one also reads and masks empty ones, because CUDA graphs need steps of the same shapes: 128
            on a GPU, or all where `decode_attention` has a kernel, which reads the filled ones of any number.
    """

    def __init__(
        self, config: BiARTConfig, batch: int, device: torch.device | str, dtype: torch.dtype, bucket: int | None = None
    ):
        device, longest = torch.device(device), Vocabulary.of(config).input_len
        head_dim = config.n_embd // config.n_head
        self.by_kernel = has_kernels(device, dtype, head_dim)
        if bucket is None:
            bucket = longest if self.by_kernel else 128 if device.type == "cuda" else 1
        self.bucket = bucket
        shape = (config.n_layer, batch, config.n_head, math.ceil(longest / bucket) * bucket, head_dim)
        self.image_first_B1 = torch.zeros(batch, 1, device=device, dtype=torch.bool)  # the direction of each row
        self.k_LBHSD = torch.zeros(shape, device=device, dtype=dtype)
        self.v_LBHSD = torch.zeros(shape, device=device, dtype=dtype)

    @staticmethod
    def row_bytes(config: BiARTConfig, dtype: torch.dtype) -> int:
        """What one row takes."""
        return 2 * config.n_layer * Vocabulary.of(config).input_len * config.n_embd * dtype.itemsize

    def slots(self, position: int) -> int:
        """The number of slots that the step at `position` is given."""
        return math.ceil((position + 1) / self.bucket) * self.bucket

    def reorder(self, rows_B: Tensor, slots: slice) -> None:
        """Copy row rows_B[i] to row i, in `slots` alone (for beam search, whose beams share their prompt)."""
        for cache in (self.k_LBHSD, self.v_LBHSD):
            cache[:, :, :, slots] = cache[:, :, :, slots].index_select(1, rows_B)


class Past(NamedTuple):
    """One block's part of the cache, and which slots a step writes (pos_T) and how many it is given."""

    k_BHSD: Tensor
    v_BHSD: Tensor
    pos_T: Tensor
    slots: int
    mask_TS: Tensor | None
    by_kernel: bool  # a single token's attention is one kernel, which needs neither slots nor mask


class Attention(nn.Module):
    """Causal self-attention; with `past` over the cached positions as well."""

    def __init__(self, config: BiARTConfig):
        super().__init__()
        self.n_head, self.attn_pdrop = config.n_head, config.attn_pdrop
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_drop = nn.Dropout(config.resid_pdrop)

    def forward(self, x_BTC: Tensor, past: Past | None = None) -> Tensor:
        B, T, C = x_BTC.shape
        q, k, v = self.qkv(x_BTC).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        mask_TS, causal = None, True
        if past is not None and past.by_kernel and T == 1:
            y_BHD = decode_attention(q[:, :, 0], k[:, :, 0], v[:, :, 0], past.k_BHSD, past.v_BHSD, past.pos_T)
            return self.resid_drop(self.proj(y_BHD.view(B, T, C)))
        if past is not None:
            past.k_BHSD.index_copy_(2, past.pos_T, k.to(past.k_BHSD.dtype))
            past.v_BHSD.index_copy_(2, past.pos_T, v.to(past.v_BHSD.dtype))
            if T == 1:  # decoding; the prefill starts at 0 and needs only its own keys
                k, v = past.k_BHSD[:, :, : past.slots], past.v_BHSD[:, :, : past.slots]
                mask_TS, causal = past.mask_TS, False
        dropout = self.attn_pdrop if self.training else 0.0
        y_BHTD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TS, dropout_p=dropout, is_causal=causal)
        return self.resid_drop(self.proj(y_BHTD.transpose(1, 2).reshape(B, T, C)))


class Block(ActivationCheckpointing):
    """x + attention(norm x), then x + MLP(norm x); the last sum is left to the next block.

    Activation checkpointing recomputes the outputs of the second norm and of GELU, a third of what a block keeps.
    """

    def __init__(self, config: BiARTConfig):
        super().__init__()
        self.ln1 = LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln2 = LayerNorm(config.n_embd)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd),
            nn.GELU(),
            nn.Linear(4 * config.n_embd, config.n_embd),
        )
        self.resid_drop = nn.Dropout(config.resid_pdrop)

    def forward(
        self, x_BTC: Tensor, branch_BTC: Tensor | None = None, past: Past | None = None
    ) -> tuple[Tensor, Tensor]:
        """The stream and what the block before adds to it, None at first -> the stream and what this block adds.

        So the compiler, which sees one block at a time, can make each sum and the norm of it in one pass.
        """
        if branch_BTC is not None:
            x_BTC = x_BTC + self.resid_drop(branch_BTC)
        x_BTC = x_BTC + self.attn(self.ln1(x_BTC), past)
        widen, gelu, narrow = self.mlp
        wide_BTF = self.recomputed(lambda x: widen(self.ln2(x)), x_BTC)
        return x_BTC, self.recomputed(lambda wide: narrow(gelu(wide)), wide_BTF)


class BiART(nn.Module):
    """The joint transformer. Its `vocab`, a `Vocabulary`, packs texts and codes into what the network reads."""

    def __init__(self, config: BiARTConfig):
        super().__init__()
        check_memory("BiART's weights", config.least_weights, "n_layer, n_embd or the vocabulary")
        self.config = config
        self.vocab = Vocabulary.of(config)
        self.tok_emb = nn.Embedding(self.vocab.size, config.n_embd)
        self.seg_emb = nn.Embedding(2, config.n_embd)
        # by modality one more: which modality loses its last token depends on the direction
        self.pos_emb = nn.Parameter(torch.empty(1, self.vocab.input_len + int(config.pos_by_modality), config.n_embd))
        self.drop = nn.Dropout(config.embd_pdrop)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.resid_drop = nn.Dropout(config.resid_pdrop)  # of the last block's branch
        self.ln_f = LayerNorm(config.n_embd)
        # a linear layer that quantisation leaves alone: its rows are read, and int8 would cost the logits most
        self.head = nn.modules.linear.NonDynamicallyQuantizableLinear(config.n_embd, self.vocab.size, bias=False)
        self._init_weights()

    def _init_weights(self) -> None:
        """As GPT-2: normal(0, 0.02), and the last layer of each residual branch scaled down by sqrt(2 n_layer)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.pos_emb, std=0.02)
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(("attn.proj.weight", "mlp.2.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.head.weight.device

    def positions(self, places: slice | Tensor, image_first_B1: Tensor) -> Tensor:
        """The position embeddings of T places in the sequence, (T, C), or (B, T, C) by modality.

        Training, prefill and decoding all call this: another position encoding replaces it here.

        Args:
            places: what a table of all places is indexed with. A whole sequence gives a slice, whose gradient costs
                half as much as a look-up's; decoding gives places_T.
            image_first_B1: which rows begin with the image.
        """
        table_PC = self.pos_emb[0]
        if not self.config.pos_by_modality:
            return table_PC[places]
        # text has the first L + 1 rows of the table, whichever modality comes first
        place_T = torch.arange(len(table_PC), device=table_PC.device)[places]
        turned_T = (place_T + self.vocab.text_len + 1) % len(table_PC)
        return F.embedding(torch.where(image_first_B1, turned_T, place_T), table_PC)

    def _embed(self, idx_BT: Tensor, seg_BT: Tensor, places: slice | Tensor, image_first_B1: Tensor) -> Tensor:
        x_BTC = self.tok_emb(idx_BT) + self.seg_emb(seg_BT) + self.positions(places, image_first_B1)
        return as_residual_stream(self.drop(x_BTC))

    def features(self, idx_BT: Tensor, seg_BT: Tensor) -> Tensor:
        """Joint ids and segments -> features_BTC, from which the heads read the next token."""
        x_BTC = self._embed(idx_BT, seg_BT, slice(idx_BT.shape[1]), idx_BT[:, :1] == self.vocab.begin_image)
        branch_BTC: Tensor | None = None
        for block in self.blocks:
            x_BTC, branch_BTC = self.call_block(block, x_BTC, branch_BTC)
        return self.ln_f(x_BTC + self.resid_drop(branch_BTC))

    @staticmethod
    def call_block(block: nn.Module, x_BTC: Tensor, branch_BTC: Tensor | None) -> tuple[Tensor, Tensor]:
        """block(x_BTC, branch_BTC). Cached decoding, with its changing shapes, bypasses it.

        Training may compile this function: once for the first block, which has no branch, and once for all others.
        """
        return block(x_BTC, branch_BTC)

    @staticmethod
    def decode_block(block: nn.Module, x_BTC: Tensor, branch_BTC: Tensor | None, past: Past) -> tuple[Tensor, Tensor]:
        """block(x_BTC, branch_BTC, past). Like `call_block`, it may be compiled, which `sampling.Decoder` does."""
        return block(x_BTC, branch_BTC, past)

    def forward(self, idx_BT: Tensor, seg_BT: Tensor) -> Tensor:
        """Joint ids and segments -> logits_BTV of the next token over the whole joint vocabulary."""
        return self.head(self.features(idx_BT, seg_BT))

    def head_weight(self, modality: Modality) -> Tensor:
        """The rows of `head` for one modality's classes, weight_VC: text ids and pad (a copy), or codes (a view)."""
        start, pad = self.vocab.image_start, self.vocab.pad
        if modality == "image":
            return self.head.weight[start:pad]
        return torch.cat([self.head.weight[:start], self.head.weight[pad : pad + 1]])

    def modality_logits(self, features_BTC: Tensor, modality: Modality) -> Tensor:
        """Logits over one modality's classes, (B, T, V): those of `forward` without all other tokens."""
        return F.linear(features_BTC, self.head_weight(modality))

    @staticmethod
    def token_losses(features_BTC: Tensor, class_BT: Tensor, weight_VC: Tensor, chunk: int | None = None) -> Tensor:
        """-log p of each class in nats, (B, T) float32; 0 where the class is IGNORE.

        Args:
            weight_VC: from `head_weight`.
            chunk: compute the logits of this many tokens at a time, and again in the backward pass: a fraction of the
                head's memory for a third more of its FLOPs.
        """

        def nll(x_MC: Tensor, class_M: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x_MC, weight_VC).float(), class_M, ignore_index=IGNORE, reduction="none")

        x_MC, class_M = features_BTC.flatten(0, 1), class_BT.flatten()
        if chunk is None or len(x_MC) <= chunk:
            return nll(x_MC, class_M).view_as(class_BT)
        chunks = zip(x_MC.split(chunk), class_M.split(chunk), strict=True)
        return torch.cat([checkpoint(nll, *pair, use_reentrant=False) for pair in chunks]).view_as(class_BT)

    def loss(
        self,
        sequences: Sequences,
        weights: Mapping[str, float],
        chunk: int | None = None,
        token_share: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the cross-entropies of text and image in both directions.

        Each is a mean over its counted tokens, so that a long modality does not outweigh a short one, and is also
        weighted by its direction's share of the rows.

        Args:
            weights: of each "direction/modality", as `loss_weights` gives them; 0 leaves that head out.
            chunk: see `token_losses`.
            token_share: for each "direction/modality", this process's number of counted tokens (`Sequences.counted`)
                over the mean number of all processes, so that the mean of their losses is a mean over all their tokens.

        Returns:
            The loss, and the mean of each "direction/modality" that was computed, detached, in nats per token.

        Raises:
            KeyError: the batch holds a "direction/modality" without a weight.
        """
        features_BTC = self.features(sequences.idx_BT, sequences.seg_BT)
        total, means = features_BTC.new_zeros((), dtype=torch.float32), {}
        weight_VC: dict[str, Tensor] = {}  # each head's weight is read once: every read costs in the backward pass
        for direction, rows in sequences.parts():
            share = (rows.stop - rows.start) / len(features_BTC)
            for modality in MODALITIES:
                name = f"{direction}/{modality}"
                weight = share * weights[name]
                if weight == 0:
                    continue
                if modality not in weight_VC:
                    weight_VC[modality] = self.head_weight(modality)
                here_BTC = features_BTC[rows, self.vocab.positions(direction, modality)]
                class_BT = sequences.classes(modality)[rows]
                counted = (class_BT != IGNORE).sum().clamp(min=1)  # reference dropout may leave no token at all
                mean = self.token_losses(here_BTC, class_BT, weight_VC[modality], chunk).sum() / counted
                total = total + weight * mean * (1.0 if token_share is None else token_share[name])
                means[name] = mean.detach()
        return total, means

    def prefill(self, idx_BT: Tensor, seg_BT: Tensor, cache: KVCache) -> Tensor:
        """Read a prompt, from position 0 on, into an empty cache -> features_BTC."""
        pos_T = torch.arange(idx_BT.shape[1], device=idx_BT.device)
        cache.image_first_B1.copy_(idx_BT[:, :1] == self.vocab.begin_image)
        return self._cached(idx_BT, seg_BT, cache, pos_T, idx_BT.shape[1], None, self.decode_block)

    def decode(
        self,
        idx_B1: Tensor,
        seg_B1: Tensor,
        cache: KVCache,
        pos_1: Tensor,
        slots: int,
        decode_block: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Read one more token, at position pos_1 -> features_B1C. `slots` is cache.slots(position).

        Shapes depend on `slots` alone, and nothing waits for the device. `decode_block` is `BiART.decode_block`, or
        that compiled.
        """
        mask_TS = None
        if cache.bucket > 1 and not cache.by_kernel:  # additive, as every block would convert a boolean mask to that
            filled_TS = torch.arange(slots, device=pos_1.device)[None] <= pos_1[:, None]
            mask_TS = torch.zeros_like(filled_TS, dtype=cache.k_LBHSD.dtype).masked_fill(~filled_TS, -math.inf)
        return self._cached(idx_B1, seg_B1, cache, pos_1, slots, mask_TS, decode_block or self.decode_block)

    def _cached(
        self,
        idx_BT: Tensor,
        seg_BT: Tensor,
        cache: KVCache,
        pos_T: Tensor,
        slots: int,
        mask_TS: Tensor | None,
        call: Callable[..., tuple[Tensor, Tensor]],
    ) -> Tensor:
        x_BTC = self._embed(idx_BT, seg_BT, pos_T, cache.image_first_B1)
        branch_BTC: Tensor | None = None
        for block, k_BHSD, v_BHSD in zip(self.blocks, cache.k_LBHSD, cache.v_LBHSD, strict=True):
            past = Past(k_BHSD, v_BHSD, pos_T, slots, mask_TS, cache.by_kernel)
            x_BTC, branch_BTC = call(block, x_BTC, branch_BTC, past)
        return self.ln_f(x_BTC + self.resid_drop(branch_BTC))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Two groups for AdamW: matrices decay; biases, norms and embeddings do not."""
        decay = [m.weight for m in self.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
        ids = {id(p) for p in decay}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in ids]
        return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]

    def num_parameters(self) -> int:
        """The number of weights, embeddings included."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> float:
        """FLOPs of forward and backward pass per input position, for MFU; counted as in PaLM, appendix B.

        6 per weight of a matrix product, with the head's rows of a position's own modality, and 12 n_layer n_embd T for
        attention, as if it were not causal. Embeddings and recomputation count nothing.
        """
        c, T = self.config, self.vocab.input_len
        head = sum(self.vocab.length(m) * self.vocab.num_classes(m) for m in MODALITIES) * c.n_embd / T
        return 6 * (12 * c.n_layer * c.n_embd**2 + head) + 12 * c.n_layer * c.n_embd * T
