"""The plan: a partition as it is shown, before any work, and saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from fxinvert.notebook import plain
from fxinvert.notebook import table as html_table

Shape = tuple[int, ...]
_HEADER = ("#", "segment", "from → to", "shape", "trained ops", "parameters", "mult-adds")


@dataclass(frozen=True)
class Segment:
    """A piece of the graph between two cuts, the unit of training.

    Attributes:
        name: the path of its first op with parameters of the segment, or of its exit if it has none.
        entry, exit: the paths of the values at its two cuts.
        nodes: the paths of its ops, in order.
        trained: the paths of the ops whose parameters can be trained in closed form.
        parameters: the names of those parameters, and of those that only methods that follow gradients can train, because
            what is computed from them is the weight of an op, but not affine in them.
        parameter_count: how many numbers they hold.
        in_shape, out_shape: of entry and exit, without the batch.
        cost: multiply-adds of a forward pass per sample, estimated.
        ops: what its nodes do, one for each; none in plans of version 0.1.0.
    """

    name: str
    entry: str
    exit: str
    nodes: tuple[str, ...]
    trained: tuple[str, ...]
    parameters: tuple[str, ...]
    parameter_count: int
    in_shape: Shape
    out_shape: Shape
    cost: int
    ops: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Plan:
    """A partition and what it will cost, made before any work; `print(plan)` shows it.

    Attributes:
        segments: in the order of the graph.
    """

    segments: tuple[Segment, ...]

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        return {"segments": [vars(segment) for segment in self.segments]}

    def __rich__(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
        *_, parameters, cost = self._total()
        footers = ("", "total", "", "", "", f"{parameters:,}", f"{cost:,}")
        for header, footer in zip(_HEADER, footers, strict=True):
            right = header in ("#", "parameters", "mult-adds")
            table.add_column(header, footer, justify="right" if right else "left")
        for row in self._rows():
            table.add_row(*(cell if isinstance(cell, str) else f"{cell:,}" for cell in row))
        return table

    def __repr__(self) -> str:
        return plain(self)

    def _repr_html_(self) -> str:
        segments, parameters, cost = self._total()
        title = f"Plan: {segments} segments, {parameters:,} parameters, {cost:,} multiply-adds per sample"
        return html_table(title, _HEADER, self._rows())

    def _total(self) -> tuple[int, int, int]:
        """Segments, parameters, cost."""
        return (
            len(self.segments),
            sum(s.parameter_count for s in self.segments),
            sum(s.cost for s in self.segments),
        )

    def _rows(self) -> Iterator[tuple[str | int, ...]]:
        for i, s in enumerate(self.segments, 1):
            shapes = f"{_times(s.in_shape)} → {_times(s.out_shape)}"
            trained = ", ".join(s.trained) or "none"
            yield i, s.name, f"{s.entry} → {s.exit}", shapes, trained, s.parameter_count, s.cost


def _times(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "1"
