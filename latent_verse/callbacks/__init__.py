"""The names of earlier versions; see training/."""

from latent_verse.training.backups import Backup, Interrupted, ProcessState, RunFolder  # noqa: F401
from latent_verse.training.image_logging import Diverged, ImageGrids, SavedPictures, TextImageSamples  # noqa: F401
from latent_verse.training.progress_bar import ProgressBar  # noqa: F401
