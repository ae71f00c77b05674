"""What all tasks of an evaluation share: settings, processes, the model, the data, and where results go."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from latent_verse.config.evaluate import EvalBiARTConfig
from latent_verse.data.images import ImageDataset
from latent_verse.evaluation.page import Case, Gallery, Images, Texts, choose
from latent_verse.evaluation.pairs import Pairs, Sample
from latent_verse.evaluation.records import Records
from latent_verse.inference.pipeline import LVerse
from latent_verse.metrics import networks
from latent_verse.metrics.processes import Ranks

T = TypeVar("T")


@dataclass(eq=False)
class Context:
    """An evaluation in this process."""

    config: EvalBiARTConfig
    ranks: Ranks
    device: str
    folder: Path
    model: LVerse | None  # None if another system's outputs are evaluated
    pairs: Pairs
    resolution: int  # of every image that is compared
    records: Records
    classes: tuple[ImageDataset, list[str]] | None = None  # for zero-shot classification: images, names of the classes
    galleries: list[Gallery] = field(default_factory=list)  # best, median and worst cases for the page

    @property
    def seed(self) -> int:
        """The seed of the choice of captions and of sampling."""
        return self.config.write.seed

    @functools.cached_property
    def inception(self) -> networks.Inception | str:
        """InceptionV3 on the device, or the reason why it is missing."""
        return self._network(networks.inception_weights, lambda: networks.open_inception().to(self.device))

    @functools.cached_property
    def clip(self) -> networks.ClipNetwork | str:
        """CLIP on the device, or the reason why it is missing."""
        names = self.config.networks.clip_model, self.config.networks.clip_weights
        return self._network(
            lambda: networks.clip_weights(*names), lambda: networks.open_clip_network(*names, self.device)
        )

    def _network(self, weights: Callable[[], networks.Weights], open_it: Callable[[], T]) -> T | str:
        try:
            if self.config.networks.download:
                self.ranks.share(lambda: weights().find(download=True))
            return open_it()
        except networks.NotDownloaded as error:
            return f"{error}; --download fetches it"
        except networks.NetworkMissing as error:
            return str(error)

    def readable(self, chosen: list[Sample]) -> tuple[list[Sample], list[Tensor]]:
        """The samples whose image can be read, and these images, uint8 (3, R, R)."""
        read = [(sample, x) for sample in chosen if (x := self.pairs.image(sample.index)) is not None]
        return [sample for sample, _ in read], [x for _, x in read]

    def cut(self, texts: Sequence[str]) -> int:
        """The number of texts that are longer than the model takes: only their beginning is scored."""
        longest = self.model.biart.config.text_len
        return sum(count > longest for _, count in self.model.tokenizer.encode_counted(list(texts), longest))

    def add_gallery(
        self, title: str, scored: str, scores: Sequence[float | None], case_of: Callable[[int], tuple[Images, Texts]]
    ) -> None:
        """Show the best, median and worst by score, or the first where scores are None. In the first process."""
        count = self.config.write.page_cases
        if not (self.ranks.is_first and scores and count):
            return
        chosen = choose(scores, count).items()
        parts = {heading: [Case(scores[i], *case_of(i)) for i in numbers] for heading, numbers in chosen}
        self.galleries.append(Gallery(title, scored, len(scores), parts))
