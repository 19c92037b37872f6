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
