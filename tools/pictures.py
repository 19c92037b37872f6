"""Makes the screenshots in docs/pictures: the demonstration's report and an explanation, as a headless Chromium shows them.

python tools/pictures.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1280, 860
SAMPLE = 28  # of the test data: a 2 that the early network takes for a 3
COLOURS = 256


def main() -> None:
    """Runs the demonstration in a temporary folder, and writes report.png and explain.png."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "demo")
        fxinvert("demo", "--run-directory", str(run))
        fxinvert("explain", "--run", str(run), "--sample", str(SAMPLE), "--out", f"{folder}/explain.png")
        photograph(run / "report.html", Path(folder, "report.png"))
        for name, width in (("report.png", WIDTH), ("explain.png", WIDTH * 3 // 4)):
            shrink(Path(folder, name), PICTURES / name, width)


def fxinvert(*arguments: str) -> None:
    """Runs a command."""
    subprocess.run([sys.executable, "-m", "fxinvert", *arguments], check=True)


def photograph(page: Path, picture: Path) -> None:
    """Opens a page from disk and takes a picture of its top."""
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        opened = chromium.new_page(color_scheme="light", viewport={"width": WIDTH, "height": HEIGHT})
        opened.goto(page.as_uri())
        opened.screenshot(path=picture)
        chromium.close()


def shrink(source: Path, picture: Path, width: int) -> None:
    """Writes a picture with few colours, at most so wide."""
    with Image.open(source) as found:
        image = found.convert("RGB")
    if image.width > width:
        image = image.resize((width, image.height * width // image.width), Image.Resampling.LANCZOS)
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    main()
