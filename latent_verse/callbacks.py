"""Lightning callbacks: run folder, backups and interruption, per-process state, progress bar, grids of pictures."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from latent_verse import runs
from latent_verse.config import UserError
from latent_verse.runs import Run


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved; the message says where."""


class RunFolder(pl.Callback):
    """Make the run folder, once all processes have met, and tell them all its id."""

    def __init__(self, run: Run, config: dict, yaml_text: str):
        self.run = run
        self.config = config
        self.yaml_text = yaml_text

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.run = dataclasses.replace(self.run, id=trainer.strategy.broadcast(self.run.id))  # rank 0's draw
        if trainer.is_global_zero:
            runs.start(self.run, self.config, self.yaml_text)


class Backup(pl.Callback):
    """Save the whole state every `every` steps, and when the run is told to stop.

    A backup appears under its name only once it is whole; the two newest are kept. SIGTERM and Ctrl-C end
    the step at hand, save, and raise Interrupted; a second Ctrl-C stops at once.

    At the last batch of an epoch nothing is saved: validation and what the epoch adds up are still to come, and a
    resume would miss them. The run's `last` checkpoint is written a moment later, when the epoch is whole.

    Args:
        every: steps between backups; None saves only when told to stop.
    """

    def __init__(self, folder: RunFolder, every: int | None):
        self.folder = folder
        self.every = every
        self.told_to_stop = False
        self._handlers: dict[int, object] = {}
        self._pid = os.getpid()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.told_to_stop |= trainer.received_sigterm
        # Several processes would tell each other of a SIGTERM before every step, and wait for their GPUs to do so
        # (Lightning 2.6). Here they ask each other less often: see on_train_batch_end.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._stop)

    def _stop(self, number: int, frame) -> None:
        if self.told_to_stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.told_to_stop = True
        if os.getpid() != self._pid:  # a loader process, which has inherited this handler
            return
        rank_zero_info(f"{signal.Signals(number).name}: saving after this step (Ctrl-C again stops at once)")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        stop = self.told_to_stop
        if trainer.world_size > 1:  # all processes must leave after the same step; asking costs, so not at every one
            ask = trainer.global_step % trainer.log_every_n_steps == 0
            stop = ask and trainer.strategy.reduce_boolean_decision(stop, all=False)
        if not stepped or trainer.is_last_batch:
            return
        if stop:
            raise Interrupted(f"stopped at step {trainer.global_step}; saved {self.save(trainer)}")
        if self.every and trainer.global_step % self.every == 0:
            self.save(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stop = self.told_to_stop
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            saved = runs.states(self.folder.run)
            found = f"saved {saved[0]}" if saved else "there was nothing to save yet"
            raise Interrupted(f"stopped at step {trainer.global_step}; {found}")

    def save(self, trainer: pl.Trainer) -> Path:
        """Write a backup; called by all processes together. Returns its path."""
        place = self.folder.run.backups()
        file = place / f"step={trainer.global_step}.ckpt"
        unfinished = place / f".{file.name}.tmp"
        if trainer.is_global_zero:
            place.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(unfinished, weights_only=False)  # with the optimiser, for an exact resume
        if trainer.is_global_zero:
            runs.flush(unfinished)
            os.replace(unfinished, file)
            for old in sorted(place.glob("step=*.ckpt"), key=runs.step_of)[:-2]:  # two, lest a disk damages the newest
                old.unlink()
            for leftover in place.glob(".step=*.tmp"):  # of a process killed while it saved
                leftover.unlink()
        trainer.strategy.barrier()
        return file

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()


class ProcessState(pl.Callback):
    """Save and restore what differs between processes: random number generators, and the module's `process_state`.

    Lightning saves rank 0's view only. Without this a resumed run would draw other dropout masks and code restarts.
    """

    def __init__(self):
        self.loaded: list[dict] | None = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        state = {"rng": random_state(), "module": pl_module.process_state()}
        states = [state]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            dist.all_gather_object(states, state)
        checkpoint["process_states"] = states

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        self.loaded = checkpoint.get("process_states")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.loaded is None:
            return
        if len(self.loaded) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint was saved by {len(self.loaded)} processes and is continued by {trainer.world_size}: "
                "weights and step are the same, data order and random numbers are not."
            )
        else:
            state = self.loaded[trainer.global_rank]
            set_random_state(state["rng"])
            pl_module.load_process_state(state["module"])
        self.loaded = None


