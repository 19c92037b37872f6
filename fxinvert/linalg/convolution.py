"""Convolutions and their transposes as linear operators, and the band that their Gram matrices have along an axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from fxinvert.errors import SolveError
from fxinvert.linalg.operators import LinearOperator, Shape

_CONVOLUTION: dict[int, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    1: (torch.nn.functional.conv1d, conv1d_input),
    2: (torch.nn.functional.conv2d, conv2d_input),
    3: (torch.nn.functional.conv3d, conv3d_input),
}


@dataclass(frozen=True)
class Slices:
    """A convolution cut along one spatial axis: output row o is the sum of M_κ (input row o·stride − before + κ·dilation).

    Attributes:
        matrices: M_κ, `(k, groups, m, n)` in float64: what a row of the input, channels first, adds to one of the output.
        inputs, outputs: number of rows.
        stride, before, dilation: along the axis.
    """

    matrices: Tensor
    inputs: int
    outputs: int
    stride: int
    before: int
    dilation: int

    def tap(self, output: int, source: int) -> int | None:
        """The κ with which an input row enters an output row, None where it does not."""
        if not (0 <= output < self.outputs and 0 <= source < self.inputs):
            return None
        tap, rest = divmod(source + self.before - self.stride * output, self.dilation)
        return tap if rest == 0 and 0 <= tap < len(self.matrices) else None

    def outputs_of(self, source: int) -> range:
        """The output rows that an input row may enter."""
        span = self.dilation * (len(self.matrices) - 1)
        return range(
            -((span - source - self.before) // self.stride), (source + self.before) // self.stride + 1
        )

    def inputs_of(self, output: int) -> range:
        """The input rows that may enter an output row."""
        first = self.stride * output - self.before
        return range(first, first + self.dilation * (len(self.matrices) - 1) + 1, self.dilation)


class Convolution(LinearOperator):
    """Discrete convolution (cross-correlation, as in torch) in 1, 2 or 3 dimensions, zero padding.

    Args:
        weight: `(c_out, c_in / groups, *kernel)`.
        in_shape: `(c_in, *spatial)`.
        stride, padding, dilation: one entry per spatial dimension.
        groups: number of groups.
        after: padding at the far ends, where it is not the same.

    Raises:
        SolveError: the kernel is larger than the map with its padding.
    """

    #: whether it maps the rows that `slices` calls inputs to those it calls outputs
    forward = True

    def __init__(
        self,
        weight: Tensor,
        in_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        after: Sequence[int] | None = None,
    ) -> None:
        self.weight, self.padding, self.after = weight, tuple(padding), tuple(after or padding)
        symmetric = self.padding == self.after
        self.options: dict[str, Any] = {
            "stride": tuple(stride),
            "padding": self.padding if symmetric else (0,) * len(self.padding),
            "dilation": tuple(dilation),
            "groups": groups,
        }
        self._ends = (
            [end for pair in reversed([*zip(self.padding, self.after, strict=True)]) for end in pair]
            if not symmetric
            else None
        )
        ends = [p + a for p, a in zip(self.padding, self.after, strict=True)]
        spatial = [
            (size + p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(in_shape[1:], weight.shape[2:], stride, ends, dilation, strict=True)
        ]
        if min(spatial) < 1:
            raise SolveError(
                f"a kernel of {tuple(weight.shape[2:])} with dilation {tuple(dilation)} does not fit into a map of "
                f"{tuple(in_shape[1:])} with {tuple(ends)} added by padding"
            )
        self._padded = in_shape[0], *(size + p for size, p in zip(in_shape[1:], ends, strict=True))
        super().__init__(in_shape, (weight.shape[0], *spatial), weight)
        self._forward, self._input_gradient = _CONVOLUTION[len(spatial)]
        # without strides and groups the adjoint is a convolution, too, and faster so than as a gradient; not in float64
        self._flipped_padding = [
            d * (k - 1) - p for k, p, d in zip(weight.shape[2:], self.padding, dilation, strict=True)
        ]
        plain = groups == 1 and set(stride) == {1} and symmetric and min(self._flipped_padding) >= 0
        self._flipped = (
            weight.flip(tuple(range(2, weight.dim()))).transpose(0, 1).contiguous()
            if plain and weight.dtype == torch.float32
            else None
        )

    def apply(self, x: Tensor) -> Tensor:
        if self._ends is not None:
            x = pad(x, self._ends)
        return self._forward(x, self.weight, **self.options)

    def adjoint(self, r: Tensor) -> Tensor:
        if self._flipped is not None:
            return self._forward(
                r, self._flipped, padding=self._flipped_padding, dilation=self.options["dilation"]
            )
        if self._ends is None:
            return self._input_gradient((len(r), *self.in_shape), self.weight, r, **self.options)
        padded = self._input_gradient((len(r), *self._padded), self.weight, r, **self.options)
        return pad(padded, [-end for end in self._ends])

    def to(self, dtype: torch.dtype) -> Convolution:
        return Convolution(
            self.weight.to(dtype),
            self.in_shape,
            self.options["stride"],
            self.padding,
            self.options["dilation"],
            self.options["groups"],
            self.after,
        )

    @property
    def cost(self) -> float:
        return 2.0 * math.prod(self.out_shape) * self.weight[0].numel()

    def slices(self, axis: int) -> Slices:
        """The convolution cut along a spatial axis, counted from 0."""
        groups = self.options["groups"]
        others = [i for i in range(len(self.in_shape) - 1) if i != axis]
        taps = self.weight.to(torch.float64).movedim(2 + axis, 0)
        return Slices(
            torch.stack([self._across(tap, others, groups) for tap in taps]),
            inputs=self.in_shape[1 + axis],
            outputs=self.out_shape[1 + axis],
            stride=self.options["stride"][axis],
            before=self.padding[axis],
            dilation=self.options["dilation"][axis],
        )

    def _across(self, tap: Tensor, others: list[int], groups: int) -> Tensor:
        """The convolution along the other axes with one tap, as a matrix `(groups, m, n)`."""
        if not others:
            return tap.reshape(groups, -1, tap.shape[1])
        shape = tap.shape[1], *(self.in_shape[1 + i] for i in others)
        along: dict[str, list[int]] = {
            name: [values[i] for i in others]
            for name, values in (
                ("stride", self.options["stride"]),
                ("padding", self.padding),
                ("dilation", self.options["dilation"]),
                ("after", self.after),
            )
        }
        one = Convolution(tap, (groups * shape[0], *shape[1:]), groups=groups, **along)
        units = torch.eye(math.prod(shape), dtype=tap.dtype, device=tap.device).reshape(-1, 1, *shape)
        columns = one.apply(units.expand(-1, groups, *shape).flatten(1, 2))
        return columns.reshape(len(units), groups, -1).permute(1, 2, 0)


class TransposedConvolution(Convolution):
    """The adjoint of a convolution, cut or filled up with zeros to `out_shape` (`output_padding`).

    Args:
        weight: `(c_in, c_out / groups, *kernel)`.
        in_shape: `(c_in, *spatial)`.
        out_shape: `(c_out, *spatial)`.
        stride, padding, dilation, groups: of the convolution.
    """

    forward = False

    def __init__(
        self,
        weight: Tensor,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        super().__init__(weight, out_shape, stride, padding, dilation, groups)
        # the convolution sees more positions than there are where the output padding is a stride or more
        self._positions = (slice(None), slice(None), *(slice(size) for size in in_shape[1:]))
        self._convolved = self.out_shape
        self.in_shape, self.out_shape = tuple(in_shape), tuple(out_shape)

    def apply(self, x: Tensor) -> Tensor:
        filled = x
        if x.shape[1:] != self._convolved:
            filled = x.new_zeros(len(x), *self._convolved)
            filled[self._positions] = x
        return self._input_gradient((len(x), *self.out_shape), self.weight, filled, **self.options)

    def adjoint(self, r: Tensor) -> Tensor:
        return self._forward(r, self.weight, **self.options)[self._positions]

    def to(self, dtype: torch.dtype) -> TransposedConvolution:
        stride, dilation, groups = (self.options[name] for name in ("stride", "dilation", "groups"))
        return TransposedConvolution(
            self.weight.to(dtype), self.in_shape, self.out_shape, stride, self.padding, dilation, groups
        )

    @property
    def cost(self) -> float:
        return 2.0 * math.prod(self.in_shape) * self.weight[0].numel()

    def slices(self, axis: int) -> Slices:
        """The convolution that this is the transpose of, its outputs cut to the positions there are."""
        convolution = Convolution(
            self.weight,
            self.out_shape,
            self.options["stride"],
            self.padding,
            self.options["dilation"],
            self.options["groups"],
        )
        sliced, groups = convolution.slices(axis), self.options["groups"]
        others: Shape = tuple(size for i, size in enumerate(self.in_shape[1:]) if i != axis)
        everything: Shape = tuple(size for i, size in enumerate(self._convolved[1:]) if i != axis)
        if others != everything:
            taps, n = len(sliced.matrices), sliced.matrices.shape[-1]
            cut = sliced.matrices.reshape(taps, groups, -1, *everything, n)
            cut = cut[(slice(None), slice(None), slice(None), *(slice(size) for size in others))]
            sliced = replace(sliced, matrices=cut.reshape(taps, groups, -1, n))
        return replace(sliced, outputs=self.in_shape[1 + axis])
