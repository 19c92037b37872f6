"""A headless Chromium, where there is one, that notes everything a page complains about or asks for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def opened(path: Path, scheme: str = "light", inside: Path | None = None) -> Iterator[Any]:
    """A page opened from disk; fails in the end if it complained, or asked for anything but itself.

    What lies in the folder `inside`, if one is given, it may ask for too.

    Skips the test where Playwright or the system's Chromium is missing.
    """
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    executable = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip(f"no browser on the path: {', '.join(NAMES)}")
    own = [] if inside is None else [inside.resolve().as_uri()]
    complaints: list[str] = []
    requests: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 900})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.resolve().as_uri())
        yield page
        browser.close()
    assert not complaints
    assert requests[0] == path.resolve().as_uri()
    assert not [url for url in requests[1:] if not url.startswith(("data:", *own))]


#: of every piece of text that is seen: the text, and the contrast of its colour with what has been painted behind it,
#: as WCAG defines it. What is behind a text of a drawing is the shape in its own group, else what is behind the drawing.
CONTRASTS = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const painted = layers => {
    context.clearRect(0, 0, 1, 1);
    for (const [colour, opacity] of layers) {
      context.globalAlpha = opacity;
      context.fillStyle = colour;
      context.fillRect(0, 0, 1, 1);
    }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = parts => {
    const [r, g, b] = parts.map(p => p / 255).map(p => p <= 0.04045 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const style = getComputedStyle(e);
      const shape = e.tagName === "g" && e.querySelector(":scope > rect");
      if (shape && getComputedStyle(shape).fill !== "none") layers.unshift([getComputedStyle(shape).fill, 1]);
      layers.unshift([style.backgroundColor, 1]);
    }
    return [["#fff", 1], ...layers];
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, text = texts.currentNode.data.trim();
    if (!text || !element.checkVisibility() || element.closest("script, noscript, style")) continue;
    const style = getComputedStyle(element);
    const ink = element.closest("svg") ? style.fill : style.color;
    const below = behind(element);
    const [first, second] = [painted(below), painted([...below, [ink, Number(style.opacity)]])].map(luminance);
    found.push([text, (Math.max(first, second) + 0.05) / (Math.min(first, second) + 0.05)]);
  }
  return found;
}"""


def faint(page: Any, least: float = 4.5) -> dict[str, float]:
    """The texts of a page that stand out too little, with their contrasts; folded parts are opened first."""
    page.evaluate("document.querySelectorAll('details').forEach(it => it.open = true)")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 100
    return {text: round(contrast, 2) for text, contrast in found if contrast < least}
