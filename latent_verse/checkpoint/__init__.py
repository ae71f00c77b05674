"""The names of earlier versions; see checkpoints/files.py and checkpoints/augvae.py."""

from latent_verse.checkpoints.augvae import (  # noqa: F401
    FORMAT,
    WEIGHTS,
    load_augvae,
    load_for_training,
    save_augvae,
)
from latent_verse.checkpoints.files import (  # noqa: F401
    CheckpointError,
    check_resumable,
    fetch_from_hub,
    fill,
    find_checkpoint,
    fingerprint,
    first_line,
    read_ckpt,
    starting_point,
)
