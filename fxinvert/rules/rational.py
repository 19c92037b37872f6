"""Inverses without a closed form: rational functions, fitted once to what Newton's method finds.

A variable s of the value is chosen in which the inverse is smooth: zero at the end where the slope may vanish, growing
like a root there. What the inverse has beside a line is then P(s) / Q(s) with polynomials of low degree, to
five or six digits, enough for single precision; in double precision one Newton step follows, which doubles them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxinvert.linalg.memory import waits

Scalar = Callable[[Tensor], Tensor]

#: the largest error of a fit, relative to x where that is larger than 1
ENOUGH = 6e-6
#: degrees of Q that are tried, in turn
DEGREES = range(4, 9)
#: places where it is fitted, and the steps of the fit
PLACES, STEPS = 400, 30


@dataclass(eq=False)  # known by identity
class Rational:
    """Inverse of a smooth function on an interval on which it is monotone: x ≈ b y + P(s) / Q(s), s = variable(y).

    Attributes:
        function: the scalar function, differentiable.
        ends: of the interval of x; s is zero at the first.
        variable: s ≥ 0 of a value, a new tensor; no more than that of the second end.
        value_at: the value with a given s.
        constant: P(0) / Q(0).
        adds: whether b is 1; else it is 0.
    """

    function: Scalar
    ends: tuple[float, float]
    variable: Scalar
    value_at: Scalar
    constant: float
    adds: bool
    #: that it may be told where to write
    writes: ClassVar[bool] = True

    def __call__(self, value: Tensor, out: Tensor | None = None) -> Tensor:
        s = self.variable(value)
        above, below = (_polynomial(coefficients, s) for coefficients in _fitted(self))
        x = torch.addcdiv(value, above, below, out=out) if self.adds else torch.div(above, below, out=out)
        return self.newton(x, value) if value.dtype == torch.float64 else x

    def newton(self, x: Tensor, value: Tensor) -> Tensor:
        """One step towards f(x) = value; none where the slope is lost in rounding, and the fit is right."""
        y, slope = self.with_slope(x)
        return x - (y - value) * slope / slope.square().add_(torch.finfo(torch.float64).eps)

    def with_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = self.function(x)
            (slope,) = torch.autograd.grad(y.sum(), x)
        return y.detach(), slope

    def solved(self, value: Tensor) -> Tensor:
        """Newton's method, every step that leaves the bracket replaced by the bracket's middle."""
        low, high = (torch.full_like(value, end) for end in sorted(self.ends))
        start, stop = self.function(torch.tensor(self.ends, dtype=value.dtype)).tolist()
        sign = 1.0 if (stop - start) * (self.ends[1] - self.ends[0]) > 0 else -1.0
        x = (low + high) / 2
        for _ in range(80):
            y, slope = self.with_slope(x)
            above = (y - value) * sign > 0
            high, low = torch.where(above, x, high), torch.where(above, low, x)
            step = x - (y - value) / slope
            x = torch.where((step > low) & (step < high), step, (low + high) / 2)
        return x


def _polynomial(coefficients: tuple[float, ...], s: Tensor) -> Tensor:
    """Σ cᵢ sⁱ, by Horner's rule, a new tensor."""
    *rest, second, last = coefficients
    if waits(s):
        total = torch.mul(s, last).add_(second)
        for coefficient in reversed(rest):
            total = total * s + coefficient
    else:  # a pass for each
        *constants, start = _constants((*rest, second), s.dtype)
        total = torch.add(start, s, alpha=last)
        for constant in reversed(constants):
            torch.addcmul(constant, total, s, out=total)
    return total


@functools.cache
def _constants(numbers: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):
        return tuple(torch.tensor(number, dtype=dtype) for number in numbers)


@functools.cache
def _fitted(inverse: Rational) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The coefficients of P and Q."""
    with torch.inference_mode(False), torch.no_grad():
        end = inverse.function(torch.tensor(inverse.ends[1], dtype=torch.float64))
        stop = float(inverse.variable(end))
        place = torch.cos((torch.arange(PLACES, dtype=torch.float64) + 0.5) * (math.pi / PLACES))
        s = (place + 1) * (stop / 2)
        value = inverse.value_at(s)
        x = inverse.solved(value)
        wanted = (x - inverse.constant - inverse.adds * value) / s
        weight = s.clamp(min=1) / x.abs().clamp(min=1)
        for degree in DEGREES:
            error, above, below = _fit(place, wanted, weight, degree)
            if error <= ENOUGH:
                break
        scale = float(_powers(below, stop)[0])
        above, below = (_powers(c, stop) / scale for c in (above, below))
        none = above.new_zeros(1)
        above = torch.cat([none, above]) + inverse.constant * torch.cat([below, none])
        return tuple(above.tolist()), tuple(below.tolist())


def _fit(place: Tensor, wanted: Tensor, weight: Tensor, degree: int) -> tuple[float, Tensor, Tensor]:
    """P / Q ≈ wanted with P, Q sums of Chebyshev polynomials, nearly with the least largest weighted error.

    Linear least squares ‖(P − wanted · Q) / Q₋‖ with the Q₋ of the step before (Sanathanan & Koerner, IEEE Trans.
    Automatic Control 8, 1963), weights raised where the error is large (Lawson's algorithm).

    Returns:
        the largest error; the coefficients of P and of Q.
    """
    basis = torch.cos(place.acos()[:, None] * torch.arange(degree + 1))
    best = (math.inf, basis[0], basis[0])
    below, raised = torch.ones_like(place), torch.ones_like(place)
    for step in range(STEPS):
        rows = weight * raised / below
        matrix = torch.cat([basis, -wanted[:, None] * basis[:, 1:]], 1) * rows[:, None]
        scale = torch.linalg.vector_norm(matrix, dim=0)
        found = torch.linalg.lstsq(matrix / scale, (wanted * rows)[:, None], driver="gelsd").solution[:, 0]
        p, q = (found / scale).split([degree + 1, degree])
        q = torch.cat([torch.ones_like(q[:1]), q])
        below = basis @ q
        error = (basis @ p / below - wanted).abs() * weight
        if below.amin() > 0 and error.amax() < best[0]:
            best = float(error.amax()), p, q
        below = below.abs().clamp(min=1e-6)
        if step >= 3:  # Q has settled
            raised = raised * (0.3 + error / error.amax())
            raised = raised / raised.amax()
    return best


def _powers(coefficients: Tensor, stop: float) -> Tensor:
    """A sum of Chebyshev polynomials on [0, stop] as coefficients of 1, s, s², …"""
    count = len(coefficients)
    polynomials = torch.zeros(count, count, dtype=coefficients.dtype)
    polynomials[0, 0] = 1
    turned = torch.zeros_like(polynomials)  # of a polynomial, (2 s / stop − 1) times it
    turned.fill_diagonal_(-1)
    turned.diagonal(-1).fill_(2 / stop)
    for n in range(1, count):
        further = turned @ polynomials[n - 1]
        polynomials[n] = further if n == 1 else 2 * further - polynomials[n - 2]
    return coefficients @ polynomials