def random_state() -> dict:
    """States of the generators of Python, NumPy, torch and every visible GPU, as plain types and tensors."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Undo `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, drawn no more than five times a second in training.

    Its figures are on the device, and reading one waits until the device has done all that it was given: after every
    step a GPU would stand idle until the next one is prepared. The last step of an epoch is always shown.
    """

    EVERY = 0.2  # seconds

    def __init__(self, refresh_rate: int):
        super().__init__(refresh_rate=refresh_rate)
        self._drawn = float("-inf")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        now, last = time.monotonic(), trainer.is_last_batch or trainer.global_step == trainer.max_steps
        due = (batch_idx + 1) % self.refresh_rate == 0 and now - self._drawn >= self.EVERY
        if last or due:
            self._drawn = now
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


class ImageGrids(pl.Callback):
    """Log input over reconstruction, values fixed to [-1, 1], and write it as PNG to the run folder.

    Of the training batch every `every` steps, and of the first validation batch. The steps of the module return
    {"x": (B, C, H, W), "xrec": the same}.
    """

    def __init__(self, folder: RunFolder, every: int, at_most: int = 8):
        self.folder = folder
        self.every = every
        self.at_most = at_most

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step:
            self._write(trainer, outputs, "train")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        if batch_idx == 0 and outputs is not None and not trainer.sanity_checking:
            self._write(trainer, outputs, "val")

    def _write(self, trainer: pl.Trainer, outputs: dict, stage: str) -> None:
        if not trainer.is_global_zero or "x" not in outputs:
            return
        from torchvision.utils import make_grid, save_image

        n = min(len(outputs["x"]), self.at_most)
        rows = torch.cat([outputs["x"][:n], outputs["xrec"][:n]]).float().cpu()
        grid = make_grid(rows, nrow=n, normalize=True, value_range=(-1, 1))
        place = self.folder.run.images
        place.mkdir(parents=True, exist_ok=True)
        save_image(grid, place / f"{stage}_step={trainer.global_step}.png")
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                logger.experiment.add_image(f"{stage}/reconstructions", grid, trainer.global_step)
            elif isinstance(logger, pl.loggers.WandbLogger):
                logger.log_image(f"{stage}/reconstructions", [grid], caption=[f"step {trainer.global_step}"])


class SavedPictures(pl.Callback):
    """In a test: write input and reconstruction as PNG files of the same number, and a grid of pairs.

    Args:
        folder: gets original_images/, generated_images/ and grid.png.
        at_most: pictures to write, over all processes.
    """

    def __init__(self, folder: Path, at_most: int, in_grid: int = 32):
        self.folder = folder
        self.at_most = at_most
        self.in_grid = in_grid
        self._pairs: list[torch.Tensor] = []

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        from torchvision.utils import save_image

        if outputs is None:
            return
        first = batch_idx * pl_module.config.data.batch_size
        for j, pair in enumerate(zip(outputs["x"], outputs["xrec"], strict=True)):
            number = (first + j) * trainer.world_size + trainer.global_rank
            if number >= self.at_most:
                break
            pair_CHW = [image_CHW.float().cpu() for image_CHW in pair]
            for name, image_CHW in zip(("original_images", "generated_images"), pair_CHW, strict=True):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
                save_image((image_CHW + 1) / 2, self.folder / name / f"{number:06d}.png")
            if trainer.is_global_zero and len(self._pairs) < self.in_grid:
                self._pairs.append(torch.cat(pair_CHW, dim=2))

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from torchvision.utils import make_grid, save_image

        if self._pairs:
            grid = make_grid(torch.stack(self._pairs), nrow=4, normalize=True, value_range=(-1, 1), pad_value=1)
            save_image(grid, self.folder / "grid.png")


class Diverged(UserError):
    """The network that trains has no finite outputs any more."""


