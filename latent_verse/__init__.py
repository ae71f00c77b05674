"""L-Verse: bidirectional generation between image and text (Kim et al., CVPR 2022)."""

__version__ = "0.1.0"
