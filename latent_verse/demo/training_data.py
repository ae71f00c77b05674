"""The demo's first stage: images of a shapes world with captions, to train on and to validate with.

python -m latent_verse.demo.training_data --world small --out demo         writes demo/data/train and demo/data/val
"""

from __future__ import annotations

import sys
from pathlib import Path

from latent_verse.config.cli import parse
from latent_verse.config.program import one_line_errors
from latent_verse.data.shapes import World, write_pairs
from latent_verse.demo.run import VAL_PAIRS, DemoConfig, train_pairs

CAPTIONS = 8  # of each image


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Write both folders and, at the end, the file data/finished; 0 when done, 2 for a mistake in the settings."""
    s = parse(DemoConfig, argv, __doc__)[0].demo
    world, folder, pairs = World.preset(s.world), Path(s.out) / "data", train_pairs(s)
    write_pairs(world, folder / "train", pairs, "train", captions=CAPTIONS)
    write_pairs(world, folder / "val", min(VAL_PAIRS, pairs), "val", captions=CAPTIONS)
    (folder / "finished").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
