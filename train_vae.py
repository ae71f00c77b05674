#!/usr/bin/env python3
"""Train AugVAE-ML, or fine-tune AugVAE-SL from it, on images. `--help` lists every setting."""

import sys

from latent_verse.commands.train_vae import main

if __name__ == "__main__":
    sys.exit(main())
