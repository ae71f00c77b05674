"""What all tasks of an evaluation share: settings, processes, the model, the data, and where results go."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from latent_verse.config.evaluate import EvalBiARTConfig
from latent_verse.evaluation.page import Case, Gallery, choose
from latent_verse.evaluation.pairs import Pairs, Sample
from latent_verse.evaluation.records import Records
from latent_verse.inference.pipeline import LVerse
from latent_verse.metrics import networks
from latent_verse.metrics.processes import Ranks


@dataclass(eq=False)
class Context:
    """An evaluation in this process.

    Attributes:
        model: None if another system's outputs are evaluated.
        resolution: pixels a side of every image that is compared.
        galleries: best, median and worst cases for the page.
    """

    config: EvalBiARTConfig
    ranks: Ranks
    device: str
    folder: Path
    model: LVerse | None
    pairs: Pairs
    resolution: int
    records: Records
    galleries: list[Gallery] = field(default_factory=list)

    @property
    def seed(self) -> int:
        """Of the choice of captions and of sampling."""
        return self.config.write.seed

    @functools.cached_property
    def inception(self) -> networks.Inception | str:
        """InceptionV3 on the device, or the reason why it is missing."""
        download = self.config.networks.download
        try:
            if download:
                self.ranks.share(lambda: networks.inception_weights().find(True) and None)
            return networks.open_inception().to(self.device)
        except networks.NetworkMissing as error:
            return str(error)

    @functools.cached_property
    def clip(self) -> networks.ClipNetwork | str:
        """CLIP on the device, or the reason why it is missing."""
        n = self.config.networks
        try:
            if n.download:
                self.ranks.share(lambda: networks.clip_weights(n.clip_model, n.clip_weights).find(True) and None)
            return networks.open_clip_network(n.clip_model, n.clip_weights, self.device)
        except networks.NetworkMissing as error:
            return str(error)

    def readable(self, chosen: list[Sample]) -> tuple[list[Sample], list[Tensor]]:
        """Those whose image can be read, and these images, uint8 (3, R, R)."""
        read = [(sample, x) for sample in chosen if (x := self.pairs.image(sample.index)) is not None]
        return [sample for sample, _ in read], [x for _, x in read]

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the model takes: what is scored is not all of them."""
        longest = self.model.biart.config.text_len
        return sum(len(ids) > longest for ids in self.model.tokenizer.encode_batch(list(texts)))

    def add_gallery(
        self, title: str, scored: str, scores: list[float], case_of: Callable[[int], tuple[Image.Image, str, str]]
    ) -> None:
        """Show the best, median and worst by score; case_of(i) gives (image, text, note). In the first process."""
        count = self.config.write.page_cases
        if not (self.ranks.is_first and scores and count):
            return
        parts = {
            heading: [Case(scores[i], *case_of(i)) for i in numbers]
            for heading, numbers in choose(scores, count).items()
        }
        self.galleries.append(Gallery(title, f"{scored}, of {len(scores)}", parts))


def as_pil(x_CHW: Tensor) -> Image.Image:
    """A uint8 image (3, H, W) as a PIL image."""
    return Image.fromarray(x_CHW.permute(1, 2, 0).contiguous().numpy())
