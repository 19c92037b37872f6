"""The documentation's site: built strictly, complete, and in need of nothing but itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import browser
import pytest
import typer.main

import fxinvert
from fxinvert.cli import app

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_command_and_option_is_described(site: Path) -> None:
    page = (site / "command-line.html").read_text()
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert commands
    for name, command in commands.items():
        assert f'id="fxinvert-{name}"' in page
        for parameter in command.params:
            assert all(option in page for option in parameter.opts if option.startswith("--"))
    assert "[bold]" not in page


def test_every_public_name_is_described(site: Path) -> None:
    described = set(re.findall(r'<h[34] id="([\w.]+)" class="doc', (site / "api.html").read_text()))
    names = {name.rpartition(".")[2] for name in described}
    assert set(fxinvert.__all__) <= names


def test_pages_ask_for_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.glob("*.html"))
    assert len(pages) > 10
    fetched = r"<(?:link|script|img|iframe)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//"
    assert not [page.name for page in pages if re.search(fetched, page.read_text())]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_home_page_opens_from_disk(site: Path, scheme: str) -> None:
    with browser.opened(site / "index.html", scheme, inside=site) as page:
        assert page.title() == "fxinvert"
        assert page.locator("img").evaluate_all("pictures => pictures.every(it => it.naturalWidth > 0)")
