#!/usr/bin/env python3
"""Judge a trained bundle, or another system's pictures and captions, in both directions. `--help` lists every setting.

FID and FID-k, Inception Score, precision and recall, CLIP score; BLEU, METEOR, ROUGE-L, CIDEr, SPICE; retrieval,
zero-shot classification, round trips and held-out likelihoods by the model itself. Prints one table and writes
metrics.json and index.html. --compare A B prints the figures of two finished runs side by side.
"""

from __future__ import annotations

import sys

from latent_verse.config.cli import errors_to_exit_code, parse, quick_imports, to_yaml
from latent_verse.config.evaluate import EvalBiARTConfig, resolve_eval_biart


def main(argv: list[str] | None = None) -> int:
    """Evaluate; 0 when done, 2 for a mistake in the settings, the model, pictures or captions."""
    with errors_to_exit_code() as code:
        config, given = parse(EvalBiARTConfig, argv, __doc__)
        config, tasks = resolve_eval_biart(config, given)
    return code[0] if code else run(config, tasks)


def run(config: EvalBiARTConfig, tasks: tuple[str, ...]) -> int:
    """Compare two runs, or judge in as many processes as the settings say."""
    from latent_verse.data import DataError

    with errors_to_exit_code(DataError) as code:
        if config.judged.compare:
            from latent_verse.evaluation.figures import compare

            print(compare(*config.judged.compare))
            return 0
        with quick_imports():
            from latent_verse.evaluation import command, ranks

        return ranks.launch(command.run, ranks.processes(config.write), config, tasks, to_yaml(config))
    return code[0] if code else 0


if __name__ == "__main__":
    sys.exit(main())
