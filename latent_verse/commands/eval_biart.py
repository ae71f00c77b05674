"""Evaluate a trained bundle, or another system's images and captions, in both directions.

FID and FID-k, Inception Score, precision and recall, CLIP score; BLEU, METEOR, ROUGE-L, CIDEr, SPICE; retrieval,
zero-shot classification, round trips and held-out likelihoods by the model itself. Prints one table and writes
metrics.json and index.html. --compare A B prints the metrics of two finished runs side by side.
"""

from __future__ import annotations

from latent_verse.config.cli import naming_sources, parse, quick_imports
from latent_verse.config.evaluate import EvalBiARTConfig, resolve_eval_biart
from latent_verse.config.program import one_line_errors
from latent_verse.config.remembered import with_data_of_biart_run
from latent_verse.config.yaml_files import to_yaml


@one_line_errors
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Evaluate; 0 when done, 2 for a mistake in the settings, the model, images or captions."""
    config, given = with_data_of_biart_run(*parse(EvalBiARTConfig, argv, __doc__, prog))
    with naming_sources(config, given):
        return run(*resolve_eval_biart(config, given))


def run(config: EvalBiARTConfig, tasks: tuple[str, ...]) -> int:
    """Compare two runs, or evaluate in as many processes as the settings say."""
    if config.judged.compare:
        from latent_verse.evaluation.records import compare

        print(compare(*config.judged.compare))
        return 0
    with quick_imports():
        from latent_verse.evaluation import distributed as ranks
        from latent_verse.evaluation import worker as command

    return ranks.launch(command.run, ranks.processes(config.write), config, tasks, to_yaml(config))
