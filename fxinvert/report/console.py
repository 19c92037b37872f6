"""The consoles that everything is printed on."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

#: a pipe has no width of its own; tables should not be squeezed into rich's 80 columns
PIPE_WIDTH = 140


def make_console(*, stderr: bool = False) -> Console:
    """A console on standard output or error; wide where that is no terminal, unless `COLUMNS` says otherwise.

    Text is printed as it is: brackets in names are no markup, colons around words no pictures.
    """
    plain: dict[str, Any] = {"stderr": stderr, "highlight": False, "markup": False, "emoji": False}
    console = Console(**plain)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        return Console(**plain, width=PIPE_WIDTH)
    return console


def error_panel(error: Exception) -> Panel:
    """An error as the user sees it, with its notes."""
    text = Text(str(error))
    for note in getattr(error, "__notes__", ()):
        text.append(f"\n\n{note}", style="dim")
    return Panel(text, title=type(error).__name__, title_align="left", border_style="red", expand=False)


def print_json(content: Any) -> None:
    """Prints JSON on standard output: ASCII, so that no name of a file can break it."""
    sys.stdout.write(f"{json.dumps(content, indent=2)}\n")
