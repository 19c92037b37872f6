"""What `mkdocs build` adds to the pages in docs/: the commands' reference, made from the commands, and the examples."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMANDS = "<!-- commands -->"
EXAMPLE = re.compile(r"<!-- example: (\w+) -->")
EXAMPLES = Path(__file__).parents[1] / "examples"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the reference, and the text of examples, in the places of their markers."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands())
    return EXAMPLE.sub(example, markdown)


def example(marker: re.Match[str]) -> str:
    """The text of an example script, folded."""
    text = (EXAMPLES / f"{marker[1]}.py").read_text(encoding="utf-8")
    code = f"```python\n{text}```".replace("\n", "\n    ")
    return f'??? example "examples/{marker[1]}.py"\n\n    {code}'


def commands() -> str:
    """Every command with its options, in Markdown, as typer documents them."""
    run = [sys.executable, "-m", "typer", "fxinvert.cli", "utils", "docs", "--name", "fxinvert"]
    written = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    written = re.sub(r"\[bold\](.*?)\[/bold\]", r"`\1`", written)  # rich's markup, in examples
    written = re.sub(r"^\$ ", "", written, flags=re.MULTILINE)  # what is copied should run
    # the list of commands with half sentences: the headings do the same
    written = re.sub(r"^\*\*Commands\*\*:.*?(?=^## )", "", written, flags=re.MULTILINE | re.DOTALL)
    return written[written.index("**Usage**") :]
