"""AugVAE under Lightning, trained or evaluated: steps, logging and the optimiser; the mathematics is in the model.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import nn

from latent_verse.augvae.losses import LOSSES, ReconstructionLoss, fetch_vgg16
from latent_verse.augvae.model import AugVAE, Encoded
from latent_verse.augvae.quantizer import count, perplexity, world_size
from latent_verse.checkpoints.ckpt_files import CheckpointError
from latent_verse.config import as_plain
from latent_verse.config.train import EvalVAEConfig, TrainVAEConfig
from latent_verse.metrics.codebook_usage import CodebookUsage
from latent_verse.metrics.reconstruction import ReconstructionMetrics
from latent_verse.metrics.running import Mean
from latent_verse.nn.activation_checkpointing import checkpoint_activations
from latent_verse.training.logs import is_logged, over_processes
from latent_verse.training.optimizer import make_optimizer, warm_up_then_cosine
from latent_verse.training.trainer import before_compiling, uncompiled, untuned


class LitAugVAE(pl.LightningModule):
    """Trains an AugVAE (-ML or -SL) on batches (images (B, C, H, W) in [-1, 1], ...).

    In validation a batch may be empty: its process has run out of images before the others.
    """

    trains = True
    unit = "images"  # what its speed is counted in

    def __init__(self, model: AugVAE, config: TrainVAEConfig, compiled: bool | None = None):
        super().__init__()
        self.model = model
        self.config = config
        self.loss_type = LOSSES[config.loss.loss_type]
        self.loss: ReconstructionLoss | None = None  # made in configure_model, in training only
        self.compiled = bool(config.trainer.compile) if compiled is None else compiled  # see trainer.compiles
        self._configured = False
        names = ["total_loss", *self.loss_type.terms, "embed_loss", "perplexity"]
        self.val_means = nn.ModuleDict({name: Mean() for name in names})
        self.usage = nn.ModuleDict(
            {stage: CodebookUsage(model.levels, model.config.num_tokens) for stage in ("train_usage", "val_usage")}
        )
        # sum and number of this epoch's training losses; saved, so that a resumed epoch has the same mean
        self.epoch_loss = torch.zeros(2, dtype=torch.float64)
        # We step it: Lightning would do so after the epoch's checkpoint is written, and a resumed run would miss it.
        self.plateau: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None
        self.plateau_state: dict | None = None

    def prepare_data(self) -> None:
        """Fetch LPIPS' backbone if the loss uses LPIPS, in one process per node. Raises as `fetch_vgg16`."""
        if self.trains and self.loss_type.uses_lpips and not self.config.data.fake_data:
            fetch_vgg16()

    def configure_model(self) -> None:
        """Shard the networks (--strategy fsdp), compile them (--compile), checkpoint their activations."""
        if self._configured:  # Lightning calls this once per fit, validate or test
            return
        self._configured = True
        c = self.config
        if self.trains:
            self.loss = self.loss_type(c.loss, untrained=c.data.fake_data)
        networks = [*self.model.encoders, *self.model.decoders]
        if c.trainer.activation_checkpointing:
            checkpoint_activations(self.model)
        if self.compiled:
            before_compiling()
            for network in networks:
                network.compile(dynamic=False)  # each network has one input size; dynamic sizes are slower
            if self.loss is not None:
                self.loss.compile()
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            for network in networks:
                fully_shard(network, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])
            for method in ("encode", "decode", "initialise_codebook"):  # called instead of forward
                register_fsdp_forward_method(self.model, method)
        else:  # fully_shard accepts contiguous weights only
            self.model.to(memory_format=self._memory_format)

    def on_fit_start(self) -> None:
        """Move the loss to the device: it is not a module, so Lightning does not."""
        self.loss.to(self.device)

    on_validation_start = on_fit_start

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        """Start the codebook from the first batch if codebook_init is data."""
        first = self.global_step == 0 and batch_idx == 0
        if first and self.config.optim.codebook_init == "data" and self.model.quantizer.is_fresh:
            with uncompiled(self.compiled), untuned():  # without gradients and autocast: graphs for this batch alone
                self.model.initialise_codebook(batch[0].to(self.model.dtype))

    @property
    def _memory_format(self) -> torch.memory_format:
        """Channels last, but contiguous for training on a CPU: GroupNorm's backward pass is seven times as fast."""
        device = self._trainer.strategy.root_device if self._trainer else self.device
        return torch.contiguous_format if self.trains and device.type == "cpu" else torch.channels_last

    def reconstruct(self, x_BCHW: torch.Tensor) -> tuple[Encoded, torch.Tensor]:
        """Images in [-1, 1] -> what `AugVAE.encode` gives, and the reconstruction, of the weights' type and format."""
        # the images' type differs from the weights' under --precision bf16-true and 64
        x_BCHW = x_BCHW.to(self.model.dtype).contiguous(memory_format=self._memory_format)
        encoded = self.model.encode(x_BCHW)
        return encoded, self.model.decode(encoded.z_q)

    def _nothing_in(self, x_BCHW: torch.Tensor) -> bool:
        """Whether a batch is empty. A sharded model must run all the same: its gathers wait for every process."""
        if len(x_BCHW) == 0 and self.device_mesh is not None:
            self.reconstruct(x_BCHW.new_zeros(1, *x_BCHW.shape[1:]))
        return len(x_BCHW) == 0

    def amount(self, batch: list[torch.Tensor]) -> int:
        """The images of a batch."""
        return len(batch[0])

    def _losses(
        self, x_BCHW: torch.Tensor, stage: str
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[torch.Tensor]]:
        """({name: value ()} of all that is logged, the reconstruction, the codes of each level)."""
        encoded, reconstruction_BCHW = self.reconstruct(x_BCHW)
        parts = self.loss(reconstruction_BCHW, x_BCHW)
        total = sum(parts.values()) + self.config.loss.codebook_weight * encoded.embed_loss
        self.usage[f"{stage}_usage"].update(encoded.indices)
        parts |= {"total_loss": total, "embed_loss": encoded.embed_loss, "perplexity": encoded.perplexity}
        return parts, reconstruction_BCHW, encoded.indices

    def training_step(self, batch, batch_idx: int):
        """One step; returns the loss and, if images are logged, input and reconstruction."""
        parts, reconstruction_BCHW, indices = self._losses(batch[0], "train")
        for name, value in self._over_processes(parts, indices).items():
            self.log(f"train/{name}", value, prog_bar=name in ("total_loss", "rec_loss", "perplexity"))
        total = parts["total_loss"]
        self.epoch_loss = self.epoch_loss.to(total.device)
        self.epoch_loss += torch.stack([total.detach().double(), self.epoch_loss.new_ones(())])
        out = {"loss": total}
        if self.config.trainer.log_images:
            out |= {"x": batch[0].detach(), "xrec": reconstruction_BCHW.detach()}
        return out

    def _over_processes(self, parts: dict[str, torch.Tensor], indices: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is logged of a step: means over processes, but one perplexity of all their codes."""
        if world_size() == 1 or not is_logged(self.trainer):
            return parts
        counts_K = count(torch.cat([level.flatten() for level in indices]), self.model.config.num_tokens)
        found = over_processes(self.trainer, parts, {"counts": counts_K})
        return found | {"perplexity": perplexity(found.pop("counts")).to(parts["perplexity"])}

    def on_train_batch_end(self, outputs, batch, batch_idx: int) -> None:
        """At max_steps, even in the middle of an epoch, let Lightning validate before it stops."""
        if self.global_step == self.trainer.max_steps:
            self.trainer.should_stop = True

    def validation_step(self, batch, batch_idx: int):
        """Add a batch to the means; an empty one adds nothing."""
        x_BCHW = batch[0]
        if self._nothing_in(x_BCHW):
            return None
        with uncompiled(self.compiled), untuned(len(x_BCHW) != self.config.data.batch_size):
            parts, reconstruction_BCHW, _ = self._losses(x_BCHW, "val")
        for name, mean in self.val_means.items():
            mean.update(parts[name], weight=len(x_BCHW))
        return {"x": x_BCHW, "xrec": reconstruction_BCHW} if self.config.trainer.log_images else None

    def on_train_epoch_end(self) -> None:
        """Log the usage of the codebook, and the epoch's mean loss over all processes, which lr_decay watches."""
        sums = self.trainer.strategy.reduce(self.epoch_loss.clone(), reduce_op="sum")
        mean = (sums[0] / sums[1].clamp(min=1)).float()
        self.log("train/total_loss_epoch", mean)
        if self.trainer.datamodule is not None:
            skipped = torch.tensor(float(self.trainer.datamodule.skipped), device=self.device)
            self.log("train/skipped_files", self.trainer.strategy.reduce(skipped, reduce_op="sum"))
        if self.plateau is not None:
            self.plateau.step(mean.item())
        self.epoch_loss.zero_()
        self._log_usage("train")

    def on_validation_epoch_end(self) -> None:
        """Log the means over all images and processes."""
        for name, mean in self.val_means.items():
            self.log(f"val/{name}", mean.compute(), prog_bar=name == "total_loss")
            mean.reset()
        self._log_usage("val")

    def _log_usage(self, stage: str) -> None:
        usage = self.usage[f"{stage}_usage"]
        self.log_dict({f"{stage}/{name}": value for name, value in usage.compute().items()})
        usage.reset()

    def configure_optimizers(self):
        """AdamW or Muon. As in the original, the rate is learning_rate x processes over all nodes x batch_size."""
        o = self.config.optim
        rate = o.learning_rate * max(1, self.trainer.world_size) * self.config.data.batch_size
        optimizer = make_optimizer(self.model, o.optimizer, rate, rate, o.weight_decay, betas=o.betas)
        if o.lr_decay:
            self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, mode="min", factor=0.5, patience=10, cooldown=10, min_lr=min(1e-6, rate)
            )
            if self.plateau_state:
                self.plateau.load_state_dict(self.plateau_state)
        if o.lr_cosine:
            schedule = warm_up_then_cosine(optimizer, o.warmup_steps, lambda: self.trainer.estimated_stepping_batches)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Let the file describe itself, in plain types only."""
        about = {"kind": "augvae", "model": as_plain(self.model.config), "run": as_plain(self.config)}
        plateau = None if self.plateau is None else self.plateau.state_dict()
        checkpoint.setdefault("latent_verse", {}).update(about, plateau=plateau)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Keep the state of lr_decay's schedule until the optimiser exists."""
        self.plateau_state = checkpoint["latent_verse"].get("plateau")
        if self.plateau is not None and self.plateau_state:  # sharded strategies restore after making the optimiser
            self.plateau.load_state_dict(self.plateau_state)

    def process_state(self) -> dict:
        """What differs between processes and is not in the state dict; backups.ProcessState saves it."""
        return {"epoch_loss": self.epoch_loss.cpu(), "train_counts": self.usage["train_usage"].counts_LK.cpu()}

    def load_process_state(self, state: dict) -> None:
        """Restore what `process_state` returned."""
        self.epoch_loss = state["epoch_loss"].to(self.device)
        usage = self.usage["train_usage"]
        usage.reset()
        usage.update([usage.counts_LK.new_empty(0)] * len(self.model.levels))  # torchmetrics warns of one without any
        usage.counts_LK += state["train_counts"].to(usage.counts_LK.device)


