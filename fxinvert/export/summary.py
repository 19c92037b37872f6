"""What an export proved: how far the file's outputs lie from the model's, per batch size and output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class OutputDifference:
    """How far one output of the file lies from the model's at one batch size.

    Attributes:
        batch_size: Number of rows of the inputs.
        output: The output's name in the file.
        shape: Its shape.
        max_abs: Largest absolute difference over its elements.
        max_rel: `max_abs` relative to the model's largest magnitude in this output (0 where both are 0).
        worst: Index of the element that comes nearest to its tolerance.
    """

    batch_size: int
    output: str
    shape: tuple[int, ...]
    max_abs: float
    max_rel: float
    worst: tuple[int, ...] = ()


@dataclass(frozen=True)
class ExportReport:
    """The proof of an ONNX file: what was run, and how far from the model its outputs are.

    Attributes:
        path: The file.
        opset: Its ONNX opset.
        batch_sizes: The batch sizes at which file and model were run.
        differences: One entry per batch size and output, in that order.
        atol: Absolute tolerance that every element met.
        rtol: Tolerance relative to the magnitude of each expected element, added to `atol`.
        note: What to mind when the file is used; empty for nothing.
    """

    path: Path
    opset: int
    batch_sizes: tuple[int, ...]
    differences: tuple[OutputDifference, ...]
    atol: float
    rtol: float
    note: str = ""

    @property
    def max_abs(self) -> float:
        """Largest absolute difference over all batch sizes and outputs."""
        return max((entry.max_abs for entry in self.differences), default=0.0)

    @property
    def max_rel(self) -> float:
        """Largest relative difference (see `OutputDifference`) over all batch sizes and outputs."""
        return max((entry.max_rel for entry in self.differences), default=0.0)

    def to_dict(self) -> dict[str, object]:
        """The report as plain dicts, lists, strings and finite numbers, ready for `json.dumps`."""
        return {
            "path": str(self.path),
            "opset": self.opset,
            "batch_sizes": list(self.batch_sizes),
            "atol": self.atol,
            "rtol": self.rtol,
            "max_abs": self.max_abs,
            "max_rel": self.max_rel,
            "note": self.note,
            "differences": [
                {
                    "batch_size": entry.batch_size,
                    "output": entry.output,
                    "shape": list(entry.shape),
                    "max_abs": entry.max_abs,
                    "max_rel": entry.max_rel,
                    "worst": list(entry.worst),
                }
                for entry in self.differences
            ],
        }

    def __str__(self) -> str:
        width = max((len(entry.output) for entry in self.differences), default=0)
        width = max(width, len("output"))
        sizes = ", ".join(str(size) for size in self.batch_sizes)
        lines = [
            f"{self.path}: opset {self.opset}, equal to the model at batch sizes {sizes}",
            f"  tolerance {self.atol:g} + {self.rtol:g} * |expected|",
            f"  largest difference {self.max_abs:.1e} (relative {self.max_rel:.1e})",
            f"  {'batch':>5}  {'output':<{width}}  {'max abs':>8}  {'max rel':>8}  shape, worst at",
        ]
        lines += [
            f"  {entry.batch_size:>5}  {entry.output:<{width}}  {entry.max_abs:>8.1e}  {entry.max_rel:>8.1e}  "
            f"{list(entry.shape)}, {list(entry.worst)}"
            for entry in self.differences
        ]
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else [])])


def relative(max_abs: float, largest: float) -> float:
    """`max_abs` relative to the largest expected magnitude; 0 for no difference at all.

    An output that should be all zero has no scale: its relative difference is the absolute one.
    """
    if max_abs == 0.0:
        return 0.0
    return max_abs / largest if largest > 0.0 and math.isfinite(largest) else max_abs
