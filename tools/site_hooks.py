"""What `mkdocs build` adds to the pages in docs/: the command line's reference, made from the commands themselves."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

COMMANDS = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the reference in the place of the marker."""
    return markdown.replace(COMMANDS, commands()) if COMMANDS in markdown else markdown


def commands() -> str:
    """Every command with its options, in Markdown, as typer documents them."""
    run = [sys.executable, "-m", "typer", "fxinvert.cli", "utils", "docs", "--name", "fxinvert"]
    written = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    written = re.sub(r"\[bold\](.*?)\[/bold\]", r"`\1`", written)  # rich's markup, in examples
    written = re.sub(r"^\$ ", "", written, flags=re.MULTILINE)  # what is copied should run
    # the list of commands with half sentences: the headings do the same
    written = re.sub(r"^\*\*Commands\*\*:.*?(?=^## )", "", written, flags=re.MULTILINE | re.DOTALL)
    return written[written.index("**Usage**") :]