class LitAugVAEEvaluation(LitAugVAE):
    """Evaluates an AugVAE on such batches; after `Trainer.test`, `results` holds what `ReconstructionMetrics` says."""

    trains = False

    def __init__(self, model: AugVAE, config: EvalVAEConfig):
        super().__init__(model, config)
        c = model.config
        networks = not config.data.fake_data
        self.metrics = ReconstructionMetrics(model.levels, c.num_tokens, c.resolution, with_networks=networks)
        self.not_finite = Mean()  # the share of reconstructions
        self.limit = config.eval.eval_images
        self.results: dict = {}

    def test_step(self, batch, batch_idx: int):
        """Add a batch to the metrics; returns input and reconstruction, to be written to disk."""
        x_BCHW = batch[0]
        t = self.trainer
        if self.limit is not None:  # image j of the batch is number (batch * size + j) * processes + rank
            first = batch_idx * self.config.data.batch_size
            x_BCHW = x_BCHW[: max(0, -(-(self.limit - t.global_rank) // t.world_size) - first)]
        if self._nothing_in(x_BCHW):
            return None
        encoded, reconstruction_BCHW = self.reconstruct(x_BCHW)
        self.not_finite.update((~reconstruction_BCHW.isfinite().flatten(1).all(1)).float())
        self.metrics.update(x_BCHW, reconstruction_BCHW, encoded.indices)
        return {"x": x_BCHW, "xrec": reconstruction_BCHW.float().clamp(-1, 1)}

    def on_test_epoch_end(self) -> None:
        """Compute the metrics while they are on the device: after the test, Lightning moves them to the CPU.

        Raises:
            CheckpointError: reconstructions are not finite, so that no metric would mean anything.
        """
        share = float(self.not_finite.compute())
        if share > 0:
            t = self.config.trainer
            raise CheckpointError(
                f"{share:.2%} of the reconstructions of {t.ckpt_path} are not finite: its weights are damaged, or "
                f"overflow in precision {t.precision}. Try --precision 32, or another checkpoint."
            )
        self.results = self.metrics.compute()
