"""The networks that metrics use: where their weights are, whether they are the right ones, and how to call them.

Nothing is downloaded unless asked for. Every file is checked against the hash that its publisher put into its name or
address before it is read: a damaged or different network gives numbers that look right. Tests put small stand-ins in
place of `open_inception` and `open_clip_network`.

Shapes: B batch, H x W pixels, F features, D dimensions of CLIP's space.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from latent_verse.config import ConfigError
from latent_verse.config.messages import reason

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"


class NetworkMissing(ValueError):
    """A network's weights are missing or are other weights. The message names the file and its source."""


class NotDownloaded(NetworkMissing):
    """Nobody asked for its weights to be downloaded; they have an address."""


@dataclass(frozen=True)
class Weights:
    """A file of published weights: where it belongs, its source, and the first digits of its SHA-256, if published."""

    file: Path
    url: str
    sha256: str

    def find(self, download: bool = False) -> Path:
        """The file, checked; `download` fetches it if it does not exist.

        Raises:
            NetworkMissing: it does not exist or cannot be fetched, or has another hash.
        """
        if not self.file.is_file():
            if not download:
                kind = NotDownloaded if "://" in self.url else NetworkMissing
                raise kind(f"needs {self.file}, from {self.url}")
            self.file.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(self.url, str(self.file), hash_prefix=self.sha256 or None)
            except Exception as error:  # urllib, ssl and socket raise kinds of their own
                raise NetworkMissing(
                    f"needs {self.file}, from {self.url}, which cannot be reached: {reason(error)}"
                ) from error
        found = sha256(self.file)
        if not found.startswith(self.sha256):
            raise NetworkMissing(
                f"needs {self.file}, but that file's SHA-256 begins with {found[:8]}, not {self.sha256[:8]}: it is "
                f"damaged or another network. Put {self.url} there"
            )
        return self.file


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()


def inception_weights() -> Weights:
    """torch-fidelity's port of the original FID's InceptionV3, in torch's cache ($TORCH_HOME, or ~/.cache/torch).

    Raises:
        NetworkMissing: torch-fidelity is not installed.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise NetworkMissing("needs the package torch-fidelity: pip install '.[eval]'")
    return Weights(Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION, INCEPTION_URL, "6726825d")


def vgg16_weights() -> Weights:
    """VGG16 of LPIPS; torchvision puts the digits of the hash into the file's name."""
    from torchvision.models import VGG16_Weights

    from latent_verse.augvae.losses import vgg16_file

    return Weights(vgg16_file(), VGG16_Weights.IMAGENET1K_V1.url, vgg16_file().stem.rsplit("-", 1)[1])


def clip_weights(model: str, pretrained: str) -> Weights:
    """Weights of an open_clip model, by a file or a tag that has an address.

    Raises:
        NetworkMissing: there is no such tag.
    """
    if os.path.sep in pretrained or Path(pretrained).is_file():
        return Weights(Path(pretrained), "where it was published", "")
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    url = get_pretrained_cfg(model, pretrained).get("url", "")
    if not url:
        tags = [tag for tag in list_pretrained_tags_by_model(model) if get_pretrained_cfg(model, tag).get("url")]
        known = ", ".join(tags) or "none with an address; give a file"
        raise NetworkMissing(f"needs weights of {model} that open_clip can fetch: {pretrained!r} is not one of {known}")
    name = url.rsplit("/", 1)[1]
    digits = url.split("/")[-2] if "openaipublic" in url else Path(name).stem.rsplit("-", 1)[-1]
    digits = digits if re.fullmatch("[0-9a-f]{8,64}", digits) else ""  # not everyone publishes a hash
    return Weights(Path("~/.cache/clip").expanduser() / name, url, digits)


