"""Train AugVAE-ML, or fine-tune AugVAE-SL from it, on images."""

from __future__ import annotations

from collections.abc import Mapping

from latent_verse.config.cli import naming_sources, parse, quick_imports
from latent_verse.config.messages import counted
from latent_verse.config.program import one_line_errors
from latent_verse.config.train import TrainVAEConfig
from latent_verse.config.train_rules import idle_flags_vae, resolve_train_vae


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Train; 0 when done, 128 + N when stopped by signal N and saved, 2 for a mistake of the user."""
    config, given = parse(TrainVAEConfig, argv, __doc__, prog)
    with naming_sources(config, given):
        return run(resolve_train_vae(config, given), given, prog)


def run(config: TrainVAEConfig, given: Mapping[str, str], prog: str | None = None) -> int:
    """Build everything and train."""
    with quick_imports():
        import pytorch_lightning as pl

        from latent_verse.augvae.losses import LOSSES
        from latent_verse.checkpoints.augvae import load_for_training
        from latent_verse.config import as_plain
        from latent_verse.data.datasets import open_images
        from latent_verse.data.modules import ImageDataModule
        from latent_verse.training import runs, summaries
        from latent_verse.training.augvae import LitAugVAE
        from latent_verse.training.backups import RunFolder
        from latent_verse.training.image_logging import ImageGrids
        from latent_verse.training.next_commands import after_augvae, captions_needed
        from latent_verse.training.resume import starting_point
        from latent_verse.training.trainer import (
            announce,
            compiles,
            ease_smoke_test,
            fit,
            log_in,
            make_trainer,
            run_name,
            say,
        )

    t = config.trainer
    log_in(t)
    pl.seed_everything(t.seed, verbose=False)
    config, model = load_for_training(ease_smoke_test(config, given), given)
    name = run_name(config, given, "augvae")
    with runs.hold_run(t.log_dir, name, t.backup, t.backup_dir, as_plain(config)) as run:
        start_from, step = starting_point(run, t.ckpt_path if t.resume else None, "augvae", model.config, config.optim)
        data = ImageDataModule(open_images(config.data, model.config.resolution, t.seed), config.data, t.seed)
        folder = RunFolder(run, config)
        grids = [ImageGrids(folder, t.image_log_steps)] if t.log_images else []
        trainer = make_trainer(t, folder, grids, step)
        announce(t, run, start_from, idle_flags_vae(config, given, LOSSES[config.loss.loss_type].uses_lpips))
        say(summaries.row("Data", summaries.of_data(data)))
        say(summaries.row("Model", summaries.of_augvae(model)))
        if not start_from:
            base, size, processes = config.optim.learning_rate, config.data.batch_size, trainer.world_size
            of_all = f"{counted(processes, 'process')} x batch {size}"
            say(summaries.row("Learning rate", f"{base:g} x {of_all} = {base * processes * size:g}"))
        fit(trainer, t, run, LitAugVAE(model, config, compiles(config)), data, start_from, step)
        if trainer.is_global_zero:
            following = after_augvae(config, given, model, run.folder, prog)
            print(summaries.closing(run, following, captions_needed(config, model)))
    return 0
