"""LVerse: AugVAE, BiART and a tokenizer as one thing that draws pictures from texts and writes texts about pictures.

    model = LVerse.from_pretrained("results/shapes/bundle")
    [[picture]] = model.text_to_image(["a red circle"])
    [[caption]] = model.image_to_text([picture])

Shape suffixes: B samples, R references, D draws of each, I images, T texts, N image codes, L text tokens.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latent_verse.augvae.model import AugVAE
from latent_verse.biart.model import BiART
from latent_verse.biart.sequence import IMAGE_TO_TEXT, TEXT_TO_IMAGE
from latent_verse.checkpoints.bundle import fingerprints, load_bundle, save_bundle
from latent_verse.checkpoints.files import CheckpointError
from latent_verse.config import ConfigError
from latent_verse.drawing import LARGEST_CHUNK, Drawing
from latent_verse.pictures import Picture, load_image, to_pictures

CHUNK_PIXELS = 2**20  # that go through AugVAE at a time
TOO_LONG = ("truncate", "error")


def known_settings(method: Callable) -> Callable:
    """Unknown keywords become a ConfigError that names the nearest known one."""
    names = [name for name in inspect.signature(method).parameters if name != "self"]

    @functools.wraps(method)
    def checked(*args, **kwargs):
        for name in kwargs:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"Did you mean {near[0]}?" if near else f"It takes {', '.join(names)}."
                raise ConfigError(f"{method.__name__} has no setting {name}. {hint}")
        return method(*args, **kwargs)

    return checked


class LVerse(Drawing):
    """Both directions of one model. All methods leave the modules' training mode and the gradients alone.

    Samples depend on the seed, their own text or picture and their number among the draws for it, not on what else is
    in the call: a picture can be drawn again alone. `seed=None` takes one from torch's global generator.

    Attributes:
        vae, biart, tokenizer: the parts. AugVAE is set to evaluation mode.
        info: how they were trained; `reference_dropout` above 0 is what allows guidance and drawing without a text.
        batch_size: samples at a time; None chooses by memory.
        progress: show a progress bar on stderr.
        too_long: "truncate" a text that exceeds text_len, with a warning, or make it an "error".
    """

    def __init__(self, vae: AugVAE, biart: BiART, tokenizer, info: dict[str, Any]):
        """Raises ConfigError where the parts do not belong together."""
        v, b = vae.config, biart.config
        for what, mine, theirs, value in (
            ("image_vocab", b.image_vocab, "AugVAE's codebook (num_tokens)", v.num_tokens),
            ("image_len", b.image_len, f"AugVAE's codes of one picture (levels {vae.code_levels})", vae.num_codes),
            ("text_vocab", b.text_vocab, "tokenizer's vocabulary", tokenizer.vocab_size),
        ):
            if mine != value:
                raise ConfigError(
                    f"{what} of BiART is {mine}, but the {theirs} is {value}: they were not trained together. "
                    "Use the AugVAE and the tokenizer that BiART was trained with."
                )
        if (v.in_channels, v.out_channels) != (3, 3):
            raise ConfigError(f"AugVAE has {v.in_channels} channels in and {v.out_channels} out; pictures have 3.")
        dropout = info.get("reference_dropout", 0)
        if not 0 <= dropout <= 1:
            raise ConfigError(f"info: reference_dropout is {dropout}; it is a probability.")
        super().__init__(biart, null_trained=dropout > 0)
        self.vae, self.tokenizer, self.info = vae.eval(), tokenizer, dict(info)
        self.too_long = "truncate"

    # ------------------------------------------------------------------------------------------------------- bundles

    @classmethod
    def from_pretrained(cls, directory_or_id, device=None, dtype: torch.dtype | str | None = None) -> LVerse:
        """Load what `save_pretrained` wrote, from a folder or a Hugging Face hub id, in evaluation mode.

        device: default the GPU where there is one, else the CPU. dtype: BiART's (torch.bfloat16, "float16", ...);
        default as stored. AugVAE stays in float32: lower precision picks wrong codes.

        Raises:
            CheckpointError: absent, incomplete, damaged, of another kind, or parts that do not belong together.
            ConfigError: no such dtype.
        """
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, dtype)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigError(f"dtype is {dtype!r}; give float32, bfloat16 or float16.")
        vae, biart, tokenizer, info, fingerprints = load_bundle(directory_or_id)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model = cls(vae.to(device), biart.to(device=device, dtype=dtype), tokenizer, info)
        except ConfigError as error:
            raise CheckpointError(f"{directory_or_id}: {error}") from error
        model.fingerprints = fingerprints
        return model

    def save_pretrained(self, directory) -> None:
        """Write a bundle: config.json, vae/, biart.safetensors, tokenizer/. Raises CheckpointError if it is not one."""
        save_bundle(directory, self.vae, self.biart, self.tokenizer, self.info)

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """16 hexadecimal digits for each of vae, biart and tokenizer, as the bundle records them."""
        return fingerprints(self.vae, self.biart, self.tokenizer)

    # --------------------------------------------------------------------------------------------------- text → image

    @known_settings
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
        """Draw `num_images` pictures for every text. Raises ValueError for texts or settings that cannot be used.

        temperature 0 is greedy: one picture a text. top_k and top_p cut the unlikely codes. guidance above 1 follows
        the text more closely, at twice the work. rerank: draw so many for each picture wanted, keep the one with the
        largest log p(text | picture).
        """
        settings = self._settings(TEXT_TO_IMAGE, num_images, temperature, top_k, top_p, guidance, rerank)
        text_RL = self.encode_texts(texts)
        codes_RDN = self._draw(text_RL, TEXT_TO_IMAGE, num_images, rerank, seed, settings)
        return self._pictures(codes_RDN)

    @known_settings
    def draw_scored(
        self,
        texts: Sequence[str],
        num_images: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        seed: int | None = None,
    ) -> tuple[list[list[Image.Image]], Tensor]:
        """As `text_to_image`, and log p(text | the codes drawn) of each: (texts, num_images) float32 on the CPU."""
        settings = self._settings(TEXT_TO_IMAGE, num_images, temperature, top_k, top_p, guidance)
        text_RL = self.encode_texts(texts)
        codes_RDN = self._draw(text_RL, TEXT_TO_IMAGE, num_images, 0, seed, settings)
        score_B = self.log_p(text_RL.repeat_interleave(num_images, dim=0), codes_RDN.flatten(0, 1), "image")
        return self._pictures(codes_RDN), score_B.view(len(text_RL), num_images)

    @known_settings
    def complete(
        self,
        images: Sequence[Picture],
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
        """Keep the top `keep_rows` rows of every picture's codes and draw the rest, `num_images` times.

        text: for all pictures, or one for each. Without one the model draws without a reference, which it must have
        been trained for (reference_dropout). Other settings as `text_to_image`. Raises ValueError as it does.
        """
        settings = self._settings(TEXT_TO_IMAGE, num_images, temperature, top_k, top_p, guidance, rerank)
        if len(self.vae.code_levels) != 1:
            raise ConfigError(
                f"complete needs an AugVAE with one level of codes; this one has {self.vae.code_levels}: its rows lie "
                "in several grids. Train BiART on an AugVAE-SL."
            )
        (side,) = self.vae.code_levels
        if not 1 <= keep_rows < side:
            raise ConfigError(f"keep_rows (--rows) is {keep_rows}; of {side} rows of codes keep 1 to {side - 1}.")
        if text is None:
            if not self.null_trained:
                raise ConfigError(
                    "This model was trained without reference_dropout, so it cannot draw without a text: give one."
                )
            if guidance != 1 or rerank > 1:
                raise ConfigError("guidance and rerank follow a text: give one, or leave them out.")
        codes_IN = self.codes(images)
        if text is None:
            text_IL = self.biart.vocab.null_reference(len(codes_IN), TEXT_TO_IMAGE)
        else:
            text_IL = self.encode_texts([text] * len(codes_IN) if isinstance(text, str) else text)
        if len(text_IL) != len(codes_IN):
            raise ConfigError(f"{len(text_IL)} texts for {len(codes_IN)} pictures: give one text, or one for each.")
        prefix_IK = codes_IN[:, : keep_rows * side]
        return self._pictures(self._draw(text_IL, TEXT_TO_IMAGE, num_images, rerank, seed, settings, prefix_IK))

    # --------------------------------------------------------------------------------------------------- image → text

    @known_settings
    def image_to_text(
        self,
        images: Sequence[Picture],
        num_captions: int = 1,
        temperature: float = 0.0,
        seed: int | None = None,
        beams: int = 1,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
    ) -> list[list[str]]:
        """Write `num_captions` captions for every picture: the greedy one, sampled ones (temperature above 0), or the
        likeliest that `beams` beams find. Raises ValueError for pictures or settings that cannot be used."""
        settings = self._settings(IMAGE_TO_TEXT, num_captions, temperature, top_k, top_p, guidance)
        if beams < 1:
            raise ConfigError(f"beams is {beams}; it must be at least 1.")
        if beams > 1 and (temperature > 0 or num_captions > 1 or guidance != 1):
            raise ConfigError(
                "beams search for the one likeliest caption: leave out temperature, num_captions and guidance."
            )
        codes_RN = self.codes(images)
        if beams > 1:
            ids_BL = self._beam_search(codes_RN, beams)
        else:
            ids_BL = self._draw(codes_RN, IMAGE_TO_TEXT, num_captions, 0, seed, settings).flatten(0, 1)
        captions = self.tokenizer.decode_batch(self.biart.vocab.unpad_text(ids_BL))
        return [captions[start : start + num_captions] for start in range(0, len(captions), num_captions)]

    # --------------------------------------------------------------------------------------------------------- scores

    @known_settings
    def score(self, images: Sequence[Picture], texts: Sequence[str], given: str = "image") -> Tensor:
        """log p(text | image) in nats, the end of the text included, or with given="text" log p(image's codes | text).

        Every image with every text: (I, T) float32 on the CPU. Raises ValueError for input that cannot be used.
        """
        if given not in ("image", "text"):
            raise ConfigError(f"given is {given!r}; it must be image or text.")
        text_TL, codes_IN = self.encode_texts(texts), self.codes(images)
        images, texts = len(codes_IN), len(text_TL)
        total_B = self.log_p(text_TL.repeat(images, 1), codes_IN.repeat_interleave(texts, dim=0), given)
        return total_B.view(images, texts)

    @known_settings
    def reconstruct(self, images: Sequence[Picture]) -> list[Image.Image]:
        """The pictures as their codes hold them, centre-cropped to the model's resolution."""
        return [picture for row in self._pictures(self.codes(images)[:, None]) for picture in row]

    # ---------------------------------------------------------------------------------------------------------- parts

    def codes(self, images: Sequence[Picture]) -> Tensor:
        """AugVAE's codes (I, N) int64, on the CPU, of pictures as `load_image` takes them.

        Raises DataError for a picture that cannot be used, ConfigError where there is none.
        """
        images = _listed(images, (Image.Image, str, os.PathLike), "images")
        resolution, size = self.vae.config.resolution, self._vae_chunk()
        device = self.vae.device
        out = []
        for start in range(0, len(images), size):
            x_BCHW = torch.stack([load_image(image, resolution) for image in images[start : start + size]])
            out.append(self.vae.codes(x_BCHW.to(device)).cpu())
        return torch.cat(out)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Padded ids text_TL on the CPU. Too long ones are cut with a warning, or a TokenizerError (`too_long`)."""
        texts = _listed(texts, str, "texts")
        if self.too_long not in TOO_LONG:
            raise ConfigError(f"too_long is {self.too_long!r}; it must be one of {', '.join(TOO_LONG)}.")
        length = self.biart.config.text_len
        ids = self.tokenizer.encode_batch(texts)
        for i, (text, row) in enumerate(zip(texts, ids, strict=True)):
            if len(row) > length:
                (ids[i],) = self.tokenizer.encode_batch([text], length, self.too_long)
                kept = self.tokenizer.decode(ids[i])
                warnings.warn(f"text {i} has {len(row)} tokens, text_len is {length}: cut to {kept!r}", stacklevel=4)
        return self.biart.vocab.pad_text(ids)

    def _pictures(self, codes_RDN: Tensor) -> list[list[Image.Image]]:
        device, draws = self.vae.device, codes_RDN.shape[1]
        pictures = []
        for part_BN in codes_RDN.flatten(0, 1).split(self._vae_chunk()):
            pictures += to_pictures(self.vae.decode_codes(part_BN.to(device)))
        return [pictures[start : start + draws] for start in range(0, len(pictures), draws)]

    def _vae_chunk(self) -> int:
        return self.batch_size or max(1, min(LARGEST_CHUNK, CHUNK_PIXELS // self.vae.config.resolution**2))


def _listed(items, single: type | tuple[type, ...], what: str) -> list:
    """A list of one or more; a single text or picture counts as one."""
    if isinstance(items, single) or (isinstance(items, Tensor) and items.dim() == 3):
        items = [items]
    try:
        items = list(items)
    except TypeError:
        raise ConfigError(f"{what} is a {type(items).__name__}; give a list.") from None
    if not items:
        raise ConfigError(f"{what} is an empty list: give at least one.")
    return items