class TextImageSamples(pl.Callback):
    """Draw a picture for each of a few validation captions, and write a caption for each of their pictures.

    After every `sample_every_n_epochs`-th validation, and with --log_images every image_log_steps steps. Pictures go
    to <run>/images as a grid (the validation pictures above, what was drawn below), captions to a text file beside
    it, both to the logger. On shapes, whose truth is known, the share that is right in each direction is logged too.
    Seeds are fixed, so what changes from one time to the next is the model. The tokenizer is saved in the run folder.

    Args:
        sampling: `config_biart.SamplingConfig`.
        tokenizer: reads ids back into text.
    """

    def __init__(self, folder: RunFolder, sampling, tokenizer):
        self.folder = folder
        self.sampling = sampling
        self.tokenizer = tokenizer
        self._examples = None
        self._last_step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            place = self.folder.run.folder / "tokenizer"
            unfinished = place.with_name(".tokenizer.tmp")
            for leftover in (unfinished, place):  # that of a run killed before its first checkpoint may be another
                shutil.rmtree(leftover, ignore_errors=True)
            self.tokenizer.save(unfinished)
            os.replace(unfinished, place)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs, batch, batch_idx) -> None:
        t, step = pl_module.config.trainer, trainer.global_step
        if t.log_images and step % t.image_log_steps == 0 and step != self._last_step and self._has_data(trainer):
            self._last_step = step
            self._sample(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = (trainer.current_epoch + 1) % self.sampling.sample_every_n_epochs == 0
        if due and not trainer.sanity_checking and self._has_data(trainer):
            for name, share in self._sample(trainer, pl_module).items():
                pl_module.log(f"val/{name}", share, batch_size=1)

    def _has_data(self, trainer: pl.Trainer) -> bool:
        """Whether there is anything to draw for; looked up once, and the same on every process."""
        if self._examples is None and trainer.datamodule.has_val:
            count = max(self.sampling.num_samples, self.sampling.num_judged if self._judges(trainer) else 0)
            self._examples = trainer.datamodule.examples(count) if count else None
        return self._examples is not None and len(self._examples.captions) > 0

    def _judges(self, trainer: pl.Trainer) -> bool:
        return getattr(trainer.datamodule.dataset("val"), "world", None) is not None

    @torch.no_grad()
    def _sample(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Draw and write, on all processes alike (a sharded network needs them all). Returns the shares right."""
        from latent_verse.biart.sampling import NotFinite, generate
        from latent_verse.biart.sequence import IMAGE_TO_TEXT, TEXT_TO_IMAGE

        e, s, device = self._examples, self.sampling, pl_module.device
        network, settings = pl_module.network, s.arguments()
        text_BL = trainer.datamodule.caption_ids(e.captions, network.vocab.pad).to(device)
        codes_BN = pl_module.codes(e.x.to(device))
        null_trained = pl_module.config.loss.reference_dropout > 0
        settings |= {"seed": 0, "reference_dropout_trained": null_trained}
        try:
            drawn_BN = generate(network, text_BL, TEXT_TO_IMAGE, **settings)
            written_BL = generate(network, codes_BN, IMAGE_TO_TEXT, temperature=0)
        except NotFinite as error:
            raise Diverged(
                f"training has diverged: after step {trainer.global_step} the model's logits are not finite. Lower "
                "learning_rate (or muon_learning_rate), raise warmup_steps, set gradient_clip_val, or train with "
                "precision: 32."
            ) from error
        written = self.tokenizer.decode_batch(network.vocab.unpad_text(written_BL))
        drawn_BCHW = pl_module.vae.decode_codes(drawn_BN).float().cpu()
        marks, shares = [""] * len(written), {}
        if e.world:
            pixels = ((drawn_BCHW + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
            statements = [e.world.parse_caption(text) for text in e.captions]
            scenes = [e.world.parse_image(picture) for picture in pixels]
            picture_right = [e.world.satisfies(*pair) for pair in zip(scenes, statements, strict=True)]
            truth = zip(e.scenes, written, strict=True)
            caption_right = [e.world.satisfies(scene, e.world.parse_caption(text)) for scene, text in truth]
            marks = [" (right)" if right else " (wrong)" for right in caption_right]
            shares["text_to_image/right"] = sum(picture_right) / len(picture_right)
            shares["image_to_text/right"] = sum(caption_right) / len(caption_right)
        n = s.num_samples
        if trainer.is_global_zero and n:
            originals = e.x[:n] if e.x.is_floating_point() else pl_module.vae.decode_codes(codes_BN[:n]).float().cpu()
            lines = [
                f"{i}. caption: {given}\n   written: {text}{mark}"
                for i, (given, text, mark) in enumerate(zip(e.captions, written, marks, strict=True))
            ]
            self._write(trainer, torch.cat([originals, drawn_BCHW[:n]]), lines[:n])
        return shares

    def _write(self, trainer: pl.Trainer, x_BCHW: torch.Tensor, lines: list[str]) -> None:
        from torchvision.utils import make_grid, save_image

        grid = make_grid(x_BCHW, nrow=len(x_BCHW) // 2, normalize=True, value_range=(-1, 1))
        place, step = self.folder.run.images, trainer.global_step
        place.mkdir(parents=True, exist_ok=True)
        save_image(grid, place / f"samples_step={step}.png")
        runs.write_whole(place / f"samples_step={step}.txt", "\n".join(lines) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                logger.experiment.add_image("val/drawn", grid, step)
                logger.experiment.add_text("val/written", "\n\n".join(lines), step)
            elif isinstance(logger, pl.loggers.WandbLogger):
                logger.log_image("val/drawn", [grid], caption=[f"step {step}"])
                logger.log_text("val/written", columns=["sample"], data=[[line] for line in lines])
