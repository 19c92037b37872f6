"""One mechanism for every scalar function: its monotone branches.

A scalar function is described by the intervals on which it is monotone or constant. The nearest pre-image of a target
is then found without any code of the function's own: take each branch's best candidate (the target, moved into the
branch's image, and inverted there; on a constant branch the anchor, moved into the branch's domain) and the anchor
itself, and keep the candidate that comes closest to the target and, among those that come equally close, the one
closest to the anchor:

    x* = argmin_x |f(x) − t|, ties by |x − x0|,

which is the anchored equation with λ → 0 for a function of one variable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxinvert.rules.certificate import Certificate, Inverse, Status, relative, row_norms
from fxinvert.rules.op import Op

Scalar = Callable[[Tensor], Tensor]

#: How near an answer may come to an end of an image that is only reached at infinity, relative to the image's width
#: (absolute where the image is unbounded). It applies to targets beyond that end: they have no pre-image at all.
MARGIN = 1e-6


@dataclass(frozen=True)
class Branch:
    """An interval on which a scalar function is monotone or constant.

    Attributes:
        low, high: ends of the interval of x.
        least, most: ends of its image, the smaller first. An end reached only at infinity is never returned.
        inverse: the closed-form pre-image, or None for a constant branch.
        open_least, open_most: whether that end of the image is only approached.
    """

    low: float
    high: float
    least: float
    most: float
    inverse: Scalar | None
    open_least: bool = False
    open_most: bool = False

    def candidate(self, target: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """The branch's best pre-image and the value the function takes there; same shape as `target`."""
        if self.inverse is None:
            return anchor.clamp(self.low, self.high), torch.full_like(target, self.least)
        width = self.most - self.least
        margin = MARGIN * (width if math.isfinite(width) else 1.0)
        value = target
        if self.open_least:
            value = torch.where(value <= self.least, self.least + margin, value)
        elif self.least > -math.inf:
            value = value.clamp(min=self.least)
        if self.open_most:
            value = torch.where(value >= self.most, self.most - margin, value)
        elif self.most < math.inf:
            value = value.clamp(max=self.most)
        return self.inverse(value).clamp(self.low, self.high), value


def flat(low: float, high: float, value: float) -> Branch:
    """The function is constant on [low, high]."""
    return Branch(low, high, value, value, None)


def rising(low: float, high: float, image: tuple[float, float], inverse: Scalar) -> Branch:
    """The function increases on [low, high], onto `image`."""
    return _monotone(low, high, image, inverse, increasing=True)


def falling(low: float, high: float, image: tuple[float, float], inverse: Scalar) -> Branch:
    """The function decreases on [low, high], onto `image` (smaller end first)."""
    return _monotone(low, high, image, inverse, increasing=False)


def _monotone(
    low: float, high: float, image: tuple[float, float], inverse: Scalar, *, increasing: bool
) -> Branch:
    ends = (low, high) if increasing else (high, low)
    # an end of the image at infinity needs no margin: no target lies beyond it
    open_least, open_most = (math.isinf(x) and math.isfinite(y) for x, y in zip(ends, image, strict=True))
    return Branch(low, high, *image, inverse, open_least, open_most)


def invert_branches(op: Op, target: Tensor, branches: tuple[Branch, ...]) -> Inverse:
    """Nearest pre-image of `target` over all branches, entry by entry.

    The anchor is the first candidate, so an entry moves only if that brings the output closer to the target.
    """
    # half precisions cannot tell 1 from 1 − MARGIN
    working = torch.promote_types(target.dtype, torch.float32)
    anchor, wanted, reached = op.anchor.to(working), target.to(working), op.output.to(working)
    best = anchor
    for branch in branches:
        x, y = branch.candidate(wanted, anchor)
        error, best_error = (y - wanted).abs(), (reached - wanted).abs()
        nearer = (x - anchor).abs() < (best - anchor).abs()
        better = ((error < best_error) | ((error == best_error) & nearer)) & torch.isfinite(x)
        best, reached = torch.where(better, x, best), torch.where(better, y, reached)
    outside = int(((reached - wanted).abs() > 0).sum())
    value = best.to(target.dtype)
    residual = relative(op(value) - target, target)
    certificate = Certificate(
        status=Status.PROJECTED if outside else Status.NEAREST if len(branches) > 1 else Status.EXACT,
        residual=residual,
        distance=row_norms(value - op.anchor),
        failed=torch.zeros_like(residual, dtype=torch.bool),
        projected=outside,
    )
    return Inverse(value, certificate)


def numeric(
    function: Scalar, bracket: Callable[[Tensor], tuple[Tensor, Tensor]], *, increasing: bool
) -> Scalar:
    """Inverse of a smooth monotone function without a closed form.

    Newton's method, safeguarded by bisection: every step that leaves the bracket is replaced by the bracket's middle.
    An entry stops by itself, so that it never depends on its neighbours.

    Args:
        function: the scalar function, differentiable.
        bracket: two points, for every target, between which its pre-image lies.
        increasing: the direction.
    """

    def inverse(target: Tensor) -> Tensor:
        # in float64: where the function is flat, its rounding is what decides
        t = target.flatten().double()
        a, b = bracket(t)
        x = (a + b) / 2
        result, index = torch.full_like(x, torch.nan), torch.isfinite(t).nonzero()[:, 0]
        t, a, b, x = t[index], a[index], b[index], x[index]
        digits = 4 * torch.finfo(target.dtype).eps
        for _ in range(60):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                y = function(x)
                (slope,) = torch.autograd.grad(y.sum(), x)
            x, error = x.detach(), y.detach() - t
            above = (error > 0) == increasing
            a, b = torch.where(above, a, x), torch.where(above, x, b)
            step = x - error / slope
            inside = (step > a) & (step < b)
            result[index] = x
            near = torch.minimum((step - x).abs(), b - a) <= digits * (1 + x.abs())
            far = ~near & (error.abs() > digits * t.abs())
            x = torch.where(inside, step, (a + b) / 2)
            index, t, a, b, x = index[far], t[far], a[far], b[far], x[far]
            if not len(index):
                break
        return result.reshape(target.shape).to(target.dtype)

    return inverse
