"""A page as a browser lays it out, where there is one: what it would cut off."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

MEASURE = """<script>addEventListener("load", () => { const wide = [], all = document.querySelectorAll("body *");
const width = document.documentElement.clientWidth;
for (const e of all) { const box = e.getBoundingClientRect();
  if (box.width && (box.right > width + 1 || box.left < -1) || e.clientWidth && e.scrollWidth > e.clientWidth + 1)
    wide.push(e.tagName + " " + e.textContent.trim().slice(0, 40)); }
parent.postMessage(JSON.stringify({width, wide: wide.slice(0, 9)}), "*") })</script></body>"""
FRAME = """<script>
addEventListener("message", e => { document.title = btoa(unescape(encodeURIComponent(e.data))) })</script>
<iframe src="page.html" style="border: 0; height: 900px; width: WIDTHpx"></iframe>"""
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
browser_needed = pytest.mark.skipif(not BROWSER, reason="no browser")


def wider_than_the_page(page: Path, width: int, folder: Path) -> list[str]:
    """What a browser lays out beyond the page's edges, or beyond those of its own box. A frame may be narrow."""
    (folder / "page.html").write_text(page.read_text(encoding="utf-8").replace("</body>", MEASURE), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    flags = f"--headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir={folder}/profile --dump-dom"
    flags += " --allow-file-access-from-files --virtual-time-budget=5000 --window-size=1400,900"
    command = [BROWSER, *flags.split(), f"file://{folder}/frame.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search("<title>(.+)</title>", done.stdout)
    if title is None:
        pytest.skip(f"{BROWSER} shows no page here")
    measured = json.loads(base64.b64decode(title[1]))
    assert measured["width"] == width
    return measured["wide"]
