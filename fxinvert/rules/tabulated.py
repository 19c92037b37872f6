"""Inverses without a closed form: tables, made once by Newton's method, then one interpolation for every value.

The pre-image is tabulated over a coordinate of the value, from zero on, that has the same number of nodes between any
power of two and the next, so that a square root at zero, a straight line and a slow growth far away are all resolved
alike. The place in the table is then a part of the coordinate's bits, and nothing has to be searched. Linear
interpolation has six to seven digits, enough for single precision; in double precision one Newton step follows, which
doubles them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fxinvert.linalg.memory import waits

Scalar = Callable[[Tensor], Tensor]

#: nodes from a power of two to the next are 2 ** NODES
NODES = 8
#: bits of a float32 below those that tell the node, and what is added to its exponent
SHIFT, BIAS = 23 - NODES, 127
#: below this coordinate the pre-image is that of zero
SMALLEST = 2.0**-52


@dataclass(eq=False)  # known by identity
class Tabulated:
    """Inverse of a smooth function on an interval on which it is monotone.

    Attributes:
        function: the scalar function, differentiable.
        ends: of the interval of x; the first is where the coordinate is zero. Beyond the second the slope is 1.
        coordinate: of a value, a new tensor: zero for the first end, growing in size; its sign does not matter.
        value_at: the value with a coordinate of this size.
    """

    function: Scalar
    ends: tuple[float, float]
    coordinate: Scalar
    value_at: Scalar

    def __call__(self, value: Tensor) -> Tensor:
        lines = _lines(self, value.device, value.dtype)
        at = self.coordinate(value).flatten().abs_()
        if torch.compiler.is_exporting():  # ONNX has neither a number's bits nor complex numbers
            place = lines.place(at)
            return (lines.constant[place] + lines.slope[place] * at).view_as(value)
        index = torch.bitwise_right_shift(at.float().view(torch.int32), SHIFT)
        if waits(value):
            constant, slope = lines.pairs[index].unbind(1)
        else:  # one look-up for both numbers of a line, as one complex number, is faster
            line = torch.view_as_complex(lines.pairs).index_select(0, index)
            constant, slope = line.real, line.imag
        x = torch.addcmul(constant, slope, at)
        if value.dtype == torch.float64:
            x = self.newton(x, value.flatten())
        return x.view_as(value)

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
        ends = torch.tensor(self.ends, dtype=torch.float64)
        start, stop = self.function(ends).tolist()
        known = value.clamp(min(start, stop), max(start, stop))
        low, high = (torch.full_like(value, end) for end in sorted(self.ends))
        sign = 1.0 if (stop - start) * (self.ends[1] - self.ends[0]) > 0 else -1.0
        x = (low + high) / 2
        for _ in range(80):
            y, slope = self.with_slope(x)
            above = (y - known) * sign > 0
            high, low = torch.where(above, x, high), torch.where(above, low, x)
            step = x - (y - known) / slope
            x = torch.where((step > low) & (step < high), step, (low + high) / 2)
        return x + (value - known)


class Lines(NamedTuple):
    """The lines x = constant + slope · coordinate between nodes.

    Attributes:
        pairs: `(n, 2)`, constant and slope, for every upper half of a float32's bits.
        first: the place of the first line that is needed; all before it are alike.
        constant, slope: of the lines from there on, up to the last that is needed.
    """

    pairs: Tensor
    first: int
    constant: Tensor
    slope: Tensor

    def place(self, at: Tensor) -> Tensor:
        """Whose line a coordinate lies on, by arithmetic; where rounding takes the one beside it, the two meet."""
        exponent = at.clamp(min=SMALLEST / 2).log2().floor()
        mantissa = (at * torch.exp2(-exponent) - 1).clamp(min=0.0)
        index = ((exponent + BIAS + mantissa) * (1 << NODES)).long() - self.first
        return index.clamp(0, len(self.constant) - 1)


@functools.cache
def _lines(inverse: Tabulated, device: torch.device, dtype: torch.dtype) -> Lines:
    """The table of an inverse."""
    with torch.inference_mode(False), torch.no_grad():
        grid = (torch.arange(1 << (31 - SHIFT), dtype=torch.int32) << SHIFT).view(torch.float32).double()
        end = inverse.function(torch.tensor(inverse.ends[1], dtype=torch.float64))
        stop = abs(float(inverse.coordinate(end)))
        # beyond the end, one line goes on
        solved = (grid >= SMALLEST) & (grid <= 2 * stop)
        nodes = torch.full_like(grid, inverse.ends[0])
        nodes[solved] = inverse.solved(inverse.value_at(grid[solved]))
        slope = torch.zeros_like(grid)
        inside = solved[:-1] & solved[1:]
        slope[:-1][inside] = (nodes.diff() / grid.diff())[inside]
        constant = nodes - slope * grid
        first, last = int(inside.nonzero()[0]), int(inside.nonzero()[-1])
        constant[last + 1 :], slope[last + 1 :] = constant[last], slope[last]
        constant, slope = constant.to(device, dtype), slope.to(device, dtype)
        needed = slice(first - 1, last + 1)
        return Lines(
            torch.stack([constant, slope], 1), first - 1, constant[needed].clone(), slope[needed].clone()
        )
