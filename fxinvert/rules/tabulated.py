"""Inverses without a closed form: tables, made once by Newton's method, then one interpolation for every value.

The pre-image is tabulated over a coordinate of the value in which it is smooth, so that linear interpolation has seven
digits, enough for single precision; in double precision one Newton step follows, which doubles them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Scalar = Callable[[Tensor], Tensor]

#: intervals of a table
INTERVALS = 1 << 14


@dataclass(eq=False)  # known by identity
class Tabulated:
    """Inverse of a smooth function on an interval on which it is monotone.

    Attributes:
        function: the scalar function, differentiable.
        ends: of the interval of x, in the order in which the coordinate rises.
        coordinate: of a value; its inverse is `value_at`. The pre-image must be smooth in it.
        value_at: the value with a coordinate.
        start, stop: the values at the ends. Beyond the second the function's slope is 1.
    """

    function: Scalar
    ends: tuple[float, float]
    coordinate: Scalar
    value_at: Scalar
    start: float
    stop: float

    def __call__(self, value: Tensor) -> Tensor:
        # in float64: where the function is flat, its rounding is what decides
        wanted = value.flatten().double()
        nodes, rises, first, step = _table(self, value.device)
        known = wanted.clamp(min(self.start, self.stop), max(self.start, self.stop))
        place = self.coordinate(known).sub_(first).div_(step)
        index = place.long().clamp_(0, INTERVALS - 1)
        x = torch.addcmul(nodes.index_select(0, index), place.sub_(index), rises.index_select(0, index))
        x = self.newton(x, known) if value.dtype == torch.float64 else x
        return x.add_(wanted - known).to(value.dtype).view_as(value)

    def newton(self, x: Tensor, value: Tensor) -> Tensor:
        """One step towards f(x) = value; none where the slope is lost in rounding, and the table is right."""
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
        sign = 1.0 if (self.stop - self.start) * (self.ends[1] - self.ends[0]) > 0 else -1.0
        x = (low + high) / 2
        for _ in range(80):
            y, slope = self.with_slope(x)
            above = (y - value) * sign > 0
            high, low = torch.where(above, x, high), torch.where(above, low, x)
            step = x - (y - value) / slope
            x = torch.where((step > low) & (step < high), step, (low + high) / 2)
        return x


@functools.cache
def _table(inverse: Tabulated, device: torch.device) -> tuple[Tensor, Tensor, float, float]:
    """Pre-images at equal steps of the coordinate, their differences, the first coordinate and the step."""
    with torch.inference_mode(False):
        ends = inverse.coordinate(torch.tensor([inverse.start, inverse.stop], dtype=torch.float64))
        first, last = ends.tolist()
        grid = torch.linspace(first, last, INTERVALS + 1, dtype=torch.float64)
        nodes = inverse.solved(inverse.value_at(grid))
        nodes[0], nodes[-1] = inverse.ends
        return nodes[:-1].to(device), nodes.diff().to(device), first, (last - first) / INTERVALS
