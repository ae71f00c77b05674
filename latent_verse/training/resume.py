"""Which checkpoint a rerun resumes from. No Lightning."""

from __future__ import annotations

import warnings
from pathlib import Path

from latent_verse.checkpoints.ckpt_files import CheckpointError, Kind, check_resumable, newest
from latent_verse.config import AugVAEConfig, BiARTConfig
from latent_verse.training.runs import Run, states


def starting_point(
    run: Run, ckpt_path: str | None, kind: Kind, model: AugVAEConfig | BiARTConfig | None = None
) -> Path | None:
    """The checkpoint that training resumes from, None to start anew.

    Args:
        run: its own checkpoints are tried from the newest on; a damaged one is skipped with a warning.
        ckpt_path: the checkpoint or run folder of --resume, or None. The run's own is preferred if it is as far.
        kind, model: what is trained, and its shape, which the checkpoint's has to equal; None is not compared.

    Raises:
        CheckpointError: training cannot resume from ckpt_path, or from any of the run's own checkpoints.
    """
    given, given_step = None, -1
    if ckpt_path is not None:
        place = Path(ckpt_path)
        folders = [place / "backups", place / "checkpoints", place]
        given = newest(f for d in folders for f in d.glob("*.ckpt")) if place.is_dir() else place
        if given is None:
            remedy = "To start from the weights of a bundle or AugVAE, give it as --pretrained_path."
            raise CheckpointError(f"ckpt_path: the folder {place} holds no .ckpt to resume from. {remedy}")
        given_step = check_resumable(given, kind, model)
    problem = None
    for own in states(run):
        try:
            step = check_resumable(own, kind, model)
        except CheckpointError as error:
            problem = error
            warnings.warn(f"{error} Trying the checkpoint before it.", stacklevel=2)
            continue
        return own if step >= given_step else given
    if problem and given is None:
        raise problem
    return given
