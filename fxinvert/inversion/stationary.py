"""Stationary: how near its output target a value comes to first order, with a correction that is no longer than a part of it.

At a value x where refinement has come to an end, with residual r = t − f(x) and Jacobian J, the least of ‖r − J d‖ over
‖d‖ ≤ ρ‖x‖ (a trust-region subproblem: Moré & Sorensen, SIAM J. Sci. Stat. Comput. 4, 1983) tells whether the derivative
shows a way on. Where J lacks the rank, or all but lacks it, in the direction of r, it shows none: x is a least-squares
solution, the gradient Jᵀr vanishes. It is no proof: another value, far away, may do better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxinvert.inversion.rest import Rest
from fxinvert.inversion.stepping import ROWS, jacobian_rows

#: ρ, the longest correction as a part of the value
REACH = 0.1
#: halvings of the interval that holds the logarithm of the multiplier
HALVINGS = 60


def first_order_error(rest: Rest, value: Tensor, goal: Tensor) -> Tensor:
    """What the linearized rest of a model leaves of ‖t − f(x)‖ / ‖t‖ with a correction of up to `REACH` of the value.

    Args:
        rest: f.
        value: x, `(B, …)`.
        goal: t, `(B, n)`.

    Returns:
        `(B,)`; 0, which says nothing, for outputs of more than `ROWS` numbers.
    """
    if goal[:1].numel() > ROWS:
        return torch.zeros_like(goal[:, 0])
    jacobian, output = jacobian_rows(rest, value)
    curvatures, axes = torch.linalg.eigh((jacobian @ jacobian.mT).double())
    squares = curvatures.clamp(min=0)
    residual = ((goal - output).double()[:, None] @ axes)[:, 0]
    longest = REACH * torch.linalg.vector_norm(value.flatten(1).double(), dim=1)
    # d = Jᵀ(JJᵀ + λI)⁻¹r grows as λ falls: as small a λ as keeps it short enough
    tiny = torch.finfo(torch.float64).tiny
    low = torch.full_like(longest, tiny).log()
    high = (squares.amax(1) + residual.abs().amax(1) + 1).log() + 50
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        parts = residual / (squares + middle.exp()[:, None])
        short = (squares * parts.square()).sum(1).sqrt() <= longest
        low, high = torch.where(short, low, middle), torch.where(short, middle, high)
    left = high.exp()[:, None] * residual / (squares + high.exp()[:, None])
    size = torch.linalg.vector_norm(goal, dim=1)
    found: Tensor = torch.linalg.vector_norm(left, dim=1).to(goal.dtype)
    return found / torch.where(size > 0, size, 1)
