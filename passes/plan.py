"""The plan: a partition as it is shown, before any work, and saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """A piece of the graph between two cuts, the unit of training.

    Attributes:
        name: the path of its first trained op, or of its exit if nothing in it is trained.
        entry, exit: the paths of the values at its two cuts.
        nodes: the paths of its ops, in order.
        trained: the paths of the ops whose parameters can be trained in closed form.
        parameters: the names of those parameters.
        parameter_count: how many numbers they hold.
        in_shape, out_shape: of entry and exit, without the batch.
        cost: multiply-adds of a forward pass per sample, estimated.
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


@dataclass(frozen=True)
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
        parameters, cost = (
            sum(values) for values in zip(*((s.parameter_count, s.cost) for s in self.segments), strict=True)
        )
        for header, footer, right in (
            ("#", "", True),
            ("segment", "total", False),
            ("from → to", "", False),
            ("shape", "", False),
            ("trained ops", "", False),
            ("parameters", f"{parameters:,}", True),
            ("mult-adds", f"{cost:,}", True),
        ):
            table.add_column(header, footer, justify="right" if right else "left")
        for i, s in enumerate(self.segments, 1):
            table.add_row(
                str(i),
                s.name,
                f"{s.entry} → {s.exit}",
                f"{_times(s.in_shape)} → {_times(s.out_shape)}",
                ", ".join(s.trained) or "none",
                f"{s.parameter_count:,}",
                f"{s.cost:,}",
            )
        return table

    def __str__(self) -> str:
        console = Console(width=200, no_color=True)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines())


def _times(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "1"
