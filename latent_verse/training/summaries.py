"""What a run says before its first step and after its last one, in rows of a name and its value."""

from __future__ import annotations

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.checkpoints.ckpt_files import MONITOR, CheckpointError, find_checkpoint, read_ckpt, score_of
from latent_verse.config.datasets import PAIR_DATASETS
from latent_verse.config.messages import counted
from latent_verse.data.datasets import how_many
from latent_verse.data.modules import ImageDataModule
from latent_verse.data.text import Tokenizer
from latent_verse.training.runs import Run

COLUMN = 15  # of the values


def row(name: str, value: object) -> str:
    """'Steps:         6 an epoch'."""
    return f"{f'{name}:':<{COLUMN}}{value}"


def of_data(data: ImageDataModule) -> str:
    """'43 images (6 .svg not read), 12 to validate'; of pairs their captions too. No image is read for it."""
    train = data.datasets["train"]
    parts = [how_many(train)]
    captions = getattr(train, "describe", dict)().get("captions")
    parts += [counted(captions, "caption")] if captions else []
    crops = getattr(train, "meta", {}).get("crops_per_image", 1)
    parts += [f"{crops} crops of each"] if crops > 1 else []
    kind = data.data.dataset
    parts += [f"generated ({kind})"] if kind in PAIR_DATASETS and PAIR_DATASETS[kind].generated else []
    if data.has_val:
        count = data.samples("val")
        parts += [f"{how_many(data.datasets['val']) if count is None else f'{count:,}'} to validate"]
    else:
        parts += ["none to validate"]
    return ", ".join(parts)


def in_millions(number: int) -> str:
    """'2.1 M', '95,200'."""
    return f"{number / 1e6:,.1f} M" if number >= 100_000 else f"{number:,}"


def of_augvae(model: AugVAE) -> str:
    """'AugVAE-ML, 2.1 M parameters; 16 x 16 + 8 x 8 + 4 x 4 + 2 x 2 codes of 512'."""
    kind = "ML" if len(model.code_levels) > 1 else "SL"
    grids = " + ".join(f"{level} x {level}" for level in model.code_levels)
    parameters = sum(p.numel() for p in model.parameters())
    return f"AugVAE-{kind}, {in_millions(parameters)} parameters; {grids} codes of {model.config.num_tokens}"


def of_biart(model: BiART, tokenizer: Tokenizer) -> str:
    """'BiART, 2.1 M parameters; 24 tokens of bpe (1000 ids), 256 codes of 512'."""
    v = model.vocab
    return (
        f"BiART, {in_millions(model.num_parameters())} parameters; {v.text_len} tokens of {tokenizer.name} "
        f"({tokenizer.vocab_size} ids), {v.image_len} codes of {v.image_vocab}"
    )


def closing(run: Run, commands: list[str], needed: str = "") -> str:
    """Where the best checkpoint of a finished run is, what it reached, what is `needed` next, and the next commands."""
    try:
        best = [row("Best", of_best(run))]
    except CheckpointError as error:  # somebody has moved them: training has ended well all the same
        best = [row("Best", f"none; {error}")]
    return "\n".join([*best, *([row("Needed", needed)] if needed else []), *following(commands)])


def following(commands: list[str]) -> list[str]:
    """The lines that name the next commands."""
    return ["Next:", *(f"  {command}" for command in commands)]


def of_best(run: Run) -> str:
    """The best checkpoint of a run, or without validation the last one, and what it reached.

    Raises:
        CheckpointError: there is none, or none that can be read.
    """
    file = find_checkpoint(run.folder)
    content = read_ckpt(file)
    score, at = score_of(content), f"epoch {content['epoch'] + 1}, step {content['global_step']:,}"
    reached = f"{MONITOR} {score:.4g}, " if score is not None else ""
    return f"{file} ({reached}{at})"
