"""Quality of generated images: FID and FID-k, Inception Score, precision and recall, CLIP score.

Generated and reference images are R x R by the same resizing and cropping (data/transforms.centre_crop), 8-bit, and for
FID-k blurred (Pillow's GaussianBlur of radius k, after resizing). The formulas are torchmetrics' (FID) and
torch-fidelity's (Inception Score, precision, recall); features are computed once for all of them.

Shapes: B batch, F features, V classes of Inception, N images.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance  # .image lacks it without torch-fidelity

from latent_verse.config.messages import differences, reason
from latent_verse.data import DataError
from latent_verse.files import replacing
from latent_verse.metrics.networks import ClipNetwork, Inception
from latent_verse.metrics.processes import Ranks

ReadImage = Callable[[int], Tensor | None]  # image i as uint8 (3, R, R), None if it cannot be read


class FrechetDistance(FrechetInceptionDistance):
    """torchmetrics' FID of features (B, F) computed elsewhere, in float64, spread over the processes in any way."""

    def __init__(self, num_features: int, sync_on_compute: bool = True):
        network = nn.Identity()  # the input is features already
        network.num_features = num_features
        super().__init__(feature=network, sync_on_compute=sync_on_compute)
        self.orig_dtype = torch.float64

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: object, **kwargs: object) -> FrechetDistance:
        if fn(torch.empty(0)).device.type == "mps":  # which has no float64: the sums stay on the CPU
            return self
        return super()._apply(fn, *args, **kwargs)

    def update(self, features_BF: Tensor, real: bool) -> None:
        """Add features of reference (real) or evaluated images."""
        super().update(features_BF.to(self.real_features_sum.device).double(), real=real)


@dataclass
class Moments:
    """Number, sum (F,) and sum of outer products (F, F) of features, float64: all that FID needs of a set."""

    count: int
    sum_F: Tensor
    outer_FF: Tensor

    @classmethod
    def none(cls, num_features: int) -> Moments:
        """The moments of no features."""
        zeros = torch.zeros(num_features, num_features, dtype=torch.float64)
        return cls(0, zeros[0].clone(), zeros)

    def add(self, features_BF: Tensor) -> None:
        """Add the features of a batch."""
        features_BF = features_BF.cpu().double()
        self.count += len(features_BF)
        self.sum_F += features_BF.sum(0)
        self.outer_FF += features_BF.T @ features_BF

    def over(self, ranks: Ranks) -> Moments:
        """The sums over all processes."""
        count, sum_F, outer_FF = ranks.sum([torch.tensor(self.count), self.sum_F, self.outer_FF])
        return Moments(int(count), sum_F, outer_FF)


def frechet_distance(real: Moments, generated: Moments) -> float:
    """FID of two sets, by torchmetrics. NaN if one has fewer than 2 images."""
    if min(real.count, generated.count) < 2:
        return float("nan")
    metric = FrechetDistance(len(real.sum_F), sync_on_compute=False)
    for name, moments in (("real", real), ("fake", generated)):
        setattr(metric, f"{name}_features_sum", moments.sum_F)
        setattr(metric, f"{name}_features_cov_sum", moments.outer_FF)
        setattr(metric, f"{name}_features_num_samples", torch.tensor(moments.count))
    metric._update_count = 1  # torchmetrics would warn of a metric that was never updated
    return metric.compute().item()


def as_pil(x_CHW: Tensor) -> Image.Image:
    """A uint8 image (3, H, W) as a PIL image."""
    return Image.fromarray(x_CHW.permute(1, 2, 0).contiguous().numpy())


def blur(x_CHW: Tensor, radius: int) -> Tensor:
    """A uint8 image (3, H, W) under Pillow's GaussianBlur; radius 0 leaves it as it is."""
    if radius == 0:
        return x_CHW
    return torch.from_numpy(np.array(as_pil(x_CHW).filter(ImageFilter.GaussianBlur(radius)))).permute(2, 0, 1)


@dataclass
class ImageFeatures:
    """The features of a set of images: moments by blur radius; features and logits, by number, without blur."""

    moments: dict[int, Moments]
    features: dict[int, np.ndarray] = field(default_factory=dict)  # (F,) float32 of the first images, for precision
    logits: dict[int, np.ndarray] = field(default_factory=dict)  # (V,) float32, for Inception Score


def extract_features(
    read: ReadImage,
    count: int,
    network: Inception,
    ranks: Ranks,
    *,
    radii: Sequence[int],
    batch_size: int,
    keep_features: int,
    keep_logits: bool,
    device: str = "cpu",
    workers: int | None = 1,
) -> ImageFeatures:
    """Features of images 0 .. count - 1, shared among processes; the same result in each.

    Args:
        keep_features: the features of this many images are kept, from the first on.
        workers: threads that read and blur; None takes as many as there are cores, up to 16.
    """
    found = ImageFeatures({k: Moments.none(network.num_features) for k in radii})
    mine = ranks.mine(count)

    def prepare(i: int) -> tuple[int, list[Tensor]] | None:
        x = read(i)
        return None if x is None else (i, [blur(x, k) for k in radii])

    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        for start in ranks.follow(range(0, len(mine), batch_size), "features"):
            numbered = [done for done in pool.map(prepare, mine[start : start + batch_size]) if done is not None]
            if not numbered:
                continue
            for n, (k, moments) in enumerate(found.moments.items()):
                x_BCHW = torch.stack([blurred[n] for _, blurred in numbered]).to(device)
                features_BF, logits_BV = network.features_and_logits(x_BCHW)
                moments.add(features_BF)
                if k == 0:
                    for (i, _), row_F, row_V in zip(numbered, features_BF.cpu(), logits_BV.cpu(), strict=True):
                        if i < keep_features:
                            found.features[i] = row_F.numpy()
                        if keep_logits:
                            found.logits[i] = row_V.numpy()
    moments = {k: m.over(ranks) for k, m in found.moments.items()}
    return ImageFeatures(moments, ranks.gather(found.features), ranks.gather(found.logits))


