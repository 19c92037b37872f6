"""Heads: several supervised outputs, joined to one vector per sample, and what the labels of each ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxinvert.errors import DataError
from fxinvert.output_target import OutputTarget, output_target
from fxinvert.passes.outputs import Head


@dataclass(frozen=True)
class Heads:
    """The outputs that a graph joins, in order; one without a name where it has a single output."""

    heads: tuple[Head, ...]

    @classmethod
    def of(cls, graph: fx.GraphModule) -> Heads:
        """Those of a traced graph."""
        return cls(graph.meta["heads"])

    def pairs(self, outputs: Tensor, labels: Any) -> list[tuple[Tensor, Tensor]]:
        """Every head's output `(B, …)` with its labels.

        Args:
            outputs: of the graph.
            labels: a tensor for a single output; a mapping by the outputs' names, or a sequence in their order.

        Raises:
            DataError: the labels are not such.
        """
        if not self.heads:
            return [(outputs, labels)]
        parts = torch.split(outputs, [head.size for head in self.heads], 1)
        own = [part.reshape(-1, *head.shape) for part, head in zip(parts, self.heads, strict=True)]
        return list(zip(own, self._labels(labels), strict=True))

    def target(self, choice: OutputTarget) -> OutputTarget:
        """An output target of all heads: `choice` for class numbers, the labels themselves for numbers."""
        if not self.heads:
            return choice

        def joined(outputs: Tensor, labels: Any, other: Tensor, share: Tensor) -> Tensor:
            projected = []
            for (output, own), (part, _) in zip(
                self.pairs(outputs, labels), self.pairs(other, labels), strict=True
            ):
                wanted = output_target("regression") if own.dtype.is_floating_point else choice
                projected.append(
                    wanted.project(output, own, part, share) if wanted.project else wanted(output, own)
                )
            return torch.cat([target.flatten(1) for target in projected], 1)

        def target(outputs: Tensor, labels: Any) -> Tensor:
            return joined(outputs, labels, outputs, torch.ones_like(outputs[:, 0]))

        return OutputTarget(choice.name, target, joined if choice.project else None)

    def _labels(self, labels: Any) -> list[Any]:
        names = [head.key for head in self.heads]
        if isinstance(labels, Mapping) and all(name in labels for name in names):
            return [labels[name] for name in names]
        if isinstance(labels, Sequence) and len(labels) == len(names):
            return list(labels)
        raise DataError(
            f"the supervised outputs are {', '.join(map(repr, names))}; labels are needed for each, as a mapping by "
            f"name or a sequence in that order, not {type(labels).__name__}"
        )
