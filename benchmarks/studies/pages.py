"""What sections of the results page are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: plots of the same results are the same files
STYLE: Any = {
    "svg.hashsalt": "fxinvert",
    "svg.fonttype": "none",
    "font.size": 8,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def table_of(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def grid(panels: Sequence[tuple[str, Callable[[Axes], None]]], columns: int = 3) -> Figure:
    """A figure of panels, each with a title and what draws it."""
    with matplotlib.rc_context(STYLE):
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(3.2 * columns, 2.5 * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, (title, draw) in zip(axes, panels, strict=False):
            axis.set_title(title)
            draw(axis)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
    return figure


def save(figure: Figure, file: Path) -> None:
    """Writes a figure as SVG; the same figure gives the same bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, metadata={"Date": None})
