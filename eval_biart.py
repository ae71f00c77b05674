#!/usr/bin/env python3
"""Evaluate a trained bundle, or another system's images and captions. `--help` lists every setting."""

import sys

from latent_verse.commands.eval_biart import main

if __name__ == "__main__":
    sys.exit(main())
