#!/usr/bin/env python3
"""Generate images from texts or captions from images, score pairs, or complete images, with a trained bundle."""

import sys

from latent_verse.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
