"""Every setting of generate.py, and the rules across them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Optional, Tuple

from latent_verse.config.evaluate import DTYPES, CaptionConfig, EvaluatedConfig, EvalWriteConfig
from latent_verse.config.messages import ConfigError
from latent_verse.config.settings import SamplingSettings, Settings, check_rules, require, same, setting
from latent_verse.config.train import TextConfig

TASKS = ("complete", "score", "image", "text")  # `complete` takes texts as well, so it is looked for first


@dataclass(frozen=True)
class WhatConfig(Settings):
    """The model, and one of four things to do: text, image, score or complete."""

    model: Optional[str] = same(
        EvaluatedConfig, "model", None, "bundle of train_biart.py, hub id, or name of a shipped model; default shapes"
    )
    text: Tuple[str, ...] = setting((), "generate images for these texts, one argument each")
    text_file: Optional[str] = setting(None, "generate images for the texts in this file, one per line", path=True)
    image: Tuple[str, ...] = setting((), "generate captions for these images (files or folders)", path=True)
    score: Tuple[str, ...] = setting((), "score an image (or folder) against one or more texts", path="first")
    complete: Optional[str] = setting(None, "keep the top of an image (or of a folder's), generate the rest", path=True)
    rows: Optional[int] = setting(None, "number of rows of codes, from the top, that complete keeps", at_least=1)


@dataclass(frozen=True)
class GenerateSamplingConfig(SamplingSettings):
    """How images and captions are sampled."""

    num: int = setting(1, "images per text, or captions per image", at_least=1, at_most=2**16)
    temperature: float = same(SamplingSettings, "temperature", 1.0, "temperature; 0: greedy, the default for captions")
    seed: Optional[int] = same(EvalWriteConfig, "seed", None, "seed for sampling; default random, and recorded")
    rerank: int = setting(
        0, "candidates per image; the one that makes its text likeliest is kept; 0: off", at_least=0, at_most=4096
    )
    beams: int = same(CaptionConfig, "beams")
    text_too_long: str = same(TextConfig, "text_too_long", "truncate", "cut texts that are too long, or raise an error")

    def arguments(self) -> dict[str, Any]:
        """As `SamplingSettings.arguments`, with the seed."""
        return {**super().arguments(), "seed": self.seed}


@dataclass(frozen=True)
class WriteConfig(Settings):
    """Where results go, and which machine makes them."""

    out: Optional[str] = setting(None, "new or empty folder for results; default generated, generated-2 ...", path=True)
    overwrite: bool = setting(False, "write into a folder that is not empty, and replace files of the same name")
    gpus: int = setting(1, "1 uses the GPU if there is one, 0 the CPU", at_least=0, at_most=1)
    dtype: str = setting(
        "auto", "precision of BiART; auto: as stored, or bfloat16 to sample on a GPU that has it", ("auto", *DTYPES)
    )


@dataclass(frozen=True)
class GenerateConfig:
    """Every setting of generate.py."""

    what: WhatConfig = field(default_factory=WhatConfig)
    draw: GenerateSamplingConfig = field(default_factory=GenerateSamplingConfig)
    write: WriteConfig = field(default_factory=WriteConfig)


_IMAGES = {"num", "temperature", "top_k", "top_p", "guidance", "seed", "rerank", "text_too_long", "out", "overwrite"}
# the flags that each task reads; any other is refused
USED = {
    "text": {"text", "text_file"} | _IMAGES,
    "complete": {"complete", "rows", "text", "text_file"} | _IMAGES,
    "image": {"image", "beams"} | _IMAGES - {"rerank", "text_too_long"},
    "score": {"score", "text_too_long"},
}


def resolve_generate(config: GenerateConfig, given: Mapping[str, str]) -> tuple[GenerateConfig, str]:
    """The configuration, with the task's temperature and a seed, and which task is asked for.

    Raises:
        ConfigError: no task or several, or flags that the task does not use.
    """
    what = config.what
    require([what], "text", "text_file", "image", "score", "complete")
    asked = [t for t in TASKS if getattr(what, t) or (t == "text" and what.text_file)]
    if len(asked) > 1 and asked != ["complete", "text"]:
        raise ConfigError(f"{' and '.join('--' + t for t in asked)} are different tasks: give one of them.")
    task = asked[0]
    unused = [f"--{leaf}" for leaf, source in given.items() if source.startswith("--") and leaf not in USED[task]]
    unused = [flag for flag in unused if flag not in ("--model", "--gpus", "--dtype")]
    if unused:
        raise ConfigError(f"--{task} does not use these flags; leave them out: {', '.join(unused)}.")
    check_rules([what], needs={"complete": "rows"}, excludes={"text": "text_file"})
    if task == "score" and len(what.score) < 2:
        raise ConfigError('score needs an image and a text: --score image.png "a red circle".')
    sampling = config.draw
    if task == "image" and "temperature" not in given:
        sampling = replace(sampling, temperature=0.0)
    if sampling.seed is None:
        sampling = replace(sampling, seed=random.randrange(2**31))
    return replace(config, draw=sampling), task
