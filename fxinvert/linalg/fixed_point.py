"""f(x) = t where f is near the identity, by values of f alone: x ← x + (t − f(x)), accelerated.

For f(x) = x + F(x) with a small F that is a contraction. Anderson's acceleration takes, among the combinations of the
last points, the one whose residual is least (Anderson 1965; Walker & Ni, SIAM J. Numer. Anal. 49, 2011): with the
residuals r = t − f(x), and with ΔX, ΔR the last differences of points and of residuals,

    x ← x + r − (ΔX + ΔR) γ,   γ = argmin ‖r − ΔR γ‖.

For an affine f that is GMRES, so that it may converge where F is no contraction, too. One evaluation of f for each
step, where a pair of products with the Jacobian costs several. Every sample has its own points, its own γ and its own
end: it stops where it has arrived, or where its error falls too slowly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxinvert.linalg.vectors import by_sample, flat, norm

#: differences that are kept, and steps at most
WINDOW, STEPS = 8, 30
#: a sample is given up where its error has not fallen by this factor within so many steps
FALL, PATIENCE = 0.5, 5
#: what is added to the diagonal of the small systems, whose diagonal is 1, in units of the rounding error: differences
#: may be nearly dependent
RIDGE = 10


@dataclass(frozen=True)
class FixedPoint:
    """What the iteration has found, sample by sample.

    Attributes:
        value: `(B, …)`, the point of the least error.
        error: `(B,)`, ‖t − f(x)‖ there.
        evaluations: `(B,)`, of f, while the sample was not done.
    """

    value: Tensor
    error: Tensor
    evaluations: Tensor


def fixed_point(
    function: Callable[[Tensor], Tensor], anchor: Tensor, output: Tensor, target: Tensor, goal: Tensor
) -> FixedPoint:
    """An input whose output is the target up to `goal`, where the iteration finds one; samples by themselves.

    Args:
        function: f, `(B, …)` to the same shape, samples independent.
        anchor: where to start.
        output: f of the anchor.
        target: t.
        goal: `(B,)`, ‖t − f(x)‖ at which a sample is done; one that is done at the start is not moved.
    """
    history = _History()
    best, x, residual = anchor, anchor, target - output
    error = least = norm(residual)
    marks = [least]
    done = ~(error > goal) | ~torch.isfinite(error)
    evaluations = torch.zeros_like(error, dtype=torch.long)
    for _ in range(STEPS):
        if bool(done.all()):
            break
        step = torch.where(by_sample(done, x), 0, history.step(x, residual))
        x = x + step
        evaluations += ~done
        residual = target - function(x)
        error = norm(residual)
        better = (error < least) & ~done
        best, least = torch.where(by_sample(better, x), x, best), torch.where(better, error, least)
        marks.append(least)
        slow = least > FALL * marks[-1 - PATIENCE] if len(marks) > PATIENCE else torch.zeros_like(done)
        done = done | (least <= goal) | slow | ~torch.isfinite(error)
    return FixedPoint(best, least, evaluations)


class _History:
    """The last points and residuals, as differences; `(B, k, n)` in a ring."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None
        self._moved: list[Tensor] = []
        self._changed: list[Tensor] = []

    def step(self, x: Tensor, residual: Tensor) -> Tensor:
        """What leads from the newest point to the next."""
        point, r = flat(x), flat(residual)
        if self._last is not None:
            self._moved = [*self._moved, point - self._last[0]][-WINDOW:]
            self._changed = [*self._changed, r - self._last[1]][-WINDOW:]
        self._last = point, r
        if not self._moved:
            return residual
        changed = torch.stack(self._changed, 1)
        gram = (changed @ changed.mT).double()
        # differences of very different lengths are compared by their directions
        scale = gram.diagonal(dim1=1, dim2=2).sqrt()
        scale = torch.where((scale > 0) & torch.isfinite(scale), scale, 1)
        gram = torch.nan_to_num(gram / scale[:, :, None] / scale[:, None, :], 0, 0, 0)
        known = torch.nan_to_num((changed @ r[:, :, None]).double()[:, :, 0] / scale, 0, 0, 0)
        identity = torch.eye(len(self._moved), dtype=gram.dtype, device=gram.device)
        ridge = RIDGE * torch.finfo(r.dtype).eps
        weights = torch.linalg.solve(gram + ridge * identity, known) / scale
        back = (torch.stack(self._moved, 1) + changed).mT @ weights.to(r.dtype)[:, :, None]
        step: Tensor = (r - back[:, :, 0]).reshape(residual.shape)
        return step
