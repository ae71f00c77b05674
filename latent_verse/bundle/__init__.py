"""The names of earlier versions; see checkpoints/bundle.py."""

from latent_verse.checkpoints.bundle import BUNDLE_FILES, fingerprints, load_bundle, save_bundle  # noqa: F401
