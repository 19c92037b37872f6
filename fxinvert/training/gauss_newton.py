"""Gauss–Newton: the parameters of all ops from one damped linear system, its error measured at the output.

`ClosedForm` fits every op to its own target, so that an error of its output counts whether the network's output feels it
or not. Here the ops together are one affine function of their parameters, o(θ + d) ≈ o + J d, and d minimizes the second-order
model of the task's loss (`curvature`): one solve per step, and a few steps per sweep, since each is exact for a
linear network only. What output targets say plays no part in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxinvert.errors import SolveError
from fxinvert.passes.plan import Segment
from fxinvert.settings import check_counts, check_numbers
from fxinvert.training.context import Context
from fxinvert.training.costs import Probe, Stage, size_of
from fxinvert.training.curvature import Curvature, changed_by, curvature, joined
from fxinvert.training.jacobian_rows import JacobianRows
from fxinvert.training.work import Proposal, Update, Work

#: how often rows are held at the peak, joined and as a dense matrix
HELD = 4


@dataclass(frozen=True)
class GaussNewton:
    """A few damped linear solves for the parameters of all ops at once.

    Attributes:
        damping: λ relative to the mean of the system's diagonal, of the first step; a tenth of it is tried too. Later steps try
            three times the one that was taken, and a third.
        steps: of a sweep, at most; it ends when one brings no gain.
        rows: of the Jacobian, at most, that curvature is made of; the gradient is that of all samples.
    """

    damping: float = 3.0
    steps: int = 4
    rows: int = 1024
    name: str = "gauss_newton"
    schedule: str = "parallel"

    def __post_init__(self) -> None:
        check_numbers("a number above 0", lambda d: d > 0, damping=self.damping)
        check_counts(steps=self.steps, rows=self.rows)

    def train(self, work: Work, segments: Sequence[Segment]) -> Iterator[list[Proposal]]:
        """Yields the steps, each with several dampings; nothing while output targets are told apart.

        Raises:
            SolveError: gradients are not finite, or so few rows fit that none was drawn.
        """
        paths = [path for segment in segments for path in segment.trained]
        if work.sweep == 0 or not paths:
            return
        tried = self._first
        name = ", ".join(segment.name for segment in segments)
        arguments = self._arguments(work.context, work.samples, paths)
        for _ in range(self.steps):
            (found,) = (joined(list(block)) for block in work.blocks(curvature, arguments, None))
            like = {key: work.context.tensors[key] for key in found.descent}
            yield [[update] for update in _solved(name, found, like, tried)]
            if work.taken is None:
                return
            tried = (3 * tried[work.taken], tried[work.taken] / 3)

    @property
    def _first(self) -> tuple[float, float]:
        """What is tried in the first step."""
        return self.damping, self.damping / 10

    def _arguments(self, context: Context, samples: int, paths: Sequence[str]) -> dict[str, Any]:
        size = sum(context.tensors[name].numel() for name in changed_by(context, paths))
        fit = context.budget.sums // (HELD * max(size, 1) * torch.finfo(torch.float32).bits // 8)
        rows = max(1, min(self.rows, fit))
        return {"paths": paths, "share": min(1.0, rows / samples), "count": max(1, rows // samples)}

    def stages(self, probe: Probe, segments: Sequence[Segment]) -> Iterator[Stage]:
        """Yields one pass over the data for every step."""
        paths = [path for segment in segments for path in segment.trained]
        if not paths:
            return
        arguments = self._arguments(probe.context, probe.samples, paths)
        cost, found = probe.measured(curvature, arguments)
        sent = size_of(found)
        like = {key: probe.context.tensors[key] for key in found.descent}
        rows = round(arguments["share"] * arguments["count"] * probe.samples)
        measured = [found.rows] * max(1, rows // len(found.rows))
        whole = replace(found, rows=JacobianRows.joined(measured), drawn=found.drawn * len(measured))
        yield Stage(
            tasks=((f"curvature of {', '.join(segment.name for segment in segments)}", cost),),
            by_chunk=True,
            samples=probe.samples,
            memory=min(2 * probe.batch_size * probe.values + 2 * sent, probe.context.budget.limit),
            sent=sent,
            solve_seconds=probe.seconds(partial(_solved, "", whole, like, self._first)),
            solve_operations=found.rows.operations(rows, len(self._first)),
            proposals=len(self._first),
            times=self.steps,
        )


def _solved(
    name: str, found: Curvature, like: Mapping[str, Tensor], dampings: Sequence[float]
) -> list[Update]:
    """The step with each of some dampings, for means over samples."""
    descent = {key: value / found.samples for key, value in found.descent.items()}
    if not all(bool(torch.isfinite(value).all()) for value in descent.values()):
        raise SolveError(f"the gradients of {name!r} are not finite: values or labels overflow")
    if not found.drawn:
        raise SolveError(
            f"no row of the Jacobian of {name!r} was drawn: rows or memory_limit allow too few for so many samples"
        )
    rows = found.rows
    solved = rows.solve(rows.flat(descent), dampings, 1 / found.drawn, 2 * found.loss / found.samples)
    return [Update(name, rows.by_name(own.change[0, 0], like), own.explained, own.damping) for own in solved]
