"""The op as a rule sees it: what it was given, what it gave, and how it can be evaluated again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fxinvert.linalg import FactorCache, SolveSettings


@dataclass(frozen=True)
class Op:
    """One op of the graph, with the values it had in the forward pass.

    Attributes:
        key: the normalized name of the op, e.g. `"conv2d"`.
        name: the node's name, for messages.
        anchors: the inputs that depend on the model's input, by argument name, each `(B, …)`.
        output: what the op made of the anchors, `(B, …)`.
        parameters: the other tensors, by argument name: weights, buffers, constants, and values that depend on the model's
            input but are held at their anchors, `(B, …)`.
        attributes: every other argument, defaults filled in.
        evaluate: the op as a function of the anchors, in the order of `anchors`, everything else held.
        settings: how linear systems are solved.
        cache: for factorizations.
    """

    key: str
    name: str
    anchors: Mapping[str, Tensor]
    output: Tensor
    parameters: Mapping[str, Tensor]
    attributes: Mapping[str, Any]
    evaluate: Callable[..., Tensor]
    settings: SolveSettings = field(default_factory=SolveSettings)
    cache: FactorCache = field(default_factory=FactorCache)

    @property
    def anchor(self) -> Tensor:
        """The op's only anchor."""
        (value,) = self.anchors.values()
        return value

    @property
    def by_sample(self) -> bool:
        """Whether an operand may differ from sample to sample: it has as many rows as the batch.

        Such an op can be evaluated for the whole batch only, and nothing of it is worth caching.
        """
        rows = len(self.output) if self.output.dim() else 0
        return any(value.dim() and len(value) == rows for value in self.parameters.values())

    def samples(self, rows: slice) -> Op:
        """The op on some samples of the batch; not where an operand differs from sample to sample."""
        return replace(
            self,
            anchors={name: value[rows] for name, value in self.anchors.items()},
            output=self.output[rows],
        )

    def finite(self) -> Op:
        """The op with 0 in place of what is infinite in its output, as scores that a mask hides are: constants."""

        def shown(value: Tensor) -> Tensor:
            return value.masked_fill(torch.isinf(value), 0)

        return replace(
            self,
            output=shown(self.output),
            evaluate=lambda *inputs: shown(self.evaluate(*inputs)),
            cache=FactorCache(),
        )

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.evaluate(*inputs)
