"""Panels: one value of one sample, as computed, as it should have been, and the difference, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from torch import Tensor

INK, MUTED, PALE, BLUE, ORANGE = "#1f2933", "#5f6b78", "#cbd2d9", "#2f6fb3", "#d9772b"
#: channels and bars that are shown, those with the largest corrections
CHANNELS, ENTRIES = 4, 48

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Scale:
    """Two values of one shape as pictures `(pictures, height, width)`, or as bars `(n,)`.

    Attributes:
        computed, wanted: what is drawn.
        chosen: the numbers of the channels, or entries, that are.
        total: how many there are.
    """

    computed: Array
    wanted: Array
    chosen: tuple[int, ...]
    total: int

    @classmethod
    def of(cls, computed: Tensor, wanted: Tensor) -> Scale:
        """What is drawn of a value `(…)`: channels, or entries, chosen by the size of their corrections.

        A vector is shown as bars, a matrix (tokens, features) as one picture, anything larger as one picture for
        each entry of its first axis.
        """
        first, second = (value.detach().double().cpu() for value in (computed, wanted))
        if first.dim() <= 1:
            first, second = first.reshape(-1), second.reshape(-1)
            chosen = largest((second - first).abs(), ENTRIES)
        else:
            shape = (1, *first.shape) if first.dim() == 2 else (first.shape[0], -1, first.shape[-1])
            first, second = first.reshape(shape), second.reshape(shape)
            chosen = largest((second - first).square().sum((1, 2)), CHANNELS)
        rows = torch.tensor(chosen, dtype=torch.long)
        return cls(first[rows].numpy(), second[rows].numpy(), tuple(chosen), len(first))

    @property
    def difference(self) -> Array:
        """wanted − computed."""
        found: Array = self.wanted - self.computed
        return found


def largest(sizes: Tensor, count: int) -> list[int]:
    """The numbers of the largest entries, in order."""
    ranked = sizes.argsort(descending=True, stable=True)[:count]
    return sorted(ranked.tolist())


def shape_text(shape: Sequence[int]) -> str:
    """A shape as people write it."""
    return "×".join(map(str, shape)) or "1"


def bare(axes: Axes) -> None:
    """Takes ticks and frame away."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def write_text(axes: Axes, title: str, remarks: Sequence[str], strong: bool) -> None:
    """A title with remarks under it; a long title is cut in its middle."""
    shown = title if len(title) <= 27 else f"{title[:12]}…{title[-14:]}"
    weight = "bold" if strong else "normal"
    top: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "parse_math": False}
    axes.text(0, 1.0, shown, fontsize=9.5, weight=weight, color=INK, **top)
    for line, remark in enumerate(remarks):
        axes.text(0, 0.74 - 0.21 * line, remark, fontsize=8, color=INK if line == 0 else MUTED, **top)


def draw_value(
    figure: Figure, blocks: Sequence[SubplotSpec], scale: Scale, titles: Sequence[str | None]
) -> None:
    """Draws a value into three blocks: computed, wanted, difference."""
    if scale.computed.ndim == 1:
        _bars(figure, blocks, scale, titles)
        return
    ends = max(float(np.abs(scale.difference).max(initial=0)), 1e-12)
    for index, (block, title) in enumerate(zip(blocks, titles, strict=True)):
        pictures = (scale.computed, scale.wanted, scale.difference)[index]
        cells = block.subgridspec(1, max(len(pictures), 1), wspace=0.06)
        for place, picture in enumerate(pictures):
            axes = figure.add_subplot(cells[0, place])
            bare(axes)
            if index == 2:
                look: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -ends, "vmax": ends}
            else:
                both = np.stack([scale.computed[place], scale.wanted[place]])
                look = {"cmap": "viridis", "vmin": both.min(), "vmax": both.max()}
            axes.imshow(
                picture,
                aspect="auto" if scale.total == 1 else _aspect(picture),
                interpolation="nearest",
                **look,
            )
            if scale.total > 1:
                axes.set_xlabel(str(scale.chosen[place]), fontsize=6.5, color=MUTED, labelpad=1)
            if place == 0 and title:
                axes.set_title(title, fontsize=10, color=INK, loc="left", pad=8)


def _bars(figure: Figure, blocks: Sequence[SubplotSpec], scale: Scale, titles: Sequence[str | None]) -> None:
    places = np.arange(len(scale.computed))
    low, high = (
        float(end) for end in (np.min([scale.computed, scale.wanted]), np.max([scale.computed, scale.wanted]))
    )
    room = 0.05 * max(high - low, 1e-12)
    ends = max(float(np.abs(scale.difference).max(initial=0)), 1e-12)
    for index, (block, title) in enumerate(zip(blocks, titles, strict=True)):
        axes = figure.add_subplot(block)
        bare(axes)
        values = (scale.computed, scale.wanted, scale.difference)[index]
        if index < 2:
            axes.bar(places, values, color=MUTED if index == 0 else BLUE, width=0.8)
            axes.set_ylim(min(low, 0) - room, max(high, 0) + room)
        else:
            axes.bar(places, values, color=np.where(values >= 0, "#b2182b", "#2166ac"), width=0.8)
            axes.set_ylim(-1.05 * ends, 1.05 * ends)
        axes.axhline(0, color=INK, linewidth=0.5)
        if len(scale.chosen) < scale.total and index == 0:
            text = f"{len(scale.chosen)} of {scale.total} entries, by size of correction"
            axes.set_xlabel(text, fontsize=6.5, color=MUTED, labelpad=1)
        if title:
            axes.set_title(title, fontsize=10, color=INK, loc="left", pad=8)


def _aspect(picture: Array) -> Literal["equal", "auto"]:
    """Pixels are square unless the picture would be a thin strip."""
    height, width = picture.shape
    return "equal" if 0.4 <= height / max(width, 1) <= 2.5 else "auto"
