"""Where the weights of evaluation networks lie. Absent ones are named as missing; nothing is downloaded unasked."""

from __future__ import annotations

from pathlib import Path

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"


def inception_file() -> Path:
    """torch-fidelity's port of the original FID's InceptionV3, in torch's cache ($TORCH_HOME, or ~/.cache/torch)."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
