"""Stationary: how near its output target a value comes to first order, with a correction that is no longer than a part of it.

At a value x where refinement has come to an end, with what is missed, r, and its Jacobian J, the least of ‖r + J d‖ over
‖d‖ ≤ ρ‖x‖ (a trust-region subproblem: Moré & Sorensen, SIAM J. Sci. Stat. Comput. 4, 1983) tells whether the derivative
shows a way on. Where J lacks the rank, or all but lacks it, in the direction of r, it shows none: x is a least-squares
solution, the gradient Jᵀr vanishes. It is no proof: another value, far away, may do better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxinvert.inversion.stepping import ROWS, Run, jacobian_rows

#: ρ, the longest correction as a part of the value
REACH = 0.1
#: halvings of the interval that holds the logarithm of the multiplier
HALVINGS = 60


def first_order_error(miss: Run, value: Tensor) -> Tensor:
    """What the linearized rest of a model leaves of what is missed with a correction of up to `REACH` of the value.

    Args:
        miss: r, `(B, …)` → `(B, n)`, relative to the output target.
        value: x, `(B, …)`.

    Returns:
        `(B,)`; 0, which says nothing, for outputs of more than `ROWS` numbers.
    """
    missed = miss(value)
    if missed.shape[1] > ROWS:
        return torch.zeros_like(missed[:, 0])
    jacobian = jacobian_rows(miss, value)
    curvatures, axes = torch.linalg.eigh((jacobian @ jacobian.mT).double())
    squares = curvatures.clamp(min=0)
    residual = (missed.double()[:, None] @ axes)[:, 0]
    longest = REACH * torch.linalg.vector_norm(value.flatten(1).double(), dim=1)
    # d = −Jᵀ(JJᵀ + λI)⁻¹r grows as λ falls: as small a λ as keeps it short enough
    tiny = torch.finfo(torch.float64).tiny
    low = torch.full_like(longest, tiny).log()
    high = (squares.amax(1) + residual.abs().amax(1) + 1).log() + 50
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        parts = residual / (squares + middle.exp()[:, None])
        short = (squares * parts.square()).sum(1).sqrt() <= longest
        low, high = torch.where(short, low, middle), torch.where(short, middle, high)
    left = high.exp()[:, None] * residual / (squares + high.exp()[:, None])
    found: Tensor = torch.linalg.vector_norm(left, dim=1).to(missed.dtype)
    return found
