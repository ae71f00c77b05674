"""Images and captions that training and evaluation log and write: reconstructions, and samples of BiART."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from latent_verse.biart import sampling
from latent_verse.biart.sequence import IMAGE_TO_TEXT, TEXT_TO_IMAGE
from latent_verse.config.train import SamplingConfig
from latent_verse.data.text import Tokenizer
from latent_verse.files import replacing, write_text
from latent_verse.training.backups import RunFolder, made_step, only_warned
from latent_verse.training.trainer import untuned


class ImageGrids(pl.Callback):
    """Log 8 inputs over their reconstructions, of a training batch every `every` steps and the first validation batch.

    The module's steps return {"x": (B, C, H, W) in [-1, 1], "xrec": the same}. The run folder gets the grids as well.
    """

    def __init__(self, folder: RunFolder, every: int):
        self.folder = folder
        self.every = every

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        if trainer.global_step % self.every == 0 and made_step(trainer, batch_idx):
            self._write(trainer, outputs, "train")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        if batch_idx == 0 and outputs is not None and not trainer.sanity_checking:
            self._write(trainer, outputs, "val")

    def _write(self, trainer: pl.Trainer, outputs: dict[str, Tensor], stage: str) -> None:
        if trainer.is_global_zero:
            rows_BCHW = [outputs[name][:8].float().cpu() for name in ("x", "xrec")]
            name = f"{stage}_step={trainer.global_step}"
            _write_grid(trainer, self.folder, name, f"{stage}/reconstructions", rows_BCHW)


class SavedImages(pl.Callback):
    """In a test: write each input and its reconstruction as PNG files of the same number, and a grid of such pairs.

    `folder` gets original_images/ and generated_images/ of `at_most` images in all, and grid.png of up to 32 pairs.
    """

    def __init__(self, folder: Path, at_most: int):
        self.folder = folder
        self.at_most = at_most
        self._pairs: list[Tensor] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)  # the first process has made it

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        if outputs is None:
            return
        first = batch_idx * pl_module.config.data.batch_size
        for j, pair in enumerate(zip(outputs["x"], outputs["xrec"], strict=True)):
            number = (first + j) * trainer.world_size + trainer.global_rank
            if number >= self.at_most:
                break
            pair_CHW = [image_CHW.float().cpu() for image_CHW in pair]
            for name, image_CHW in zip(("original_images", "generated_images"), pair_CHW, strict=True):
                write_png((image_CHW + 1) / 2, self.folder / name / f"{number:06d}.png")
            if trainer.is_global_zero and len(self._pairs) < 32:
                self._pairs.append(torch.cat(pair_CHW, dim=2))

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from torchvision.utils import make_grid

        if self._pairs:
            grid = make_grid(torch.stack(self._pairs), nrow=4, normalize=True, value_range=(-1, 1), pad_value=1)
            write_png(grid, self.folder / "grid.png")


class TextImageSamples(pl.Callback):
    """Generate an image for each of a few validation captions, and a caption for each of their images.

    After every `sample_every_n_epochs`-th validation, and with --log_images every image_log_steps steps. Images go to
    <run>/images as a grid (validation images above, generated ones below), captions to a text file beside it, both to
    the logger. On shapes, whose truth is known, the share of correct ones in each direction is logged too. The seed is
    fixed, so that samples change only with the model. The tokenizer is saved in the run folder. Logits that are not
    finite, or a file that cannot be written, cost the samples and not the run.
    """

    def __init__(self, folder: RunFolder, settings: SamplingConfig, tokenizer: Tokenizer):
        self.folder = folder
        self.settings = settings
        self.tokenizer = tokenizer
        self._examples = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:  # a run killed before its first checkpoint may have left another tokenizer
            with only_warned(), replacing(self.folder.run.folder / "tokenizer") as unfinished:
                self.tokenizer.save(unfinished)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        t = pl_module.config.trainer
        due = t.log_images and trainer.global_step % t.image_log_steps == 0 and made_step(trainer, batch_idx)
        if due and self._has_data(trainer):
            self._sample(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = (trainer.current_epoch + 1) % self.settings.sample_every_n_epochs == 0
        if due and not trainer.sanity_checking and self._has_data(trainer):
            for name, share in self._sample(trainer, pl_module).items():
                pl_module.log(f"val/{name}", share, batch_size=1)

    def _has_data(self, trainer: pl.Trainer) -> bool:
        """Whether there are examples to sample for; looked up once, and the same on every process."""
        if self._examples is None and trainer.datamodule.has_val:
            s, has_truth = self.settings, getattr(trainer.datamodule.datasets["val"], "world", None) is not None
            count = max(s.num_samples, s.num_judged if has_truth else 0)
            self._examples = trainer.datamodule.examples(count) if count else None
        return self._examples is not None and len(self._examples.captions) > 0

    @torch.no_grad()
    @untuned()
    def _sample(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Generate and write, on all processes alike (a sharded network needs them all). Returns the shares correct."""
        e, s, n, device = self._examples, self.settings, self.settings.num_samples, pl_module.device
        network = pl_module.network
        text_BL = e.text_BL.to(device)
        codes_BN = pl_module.codes(e.x.to(device))
        null_trained = pl_module.config.loss.reference_dropout > 0
        try:
            sampled_BN = sampling.generate(
                network, text_BL, TEXT_TO_IMAGE, seed=0, reference_dropout_trained=null_trained, **s.arguments()
            )
            sampled_BL = sampling.generate(network, codes_BN, IMAGE_TO_TEXT, temperature=0)
        except sampling.NotFinite as error:  # whether training has diverged too is for Divergence to find
            rank_zero_warn(f"no samples after step {trainer.global_step}: {error}")
            return {}
        finally:
            sampling.forget_decoders(network)  # training needs the memory, and samples seldom
        x_BCHW = pl_module.vae.decode_codes(sampled_BN).float().cpu()
        captions = self.tokenizer.decode_batch(network.vocab.unpad_text(sampled_BL))
        image_right, caption_right = self._are_right(x_BCHW, captions) if e.world else ([], [])
        if trainer.is_global_zero and n:
            originals = e.x[:n] if e.x.is_floating_point() else pl_module.vae.decode_codes(codes_BN[:n]).float().cpu()
            marks = [" (right)" if right else " (wrong)" for right in caption_right] or [""] * len(captions)
            lines = [
                f"{i}. caption: {given}\n   written: {text}{mark}"
                for i, (given, text, mark) in enumerate(zip(e.captions, captions, marks, strict=True))
            ]
            self._write(trainer, [originals, x_BCHW[:n]], lines[:n])
        shares = {"text_to_image/right": image_right, "image_to_text/right": caption_right}
        return {name: sum(right) / len(right) for name, right in shares.items() if right}

    def _are_right(self, x_BCHW: Tensor, captions: list[str]) -> tuple[list[bool], list[bool]]:
        """Which of the generated images show what their captions say, and which captions are true of their images."""
        world, e = self._examples.world, self._examples
        x_BHWC = ((x_BCHW + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        of_images = zip(map(world.parse_image, x_BHWC), map(world.parse_caption, e.captions), strict=True)
        of_captions = zip(e.scenes, map(world.parse_caption, captions), strict=True)
        return [world.satisfies(*pair) for pair in of_images], [world.satisfies(*pair) for pair in of_captions]

    def _write(self, trainer: pl.Trainer, rows_BCHW: list[Tensor], lines: list[str]) -> None:
        name = f"samples_step={trainer.global_step}"
        _write_grid(trainer, self.folder, name, "val/drawn", rows_BCHW)
        with only_warned():
            write_text(self.folder.run.images / f"{name}.txt", "\n".join(lines) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                logger.experiment.add_text("val/written", "\n\n".join(lines), trainer.global_step)
            elif isinstance(logger, pl.loggers.WandbLogger):
                logger.log_text("val/written", columns=["sample"], data=[[line] for line in lines])


def _write_grid(trainer: pl.Trainer, folder: RunFolder, name: str, tag: str, rows_BCHW: list[Tensor]) -> None:
    """Write rows of as many images each, in [-1, 1], as <run>/images/<name>.png, and give them to the loggers."""
    from torchvision.utils import make_grid

    grid_CHW = make_grid(torch.cat(rows_BCHW), nrow=len(rows_BCHW[0]), normalize=True, value_range=(-1, 1))
    with only_warned():
        write_png(grid_CHW, folder.run.images / f"{name}.png")
    for logger in trainer.loggers:
        if isinstance(logger, pl.loggers.TensorBoardLogger):
            logger.experiment.add_image(tag, grid_CHW, trainer.global_step)
        elif isinstance(logger, pl.loggers.WandbLogger):
            logger.log_image(tag, [grid_CHW], caption=[f"step {trainer.global_step}"])


def write_png(image_CHW: Tensor, path: Path) -> None:
    """Write an image of values in [0, 1], whole or not at all."""
    from torchvision.utils import save_image

    with replacing(path, durable=False) as unfinished, unfinished.open("wb") as file:
        save_image(image_CHW, file, format="png")
