"""The plain formulations that ours is compared with: the one-hot quantiser, Muon, minGPT, and Hugging Face's GPT-2.

minGPT's is written here after its description (three projections, a mask buffer, softmax over the whole matrix, one
head over the joint vocabulary at every position), with BiART's segment embedding, so that with the same weights it must
give the same logits.

Shapes: N vectors, K codes, D code dimension; B batch, H height or heads, W width, T positions, C channels, V classes.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latent_verse.augvae.layers import Upsample
from latent_verse.augvae.model import AugVAE
from latent_verse.augvae.quantizer import Codebook
from latent_verse.biart.model import BiART
from latent_verse.config import BiARTConfig

DECAY, EPS, BETA = 0.99, 1e-5, 0.25

# ------------------------------------------------------------------------------------------------------------ quantiser


@torch.no_grad()
def one_hot_update(book: Codebook, flat_ND: Tensor, hot_NK: Tensor) -> None:
    book.cluster_size.mul_(DECAY).add_(hot_NK.sum(0), alpha=1 - DECAY)
    book.embed_avg.mul_(DECAY).add_(hot_NK.t() @ flat_ND, alpha=1 - DECAY)
    n = book.cluster_size.sum()
    smoothed = (book.cluster_size + EPS) / (n + len(book.weight) * EPS) * n
    book.weight.copy_(book.embed_avg / smoothed[:, None])


def one_hot_forward(book: Codebook, z_BDHW: Tensor, learn: bool = True, beta: float = BETA):
    """The plain formulation of EMAQuantizer.forward (van den Oord et al. 2017, appendix A.1)."""
    z_BHWD = z_BDHW.permute(0, 2, 3, 1)
    flat_ND = z_BHWD.reshape(-1, z_BHWD.shape[-1])
    weight = book.weight.clone()
    d_NK = flat_ND.pow(2).sum(1, keepdim=True) - 2 * flat_ND @ weight.t() + weight.pow(2).sum(1)
    indices_N = d_NK.argmin(1)
    hot_NK = F.one_hot(indices_N, len(weight)).to(flat_ND.dtype)
    quantised = (hot_NK @ weight).view(z_BHWD.shape)
    if learn:
        one_hot_update(book, flat_ND.detach(), hot_NK)
    loss = beta * F.mse_loss(quantised, z_BHWD)
    out = (z_BHWD + (quantised - z_BHWD).detach()).permute(0, 3, 1, 2)
    return out, indices_N.view(z_BHWD.shape[:-1]), loss


def enlarge_then_convolve(layer: Upsample, x_BCHW: Tensor) -> Tensor:
    """The plain formulation of Upsample.forward."""
    return layer.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


def plain_augvae(model: AugVAE) -> AugVAE:
    """A copy of AugVAE with the one-hot quantiser and convolutions of upsampled maps, contiguous (NCHW)."""
    with model.pre_quants[0].weight.device:
        copy = AugVAE(model.config)
    copy.load_state_dict(model.state_dict())
    quantizer = copy.quantizers[0]
    quantizer.forward = lambda z_BDHW: one_hot_forward(
        quantizer.embedding, z_BDHW, learn=quantizer.training, beta=quantizer.beta
    )
    for layer in copy.modules():
        if isinstance(layer, Upsample):
            layer.forward = functools.partial(enlarge_then_convolve, layer)
    return copy


class PlainMuon(torch.optim.Optimizer):
    """Muon as Jordan wrote it, matrix by matrix, with MuonAdamW's scale; float32, but bfloat16 on a GPU."""

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update_RC = newton_schulz(p.grad.lerp(state["momentum"], group["momentum"]).flatten(1))
                scale = 0.2 * math.sqrt(max(update_RC.shape))
                p.add_(update_RC.view(p.shape), alpha=-group["lr"] * scale)


