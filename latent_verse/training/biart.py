"""LitBiART, the LightningModule of BiART: steps, logging and the optimiser. The mathematics is in `model.py`.

Shape suffixes: B batch, L text tokens, N image codes, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from latent_verse.biart.model import BiART, loss_weights
from latent_verse.biart.sequence import (
    DIRECTIONS,
    IGNORE,
    IMAGE_TO_TEXT,
    MODALITIES,
    TEXT_TO_IMAGE,
    Sequences,
    target_modality,
)
from latent_verse.config import as_plain
from latent_verse.config.train import TrainBiARTConfig
from latent_verse.metrics.running import Mean
from latent_verse.nn.activation_checkpointing import checkpoint_activations
from latent_verse.training.logs import over_processes
from latent_verse.training.optimizer import make_optimizer, warm_up_then_cosine
from latent_verse.training.trainer import before_compiling, uncompiled, untuned


class LitBiART(pl.LightningModule):
    """Trains BiART on batches [images (B, C, H, W) in [-1, 1] or codes (B, N), text ids (B, L) filled with its pad].

    In validation a batch may be empty: a process may run out of pairs before the others.

    Args:
        vae: the frozen AugVAE, or anything with its `codes`, `decode_codes` and `to`. It is not part of this module:
            checkpoints do not hold it, and its precision stays, so that codes equal those extracted before.
        about: what checkpoints record beside the settings: AugVAE's path and fingerprint, the tokenizer; plain types.
    """

    unit = "tokens"  # what its speed is counted in

    def __init__(
        self, model: BiART, vae: nn.Module, config: TrainBiARTConfig, about: dict, compiled: bool | None = None
    ):
        super().__init__()
        self.model = model
        self.ema: BiART | None = copy.deepcopy(model).requires_grad_(False) if config.optim.ema_decay else None
        self.config = config
        self.compiled = bool(config.trainer.compile) if compiled is None else compiled  # see trainer.compiles
        self.about = about
        self._frozen = (vae.eval().requires_grad_(False),)  # a tuple, so that nn.Module does not register it
        c = config.loss
        self.weights = loss_weights(c.reference_weight, text=c.text_loss_weight, image=c.image_loss_weight)
        self.val_means = nn.ModuleDict({name: Mean() for name, weight in self.weights.items() if weight})
        self._configured = False

    @property
    def vae(self) -> nn.Module:
        """The frozen AugVAE."""
        return self._frozen[0]

    @property
    def network(self) -> BiART:
        """The weights to validate, sample from and export: the averaged ones if ema_decay keeps them."""
        return self.model if self.ema is None else self.ema

    def configure_model(self) -> None:
        """Apply the settings activation_checkpointing, compile and strategy: fsdp to the network."""
        if self._configured:  # Lightning calls this at each fit, validate and test
            return
        self._configured = True
        if self.config.trainer.activation_checkpointing:
            checkpoint_activations(self.model)
        if self.compiled:
            before_compiling()
            self.model.call_block = torch.compile(BiART.call_block, dynamic=False)  # not for each block
            if self.config.loss.loss_chunk is None:  # chunks need little memory anyway, and each would be compiled
                # compiled, logits stay in the head's precision: their float32 copy and its log-softmax are never stored
                # A graph for each modality and number of rows: 2 if the directions share a batch evenly, 8 at most (see
                # rows_text_to_image, which rounds either way), which is as many as Dynamo makes of a function.
                self.model.token_losses = torch.compile(BiART.token_losses, dynamic=False)
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            # about head_weight, whose result nothing writes to
            warnings.filterwarnings("ignore", ".*FSDP2-wrapped module .* returned a view tensor.*")
            mesh = self.device_mesh["data_parallel"]
            for network in (self.model, *([self.ema] if self.ema is not None else [])):
                for block in network.blocks:
                    fully_shard(block, mesh=mesh)
                fully_shard(network, mesh=mesh)
                for method in ("loss", "features", "prefill", "decode", "head_weight"):
                    register_fsdp_forward_method(network, method)

    def on_fit_start(self) -> None:
        """Move AugVAE to the device, and give each process its own random numbers for dropout."""
        self.vae.to(self.device)
        torch.manual_seed(self.config.trainer.seed + self.global_rank)

    def on_validation_start(self) -> None:
        """Move AugVAE to the device."""
        self.vae.to(self.device)

    def codes(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], or codes -> codes (B, N) int64. AugVAE always encodes in float32."""
        if not x.is_floating_point():
            return x.long()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.vae.codes(x.float(), validate=False)

    def pack(self, batch: list[Tensor], rows: int, **dropouts: float) -> Sequences:
        """A loader's batch -> sequences, the first `rows` of them text to image; `dropouts` go to Vocabulary.pack."""
        # ids and codes were checked where they were made; a check here would wait for the device
        return self.model.vocab.pack(batch[1], self.codes(batch[0]), rows, validate=False, **dropouts)

    def loss(
        self, model: BiART, sequences: Sequences, token_share: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of a batch, and the mean of each "direction/modality" in nats per token, detached."""
        return model.loss(sequences, self.weights, self.config.loss.loss_chunk, token_share)

    def token_share(self, sequences: Sequences) -> dict[str, Tensor] | None:
        """`token_share` of BiART.loss, or None if there is one process only.

        Without it, a word would count more in a process with few words: the gradients of all processes are averaged.
        """
        if self.trainer.world_size == 1:
            return None
        own = sequences.counted()
        average = own.clone()
        dist.all_reduce(average)  # Lightning's reduce would first wait for the other processes, and for the device
        share = own / average.div_(self.trainer.world_size).clamp(min=1e-9)  # 0 if no process counts any
        return {f"{d}/{m}": share[i, j] for i, d in enumerate(DIRECTIONS) for j, m in enumerate(MODALITIES)}

    def amount(self, batch: list[Tensor]) -> int:
        """The tokens that the network reads of a batch."""
        return len(batch[0]) * self.model.vocab.input_len

    def rows_text_to_image(self, batch_size: int, batch_idx: int) -> int:
        """The number of rows that are text to image: on average over batches exactly text_to_image_share."""
        share = self.config.loss.text_to_image_share * batch_size
        return math.floor((batch_idx + 1) * share + 1e-6) - math.floor(batch_idx * share + 1e-6)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch with both directions in it."""
        c = self.config.loss
        sequences = self.pack(
            batch,
            self.rows_text_to_image(len(batch[0]), batch_idx),
            reference_dropout=c.reference_dropout,
            word_dropout=c.word_dropout,
            code_dropout=c.code_dropout,
        )
        shares = self.token_share(sequences)
        total, means = self.loss(self.model, sequences, shares)
        if shares is not None:  # means over the tokens of all processes
            weighted = {name: shares[name] * value for name, value in means.items()}
            means = over_processes(self.trainer, {"total": total} | weighted)
        self.log("train/total_loss", means.pop("total", total).detach(), prog_bar=True)
        for name, value in means.items():
            direction, modality = name.split("/")
            self.log(f"train/{name}_loss", value, prog_bar=modality == target_modality(direction))
        return total

    def on_train_batch_end(self, outputs, batch, batch_idx: int) -> None:
        """At max_steps, even in the middle of an epoch, let Lightning validate before it stops."""
        if self.global_step == self.trainer.max_steps:
            self.trainer.should_stop = True

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Add every pair of a batch, in both directions, to the means."""
        size = len(batch[0])
        if size == 0:
            return
        with uncompiled(self.compiled), untuned(size != self.config.data.batch_size):
            x = self.codes(batch[0])
            sequences = self.pack([torch.cat([x, x]), torch.cat([batch[1], batch[1]])], size)
            _, means = self.loss(self.network, sequences)
        tokens = {m: (sequences.classes(m)[:size] != IGNORE).sum() for m in MODALITIES}  # the same in both directions
        for name, value in means.items():
            self.val_means[name].update(value, weight=tokens[name.split("/")[1]])

    def on_validation_epoch_end(self) -> None:
        """Log the means over all tokens of all processes, and the loss of text_to_image_share."""
        forth = self.config.loss.text_to_image_share
        shares = {TEXT_TO_IMAGE: forth, IMAGE_TO_TEXT: 1 - forth}
        total = 0.0
        for name, mean in self.val_means.items():
            value = mean.compute()
            total = total + shares[name.split("/")[0]] * self.weights[name] * value
            self.log(f"val/{name}_loss", value)
            mean.reset()
        self.log("val/total_loss", total, prog_bar=True)

    def configure_optimizers(self):
        """AdamW, or Muon for the blocks' matrices with AdamW for the rest; a warm-up, then a cosine over the run."""
        o = self.config.optim
        rates = (o.learning_rate, o.muon_learning_rate or o.learning_rate)
        optimizer = make_optimizer(self.model, o.optimizer, *rates, o.weight_decay, o.muon_momentum, o.betas)
        schedule = warm_up_then_cosine(
            optimizer, o.warmup_steps, lambda: self.trainer.estimated_stepping_batches, o.min_lr_ratio
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def optimizer_step(self, *args, **kwargs) -> None:
        """Step, then update the averaged weights; early in a run the average is over fewer steps."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            step = self.global_step
            decay = min(self.config.optim.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the file describe itself, in plain types."""
        about = {"kind": "biart", "model": as_plain(self.model.config), "run": as_plain(self.config)}
        checkpoint.setdefault("latent_verse", {}).update(about | self.about)
