"""Operators of known structure, and operators made of others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxinvert.errors import SolveError
from fxinvert.linalg.operators import LinearOperator, Shape
from fxinvert.linalg.vectors import flat


class Diagonal(LinearOperator):
    """y = s ⊙ x, for s of the shape of a sample."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__(scale.shape, scale.shape, scale)
        self.scale = scale

    def apply(self, x: Tensor) -> Tensor:
        return x * self.scale

    def adjoint(self, r: Tensor) -> Tensor:
        return r * self.scale

    def to(self, dtype: torch.dtype) -> Diagonal:
        return Diagonal(self.scale.to(dtype))

    @property
    def cost(self) -> float:
        return float(self.scale.numel())

    @property
    def squares(self) -> Tensor:
        return self.scale.square()


class Selection(LinearOperator):
    """Every output is an input, or zero: a permutation, a crop, a repetition, a padding of any mode.

    Args:
        index: of the shape of an output sample; which entry of the flattened input it is, −1 for none.
        in_shape: of one sample.
        like: has the dtype in which it works.
    """

    def __init__(self, index: Tensor, in_shape: Sequence[int], like: Tensor) -> None:
        super().__init__(in_shape, index.shape, like)
        none = index < 0
        self.index, self._places = index, index.clamp(min=0).flatten()
        self._none = none if bool(none.any()) else None

    @classmethod
    def padding(cls, in_shape: Sequence[int], ends: Sequence[int], mode: str, like: Tensor) -> Selection:
        """The padding of maps `(C, *spatial)`.

        Args:
            in_shape: of one sample.
            ends: numbers at either end, the last axis first, as in `torch.nn.functional.pad`.
            mode: "constant" (zeros), "reflect", "replicate" or "circular".
            like: has the dtype and device.
        """
        index = torch.arange(math.prod(in_shape), dtype=torch.float64, device=like.device)
        options = {"value": -1.0} if mode == "constant" else {}
        padded = torch.nn.functional.pad(index.reshape(1, *in_shape), list(ends), mode=mode, **options)
        return cls(padded[0].long(), in_shape, like)

    def apply(self, x: Tensor) -> Tensor:
        picked = flat(x).index_select(1, self._places).reshape(len(x), *self.out_shape)
        return picked if self._none is None else picked.masked_fill_(self._none, 0)

    def adjoint(self, r: Tensor) -> Tensor:
        kept = (r if self._none is None else r.masked_fill(self._none, 0)).flatten(1)
        summed = kept.new_zeros(len(r), self.size[1]).index_add_(1, self._places, kept)
        return summed.reshape(len(r), *self.in_shape)

    def to(self, dtype: torch.dtype) -> Selection:
        return Selection(self.index, self.in_shape, torch.empty(0, dtype=dtype, device=self.device))

    @property
    def cost(self) -> float:
        return float(self.index.numel())

    @property
    def squares(self) -> Tensor:
        return self.adjoint(torch.ones(1, *self.out_shape, dtype=self.dtype, device=self.device))[0]


class BlockDiagonal(LinearOperator):
    """y_g = W_g x_g for matrices W `(groups, m, n)`: samples are `(groups, n)` → `(groups, m)`."""

    def __init__(self, matrices: Tensor) -> None:
        groups, m, n = matrices.shape
        super().__init__((groups, n), (groups, m), matrices)
        self.matrices = matrices

    def apply(self, x: Tensor) -> Tensor:
        return torch.einsum("gmn,bgn->bgm", self.matrices, x)

    def adjoint(self, r: Tensor) -> Tensor:
        return torch.einsum("gmn,bgm->bgn", self.matrices, r)

    def to(self, dtype: torch.dtype) -> BlockDiagonal:
        return BlockDiagonal(self.matrices.to(dtype))

    @property
    def cost(self) -> float:
        return 2.0 * self.matrices.numel()


class Transpose(LinearOperator):
    """Aᵀ."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(
            operator.out_shape,
            operator.in_shape,
            torch.empty(0, dtype=operator.dtype, device=operator.device),
        )
        self.operator = operator

    def apply(self, x: Tensor) -> Tensor:
        return self.operator.adjoint(x)

    def adjoint(self, r: Tensor) -> Tensor:
        return self.operator.apply(r)

    def to(self, dtype: torch.dtype) -> Transpose:
        return Transpose(self.operator.to(dtype))

    @property
    def cost(self) -> float:
        return self.operator.cost


class Composition(LinearOperator):
    """A₁ A₂ … Aₖ: the last one comes first.

    Raises:
        SolveError: one does not take what the next one gives.
    """

    def __init__(self, *operators: LinearOperator) -> None:
        first, last = operators[-1], operators[0]
        super().__init__(first.in_shape, last.out_shape, torch.empty(0, dtype=last.dtype, device=last.device))
        for outer, inner in itertools.pairwise(operators):
            _same_shape("the shapes between composed operators", outer.in_shape, inner.out_shape)
        self.operators = operators

    def apply(self, x: Tensor) -> Tensor:
        for operator in reversed(self.operators):
            x = operator.apply(x)
        return x

    def adjoint(self, r: Tensor) -> Tensor:
        for operator in self.operators:
            r = operator.adjoint(r)
        return r

    def to(self, dtype: torch.dtype) -> Composition:
        return Composition(*(operator.to(dtype) for operator in self.operators))

    @property
    def cost(self) -> float:
        return sum(operator.cost for operator in self.operators)


class Sum(LinearOperator):
    """A₁ + A₂ + … + Aₖ; low rank and a diagonal: `Sum(Diagonal(d), Composition(Dense(u), Dense(v)))`.

    Raises:
        SolveError: their shapes differ.
    """

    def __init__(self, *operators: LinearOperator) -> None:
        first = operators[0]
        super().__init__(
            first.in_shape, first.out_shape, torch.empty(0, dtype=first.dtype, device=first.device)
        )
        for other in operators[1:]:
            _same_shape("the inputs of added operators", first.in_shape, other.in_shape)
            _same_shape("the outputs of added operators", first.out_shape, other.out_shape)
        self.operators = operators

    def apply(self, x: Tensor) -> Tensor:
        return torch.stack([operator.apply(x) for operator in self.operators]).sum(0)

    def adjoint(self, r: Tensor) -> Tensor:
        return torch.stack([operator.adjoint(r) for operator in self.operators]).sum(0)

    def to(self, dtype: torch.dtype) -> Sum:
        return Sum(*(operator.to(dtype) for operator in self.operators))

    @property
    def cost(self) -> float:
        return sum(operator.cost for operator in self.operators)


def _same_shape(what: str, a: Shape, b: Shape) -> None:
    if a != b:
        raise SolveError(f"{what} differ: {a} and {b}")
