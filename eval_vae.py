#!/usr/bin/env python3
"""Evaluate an AugVAE checkpoint on images: PSNR, SSIM, L1, MSE, LPIPS, rFID, codebook usage."""

import sys

from latent_verse.commands.eval_vae import main

if __name__ == "__main__":
    sys.exit(main())
