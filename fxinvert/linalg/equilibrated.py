"""Convolutions equilibrated by blocks: their channels are mixed until those of the kernel are orthonormal.

A kernel's channels may depend on one another as nearly as the rows of any matrix W may. With W = H Q and Q Qᵀ = I, the
convolution is A = H A', H mixing the output channels of every position alike, or A = A' Hᵀ where they are those of the
input. However H is conditioned, A⁺ = A'⁺H⁻¹ where A has full row rank, and A⁺ = H⁻ᵀA'⁺ where it has full column rank: the
Gram matrix that has to be factorized is that of A', with blocks of identities on its diagonal. No scaling by such blocks
leaves a condition that is much smaller (van der Sluis, Numer. Math. 14, 1969; Demmel, SIAM J. Numer. Anal. 20, 1983).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fxinvert.linalg.convolution import Convolution
from fxinvert.linalg.operators import LinearOperator
from fxinvert.linalg.solvers import SINGLE

#: condition of a kernel beyond which it is singular
LARGEST_CONDITION = 1e12


class Equilibrated(NamedTuple):
    """A = H A' (the outputs' channels) or A' Hᵀ (the inputs').

    Attributes:
        operator: A', in float64.
        inverse: H⁻¹, `(groups, channels, channels)`.
        condition: of H, that of the kernel.
    """

    operator: Convolution
    inverse: Tensor
    condition: float

    def solve(self, value: Tensor) -> Tensor:
        """H⁻¹ of `(B, groups · channels, *spatial)`."""
        return _mixed(self.inverse, value)

    def solve_transposed(self, value: Tensor) -> Tensor:
        """H⁻ᵀ of the same."""
        return _mixed(self.inverse.mT, value)


def equilibrated(operator: LinearOperator, *, outputs: bool) -> Equilibrated | None:
    """An operator's equilibration by output or input channels, None where it has none, or its kernel does not need it."""
    if not isinstance(operator, Convolution):
        return None
    weight, groups = operator.weight.double(), operator.groups
    # what a convolution calls its outputs is the first axis of its weight; for a transposed one that is its input
    first = outputs == operator.forward
    by_group = weight.reshape(groups, -1, *weight.shape[1:])
    channels = by_group if first else by_group.transpose(1, 2)
    rows = channels.flatten(2)
    if rows.shape[1] > rows.shape[2]:
        return None
    q, r = torch.linalg.qr(rows.mT)
    values = torch.linalg.svdvals(r)
    condition = float(values.amax() / values.amin())
    if not SINGLE < condition < LARGEST_CONDITION:
        return None
    even = q.mT.reshape(channels.shape)
    made = (even if first else even.transpose(1, 2)).reshape(weight.shape).contiguous()
    unit = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device).expand(r.shape)
    inverse = torch.linalg.solve_triangular(r.mT, unit, upper=False)
    return Equilibrated(operator.of(made), inverse, condition)


def _mixed(matrix: Tensor, value: Tensor) -> Tensor:
    groups, channels, _ = matrix.shape
    rows = value.reshape(len(value), groups, channels, math.prod(value.shape[2:]))
    return (matrix @ rows).reshape(value.shape)