class Inception(nn.Module):
    """torch-fidelity's InceptionV3 with the original's weights and resizing: uint8 (B, 3, H, W) -> (B, 2048) float32.

    Always in float32 and evaluation mode: half precision changes FID.
    """

    num_features = 2048
    described = "InceptionV3 of torch-fidelity, 2048 features, resized to 299 px as the original (bilinear)"

    def __init__(self, file: Path):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.net = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(file))

    def features_and_logits(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 2048) and (B, 1008) float32."""
        with torch.no_grad(), torch.autocast(x_BCHW.device.type, enabled=False):
            features_BF, logits_BV = self.net(x_BCHW)
        return features_BF, logits_BV

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The features alone."""
        return self.features_and_logits(x_BCHW)[0]

    def train(self, mode: bool = True) -> Inception:
        """Stays in evaluation mode."""
        return super().train(False)


def open_inception() -> Inception:
    """InceptionV3 on the CPU.

    Raises:
        NetworkMissing: see `inception_weights` and `Weights.find`.
    """
    return Inception(inception_weights().find())


@dataclass(frozen=True, eq=False)
class ClipNetwork:
    """An open_clip model in evaluation mode: images and texts -> unit vectors (B, D) float32 on the CPU."""

    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    described: str
    device: str

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """The vectors of images of any size, which the model's own preprocessing resizes."""
        x_BCHW = torch.stack([self.preprocess(image) for image in images]).to(self.device)
        return self.model.encode_image(x_BCHW, normalize=True).float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """The vectors of texts; the model's tokenizer truncates those that exceed its context."""
        from latent_verse.data.text import LONG, beginning  # imports tokenizers, which no other network needs

        tokens = self.tokenizer([beginning(text, LONG) for text in texts])
        return self.model.encode_text(tokens.to(self.device), normalize=True).float().cpu()


def open_clip_network(model: str, pretrained: str, device: str = "cpu") -> ClipNetwork:
    """CLIP by open_clip, from a checked file.

    Raises:
        NetworkMissing: see `clip_weights` and `Weights.find`.
        ConfigError: no such architecture, or a file that does not hold its weights.
    """
    import open_clip

    if model not in open_clip.list_models():
        near = difflib.get_close_matches(model, open_clip.list_models(), n=1)
        hint = f"Did you mean {near[0]}?" if near else "open_clip.list_models() has them all."
        raise ConfigError(f"clip_model: {model} is not an architecture of open_clip. {hint}")
    weights = clip_weights(model, pretrained)
    file = weights.find()
    # given a file, open_clip would not know what the tag says about the architecture and the preprocessing
    tag = open_clip.pretrained.get_pretrained_cfg(model, pretrained)
    logging.disable(logging.WARNING)  # it warns of random weights, which the file's replace below
    try:
        net, _, preprocess = open_clip.create_model_and_transforms(
            model,
            force_quick_gelu=tag.get("quick_gelu", False),
            image_mean=tag.get("mean"),
            image_std=tag.get("std"),
            image_interpolation=tag.get("interpolation"),
            image_resize_mode=tag.get("resize_mode"),
        )
        tokenizer = open_clip.get_tokenizer(model)
    except Exception as error:  # some need other packages, or fetch parts of themselves from the hub
        raise ConfigError(f"clip_model: {model} cannot be built ({reason(error)}). Take another.") from error
    finally:
        logging.disable(logging.NOTSET)
    # OpenAI's files are TorchScript archives, which `weights_only` refuses: only files of known hash may be such
    try:
        open_clip.load_checkpoint(net, str(file), weights_only=not weights.sha256)
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        why = f"{type(error).__name__}: {reason(error)}"
        raise ConfigError(f"clip_weights: {file} cannot be read as weights of {model}: {why}") from error
    # a metric says whose weights it used: a tag identifies them, the name of a file does not
    known = pretrained if weights.sha256 else f"{Path(pretrained).name} (SHA-256 {sha256(file)[:16]})"
    return ClipNetwork(net.to(device).eval(), preprocess, tokenizer, f"CLIP {model} {known}", device)
