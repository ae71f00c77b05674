"""Evaluate an AugVAE (--ckpt_path) on images (--test_dir): PSNR, SSIM, LPIPS, rFID. No loss or optimiser is used."""

from __future__ import annotations

import math
from collections.abc import Mapping

from latent_verse.config.cli import naming_sources, parse, quick_imports
from latent_verse.config.messages import UserError, counted, printable
from latent_verse.config.program import one_line_errors
from latent_verse.config.remembered import with_layout_of_vae_run
from latent_verse.config.train import EvalVAEConfig
from latent_verse.config.train_rules import resolve_eval_vae, with_evaluated_shape
from latent_verse.config.yaml_files import to_yaml
from latent_verse.files import write_json, write_text


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Evaluate; 0 when done, 2 for a mistake in the settings, data or checkpoint."""
    config, given = with_layout_of_vae_run(*parse(EvalVAEConfig, argv, __doc__, prog))
    with naming_sources(config, given):
        return run(resolve_eval_vae(config, given), given)


def run(config: EvalVAEConfig, given: Mapping[str, str]) -> int:
    """Build everything, measure, print and write."""
    with quick_imports():
        import pytorch_lightning as pl

        from latent_verse.checkpoints.augvae import load_augvae
        from latent_verse.data.datasets import how_many, open_images
        from latent_verse.data.modules import ImageDataModule
        from latent_verse.metrics.reconstruction import table
        from latent_verse.training import runs
        from latent_verse.training.augvae import LitAugVAEEvaluation
        from latent_verse.training.image_logging import SavedImages
        from latent_verse.training.progress_bar import ProgressBar
        from latent_verse.training.trainer import as_config_error, choose_devices, choose_strategy, quiet_lightning, say

    try:
        from latent_verse.evaluation.reconstructions import write_page
    except UserError as error:  # jinja2 is an extra
        say(f"Without a page: {error}")
        write_page = None
    t = config.trainer
    model = load_augvae(t.ckpt_path)
    config = with_evaluated_shape(config, model.config, given)
    accelerator, devices = choose_devices(t)
    with runs.hold_new_folder(t.log_dir, t.name or f"eval-{runs.stem(t.ckpt_path)}") as folder:
        data = ImageDataModule(open_images(config.data, model.config.resolution, t.seed, ["test"]), config.data, t.seed)
        d = config.data
        source = d.dataset if d.dataset == "fake" else d.test_dir or d.val_dir
        say(f"Evaluating on {how_many(data.datasets['test'])} of {printable(str(source))}")
        lit, n = LitAugVAEEvaluation(model, config), config.eval.eval_images
        quiet_lightning()
        bar = [ProgressBar(t.refresh_rate)] if t.refresh_rate else []
        limit = math.ceil(n / (devices * t.nodes * config.data.batch_size)) if n else t.limit_val_batches
        with as_config_error():
            trainer = pl.Trainer(
                accelerator=accelerator,
                devices=devices,
                num_nodes=t.nodes,
                strategy=choose_strategy(t, accelerator, devices),
                precision=t.precision,
                limit_test_batches=limit,
                use_distributed_sampler=False,
                benchmark=False,  # it would tune cuDNN for the last, smaller batch as well
                enable_progress_bar=bool(bar),
                enable_model_summary=False,
                logger=False,
                callbacks=[SavedImages(folder, config.eval.save_images), *bar],
            )
            trainer.test(lit, datamodule=data, verbose=False)
        results = lit.results | {"checkpoint": str(t.ckpt_path), "skipped": data.skipped}
        if trainer.is_global_zero:
            write_json(folder / "metrics.json", results)
            write_text(folder / "config.yaml", to_yaml(config))
            title = f"{t.ckpt_path}: {counted(results['images'], 'image')}"
            if write_page:
                write_page(folder, title, results, to_yaml(config))
            print(table(results, title))
            print(f"Written to {folder}: metrics.json{' and index.html' if write_page else ''}")
    return 0
