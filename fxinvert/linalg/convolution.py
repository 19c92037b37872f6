"""Convolutions and their transposes as linear operators, and the band that their Gram matrices have along an axis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from fxinvert.errors import SolveError
from fxinvert.linalg.operators import LinearOperator, Shape

#: by the number of spatial dimensions: torch's convolution, and its adjoint
CONVOLUTION: dict[int, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    1: (torch.nn.functional.conv1d, conv1d_input),
    2: (torch.nn.functional.conv2d, conv2d_input),
    3: (torch.nn.functional.conv3d, conv3d_input),
}


#: of every output row, the input rows that it reads, with the taps that they meet there
Reading = tuple[dict[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Slices:
    """A convolution cut along one spatial axis: an output row is the sum of M_κ (input row) over the taps κ that they meet at.

    Attributes:
        matrices: M_κ, `(k, groups, m, n)` in float64: what a row of the input, channels first, adds to one of the output.
        reading: who meets whom.
    """

    matrices: Tensor
    reading: Reading


def _flipped(weight: Tensor, groups: int) -> Tensor:
    """A kernel, `(c_out, c_in / groups, *taps)`, back to front, from what were its outputs to what were its inputs."""
    by_group = weight.flip(tuple(range(2, weight.dim()))).reshape(groups, -1, *weight.shape[1:])
    turned: Tensor = by_group.transpose(1, 2).flatten(0, 1).contiguous()
    return turned


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
        self._map = tuple(in_shape)
        self._padded = in_shape[0], *(size + p for size, p in zip(in_shape[1:], ends, strict=True))
        super().__init__(in_shape, (weight.shape[0], *spatial), weight)
        self._convolved = self.out_shape
        self._forward, self._input_gradient = CONVOLUTION[len(spatial)]
        # without strides the adjoint is a convolution, too, and faster so than as a gradient; not in float64
        self._flipped_padding = [
            d * (k - 1) - p for k, p, d in zip(weight.shape[2:], self.padding, dilation, strict=True)
        ]
        plain = set(stride) == {1} and symmetric and min(self._flipped_padding) >= 0
        self._flipped = _flipped(weight, groups) if plain and weight.dtype == torch.float32 else None

    def apply(self, x: Tensor) -> Tensor:
        if self._ends is not None:
            x = pad(x, self._ends)
        return self._forward(x, self.weight, **self.options)

    def adjoint(self, r: Tensor) -> Tensor:
        if self._flipped is not None:
            return self._forward(r, self._flipped, **{**self.options, "padding": self._flipped_padding})
        if self._ends is None:
            return self._input_gradient((len(r), *self._map), self.weight, r, **self.options)
        padded = self._input_gradient((len(r), *self._padded), self.weight, r, **self.options)
        return pad(padded, [-end for end in self._ends])

    def to(self, dtype: torch.dtype) -> Convolution:
        return self.of(self.weight.to(dtype))

    def of(self, weight: Tensor) -> Convolution:
        """The same with other weights."""
        return Convolution(
            weight,
            self.in_shape,
            self.options["stride"],
            self.padding,
            self.options["dilation"],
            self.options["groups"],
            self.after,
        )

    @property
    def groups(self) -> int:
        return int(self.options["groups"])

    def meets(self, *, outputs: bool) -> Tensor:
        """Which outputs, or inputs, are coupled to anything, of the shape of a sample."""
        coupled = self.of((self.weight != 0).to(self.dtype))
        ones = self.weight.new_ones(1, *(self.in_shape if outputs else self.out_shape))
        return (coupled.apply(ones) if outputs else coupled.adjoint(ones))[0] > 0.5

    @property
    def cost(self) -> float:
        return 2.0 * math.prod(self.out_shape) * self.weight[0].numel()

    @property
    def around(self) -> Convolution | None:
        """The convolution with zeros beyond the ends of the map that stands for this one on a torus, if any does."""
        return self

    def blocks(self) -> Tensor:
        return self._filled(self.in_shape[1:]).flatten(3).flatten(1, 2)

    def _filled(self, sizes: Sequence[int]) -> Tensor:
        """Matrices `(groups, c_out / groups, outputs, c_in / groups, inputs)` for a map of some sizes: every tap, where it meets it."""
        counts, kernel = self._convolved[1:], self.weight.reshape(self.groups, -1, *self.weight.shape[1:])
        made = kernel.new_zeros(*kernel.shape[:2], math.prod(counts), kernel.shape[2], math.prod(sizes))
        meetings = [self._meetings(axis) for axis in range(len(sizes))]
        every = itertools.product(*map(range, self.weight.shape[2:]))
        for taps, entries in zip(every, kernel.flatten(3).unbind(3), strict=True):
            outputs = inputs = torch.zeros(1, dtype=torch.long, device=self.device)
            for tap, met, count, size in zip(taps, meetings, counts, sizes, strict=True):
                outputs = (outputs[:, None] * count + met[tap][0]).flatten()
                inputs = (inputs[:, None] * size + met[tap][1]).flatten()
            # no output meets a tap twice; an input may meet an output at several taps, where padding repeats it
            made[:, :, outputs, :, inputs] += entries
        return made

    def _meetings(self, axis: int) -> list[Tensor]:
        """For every tap along an axis, `(2, count)`: the outputs that it adds to, and what they read there."""
        found: list[list[tuple[int, int]]] = [[] for _ in range(self.weight.shape[2 + axis])]
        for output, sources in enumerate(self.reading(axis)):
            for source, taps in sources.items():
                for tap in taps:
                    found[tap].append((output, source))
        return [torch.tensor(met, dtype=torch.long, device=self.device).reshape(-1, 2).T for met in found]

    def slices(self, axis: int) -> Slices:
        """The convolution cut along a spatial axis, counted from 0."""
        others = [i for i in range(len(self._map) - 1) if i != axis]
        taps = self.weight.to(torch.float64).movedim(2 + axis, 0)
        return Slices(torch.stack([self._across(tap, others) for tap in taps]), self.reading(axis))

    def reading(self, axis: int) -> Reading:
        """Which rows along a spatial axis meet, and at which taps."""
        places = self.places(axis)
        stride, dilation = (self.options[name][axis] for name in ("stride", "dilation"))
        found = []
        for output in range(self._convolved[1 + axis]):
            taps: dict[int, tuple[int, ...]] = {}
            for tap in range(self.weight.shape[2 + axis]):
                at = output * stride - self.padding[axis] + tap * dilation
                if 0 <= at < len(places) and places[at] >= 0:
                    taps[places[at]] = (*taps.get(places[at], ()), tap)
            found.append(taps)
        return tuple(found)

    def places(self, axis: int) -> Sequence[int]:
        """Which input row every row of the map that is convolved is, −1 for none."""
        return range(self._map[1 + axis])

    def reach(self, axis: int, *, inputs: bool) -> int:
        """How far apart two input rows along an axis may be that enter one output row; or output rows that share one."""
        span: int = self.options["dilation"][axis] * (self.weight.shape[2 + axis] - 1)
        return span if inputs else span // int(self.options["stride"][axis])

    def _across(self, tap: Tensor, others: list[int]) -> Tensor:
        """The convolution along the other axes with one tap, as a matrix `(groups, m, n)`."""
        if not others:
            return tap.reshape(self.groups, -1, tap.shape[1])
        return self._along(tap, others).blocks()

    def _along(self, weight: Tensor, axes: list[int]) -> Convolution:
        """The same along some axes only, by a kernel that has no others."""
        return Convolution(weight, (self._map[0], *(self._map[1 + i] for i in axes)), **self._options(axes))

    def _options(self, axes: list[int]) -> dict[str, Any]:
        """How it slides along some axes."""
        sliding = {**self.options, "padding": self.padding, "after": self.after}
        return {
            name: value if name == "groups" else [value[i] for i in axes] for name, value in sliding.items()
        }


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
        self.in_shape, self.out_shape = tuple(in_shape), tuple(out_shape)

    def apply(self, x: Tensor) -> Tensor:
        filled = x
        if x.shape[1:] != self._convolved:
            filled = x.new_zeros(len(x), *self._convolved)
            filled[self._positions] = x
        return self._input_gradient((len(x), *self.out_shape), self.weight, filled, **self.options)

    def adjoint(self, r: Tensor) -> Tensor:
        return self._forward(r, self.weight, **self.options)[self._positions]

    def of(self, weight: Tensor) -> TransposedConvolution:
        stride, dilation, groups = (self.options[name] for name in ("stride", "dilation", "groups"))
        return TransposedConvolution(
            weight, self.in_shape, self.out_shape, stride, self.padding, dilation, groups
        )

    @property
    def cost(self) -> float:
        return 2.0 * math.prod(self.in_shape) * self.weight[0].numel()

    def blocks(self) -> Tensor:
        made = self._filled(self._map[1:])
        kept = made.reshape(*made.shape[:2], *self._convolved[1:], *made.shape[3:])[self._positions]
        return kept.flatten(1, -3).flatten(2).mT

    def slices(self, axis: int) -> Slices:
        """The convolution that this is the transpose of, its outputs cut to the positions there are."""
        sliced, groups = super().slices(axis), self.groups
        others: Shape = tuple(size for i, size in enumerate(self.in_shape[1:]) if i != axis)
        everything: Shape = tuple(size for i, size in enumerate(self._convolved[1:]) if i != axis)
        matrices = sliced.matrices
        if others != everything:
            taps, n = len(matrices), matrices.shape[-1]
            cut = matrices.reshape(taps, groups, -1, *everything, n)
            cut = cut[(slice(None), slice(None), slice(None), *(slice(size) for size in others))]
            matrices = cut.reshape(taps, groups, -1, n)
        return Slices(matrices, sliced.reading[: self.in_shape[1 + axis]])
