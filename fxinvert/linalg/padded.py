"""Convolutions of maps that are padded by their own entries, or repeated, first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxinvert.linalg.convolution import Convolution
from fxinvert.linalg.structured import Selection


class PaddedConvolution(Convolution):
    """A convolution behind a padding of any mode, or a repetition of rows, along every axis by itself.

    Args:
        weight: `(c_out, c_in / groups, *kernel)`.
        in_shape: `(c_in, *spatial)`, before the padding.
        rows: for every spatial axis, which row of the input each row of the padded map is, −1 for a row of zeros.
        **sliding: how the kernel slides over the padded map, as for `Convolution`.
    """

    def __init__(
        self, weight: Tensor, in_shape: Sequence[int], rows: Sequence[Sequence[int]], **sliding: Any
    ) -> None:
        super().__init__(weight, (in_shape[0], *map(len, rows)), **sliding)
        self.rows = [list(along) for along in rows]
        self.in_shape = tuple(in_shape)
        self.copies = Selection(index_of(self.rows, in_shape, weight.device), in_shape, weight)

    def apply(self, x: Tensor) -> Tensor:
        return super().apply(self.copies.apply(x))

    def adjoint(self, r: Tensor) -> Tensor:
        return self.copies.adjoint(super().adjoint(r))

    def of(self, weight: Tensor) -> PaddedConvolution:
        every = list(range(len(self.rows)))
        return PaddedConvolution(weight, self.in_shape, self.rows, **self._options(every))

    @property
    def cost(self) -> float:
        return super().cost + self.copies.cost

    @property
    def around(self) -> Convolution | None:
        """The convolution with zeros in the padding, where that goes round in a circle: on a torus the two are one."""
        sliding = self._options(list(range(len(self.rows))))
        for axis, (along, size) in enumerate(zip(self.rows, self.in_shape[1:], strict=True)):
            low = along.index(0) if 0 in along else 0
            if along != [(i - low) % size for i in range(len(along))]:
                return None
            sliding["padding"][axis] += low
            sliding["after"][axis] += len(along) - size - low
        return Convolution(self.weight, self.in_shape, **sliding)

    def places(self, axis: int) -> Sequence[int]:
        return self.rows[axis]

    def reach(self, axis: int, *, inputs: bool) -> int:
        met: dict[int, list[int]] = {}
        for output, taps in enumerate(self.reading(axis)):
            for source in taps:
                key, value = (output, source) if inputs else (source, output)
                met.setdefault(key, []).append(value)
        return max((max(rows) - min(rows) for rows in met.values()), default=0)

    def _along(self, weight: Tensor, axes: list[int]) -> PaddedConvolution:
        shape = self.in_shape[0], *(self.in_shape[1 + i] for i in axes)
        return PaddedConvolution(weight, shape, [self.rows[i] for i in axes], **self._options(axes))


def index_of(rows: Sequence[Sequence[int]], shape: Sequence[int], device: torch.device) -> Tensor:
    """Which entry of a flattened map each entry of the padded one is, −1 for none.

    Args:
        rows: for every spatial axis, which row each of the padded map is, −1 for none.
        shape: of the map, `(c, *spatial)`.
        device: of the answer.
    """
    index = torch.arange(shape[0], device=device)
    none = torch.zeros_like(index, dtype=torch.bool)
    for along, size in zip(rows, shape[1:], strict=True):
        row = torch.tensor(along, device=device)
        index, none = index[..., None] * size + row, none[..., None] | (row < 0)
    return index.masked_fill(none, -1)


def rows_of(index: Tensor, shape: Sequence[int]) -> list[list[int]] | None:
    """The rows that `index_of` makes an index of; None where there are none: channels, or axes, are mixed."""
    places = torch.unravel_index(index.clamp(min=0), tuple(shape))
    along = [torch.where(index < 0, -1, place) for place in places[1:]]
    rows = [row.movedim(1 + axis, 0).flatten(1).amax(1).tolist() for axis, row in enumerate(along)]
    same = len(index) == shape[0] and torch.equal(index_of(rows, shape, index.device), index)
    return rows if same else None