def save_reference(path: Path, reference: ImageFeatures, about: dict[str, object]) -> None:
    """Write reference statistics as .npz: mu_k and sigma_k as other tools read them, count, features, and `about`."""
    arrays = {"about": json.dumps(about), "features": np.array(list(reference.features.values()))}
    for k, m in reference.moments.items():
        mean_F = m.sum_F / m.count
        sigma_FF = (m.outer_FF - m.count * torch.outer(mean_F, mean_F)) / max(m.count - 1, 1)
        arrays |= {f"mu_{k}": mean_F.numpy(), f"sigma_{k}": sigma_FF.numpy(), "count": m.count}
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **arrays)


def load_reference(path: Path, about: dict[str, object], radii: Sequence[int]) -> ImageFeatures:
    """Read what `save_reference` wrote.

    Raises:
        DataError: the file is damaged, of another set than `about`, or lacks a radius.
    """
    try:
        arrays, found, count = _arrays(path)
    except Exception as error:  # of a damaged archive numpy and zipfile raise nearly anything
        raise DataError(
            f"reference_stats: {path} holds no reference statistics ({reason(error)}). Name another."
        ) from error
    other = differences(found, about) + [f"blur radius {k} is not in it" for k in radii if f"mu_{k}" not in arrays]
    if other:
        raise DataError(f"reference_stats: {path} is of another set or network ({'; '.join(other)}). Name a new file.")
    moments = {}
    for k in radii:
        mean_F, sigma_FF = torch.from_numpy(arrays[f"mu_{k}"]), torch.from_numpy(arrays[f"sigma_{k}"])
        outer_FF = sigma_FF * max(count - 1, 1) + count * torch.outer(mean_F, mean_F)
        moments[k] = Moments(count, mean_F * count, outer_FF)
    return ImageFeatures(moments, dict(enumerate(arrays["features"])))


def _arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object], int]:
    """The arrays of a file of statistics, whose shapes and values are checked; `about` and `count` of it."""
    with zipfile.ZipFile(path) as archive:  # which np.savez does not compress: it declares no more than it holds
        if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
            raise ValueError("its arrays are larger than the file")
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    found, count, features = json.loads(str(arrays["about"])), int(arrays["count"]), arrays["features"]
    width = features.shape[-1] if features.size else next(v for k, v in arrays.items() if k.startswith("mu_")).shape[-1]
    shapes = {"mu": (width,), "sigma": (width, width), "features": (len(features), width)}
    for name, array in arrays.items():
        kind = name.split("_")[0]
        if kind not in shapes:
            continue
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(f"{name} has values that are not finite")
        if array.shape != shapes[kind] and array.size:
            raise ValueError(f"{name} has the shape {array.shape}, not {shapes[kind]}")
        if kind == "mu" and f"sigma{name[2:]}" not in arrays:
            raise ValueError(f"sigma{name[2:]} is missing")
    if not isinstance(found, dict) or count < 1:
        raise ValueError(f"`about` or `count` is damaged: {count}")
    return arrays, found, count


def inception_score(logits: dict[int, np.ndarray], splits: int) -> dict[str, float]:
    """{inception_score, inception_score_std} by torch-fidelity.

    Raises:
        ValueError: there are fewer images than splits.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if len(logits) < splits:
        raise ValueError(f"needs at least is_splits {splits} images, got {len(logits)}")
    out = isc_features_to_metric(torch.from_numpy(np.stack(list(logits.values()))), splits)
    return {"inception_score": out[KEY_METRIC_ISC_MEAN], "inception_score_std": out[KEY_METRIC_ISC_STD]}


def precision_recall(generated: ImageFeatures, real: ImageFeatures, neighbours: int) -> dict[str, float]:
    """{precision, recall} (Kynkäänniemi et al., 2019) by torch-fidelity.

    Raises:
        ValueError: a set has no more images than `neighbours`.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    if min(len(generated.features), len(real.features)) <= neighbours:
        counts = f"{len(generated.features)} generated and {len(real.features)} reference images"
        raise ValueError(f"needs more than prc_neighbours {neighbours} images of each set, got {counts}")
    a_NF, b_NF = (torch.from_numpy(np.stack(list(images.features.values()))) for images in (generated, real))
    out = prc_features_to_metric(
        a_NF, b_NF, prc_neighborhood=neighbours, prc_batch_size=10000, save_cpu_ram=True, verbose=False
    )
    return {"precision": out["precision"], "recall": out["recall"]}


def clip_scores(network: ClipNetwork, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
    """100 x the cosine between each image and its text, in CLIP's space."""
    cosine_B = torch.nn.functional.cosine_similarity(network.images(images), network.texts(texts))
    return (100 * cosine_B).tolist()
