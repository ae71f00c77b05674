"""Train BiART in both directions on images with captions.

--extract_codes DIR encodes the images once instead, for training with --dataset codes; --export DIR makes a bundle of
--ckpt_path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from latent_verse.config.cli import naming_sources, parse, quick_imports
from latent_verse.config.program import one_line_errors
from latent_verse.config.train import TrainBiARTConfig
from latent_verse.config.train_rules import idle_flags_biart, resolve_train_biart
from latent_verse.files import made_folder


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Train; 0 when done, 128 + N when stopped by signal N and saved, 2 for a mistake of the user."""
    config, given = parse(TrainBiARTConfig, argv, __doc__, prog)
    with naming_sources(config, given):
        return run(resolve_train_biart(config, given), given, prog)


def run(config: TrainBiARTConfig, given: Mapping[str, str], prog: str | None = None) -> int:
    """Export, extract codes, or build everything, train and export."""
    with quick_imports():
        import pytorch_lightning as pl

        from latent_verse.checkpoints.biart import export_bundle, take_over
        from latent_verse.config import as_plain
        from latent_verse.training import biart_setup, summaries
        from latent_verse.training.backups import RunFolder
        from latent_verse.training.biart import LitBiART
        from latent_verse.training.code_extraction import extract_codes
        from latent_verse.training.image_logging import TextImageSamples
        from latent_verse.training.next_commands import after_biart, after_codes
        from latent_verse.training.resume import starting_point
        from latent_verse.training.runs import hold_run
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
    if config.bundle.export:
        with made_folder(Path(config.bundle.export), "export"):
            file = export_bundle(t.ckpt_path, config.bundle.export, config.vae.vae_path)
        print(f"Bundle of {file}: {config.bundle.export}")
        return 0
    if not config.codes.extract_codes:
        log_in(t)
    config, pretrained = take_over(config, given)
    config, vae = biart_setup.frozen_vae(config, pretrained)
    if config.codes.extract_codes:
        folders = extract_codes(config, vae, pretrained)
        print(*summaries.following([after_codes(config, given, folders, prog)]), sep="\n")
        return 0
    config = ease_smoke_test(config, given)
    name = run_name(config, given, "biart")
    with hold_run(t.log_dir, name, t.backup, t.backup_dir, as_plain(config)) as run:
        start_from, step = starting_point(run, t.ckpt_path if t.resume else None, "biart", optim=config.optim)
        pl.seed_everything(t.seed, verbose=False)
        data, tokenizer, about = biart_setup.open_data(config, vae, start_from, pretrained)
        model = biart_setup.new_biart(config, vae, tokenizer, start_from, pretrained)
        del pretrained  # its weights would stay in memory as long as the run lasts
        folder = RunFolder(run, config)
        samples = TextImageSamples(folder, config.sampling, tokenizer)
        trainer = make_trainer(t, folder, [samples], step)
        announce(t, run, start_from, idle_flags_biart(config, given))
        say(summaries.row("Data", summaries.of_data(data)))
        say(summaries.row("Model", summaries.of_biart(model, tokenizer)))
        say(summaries.row("Learning rate", f"{config.optim.learning_rate:g}"))
        module = LitBiART(model, vae, config, about, compiles(config))
        fit(trainer, t, run, module, data, start_from, step)
        if trainer.is_global_zero:
            file = export_bundle(run.folder, run.folder / "bundle", vae=vae)
            print(f"Bundle of {file}: {run.folder / 'bundle'}")
            print(summaries.closing(run, after_biart(config, given, data.datasets, run.folder, prog)))
    return 0
