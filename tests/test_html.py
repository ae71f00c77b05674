"""Pages show whatever a text holds, and nothing in it changes the rest of the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from latent_verse.evaluation.page import Case, Gallery, write
from latent_verse.evaluation.records import Records
from latent_verse.html import PAGES

HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def page_of(folder: Path, text: str) -> str:
    """An evaluation's page with this text in every place that can hold one."""
    records = Records({"biart": "1"}, 0)
    records.add(text, 1.0, samples=1, library="x 1.0", protocol=text)
    records.miss(f"{text}!", text)
    case = Case(0.5, Image.new("RGB", (8, 8), "red"), text, note=text)
    gallery = Gallery(text, text, {text: [case]})
    write(folder / "index.html", text, records, [gallery], {text: text}, f"a:\n  b: {text}\n")
    return (folder / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "hidden", ["\x1b[31m", "\u202e", "\u2066", "\0", "\x85", "\u2028", "\x7f", "\udcff", "\r"], ids=ascii
)
def test_what_cannot_be_seen_is_shown_as_an_escape(tmp_path, hidden):
    page = page_of(tmp_path, f"a {hidden}gpj.exe")
    assert not HIDDEN.search(page)
    escape = hidden.encode("unicode_escape").decode()
    assert page.count(escape) >= 12  # title, tables, heading, alt, text, note, settings


def test_texts_are_escaped_once(tmp_path):
    page = page_of(tmp_path, "<b>a</b> & \"c\" 'd' \u202e/e")
    assert "<b>a" not in page and "&amp;lt;" not in page and "&amp;amp;" not in page
    assert r"&lt;b&gt;a&lt;<wbr>" not in page and r"\u202e" in page


def test_other_writing_stays_and_has_its_own_direction(tmp_path):
    text = "دائرة حمراء (2) 👩🏾‍🦱 赤い丸 é\u200b"
    page = page_of(tmp_path, text)
    assert f'<p dir="auto">{text}</p>' in page and f'<p class="note" dir="auto">{text}</p>' in page
    assert "a:\n  b: " in page  # lines of the settings


def test_values_that_are_no_text_are_shown_as_they_are():
    template = PAGES.from_string("{{ a }} {{ b }} {{ c }} {{ 'x\\ty' }}")
    assert template.render(a=1, b=2.5, c=None) == "1 2.5 None x\ty"
