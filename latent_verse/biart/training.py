"""LitBiART: BiART under Lightning. Steps, logging and the optimiser; the maths is the model's.

Shapes: B batch, L text tokens, N image codes, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import math
import time
import warnings

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from latent_verse.biart.model import BiART
from latent_verse.biart.sequence import DIRECTIONS, IGNORE, TEXT_TO_IMAGE, Sequences, target_modality
from latent_verse.config import as_plain
from latent_verse.config_biart import TrainBiARTConfig
from latent_verse.metrics.running import Mean
from latent_verse.optimizer import MuonAdamW, adamw, warm_up_then_cosine
from latent_verse.recompute import checkpoint_activations
from latent_verse.trainer import uncompiled

OTHER = {"text": "image", "image": "text"}
NO_TOKEN = -1  # fills captions in batches from the loader, which does not know BiART's vocabulary


class LitBiART(pl.LightningModule):
    """Trains BiART on batches [pictures (B, C, H, W) in [-1, 1] or codes (B, N), ids (B, L) filled with NO_TOKEN].

    A batch may be empty in validation, where a process has run out of pairs before the others.

    Args:
        vae: the frozen AugVAE, or whatever has its `codes`, `decode_codes` and `to`. It is no part of the module:
            checkpoints do not hold it, and it keeps its own precision, so that codes are those of extraction.
        about: what else a checkpoint has to say of the run (AugVAE's path and fingerprint, the tokenizer); plain types.
    """

    def __init__(self, model: BiART, vae, config: TrainBiARTConfig, about: dict):
        super().__init__()
        self.model = model
        self.ema: BiART | None = copy.deepcopy(model).requires_grad_(False) if config.optim.ema_decay else None
        self.config = config
        self.about = about
        self._frozen = (vae.eval().requires_grad_(False),)  # in a tuple, where nn.Module does not look for modules
        names = [f"{d}/{m}" for d in DIRECTIONS for m in ("text", "image") if self._weight(d, m)]
        self.val_means = nn.ModuleDict({name: Mean() for name in names})
        self._configured = False
        self._tokens, self._since = 0, 0.0

    @property
    def vae(self):
        """The frozen AugVAE."""
        return self._frozen[0]

    @property
    def network(self) -> BiART:
        """The weights to validate, draw with and export: the averaged ones where there are any."""
        return self.model if self.ema is None else self.ema

    def _weight(self, direction: str, modality: str) -> float:
        """What the loss of a modality counts in a direction, that direction's share of the batch apart."""
        c = self.config.loss
        own = c.text_loss_weight if modality == "text" else c.image_loss_weight
        return own * (1.0 if modality == target_modality(direction) else c.reference_weight)

    # ----------------------------------------------------------------------------------------------------- preparation

    def configure_model(self) -> None:
        """Shard the blocks under --strategy fsdp, compile them under --compile, have them hold less if asked to."""
        if self._configured:  # Lightning calls this once a fit, validate or test
            return
        self._configured = True
        networks = [n for n in (self.model, self.ema) if n is not None]
        if self.config.trainer.activation_checkpointing:
            checkpoint_activations(self.model)
        if self.config.trainer.compile:
            for block in self.model.blocks:
                block.compile(dynamic=False)  # the blocks share what is compiled
            if self.config.loss.loss_chunk is None:  # chunks hold no logits as it is, and would all be compiled apart
                # logits stay in the heads' precision: neither their float32 copy nor its log-softmax is ever held
                self.model.token_losses = torch.compile(BiART.token_losses)
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            # of head_weight, which nothing writes to
            warnings.filterwarnings("ignore", ".*FSDP2-wrapped module .* returned a view tensor.*")
            mesh = self.device_mesh["data_parallel"]
            for network in networks:
                for block in network.blocks:
                    fully_shard(block, mesh=mesh)
                fully_shard(network, mesh=mesh)
                for method in ("loss", "features", "prefill", "decode", "head_weight"):
                    register_fsdp_forward_method(network, method)

    def on_fit_start(self) -> None:
        """Bring AugVAE to the device, and give each process random numbers of its own for dropout."""
        self.vae.to(self.device)
        torch.manual_seed(self.config.trainer.seed + self.global_rank)

    def on_validation_start(self) -> None:
        """Bring AugVAE to the device."""
        self.vae.to(self.device)

    def on_train_start(self) -> None:
        """Start the clock of tokens_per_second."""
        self._tokens, self._since = 0, time.perf_counter()

    # ----------------------------------------------------------------------------------------------------------- steps

    def codes(self, x: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1], or codes already -> codes (B, N) int64. Float32 under any precision."""
        if not x.is_floating_point():
            return x.long()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.vae.codes(x.float())

    def pack(self, batch: list[Tensor], rows: int, **dropouts: float) -> Sequences:
        """A loader's batch -> sequences, the first `rows` of them text to image; `dropouts` as Vocabulary.pack's."""
        vocab = self.model.vocab
        text_BL = batch[1].masked_fill(batch[1] == NO_TOKEN, vocab.pad)
        # captions and codes were checked where they were made; a check here would wait for the device
        return vocab.pack(text_BL, self.codes(batch[0]), rows, validate=False, **dropouts)

    def loss(
        self, model: BiART, sequences: Sequences, token_share: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of a batch, and the mean of each "direction/modality" in nats per token, detached."""
        c = self.config.loss
        if c.text_loss_weight == c.image_loss_weight:
            total, means = model.loss(sequences, c.reference_weight, c.loss_chunk, token_share)
            return c.image_loss_weight * total, means
        total, means = 0.0, {}
        tensors = (sequences.idx_BT, sequences.seg_BT, sequences.text_BL, sequences.codes_BN)
        for direction, rows in sequences.parts():  # BiART.loss weighs a reference against its target: one at a time
            count = rows.stop - rows.start
            part = Sequences(*(t[rows] for t in tensors), count if direction == TEXT_TO_IMAGE else 0)
            target = target_modality(direction)
            own, other = self._weight(direction, target), self._weight(direction, OTHER[target])
            value, parts = model.loss(part, other / own, c.loss_chunk, token_share)
            total = total + count / len(sequences.idx_BT) * own * value
            means |= parts
        return total, means

    def token_share(self, sequences: Sequences) -> dict[str, Tensor] | None:
        """This process's share of the tokens of all, times their number: BiART.loss's; None where there is but one.

        The gradients of all processes are averaged. Captions differ in length, so that without this a word in a
        process with few words would count more than one in another.
        """
        if self.trainer.world_size == 1:
            return None
        own = sequences.counted()
        average = self.trainer.strategy.reduce(own.clone(), reduce_op="mean")
        share = own / average.clamp(min=1e-9)  # nothing counted anywhere: 0
        return {f"{d}/{m}": share[i, j] for i, d in enumerate(DIRECTIONS) for j, m in enumerate(("text", "image"))}

    def rows_text_to_image(self, batch_size: int, batch_idx: int) -> int:
        """How many of a batch go text to image: the configured share, to the row, on average over batches."""
        share = self.config.loss.text_to_image_share * batch_size
        return math.floor((batch_idx + 1) * share + 1e-6) - math.floor(batch_idx * share + 1e-6)

    def training_step(self, batch, batch_idx: int) -> Tensor:
        """The loss of one batch, both directions in it."""
        rows = self.rows_text_to_image(len(batch[0]), batch_idx)
        c = self.config.loss
        names = ("reference_dropout", "word_dropout", "code_dropout")
        sequences = self.pack(batch, rows, **{name: getattr(c, name) for name in names})
        total, means = self.loss(self.model, sequences, self.token_share(sequences))
        self.log("train/total_loss", total.detach(), prog_bar=True)
        for name, value in means.items():
            direction, modality = name.split("/")
            self.log(f"train/{name}_loss", value, prog_bar=modality == target_modality(direction))
        self._tokens += sequences.idx_BT.numel() * self.trainer.world_size
        if (self.global_step + 1) % self.config.trainer.log_every_n_steps == 0:
            now = time.perf_counter()
            self.log("train/tokens_per_second", self._tokens / (now - self._since))
            self._tokens, self._since = 0, now
        return total

    def on_train_batch_end(self, outputs, batch, batch_idx: int) -> None:
        """At max_steps, also in the middle of an epoch, ask Lightning to validate before it stops."""
        if self.global_step == self.trainer.max_steps:
            self.trainer.should_stop = True

    def validation_step(self, batch, batch_idx: int) -> None:
        """Add a batch, every pair of it in both directions, to the means; an empty one adds nothing."""
        if len(batch[0]) == 0:
            return
        size = len(batch[0])
        x = self.codes(batch[0])
        sequences = self.pack([torch.cat([x, x]), torch.cat([batch[1], batch[1]])], size)
        with uncompiled(self.config.trainer):
            _, means = self.loss(self.network, sequences)
        counted = {"text": sequences.text_BL, "image": sequences.codes_BN}
        for name, value in means.items():
            tokens = (counted[name.split("/")[1]][:size] != IGNORE).sum()  # the same in both directions
            self.val_means[name].update(value, weight=tokens)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all tokens of all processes, and the loss that they make."""
        share = {d: self.config.loss.text_to_image_share for d in DIRECTIONS}
        share = {d: s if d == TEXT_TO_IMAGE else 1 - s for d, s in share.items()}
        total = 0.0
        for name, mean in self.val_means.items():
            direction, modality = name.split("/")
            value = mean.compute()
            total = total + share[direction] * self._weight(direction, modality) * value
            self.log(f"val/{name}_loss", value)
            mean.reset()
        self.log("val/total_loss", total, prog_bar=True)

    # ------------------------------------------------------------------------------------------------------- optimiser

    def configure_optimizers(self):
        """AdamW, or Muon for the blocks' matrices and AdamW for the rest; warm-up, then a cosine over the whole run."""
        o = self.config.optim
        groups = self.model.parameter_groups(o.weight_decay)
        if o.optimizer == "adamw":
            optimizer = adamw(groups, lr=o.learning_rate, betas=o.betas)
        else:
            matrices = [p for p in self.model.blocks.parameters() if p.ndim == 2]
            ids = {id(p) for p in matrices}
            rest = [{**g, "params": [p for p in g["params"] if id(p) not in ids]} for g in groups]
            muon_rate = o.muon_learning_rate or o.learning_rate
            optimizer = MuonAdamW(matrices, rest, o.learning_rate, muon_rate, o.weight_decay, o.muon_momentum, o.betas)

        schedule = warm_up_then_cosine(
            optimizer, o.warmup_steps, lambda: self.trainer.estimated_stepping_batches, o.min_lr_ratio
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def optimizer_step(self, *args, **kwargs) -> None:
        """Step, then move the averaged weights; early in a run they average over fewer steps."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            step = self.global_step
            decay = min(self.config.optim.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Make the file describe itself, with plain types only."""
        checkpoint["latent_verse"] = {
            "kind": "biart",
            "model": as_plain(self.model.config),
            "run": as_plain(self.config),
            **self.about,
        }

    def process_state(self) -> dict:
        """Nothing but random numbers differs between processes, and callbacks.ProcessState keeps those."""
        return {}

    def load_process_state(self, state: dict) -> None:
        """Undo `process_state`."""
