"""What users give to `LVerse`: lists of texts or images, and arguments by the names that other libraries have for them.

Shapes: B images of H x W pixels; T texts of L tokens.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np
from torch import Tensor

from latent_verse.biart.sequence import Vocabulary
from latent_verse.config import ConfigError
from latent_verse.config.messages import closest
from latent_verse.data.text import Tokenizer

# of diffusers, transformers and earlier papers' code: what the argument is called here, the first that a method has
OTHER_NAMES = {
    **dict.fromkeys(("generator", "generators", "manual_seed", "random_seed"), ("seed",)),
    **dict.fromkeys(("prompt", "prompts", "text", "caption", "captions"), ("texts", "text")),
    **dict.fromkeys(("image", "pixel_values"), ("images",)),
    **dict.fromkeys(("num_samples", "num_return_sequences", "num_images_per_prompt"), ("num_images", "num_captions")),
    **dict.fromkeys(("guidance_scale", "cfg_scale", "cond_scale"), ("guidance",)),
    "num_beams": ("beams",),
}
ABOUT_TEXTS = r"text \d+ has \d+ tokens|unknown words"  # how warnings of `encode_texts` begin
P = ParamSpec("P")
R = TypeVar("R")


def names_checked(method: Callable[P, R]) -> Callable[P, R]:
    """The same, but an argument that it does not have is answered with what it is called here.

    The call then raises TypeError, as Python's own check does.
    """
    known = list(inspect.signature(method).parameters)[1:]  # without self

    @functools.wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in [name for name in kwargs if name not in known]:
            here = next((other for other in OTHER_NAMES.get(name, ()) if other in known), None)
            what = " (a whole number)" if here == "seed" else ""
            instead = f"; it is called {here}{what} here." if here else closest(name, known, otherwise=".")
            raise TypeError(f"{method.__name__}() has no argument {name}{instead}")
        return method(*args, **kwargs)

    return checked


def listed(items: Any, single: type | tuple[type, ...], what: str) -> list:
    """A list of one or more. A single text or image counts as one, an array or tensor of images (B, ...) as B.

    Raises:
        ConfigError: it is empty, or no list.
    """
    one = isinstance(items, single)
    one = one or (isinstance(items, Tensor) and not items.is_nested and items.dim() == 3)
    one = one or (isinstance(items, np.ndarray) and items.ndim < 4)
    if one:
        items = [items]
    try:
        items = list(items)
    except TypeError:
        raise ConfigError(f"{what} is a {type(items).__name__}; give a list.") from None
    if not items:
        raise ConfigError(f"{what} is an empty list: give at least one.")
    return items


def warn(text: str) -> None:
    """Warn of what the user's code gives: the line that is shown is the first one outside of this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("latent_verse."):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def encode_texts(tokenizer: Tokenizer, texts: list[str], vocab: Vocabulary, too_long: str) -> Tensor:
    """Padded text ids (T, L) int64. Warns of a text that is cut (`LVerse.too_long`) and of unknown words.

    Raises:
        TokenizerError: a text cannot be used, or there is no such `too_long`.
    """
    found = tokenizer.encode_counted(texts, vocab.text_len, too_long)
    for i, (kept, count) in enumerate(found):
        if count > vocab.text_len:
            cut = f"text_len is {vocab.text_len}: cut to {tokenizer.decode(kept)!r}"
            warn(f"text {i} has {count} tokens, {cut}")
    if said := tokenizer.about_unknown_words(texts):
        warn(said)
    return vocab.pad_text([kept for kept, _ in found])
