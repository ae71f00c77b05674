"""HTML pages as single files that load nothing from the network: Jinja2 templates, escaped, with embedded images.

The templates lie in `latent_verse/templates`; `base.html` has the style that all pages share, `parts.html` the macros.
"""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

from PIL import Image

from latent_verse.config import UserError, printable

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
except ModuleNotFoundError as error:
    raise UserError("pages need the package jinja2: pip install '.[eval]'") from error


def visible(value: object) -> object:
    """A value that a template shows, with what cannot be seen in a text as escapes; see `config.printable`.

    A character that turns the direction of writing would turn the rest of its line as well. Tabs and line ends stay.
    """
    if not isinstance(value, str):
        return value
    shown = re.sub(r"[^\t\n]+", lambda part: printable(part[0]), value)
    return type(value)(shown)  # markup stays markup: an escape holds nothing that HTML reads


PAGES = Environment(
    loader=PackageLoader("latent_verse"),
    autoescape=True,
    finalize=visible,
    undefined=StrictUndefined,  # a name that a template misspells is an error
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **content: object) -> str:
    """A page from a template of `latent_verse/templates`."""
    return PAGES.get_template(template).render(content)


def embedded(image: Image.Image | Path | bytes) -> str:
    """A `src` that holds the image itself: a PNG file as it is, bytes as SVG, a PIL image as PNG or, if large, JPEG."""
    kind = "svg+xml" if isinstance(image, bytes) else "png"
    if isinstance(image, Path):
        image = image.read_bytes()
    elif isinstance(image, Image.Image):
        # a page of a hundred photos would have tens of megabytes as PNG
        kind, options = ("jpeg", {"quality": 90}) if max(image.size) > 64 else ("png", {})
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format=kind, **options)
        image = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