def newton_schulz(g_RC: Tensor) -> Tensor:
    """The plain formulation of optimizer.orthogonalise, for one matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g_RC.bfloat16() if g_RC.is_cuda else g_RC
    tall = len(x) > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(g_RC.dtype)


# ---------------------------------------------------------------------------------------------------------- transformer


class MinAttention(nn.Module):
    def __init__(self, config: BiARTConfig, length: int):
        super().__init__()
        self.n_head = config.n_head
        self.key, self.query, self.value, self.proj = (nn.Linear(config.n_embd, config.n_embd) for _ in range(4))
        self.register_buffer("mask", torch.tril(torch.ones(length, length)).view(1, 1, length, length))

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        k, q, v = (
            f(x_BTC).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for f in (self.key, self.query, self.value)
        )
        att_BHTT = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att_BHTT = F.softmax(att_BHTT.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf")), dim=-1)
        return self.proj((att_BHTT @ v).transpose(1, 2).contiguous().view(B, T, C))


class MinBlock(nn.Module):
    def __init__(self, config: BiARTConfig, length: int):
        super().__init__()
        c = config.n_embd
        self.ln1, self.ln2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.attn = MinAttention(config, length)
        self.mlp = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attn(self.ln1(x_BTC))
        return x_BTC + self.mlp(self.ln2(x_BTC))


class MinGPT(nn.Module):
    """minGPT over the joint vocabulary, with BiART's weights."""

    def __init__(self, model: BiART):
        super().__init__()
        config, length = model.config, model.vocab.input_len
        with model.pos_emb.device:
            self.tok_emb = nn.Embedding(model.vocab.size, config.n_embd)
            self.seg_emb = nn.Embedding(2, config.n_embd)
            self.pos_emb = nn.Parameter(torch.zeros(1, length, config.n_embd))
            self.blocks = nn.ModuleList(MinBlock(config, length) for _ in range(config.n_layer))
            self.ln_f = nn.LayerNorm(config.n_embd)
            self.head = nn.Linear(config.n_embd, model.vocab.size, bias=False)
        weights = {}
        for name, value in model.state_dict().items():
            if ".attn.qkv." in name:
                for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    weights[name.replace("qkv", part)] = third
            else:
                weights[name] = value
        missing = self.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys and all(key.endswith("mask") for key in missing.missing_keys), missing
        self.to(model.pos_emb.dtype)

    def forward(self, idx_BT: Tensor, seg_BT: Tensor) -> Tensor:
        """Joint ids and segments -> logits_BTV over the joint vocabulary."""
        x_BTC = self.tok_emb(idx_BT) + self.seg_emb(seg_BT) + self.pos_emb[:, : idx_BT.shape[1]]
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.head(self.ln_f(x_BTC))


def gpt2(model: BiART) -> nn.Module:
    """Hugging Face's GPT2LMHeadModel (attention by SDPA) with BiART's weights; it takes `embeddings(model, ...)`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    shape = GPT2Config(
        vocab_size=model.vocab.size,
        n_positions=model.vocab.input_len,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    with model.pos_emb.device:
        peer = GPT2LMHeadModel(shape)
    weights = {"transformer.wte.weight": model.tok_emb.weight, "transformer.wpe.weight": model.pos_emb[0]}
    weights |= {f"transformer.ln_f.{n}": p for n, p in model.ln_f.named_parameters()}
    weights["lm_head.weight"] = model.head.weight
    for i, block in enumerate(model.blocks):
        parts = {
            "ln_1": block.ln1,
            "attn.c_attn": block.attn.qkv,
            "attn.c_proj": block.attn.proj,
            "ln_2": block.ln2,
            "mlp.c_fc": block.mlp[0],
            "mlp.c_proj": block.mlp[2],
        }
        for name, part in parts.items():
            weight = part.weight.t() if "c_" in name else part.weight  # its Conv1D holds (in, out)
            weights[f"transformer.h.{i}.{name}.weight"] = weight
            weights[f"transformer.h.{i}.{name}.bias"] = part.bias
    missing = peer.load_state_dict({k: v.detach().clone() for k, v in weights.items()}, strict=False)
    assert not missing.unexpected_keys and not [k for k in missing.missing_keys if "attn.bias" not in k], missing
    return peer.to(model.pos_emb.dtype)


def embeddings(model: BiART, idx_BT: Tensor, seg_BT: Tensor) -> Tensor:
    """Token and segment embeddings: what `gpt2`, which has no segments, takes as inputs_embeds."""
    return model.tok_emb(idx_BT) + model.seg_emb(seg_BT)


def x_transformer(model: BiART) -> nn.Module:
    """x-transformers' decoder of the same depth, width and vocabulary; its details differ, so its logits do too."""
    from x_transformers import Decoder, TransformerWrapper

    c = model.config
    shape = {"dim": c.n_embd, "depth": c.n_layer, "heads": c.n_head, "attn_dim_head": c.n_embd // c.n_head}
    with model.pos_emb.device:
        layers = Decoder(**shape, attn_flash=True)
        peer = TransformerWrapper(num_tokens=model.vocab.size, max_seq_len=model.vocab.input_len, attn_layers=layers)
    return peer.to(model.pos_emb.device, model.pos_emb.dtype)
