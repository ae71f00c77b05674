"""LVerse: AugVAE, BiART and a tokenizer as one model that generates images from texts and captions from images.

    model = LVerse.from_pretrained()                       # or a bundle, as training writes: "results/NAME/bundle"
    [[image]] = model.text_to_image(["a red circle"])
    [[caption]] = model.image_to_text([image])

Shape suffixes: B samples, R references, S samples of each, I images, T texts, N image codes, K kept, L text tokens.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.biart.sequence import IMAGE_TO_TEXT, TEXT_TO_IMAGE, Modality
from latent_verse.checkpoints.bundle import (
    bundle_card,
    check_parts,
    describe_bundle,
    fingerprints,
    load_bundle,
    save_bundle,
)
from latent_verse.checkpoints.ckpt_files import CheckpointError
from latent_verse.checkpoints.hub import PushToHub
from latent_verse.checkpoints.shipped import default_model, say_default
from latent_verse.config import ConfigError
from latent_verse.config.evaluate import CaptionConfig
from latent_verse.config.settings import check
from latent_verse.data.text import Tokenizer
from latent_verse.inference.arguments import encode_texts, listed, names_checked
from latent_verse.inference.batching import Sampler, whole
from latent_verse.inference.image_io import SINGLE, ImageLike, decode_images, encode_images
from latent_verse.inference.placement import best_device, chosen_device, chosen_dtype, dtype_for

VAE_BYTES_PER_PIXEL = 4096  # roughly what the activations of AugVAE take


class LVerse(PushToHub):
    """Both directions of one model. No method but `eval` changes the modules' training mode; none their gradients.

    Samples depend on the seed, on their own text or image, and on their number among the samples of it, but not on
    what else is in the call: one image can be generated again alone. `seed=None` takes one from torch's global
    generator. The attributes `null_trained`, `batch_size` and `progress` are those of a `Sampler`.

    Args:
        vae, biart, tokenizer: the parts. AugVAE is set to evaluation mode.
        info: how they were trained; reference_dropout sets `null_trained`.

    Attributes:
        too_long: "truncate" a text of more than text_len tokens, with a warning, or make it an "error".

    Raises:
        ConfigError: the parts do not belong together.
    """

    def __init__(self, vae: AugVAE, biart: BiART, tokenizer: Tokenizer, info: dict[str, Any]):
        check_parts(vae, biart, tokenizer, info)
        self.vae, self.biart, self.tokenizer, self.info = vae.eval(), biart, tokenizer, dict(info)
        self.null_trained: bool = info.get("reference_dropout", 0) > 0
        self.batch_size: int | None = None
        self.progress = False
        self.too_long = "truncate"

    @classmethod
    def from_pretrained(
        cls,
        directory_or_id: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> LVerse:
        """Load what `save_pretrained` wrote, from a folder or a Hugging Face hub id, in evaluation mode.

        Args:
            directory_or_id: or the name of a model of `latent-verse models`. None takes shapes, and says so once.
            device: None takes `best_device`.
            dtype: BiART's (torch.bfloat16, "float16", ...). None keeps the stored one; "auto" does so too, except on
                a GPU, where it samples faster and scores less exactly (`sampling_dtype`). `save_pretrained` writes the
                weights as they then are. AugVAE's weights stay float32 and it encodes in float32, as lower precision
                picks wrong codes.

        Raises:
            CheckpointError: absent, incomplete, damaged, of another kind, or parts that do not belong together.
            ConfigError: no such dtype, no such device on this machine, or as `config.settings.expand`.
        """
        if directory_or_id is None:
            directory_or_id = default_model()
            say_default()
        device, dtype = chosen_device(best_device() if device is None else device), chosen_dtype(dtype)
        vae, biart, tokenizer, info, recorded = load_bundle(directory_or_id)
        try:
            model = cls(vae, biart, tokenizer, info)
        except ConfigError as error:
            raise CheckpointError(f"{directory_or_id}: {error}") from error
        model.fingerprints = recorded
        return model.to(device, dtype)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write a bundle.

        Raises:
            CheckpointError: the folder holds something other than a bundle, or a weight is not finite.
            ConfigError, FileError: as `checkpoints.bundle.save_bundle`.
        """
        save_bundle(directory, self.vae, self.biart, self.tokenizer, self.info)

    def model_card(self, name: str) -> str:
        """The text of a model card, which `push_to_hub` adds, for the repository `name`."""
        return bundle_card(self.vae, self.biart, self.tokenizer, name)

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """16 hexadecimal digits for each of vae, biart and tokenizer, as the bundle records them."""
        return fingerprints(self.vae, self.biart, self.tokenizer)

    def __repr__(self) -> str:
        parts = describe_bundle(self.vae, self.biart, self.tokenizer)
        return "\n  ".join(["LVerse(", *parts, f"device: {self.device}"]) + "\n)"

    @property
    def device(self) -> torch.device:
        """Where the model computes. Results are returned on the CPU."""
        return self.vae.device

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | str | None = None
    ) -> LVerse:
        """Move the model, in place, and return it.

        Args:
            device: None leaves it where it is. A torch.dtype is taken for `dtype`, as torch's `.to` does.
            dtype: BiART's, as in `from_pretrained`; AugVAE stays float32.

        Raises:
            ConfigError: no such dtype, no such device on this machine, or BiART is quantised and cannot be moved.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        place = self.device if device is None else chosen_device(device)
        self.biart.to(device=place, dtype=dtype_for(self.biart, place, dtype))
        self.vae.to(place)
        return self

    def eval(self) -> LVerse:
        """Set both networks to evaluation mode, as a loaded model is."""
        self.vae, self.biart = self.vae.eval(), self.biart.eval()
        return self

    def train(self, mode: bool = True) -> NoReturn:
        """An LVerse is for use: train_biart.py trains one, and `biart` and `vae` are ordinary modules."""
        raise ConfigError("LVerse has no training mode: train with train_biart.py, or call .train() of model.biart.")

    @property
    def sampler(self) -> Sampler:
        """What generates and scores tokens in batches."""
        return Sampler(self.biart, self.null_trained, self.batch_size, self.progress)

    @names_checked
    def text_to_image(
        self,
        texts: Sequence[str],
        num_images: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        rerank: int = 0,
        seed: int | None = None,
    ) -> list[list[Image.Image]]:
        """Generate `num_images` images for every text.

        Args:
            temperature: 0 is greedy: one image per text.
            top_k, top_p: sample from the k likeliest codes, or from those that make up this probability.
            guidance: above 1 follows the text more closely, at twice the work.
            rerank: sample this many images for each one returned: the one with the largest log p(text | image).

        Raises:
            ConfigError: a setting cannot be used.
            TokenizerError: a text cannot be used.
        """
        sampling = self.sampler.checked(TEXT_TO_IMAGE, num_images, rerank, temperature, top_k, top_p, guidance)
        codes_RSN = self.sampler.sample(self.encode_texts(texts), TEXT_TO_IMAGE, num_images, sampling, seed, rerank)
        return self._images(codes_RSN)

    @names_checked
    def sample_scored(
        self,
        texts: Sequence[str],
        num_images: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        seed: int | None = None,
    ) -> tuple[list[list[Image.Image]], Tensor]:
        """As `text_to_image`, with log p(text | sampled codes) of each image, (texts, num_images) float32, on CPU."""
        sampling = self.sampler.checked(TEXT_TO_IMAGE, num_images, 0, temperature, top_k, top_p, guidance)
        text_RL = self.encode_texts(texts)
        codes_RSN = self.sampler.sample(text_RL, TEXT_TO_IMAGE, num_images, sampling, seed)
        log_p_B = self.log_p(repeat(text_RL, "R L -> (R S) L", S=num_images), codes_RSN.flatten(0, 1), "image")
        return self._images(codes_RSN), rearrange(log_p_B, "(R S) -> R S", S=num_images)

    @names_checked
    def complete(
        self,
        images: Sequence[ImageLike],
        keep_rows: int,
        text: str | Sequence[str] | None = None,
        num_images: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        rerank: int = 0,
        seed: int | None = None,
    ) -> list[list[Image.Image]]:
        """Keep the top `keep_rows` rows of every image's codes and generate the rest, `num_images` times.

        Args:
            text: one for all images, or one for each. None needs a model trained with reference_dropout.
            num_images and all after it: as in `text_to_image`.

        Raises:
            ConfigError: a setting cannot be used, AugVAE has several levels of codes, or the model needs a text.
            DataError: an image cannot be read.
            TokenizerError: a text cannot be used.
        """
        sampling = self.sampler.checked(TEXT_TO_IMAGE, num_images, rerank, temperature, top_k, top_p, guidance)
        if len(self.vae.code_levels) != 1:
            raise ConfigError(f"complete needs one level of codes, not {self.vae.code_levels}. Train on an AugVAE-SL.")
        (side,) = self.vae.code_levels
        keep_rows = whole("keep_rows (--rows)", keep_rows, 1, side - 1, f", of {side} rows of codes")
        if text is None and not self.null_trained:
            raise ConfigError("This model was trained without reference_dropout, so it needs a text: give one.")
        if text is None and (guidance != 1 or rerank > 1):
            raise ConfigError("guidance and rerank follow a text: give one, or leave them out.")
        codes_IN = self.codes(images)
        texts = [text] * len(codes_IN) if isinstance(text, str) else text
        nulls_IL = self.biart.vocab.null_reference(len(codes_IN), TEXT_TO_IMAGE)
        text_IL = nulls_IL if texts is None else self.encode_texts(texts)
        if len(text_IL) != len(codes_IN):
            raise ConfigError(f"{len(text_IL)} texts for {len(codes_IN)} images: give one text, or one for each.")
        kept_IK = codes_IN[:, : keep_rows * side]
        return self._images(self.sampler.sample(text_IL, TEXT_TO_IMAGE, num_images, sampling, seed, rerank, kept_IK))

    @names_checked
    def image_to_text(
        self,
        images: Sequence[ImageLike],
        num_captions: int = 1,
        temperature: float = 0.0,
        seed: int | None = None,
        beams: int = 1,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
    ) -> list[list[str]]:
        """Generate `num_captions` captions for every image.

        Args:
            temperature: 0 gives the greedy caption, above 0 samples.
            beams: above 1, the likeliest caption that this many beams find, in place of sampling.
            top_k, top_p, guidance: as in `text_to_image`, for tokens of text.

        Raises:
            ConfigError: a setting cannot be used.
            DataError: an image cannot be read.
        """
        sampling = self.sampler.checked(IMAGE_TO_TEXT, num_captions, 0, temperature, top_k, top_p, guidance)
        check(CaptionConfig, beams=beams)
        if beams > 1 and (temperature > 0 or num_captions > 1 or guidance != 1):
            raise ConfigError("beams search for one caption: leave out temperature, num_captions and guidance.")
        codes_RN = self.codes(images)
        if beams > 1:
            text_RSL = self.sampler.beam_search(codes_RN, beams)[:, None]
        else:
            text_RSL = self.sampler.sample(codes_RN, IMAGE_TO_TEXT, num_captions, sampling, seed)
        return [self.tokenizer.decode_batch(self.biart.vocab.unpad_text(text_SL)) for text_SL in text_RSL]

    @names_checked
    def score(self, images: Sequence[ImageLike], texts: Sequence[str], given: Modality = "image") -> Tensor:
        """log p of every image with every text, in nats: (I, T) float32 on the CPU.

        Args:
            given: "image" for log p(text | image), the end of the text included; "text" for log p(codes | text).

        Raises:
            ConfigError: no such `given`, or no image or text.
            DataError: an image cannot be read.
            TokenizerError: a text cannot be used.
        """
        if given not in ("image", "text"):
            raise ConfigError(f"given is {given!r}; it must be image or text.")
        text_TL, codes_IN = self.encode_texts(texts), self.codes(images)
        text_BL = repeat(text_TL, "T L -> (I T) L", I=len(codes_IN))
        codes_BN = repeat(codes_IN, "I N -> (I T) N", T=len(text_TL))
        return rearrange(self.log_p(text_BL, codes_BN, given), "(I T) -> I T", I=len(codes_IN))

    def reconstruct(self, images: Sequence[ImageLike]) -> list[Image.Image]:
        """The images as AugVAE decodes their codes, centre-cropped to its resolution; see `codes`."""
        return self.decode_codes(self.codes(images))

    def log_p(self, text_BL: Tensor, codes_BN: Tensor, given: Modality, alone: bool = False) -> Tensor:
        """`Sampler.log_p`."""
        return self.sampler.log_p(text_BL, codes_BN, given, alone)

    def codes(self, images: Sequence[ImageLike]) -> Tensor:
        """AugVAE's codes of images: (I, N) int64, on the CPU.

        Raises:
            ConfigError: there is no image.
            DataError: an image cannot be read.
        """
        return encode_images(self.vae, listed(images, SINGLE, "images"), self._images_at_a_time())

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Padded text ids (T, L) int64, on the CPU.

        Raises:
            ConfigError: there is no text.
            TokenizerError: a text cannot be used, or there is no such `too_long`.
        """
        return encode_texts(self.tokenizer, listed(texts, str, "texts"), self.biart.vocab, self.too_long)

    def decode_codes(self, codes_IN: Tensor) -> list[Image.Image]:
        """The images that AugVAE decodes from codes (I, N) int64, on any device, as `codes` returns them.

        Raises:
            ValueError: they are no such codes (`AugVAE.decode_codes`).
        """
        return decode_images(self.vae, codes_IN, self._images_at_a_time())

    def _images(self, codes_RSN: Tensor) -> list[list[Image.Image]]:
        images, num = self.decode_codes(codes_RSN.flatten(0, 1)), codes_RSN.shape[1]
        return [images[i : i + num] for i in range(0, len(images), num)]

    def _images_at_a_time(self) -> int:
        return self.sampler.rows_at_a_time(VAE_BYTES_PER_PIXEL * self.vae.config.resolution**2)
