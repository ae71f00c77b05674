"""What all tasks of an evaluation share: settings, processes, the model, the data, and where figures go."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from latent_verse.config_eval import EvalBiARTConfig
from latent_verse.evaluation import networks
from latent_verse.evaluation.figures import Figures
from latent_verse.evaluation.page import Case, Gallery, choose
from latent_verse.evaluation.pairs import Drawn, Pairs
from latent_verse.evaluation.ranks import Ranks


@dataclass(eq=False)
class Context:
    """An evaluation in this process.

    Attributes:
        model: an `LVerse`, None where another system's outputs are judged.
        resolution: pixels a side of every picture that is compared.
        galleries: best, median and worst cases for the page.
    """

    config: EvalBiARTConfig
    ranks: Ranks
    device: str
    folder: Path
    model: Any
    pairs: Pairs
    resolution: int
    figures: Figures
    galleries: list[Gallery] = field(default_factory=list)

    @property
    def seed(self) -> int:
        """Of the draws."""
        return self.config.write.seed

    @property
    def drawing(self) -> dict[str, Any]:
        """The settings of drawing pictures."""
        return self.config.generation.arguments()

    @functools.cached_property
    def inception(self) -> Any:
        """InceptionV3 on the device, or a str: why it is missing."""
        download = self.config.networks.download
        try:
            if download:
                self.ranks.share(lambda: networks.inception_weights().find(True) and None)
            return networks.open_inception().to(self.device)
        except networks.NetworkMissing as error:
            return str(error)

    @functools.cached_property
    def clip(self) -> Any:
        """CLIP on the device, or a str: why it is missing."""
        n = self.config.networks
        try:
            if n.download:
                self.ranks.share(lambda: networks.clip_weights(n.clip_model, n.clip_weights).find(True) and None)
            return networks.open_clip_network(n.clip_model, n.clip_weights, self.device)
        except networks.NetworkMissing as error:
            return str(error)

    def readable(self, drawn: list[Drawn]) -> tuple[list[Drawn], list[Tensor]]:
        """Those whose picture can be read, with the pictures, uint8 (3, R, R)."""
        read = [(d, x) for d in drawn if (x := self.pairs.picture(d.index)) is not None]
        return [d for d, _ in read], [x for _, x in read]

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the model takes: they are cut, so what is scored is not all of them."""
        longest = self.model.biart.config.text_len
        return sum(len(ids) > longest for ids in self.model.tokenizer.encode_batch(list(texts)))

    def add_gallery(self, title: str, scored: str, scores: list[float], case_of: Any) -> None:
        """Show the best, median and worst by score; case_of(i) gives (picture, text, note). In the first process."""
        count = self.config.write.page_cases
        if not (self.ranks.is_first and scores and count):
            return

        def cases(numbers: list[int]) -> list[Case]:
            return [Case(scores[i], *case_of(i)) for i in numbers]

        best, median, worst = map(cases, choose(scores, count))
        self.galleries.append(Gallery(title, f"{scored}, of {len(scores)}", best, median, worst))


def as_image(x_CHW: Tensor) -> Image.Image:
    """A uint8 picture (3, H, W) as an RGB image."""
    return Image.fromarray(x_CHW.permute(1, 2, 0).contiguous().numpy())
