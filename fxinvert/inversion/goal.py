"""Goal: which outputs are right, and how far others are from them.

An output target that wants the label to lead is the nearest of many outputs that are right, S, to the one that the model
gives. From an earlier value it may be out of reach where others of S are not; and the nearest value with an output in S is
nearer than the nearest whose output is one point of it. So an output o misses what it is away from its own projection,

    (o − P(o)) / ‖t‖,   P the projection onto S, t the output target.

Its derivative is that of the leads that are missed, and of nothing else. An output target that names a point, such as the
labels of a regression, has S = {t}. A margin that is known to be out of reach (`attainable.py`) is lessened.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from fxinvert.inversion.rest import Rest
from fxinvert.output_target import OutputTarget, Projection
from fxinvert.passes.flow import by_sample
from fxinvert.rules.certificate import row_norms


@dataclass(frozen=True)
class Goal:
    """The outputs that are right for a batch.

    Attributes:
        node: that gives the output.
        target: t, of the shape of the output.
        outputs: what the model gives, of the same shape.
        labels: that the output target takes.
        share: of the margin that the output target asks for, `(B,)`.
        project: P; None: S is t alone.
    """

    node: fx.Node
    target: Tensor
    outputs: Tensor
    labels: Any
    share: Tensor
    project: Projection | None

    @classmethod
    def of(cls, output_target: OutputTarget, node: fx.Node, outputs: Tensor, labels: Any) -> Goal:
        """What an output target asks for.

        Raises:
            DataError: the labels do not fit.
        """
        target = output_target(outputs, labels)
        share = target.new_ones(len(target) // int(node.meta["rows"]))
        return cls(node, target, outputs, labels, share, output_target.project)

    def eased(self, share: Tensor) -> Goal:
        """With another share of the margin, `(B,)`."""
        return replace(self, share=share)

    def samples(self, rows: Tensor) -> Goal:
        """The same for some samples, `(k,)`, only."""

        def some(value: Tensor) -> Tensor:
            chosen: Tensor = value.reshape(-1, self._rows, *value.shape[1:])[rows]
            return chosen.flatten(0, 1)

        labels = self.labels if self.project is None else tree_map(some, self.labels)
        target, outputs = some(self.target), some(self.outputs)
        return replace(self, target=target, outputs=outputs, labels=labels, share=self.share[rows])

    @property
    def _rows(self) -> int:
        """The rows of the output that belong to a sample."""
        return int(self.node.meta["rows"])

    @property
    def size(self) -> Tensor:
        """‖t‖ of every sample, `(B,)`; 1 where it is 0."""
        size = row_norms(by_sample(self.node, self.target))
        return torch.where(size > 0, size, 1)

    def nearest(self, output: Tensor) -> Tensor:
        """The nearest output that is right, `(B, n)` → `(B, n)`."""
        if self.project is None:
            return by_sample(self.node, self.target)
        share = self.share.repeat_interleave(self._rows)
        projected = self.project(self.outputs, self.labels, output.reshape(self.outputs.shape), share)
        return by_sample(self.node, projected)

    def missed(self, output: Tensor) -> Tensor:
        """`(B, n)` → `(B, n)`, relative to the output target."""
        difference = output - self.nearest(output)
        return difference / self.size[:, None].to(difference.dtype)


@dataclass(frozen=True)
class Miss:
    """What the output from another value of a node misses, `(B, …)` → `(B, n)`: zero where it is right."""

    rest: Rest
    goal: Goal

    def __call__(self, value: Tensor, width: float = 0.0) -> Tensor:
        """With kinks as wide as `width` (see `fxinvert.inversion.rest`)."""
        return self.goal.missed(self.rest(value, width))

    def of(self, rows: Tensor) -> Miss:
        """The same for some samples, `(k,)`, only."""
        return Miss(self.rest.of(rows), self.goal.samples(rows))
