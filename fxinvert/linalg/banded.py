"""Direct solves with the Gram matrix of a convolution, which is block tridiagonal along a spatial axis.

Rows of a map that no window covers together do not meet in AᵀA, nor rows of the output in AAᵀ that share no input.
With blocks of as many rows as a window reaches, only neighbouring blocks meet. The factorization is block LDLᵀ (Golub &
Van Loan, *Matrix Computations*, §4.5): S_i = D_i − G_i B_iᵀ, G_i = B_i S_{i−1}⁻¹. The inverses of the S_i are kept, so that
a solve is three matrix products for every block. Strides, dilations, groups and zero padding need nothing of their own:
they only decide which rows meet, and how.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxinvert.linalg.convolution import Convolution, Slices
from fxinvert.linalg.definite import definite_inverse, without_dead
from fxinvert.linalg.operators import Shape

#: smallest number of unknowns in a block that is worth a matrix product of its own
SMALLEST_BLOCK = 128


@dataclass(frozen=True)
class Layout:
    """How a map `(B, groups · c, *spatial)` is cut into blocks of rows along an axis.

    Attributes:
        shape: `(groups · c, *spatial)`.
        groups: independent systems.
        axis: the spatial axis, counted from 0.
        rows: of the map in a block; the last block may reach beyond the map.
        blocks: their number.
    """

    shape: Shape
    groups: int
    axis: int
    rows: int
    blocks: int

    @property
    def row(self) -> int:
        """Unknowns in a row of one group."""
        return math.prod(self.shape) // (self.groups * self.shape[1 + self.axis])

    @property
    def block(self) -> int:
        """Unknowns in a block of one group."""
        return self.rows * self.row

    def entries(self) -> int:
        """Numbers that the factorization keeps, at most."""
        return (2 * self.blocks - 1) * self.groups * self.block**2

    def solve_cost(self) -> float:
        """Operations of one solve for one sample."""
        return 2.0 * (3 * self.blocks - 2) * self.groups * self.block**2

    def factor_cost(self) -> float:
        """Operations of the factorization: inverse, coupling and complement of every block."""
        return self.groups * self.block**3 * (2.0 * self.blocks + 4.0 * (self.blocks - 1))

    def split(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """`(B, groups · c, *spatial)` → `(blocks, groups, B, block)`, filled up with zeros."""
        size, padded = self.shape[1 + self.axis], self.rows * self.blocks
        rows = value.reshape(len(value), self.groups, self.shape[0] // self.groups, *self.shape[1:]).movedim(
            3 + self.axis, 0
        )
        whole = value.new_zeros(padded, *rows.shape[1:], dtype=dtype) if padded > size else None
        if whole is not None:
            whole[:size] = rows
            rows = whole
        # (blocks, rows, B, groups, c, …) → (blocks, groups, B, rows, c, …)
        cut = rows.reshape(self.blocks, self.rows, *rows.shape[1:]).movedim(1, 3)
        return cut.movedim(2, 1).to(dtype).reshape(self.blocks, self.groups, len(value), self.block)

    def join(self, blocks: Tensor) -> Tensor:
        """The inverse of `split`."""
        c, batch = self.shape[0] // self.groups, blocks.shape[2]
        others = [size for i, size in enumerate(self.shape[1:]) if i != self.axis]
        rows = blocks.reshape(self.blocks, self.groups, batch, self.rows, c, *others)
        rows = rows.movedim(3, 1).flatten(0, 1)[: self.shape[1 + self.axis]]
        # (rows, groups, B, c, …) → (B, groups · c, …)
        return rows.transpose(1, 2).movedim(0, 3 + self.axis).flatten(1, 2)


def layout(operator: Convolution, *, outputs: bool) -> Layout:
    """The layout of AAᵀ (`outputs`) or AᵀA along the axis that makes a solve cheapest."""
    # what a convolution calls its inputs is the finer side; for a transposed one that is its output
    fine = outputs != operator.forward
    shape = operator.out_shape if outputs else operator.in_shape
    options, kernel, found = operator.options, operator.weight.shape[2:], []
    for axis, (k, s, d) in enumerate(zip(kernel, options["stride"], options["dilation"], strict=True)):
        reach = d * (k - 1) // (1 if fine else s)
        size = shape[1 + axis]
        row = math.prod(shape) // (options["groups"] * size)
        rows = min(size, max(1, reach, -(-SMALLEST_BLOCK // row)))
        found.append(Layout(shape, options["groups"], axis, rows, -(-size // rows)))
    return min(found, key=Layout.solve_cost)


class Gram:
    """The blocks of AAᵀ or AᵀA of a convolution, in float64, made when asked for.

    Blocks with the same neighbourhood are the same: away from the ends of the map there is one kind of row.
    """

    def __init__(self, operator: Convolution, *, outputs: bool) -> None:
        self.layout = layout(operator, outputs=outputs)
        self._slices: Slices = operator.slices(self.layout.axis)
        self._fine = outputs != operator.forward
        self._rows: dict[tuple[tuple[int, int], ...], Tensor] = {}
        self._size = self.layout.shape[1 + self.layout.axis]

    def block(self, i: int, j: int) -> tuple[tuple[object, ...], Tensor]:
        """The block of rows i and columns j, `(groups, block, block)`, and a key that equal blocks share."""
        h, n = self.layout.rows, self.layout.row
        keys = [[self._key(i * h + a, j * h + b) for b in range(h)] for a in range(h)]
        inside = tuple(i * h + a < self._size for a in range(h))
        made = self._slices.matrices.new_zeros(self.layout.groups, h * n, h * n)
        for a, row in enumerate(keys):
            for b, key in enumerate(row):
                if key:
                    made[:, a * n : (a + 1) * n, b * n : (b + 1) * n] = self._sum(key)
            if i == j and not inside[a]:  # beyond the map: unknowns that are zero
                made[:, a * n : (a + 1) * n, a * n : (a + 1) * n] = torch.eye(
                    n, dtype=made.dtype, device=made.device
                )
        return (tuple(map(tuple, keys)), inside), made

    def _key(self, i: int, j: int) -> tuple[tuple[int, int], ...]:
        """The pairs of taps by which two rows meet."""
        slices = self._slices
        if self._fine:
            pairs = [(slices.tap(o, i), slices.tap(o, j)) for o in slices.outputs_of(i)]
        else:
            pairs = [(slices.tap(i, s), slices.tap(j, s)) for s in slices.inputs_of(i)]
        return tuple((a, b) for a, b in pairs if a is not None and b is not None)

    def _sum(self, pairs: tuple[tuple[int, int], ...]) -> Tensor:
        if pairs not in self._rows:
            left, right = (self._slices.matrices[list(taps)] for taps in zip(*pairs, strict=True))
            # one product over all pairs of taps
            if self._fine:
                made = left.permute(1, 3, 0, 2).flatten(2) @ right.permute(1, 0, 2, 3).flatten(1, 2)
            else:
                made = left.permute(1, 2, 0, 3).flatten(2) @ right.permute(1, 2, 0, 3).flatten(2).mT
            self._rows[pairs] = made
        return self._rows[pairs]


class BlockTridiagonal:
    """(K + μI)⁻¹ for a Gram matrix K, factorized in float64.

    Args:
        gram: K.
        shift: μ.

    Raises:
        NotDefiniteError: K + μI is not positive definite to working precision.
    """

    def __init__(self, gram: Gram, shift: float) -> None:
        self.layout, self.dtype = gram.layout, torch.float64
        self._inverses: list[Tensor] = []
        self._couplings: list[Tensor] = []
        known: object = None
        complement, inverse = torch.empty(0), torch.empty(0)
        for i in range(self.layout.blocks):
            kind, made = gram.block(i, i)
            without_dead(made)
            made.diagonal(dim1=1, dim2=2).add_(shift)
            kinds: object = kind
            if i:
                beside, coupling = gram.block(i, i - 1)
                scaled = coupling @ inverse
                made -= scaled @ coupling.mT
                kinds = kind, beside
            if kinds == known and _same(made, complement):
                # the map looks the same from here on: so does the factorization, up to the map's other end
                self._inverses.append(self._inverses[-1])
                self._couplings.append(self._couplings[-1])
                continue
            known, complement = kinds, made
            inverse = definite_inverse(made)
            self._inverses.append(inverse)
            if i:
                self._couplings.append(scaled)

    def to(self, dtype: torch.dtype) -> None:
        """Solves in another dtype from now on."""
        made: dict[int, Tensor] = {}
        for kept in (self._inverses, self._couplings):
            kept[:] = [made.setdefault(id(t), t.to(dtype)) for t in kept]
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        kept = {id(t): t for t in [*self._inverses, *self._couplings]}
        return sum(t.nbytes for t in kept.values())

    def solve(self, value: Tensor) -> Tensor:
        """`(B, *shape)` → the same, in `dtype`."""
        z = self.layout.split(value, self.dtype)
        for i, coupling in enumerate(self._couplings, 1):
            z[i].baddbmm_(z[i - 1], coupling.mT, alpha=-1)
        z = torch.stack([torch.bmm(own, inverse) for own, inverse in zip(z, self._inverses, strict=True)])
        for i in range(len(self._couplings), 0, -1):
            z[i - 1].baddbmm_(z[i], self._couplings[i - 1], alpha=-1)
        return self.layout.join(z)


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 4 * torch.finfo(a.dtype).eps * b.abs().max())
