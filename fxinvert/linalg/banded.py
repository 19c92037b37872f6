"""Direct solves with the Gram matrix of a convolution, which is block-banded along a spatial axis.

Rows of a map that no window covers together do not meet in AᵀA, nor rows of the output in AAᵀ that share no input. The
factorization is block Cholesky (Golub & Van Loan, *Matrix Computations*, §4.3), which is as stable as that of a dense matrix:
L_ij = (A_ij − Σ_k L_ik L_jkᵀ) L_jj⁻ᵀ and L_ii L_iiᵀ = S_i = A_ii − Σ_j L_ij L_ijᵀ. What is kept is block LDLᵀ, the inverses of
the S_i and G_ij = L_ij L_jj⁻¹, so that a solve is three matrix products for every row of blocks. Strides, dilations,
groups and zero padding need nothing of their own: they only decide which rows meet, and how.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxinvert.linalg.convolution import Convolution
from fxinvert.linalg.definite import definite_factor, without_dead
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
        reach: how many blocks further a block still meets another.
    """

    shape: Shape
    groups: int
    axis: int
    rows: int
    blocks: int
    reach: int

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
        return self.blocks * (self.reach + 1) * self.groups * self.block**2

    def working(self) -> int:
        """Numbers that it works on besides: of a row of blocks, those of the Gram matrix, and what becomes of the last of them."""
        return (self.reach + 3) * self.groups * self.block**2

    def solve_cost(self) -> float:
        """Operations of one solve for one sample."""
        return 2.0 * self.blocks * (2 * self.reach + 1) * self.groups * self.block**2

    def factor_cost(self) -> float:
        """Operations of the factorization: an inverse, `reach` couplings and their products for every row of blocks."""
        products = 1 + 2 * self.reach + self.reach * (self.reach - 1) / 2
        return 2.0 * self.blocks * products * self.groups * self.block**3

    def split(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """`(B, groups · c, *spatial)` → `(groups, B, blocks · block)`, rows of the map in order, filled up with zeros."""
        size, c = self.shape[1 + self.axis], self.shape[0] // self.groups
        others = [size for i, size in enumerate(self.shape[1:]) if i != self.axis]
        made = value.new_empty(self.groups, len(value), self.blocks * self.rows, c, *others, dtype=dtype)
        rows = value.reshape(len(value), self.groups, c, *self.shape[1:]).movedim(3 + self.axis, 2)
        made[:, :, :size] = rows.transpose(0, 1)
        made[:, :, size:] = 0
        return made.flatten(2)

    def join(self, value: Tensor) -> Tensor:
        """The inverse of `split`."""
        c, batch = self.shape[0] // self.groups, value.shape[1]
        others = [size for i, size in enumerate(self.shape[1:]) if i != self.axis]
        rows = value.reshape(self.groups, batch, self.blocks * self.rows, c, *others)
        rows = rows[:, :, : self.shape[1 + self.axis]]
        # (groups, B, rows, c, …) → (B, groups · c, …)
        return rows.transpose(0, 1).movedim(2, 3 + self.axis).flatten(1, 2)


def layout(operator: Convolution, *, outputs: bool) -> Layout:
    """The layout of AAᵀ (`outputs`) or AᵀA along the axis that makes a solve cheapest."""
    # what a convolution calls its inputs is the finer side; for a transposed one that is its output
    fine = outputs != operator.forward
    shape = operator.out_shape if outputs else operator.in_shape
    groups, found = operator.groups, []
    for axis, size in enumerate(shape[1:]):
        reach = operator.reach(axis, inputs=fine)
        row = math.prod(shape) // (groups * size)
        least = min(size, -(-SMALLEST_BLOCK // row))
        for rows in sorted({least, min(size, max(least, reach)), size}):
            blocks = -(-size // rows)
            found.append(Layout(shape, groups, axis, rows, blocks, min(-(-reach // rows), blocks - 1)))
    return min(found, key=Layout.solve_cost)


class Gram:
    """The blocks of AAᵀ or AᵀA of a convolution, in float64, made when asked for.

    Blocks with the same neighbourhood are the same: away from the ends of the map there is one kind of row.
    """

    def __init__(self, operator: Convolution, *, outputs: bool) -> None:
        self.layout = layout(operator, outputs=outputs)
        sliced = operator.slices(self.layout.axis)
        self._matrices, self._reading = sliced.matrices, sliced.reading
        self._readers: dict[int, list[int]] = {}
        for output, taps in enumerate(self._reading):
            for source in taps:
                self._readers.setdefault(source, []).append(output)
        self._fine = outputs != operator.forward
        self._rows: dict[tuple[tuple[int, int], ...], Tensor] = {}
        self._size = self.layout.shape[1 + self.layout.axis]

    def block(self, i: int, j: int) -> tuple[tuple[object, ...], Tensor]:
        """The block of rows i and columns j, `(groups, block, block)`, and a key that equal blocks share."""
        h, n = self.layout.rows, self.layout.row
        keys = [[self._key(i * h + a, j * h + b) for b in range(h)] for a in range(h)]
        inside = tuple(i * h + a < self._size for a in range(h))
        made = self._matrices.new_zeros(self.layout.groups, h * n, h * n)
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
        reading = self._reading
        if self._fine:
            both = [(reading[o][i], reading[o][j]) for o in self._readers.get(i, ()) if j in reading[o]]
        elif max(i, j) < len(reading):
            both = [(reading[i][s], reading[j][s]) for s in reading[i] if s in reading[j]]
        else:
            both = []
        return tuple(pair for taps in both for pair in itertools.product(*taps))

    def _sum(self, pairs: tuple[tuple[int, int], ...]) -> Tensor:
        if pairs not in self._rows:
            left, right = (self._matrices[list(taps)] for taps in zip(*pairs, strict=True))
            # one product over all pairs of taps
            if self._fine:
                made = left.permute(1, 3, 0, 2).flatten(2) @ right.permute(1, 0, 2, 3).flatten(1, 2)
            else:
                made = left.permute(1, 2, 0, 3).flatten(2) @ right.permute(1, 2, 0, 3).flatten(2).mT
            self._rows[pairs] = made
        return self._rows[pairs]


class BlockBanded:
    """(K + μI)⁻¹ for a Gram matrix K, factorized in float64.

    Args:
        gram: K.
        shift: μ.

    Raises:
        NotDefiniteError: K + μI is not positive definite to working precision.
    """

    def __init__(self, gram: Gram, shift: float) -> None:
        self.layout, self.dtype = gram.layout, torch.float64
        #: S_i⁻¹ `(groups, block, block)`, and the G_ij of a row of blocks side by side, `(groups, block, ≤ reach · block)`
        self._inverses: list[Tensor] = []
        self._couplings: list[Tensor] = []
        rows: list[_Row] = []
        for i in range(self.layout.blocks):
            near = range(max(0, i - self.layout.reach), i + 1)
            kinds, made = zip(*(gram.block(i, j) for j in near), strict=True)
            own = without_dead(made[-1])
            own.diagonal(dim1=1, dim2=2).add_(shift)
            row = _Row.eliminated(kinds, [*made[:-1], own], rows)
            if rows and row.same(rows[-1]):
                # the map looks the same from here on: so does the factorization, up to the map's other end
                row = rows[-1]
            else:
                row.invert()
            rows = [*rows[max(0, len(rows) - self.layout.reach) :], row]
            self._inverses.append(row.inverse)
            self._couplings.append(row.coupling)

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
        z, b = self.layout.split(value, self.dtype), self.layout.block
        for i, coupling in enumerate(self._couplings):
            if i:
                _subtract(z[..., i * b : (i + 1) * b], z[..., i * b - coupling.shape[2] : i * b], coupling.mT)
        w = torch.empty_like(z)
        for i, inverse in enumerate(self._inverses):
            own = slice(i * b, (i + 1) * b)
            w[..., own] = z[..., own] @ inverse
        for i, coupling in reversed([*enumerate(self._couplings)]):
            if i:
                _subtract(w[..., i * b - coupling.shape[2] : i * b], w[..., i * b : (i + 1) * b], coupling)
        return self.layout.join(w)


class _Row:
    """A row of blocks in elimination: the L_ij and G_ij for j < i side by side, and S_i, with its factor and inverse once made."""

    def __init__(self, kinds: object, left: Tensor, coupling: Tensor, complement: Tensor) -> None:
        self.kinds, self.left, self.coupling, self.complement = kinds, left, coupling, complement
        self.factor = self.inverse = complement

    @classmethod
    def eliminated(cls, kinds: object, made: list[Tensor], above: list[_Row]) -> _Row:
        """The row with blocks `made`, its own last, below the rows `above`."""
        *beside, own = made
        above = above[len(above) - len(beside) :]
        b = own.shape[-1]
        left: list[Tensor] = []
        for j, (block, row) in enumerate(zip(beside, above, strict=True)):
            common = min(j, row.left.shape[2] // b)
            if common:
                done = torch.cat(left[j - common : j], 2)
                block = block - done @ row.left[..., row.left.shape[2] - common * b :].mT
            left.append(torch.linalg.solve_triangular(row.factor.mT, block, upper=True, left=False))
        if not left:
            nothing = own[..., :0]
            return cls(kinds, nothing, nothing, own)
        coupling = [
            torch.linalg.solve_triangular(row.factor, block, upper=False, left=False)
            for block, row in zip(left, above, strict=True)
        ]
        side = torch.cat(left, 2)
        return cls(kinds, side, torch.cat(coupling, 2), own - side @ side.mT)

    def same(self, other: _Row) -> bool:
        """Whether rounding is all that the rows differ in."""
        if self.kinds != other.kinds:
            return False
        return _same(self.complement, other.complement) and _same(self.left, other.left)

    def invert(self) -> None:
        self.factor = definite_factor(self.complement)
        self.inverse = torch.cholesky_inverse(self.factor)


def _subtract(value: Tensor, a: Tensor, b: Tensor) -> None:
    """value − a @ b, in place, `(groups, B, …)`; a single product for a single group writes where it should."""
    if len(value) == 1:
        value[0].addmm_(a[0], b[0], alpha=-1)
    else:
        value.baddbmm_(a, b, alpha=-1)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == 0 or bool((a - b).abs().max() <= 4 * torch.finfo(a.dtype).eps * b.abs().max())
