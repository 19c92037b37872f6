"""Pictures inside a page: samples as small images, figures, and curves as SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup, escape
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: pixels along the longer side of a sample, at most
SIDE = 96
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 220, 56, 26, 14


def image_of(value: Tensor) -> str | None:
    """A sample `(C, H, W)` of 1 or 3 channels as the address of a PNG inside the page; None for anything else."""
    if value.dim() != 3 or value.shape[0] not in (1, 3) or not value.is_floating_point():
        return None
    pixels = value.detach().float().cpu()
    low, high = pixels.min(), pixels.max()
    scaled = ((pixels - low) / (high - low).clamp_min(1e-12) * 255).round().byte().movedim(0, -1)
    image = Image.fromarray(scaled.squeeze(-1).numpy())
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return _address(stream)


def figure_of(figure: Figure) -> str:
    """A figure as the address of a PNG inside the page."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return _address(stream)


def curve(points: Sequence[float | None], sweeps: Sequence[int], unit: str) -> Markup:
    """A line through the figures after each update, the first one before any, with a mark where a sweep begins.

    Args:
        points: the figures; those that are None are left out.
        sweeps: the sweep of every point, 0 for the first.
        unit: what is shown, for readers of the picture's text.
    """
    known = [(i, value) for i, value in enumerate(points) if value is not None]
    if not known:
        return Markup("")
    low, high = min(v for _, v in known), max(v for _, v in known)
    room = (high - low or abs(high) or 1.0) * 0.08
    low, high = low - room, high + room

    def x(i: float) -> float:
        return LEFT + (WIDTH - LEFT - 12) * i / max(len(points) - 1, 1)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = [f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(unit)}</title>']
    for value in ticks(low, high):
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        )
    for i in range(1, len(points)):
        if sweeps[i] != sweeps[i - 1]:
            parts.append(
                f'<line class="sweep" x1="{x(i - 0.5):.1f}" x2="{x(i - 0.5):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
                f'<text x="{x(i - 0.5) + 4:.1f}" y="{HEIGHT - 8}">sweep {sweeps[i]}</text>'
            )
    line = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in known)
    parts.append(f'<polyline class="line" points="{line}"/>')
    parts += [
        f'<circle class="dot" cx="{x(i):.1f}" cy="{y(value):.1f}" r="3"><title>{value:.4g}</title></circle>'
        for i, value in known
    ]
    return Markup("".join(parts) + "</svg>")


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two others, three to seven of them: multiples of 1, 2 or 5 times a power of ten."""
    size = 10 ** math.floor(math.log10((high - low) / 3))
    step = max(size * factor for factor in (1, 2, 5) if size * factor <= (high - low) / 3)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def histogram(edges: Sequence[float], before: Sequence[int], after: Sequence[int]) -> Markup:
    """Two histograms over the same bins, one behind the other."""
    most, bins = max([*before, *after, 1]), len(before)
    wide = (WIDTH - LEFT - 12) / bins
    tall = HEIGHT - TOP - BOTTOM
    parts = [f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>errors</title>']
    for counts, name in ((before, "before"), (after, "after")):
        for i, count in enumerate(counts):
            height = tall * count / most
            parts.append(
                f'<rect class="bar {name}" x="{LEFT + i * wide:.1f}" y="{TOP + tall - height:.1f}" '
                f'width="{max(wide - 1, 0.5):.1f}" height="{height:.1f}"><title>{name}: {count}, '
                f"{edges[i]:.3g} to {edges[i + 1]:.3g}</title></rect>"
            )
    for k in (0, bins // 2, bins):
        parts.append(
            f'<text x="{LEFT + k * wide:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{edges[k]:.3g}</text>'
        )
    return Markup("".join(parts) + "</svg>")


def _address(stream: io.BytesIO) -> str:
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
