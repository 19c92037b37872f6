"""The scales and offsets of a normalization, y = w ⊙ z + b, and what is known of them before a target is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxinvert.rules.trust import Nodes

#: entries for each node from which a step of Newton's method at the nodes costs less than one at all entries
WORTH = 4


@dataclass(frozen=True)
class Scales:
    """The weights w and offsets b.

    Attributes:
        weight: `(1, G, n)`, or `(1, 1, n)` where all groups have the same.
        bias: likewise; None where all are zero.
        largest: `(1, G, 1)` or `(1, 1, 1)`, the largest size in a group.
        tame: whether no scale is so small beside the others that it would blow corrections up.
        even: whether all scales of a group are of one size, and not zero.
        ones: whether all scales are 1.
        nodes: for tame scales that are not even, if they are few beside the entries.
    """

    weight: Tensor
    bias: Tensor | None
    largest: Tensor
    tame: bool
    even: bool
    ones: bool
    nodes: Nodes | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, kappa: float, eps: float) -> Scales:
        """The scales, looked at; `kappa` is the largest amplification, `eps` the precision that is asked for."""
        if bias is not None and not bool(bias.any()):
            bias = None
        size = weight.abs()
        largest, smallest = size.amax(-1, keepdim=True), size.amin(-1, keepdim=True)
        tame = bool(((smallest > 0) & (largest <= kappa * smallest)).all())
        even = tame and bool((smallest == largest).all())
        nodes = Nodes.of(weight.square(), eps) if tame and not even else None
        nodes = None if nodes is None or WORTH * len(nodes.value) > weight.shape[-1] else nodes
        return cls(weight, bias, largest, tame, even, bool((weight == 1).all()), nodes)

    @property
    def nbytes(self) -> int:
        held = (self.weight, self.largest, self.bias, self.nodes)
        return sum(value.nbytes for value in held if value is not None)

    def to(self, dtype: torch.dtype) -> Scales:
        bias = None if self.bias is None else self.bias.to(dtype)
        nodes = None if self.nodes is None else self.nodes.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias, nodes=nodes)

    def wanted(self, target: Tensor, out: Tensor | None = None) -> Tensor:
        """(t − b) / w, for tame scales; `out` may be written to, in a kernel there is none."""
        found = target if self.bias is None else torch.sub(target, self.bias, out=out)
        return found if self.ones else torch.div(found, self.weight, out=out)
