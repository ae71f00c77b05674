#!/usr/bin/env python3
"""Train BiART in both directions on images with captions. `--help` lists every setting."""

import sys

from latent_verse.commands.train_biart import main

if __name__ == "__main__":
    sys.exit(main())
