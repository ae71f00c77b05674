#!/usr/bin/env python3
"""Train AugVAE-ML, or fine-tune AugVAE-SL from it, on pictures. `--help` lists every setting."""

from __future__ import annotations

import sys

from latent_verse.cli import errors_to_exit_code, parse, to_yaml
from latent_verse.config import TrainVAEConfig, check_train_vae


def main(argv: list[str] | None = None) -> int:
    """Train; 0 when done or interrupted and saved, 2 for a mistake in the settings, data or checkpoint."""
    with errors_to_exit_code() as code:
        config, given = parse(TrainVAEConfig, argv, __doc__)
        check_train_vae(config, given)
    return code[0] if code else run(config, given)


def run(config: TrainVAEConfig, given: dict[str, str]) -> int:
    """Build everything and train."""
    import pytorch_lightning as pl

    from latent_verse import runs
    from latent_verse.augvae.training import LitAugVAE
    from latent_verse.callbacks import Interrupted
    from latent_verse.checkpoint import CheckpointError, check_resumable, load_for_training
    from latent_verse.config import as_plain
    from latent_verse.data import DataError
    from latent_verse.data.module import ImageDataModule
    from latent_verse.trainer import default_name, ease_smoke_test, make_trainer

    with errors_to_exit_code(CheckpointError, DataError) as code:
        t = config.trainer
        yaml_file = next((s for s in given.values() if not s.startswith("--")), None)
        ease_smoke_test(config, given)
        name = default_name(t, yaml_file, "augvae", config.data.fake_data)
        run = runs.open_run(t.log_dir, name, t.backup, t.backup_dir, as_plain(config))
        pl.seed_everything(t.seed, verbose=False)
        model = load_for_training(config, set(given))
        data = ImageDataModule(config.data, model.config.resolution, t.seed)
        data.setup("fit")
        trainer = make_trainer(t, run, config, to_yaml(config), data.has_val)
        start_from = run.continue_from or (t.ckpt_path if t.resume else None)
        if start_from:
            check_resumable(start_from, "augvae")
            print(f"Continuing from {start_from}")
        elif t.ckpt_path:
            print(f"ckpt_path {t.ckpt_path} is not read without --resume: this run starts anew.")
        print(f"Run folder: {run.folder}")
        rate = config.optim.learning_rate * trainer.world_size * config.data.batch_size
        print(
            f"Learning rate: {config.optim.learning_rate:g} x {trainer.world_size} processes x "
            f"batch {config.data.batch_size} = {rate:g}"
        )
        try:
            trainer.fit(LitAugVAE(model, config), datamodule=data, ckpt_path=start_from, weights_only=True)
        except Interrupted as stopped:
            again = (
                "the same command continues there" if t.backup else "continue with --resume --ckpt_path and that file"
            )
            print(f"{stopped}; {again}.")
        if run.continue_from and trainer.global_step == runs.step_of(run.continue_from):
            print(f"{run.folder} was finished already. Raise --epochs to go on, or give another --name.")
    return code[0] if code else 0


if __name__ == "__main__":
    sys.exit(main())
