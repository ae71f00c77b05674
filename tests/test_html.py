"""Pages show whatever a text holds, and nothing in it changes the rest of the page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from latent_verse.evaluation.page import Case, Gallery, write
from latent_verse.evaluation.records import Records
from latent_verse.html import PAGES
from tests.browser import browser_needed, wider_than_the_page

HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def page_of(folder: Path, text: str) -> str:
    """An evaluation's page with this text in every place that can hold one."""
    records = Records({"biart": "1"}, 0)
    records.add(text, 1.0, samples=1, library="x 1.0", protocol=text)
    records.miss(f"{text}!", text)
    case = Case(0.5, {text: Image.new("RGB", (8, 8), "red")}, {text: [text, text]})
    gallery = Gallery(text, text, 1, {text: [case]})
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
    assert len(re.findall(rf'<dd dir="auto">\s*{re.escape(text)}\s*</dd>', page)) == 2
    assert "a:\n  b: " in page  # lines of the settings


def test_values_that_are_no_text_are_shown_as_they_are():
    template = PAGES.from_string("{{ a }} {{ b }} {{ c }} {{ 'x\\ty' }}")
    assert template.render(a=1, b=2.5, c=None) == "1 2.5 None x\ty"


# ---------------------------------------------------------------------------------------------------------- the layout

LONG = "a red ring left of a blue cross, " * 40
TEXTS = (
    "a red ring",
    LONG,
    "Donaudampfschifffahrt" * 20,
    "دائرة حمراء على يسار صليب أزرق (2)",
    "👩🏾‍🦱 赤い丸",
    "<b>&",
)


def full_page(folder: Path) -> Path:
    """An evaluation's page with all that is hard to lay out: long and foreign texts, five references, huge numbers."""
    records = Records({"biart": "0123456789abcdef"}, 0)
    long = "both sides resized and centre-cropped to 256 px, 8-bit; " * 5
    for name in ("generation/best_of_8_by_model/fid_0", "captions/" + "bleu" * 30, "likelihood/a", "retrieval/a/b/r@1"):
        about = {"unit": "share", "better": "higher", "interval": (-1.25e30, 9e99), "drawn": 8, "selected_by": long}
        records.add(name, 1.7e300, samples=10**12, library="torchmetrics 1.9.0", protocol=long, **about)
    for name in ("fid_1", "fid_2"):
        records.miss(f"generation/{name}", "needs /a/file, from https://somewhere/" + "long/" * 50)
    red = Image.new("RGB", (80, 80), "red")
    both = [Case(1e300, {"true image": red, "generated": red}, {"text": [text]}) for text in TEXTS]
    one = [Case(-1e-300, {"image": red}, {"caption": [text], "references": [*TEXTS[:5]]}) for text in TEXTS]
    bare = [Case(None, {"generated": red}, {})]
    galleries = [Gallery("Both", "CLIP score", 6, {"Best": both}), Gallery("One", "CIDEr", 6, {"Worst": one})]
    galleries.append(Gallery("Without a score", "", 1, {"First": bare}))
    about = {"checkpoint": {"biart": "0123456789abcdef" * 9}, "machine": "cores " * 40}
    path = folder / "index.html"
    write(path, "results/" + "long/" * 40, records, galleries, about, "data:\n  test_dir: " + "/path" * 60)
    return path


class Elements(HTMLParser):
    """(tag, attributes) of all elements of a page, in order."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_images_come_first_and_have_texts_and_links_have_targets(tmp_path):
    page = full_page(tmp_path).read_text(encoding="utf-8")
    assert page.index("<img") < page.index("<table")
    elements = Elements(page)
    assert len(elements.of("img")) == 6 * 2 + 6 + 1
    assert all(0 < len(image["alt"]) <= 310 for image in elements.of("img"))
    ids = {attributes["id"] for _, attributes in elements.found if "id" in attributes}
    assert (
        {link["href"].removeprefix("#") for link in elements.of("a")} == ids == {"images", "results", "missing", "run"}
    )
    assert not re.search(r"<script|<link|@import|url\(|(src|href)=.http", page)


def test_no_rule_cuts_anything_off(tmp_path):
    page = full_page(tmp_path).read_text(encoding="utf-8")
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert not re.search(r"overflow(-[xy])?: *(hidden|auto|scroll|clip)|text-overflow|line-clamp|max-height", style)
    assert "overflow-wrap: anywhere" in style
    # rounded corners would cut off the shapes that stand in an image's corner
    assert not re.search(r"img[^{}]*\{[^}]*(border-radius|object-fit: *cover)", style)
    elements = Elements(page)
    # on a narrow page each cell says which column it is of; each of these tables has one row
    assert 0 < sum("data-head" in cell for cell in elements.of("td")) == len(elements.of("th"))


def test_long_texts_unfold_and_none_is_lost(tmp_path):
    page = full_page(tmp_path).read_text(encoding="utf-8")
    assert page.count(f'<p dir="auto">{LONG}</p></details>') == 1 + 1 + 6  # as text, as caption and as reference


def test_numbers_of_any_size_are_short(tmp_path):
    page = full_page(tmp_path).read_text(encoding="utf-8")
    assert "1.70e+300" in page and "-1.25e+30 to 9.00e+99" in page and "-1.00e-300" in page
    assert not re.search(r"\d{20}", re.sub('data:image/[^"]*', "", page))


def test_photos_are_small_and_drawings_exact(tmp_path):
    page = full_page(tmp_path).read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == 19 and 'class="pixels"' not in page
    small = page_of(tmp_path, "a")
    assert small.count("data:image/png") == 1 and 'class="pixels"' in small


@pytest.mark.slow
@browser_needed
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_a_browser_cuts_nothing_off(tmp_path, width):
    assert wider_than_the_page(full_page(tmp_path), width, tmp_path) == []
