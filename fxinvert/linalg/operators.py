"""Linear operators on batches: how a linear map acts, apart from how systems with it are solved.

An operator maps `(B, *in_shape)` to `(B, *out_shape)`, row by row. `adjoint` is its transpose for the Euclidean
inner product: ⟨A x, r⟩ = ⟨x, Aᵀ r⟩.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxinvert.errors import SolveError

Shape = tuple[int, ...]


class LinearOperator(ABC):
    """A linear map between batches of tensors."""

    def __init__(self, in_shape: Sequence[int], out_shape: Sequence[int], like: Tensor) -> None:
        self.in_shape: Shape = tuple(in_shape)
        self.out_shape: Shape = tuple(out_shape)
        self.dtype, self.device = like.dtype, like.device

    @property
    def size(self) -> tuple[int, int]:
        """(outputs, inputs): the shape (m, n) of the matrix that the operator stands for."""
        return math.prod(self.out_shape), math.prod(self.in_shape)

    @property
    def cost(self) -> float:
        """Operations of one product with A, or with Aᵀ, for one sample; by default those of a dense matrix."""
        m, n = self.size
        return 2.0 * m * n

    @property
    def groups(self) -> int:
        """Into how many parts of equal size inputs and outputs fall, in order, none of which meets one of another."""
        return 1

    @property
    def squares(self) -> Tensor | None:
        """The diagonal of AᵀA, of the shape of an input sample, where AᵀA is nothing but that; None where it is not."""
        return None

    def norm(self, iterations: int = 20) -> float:
        """σ_max by power iteration from a fixed start; a lower bound, within a few per cent.

        Raises:
            SolveError: the operator has NaN or infinite values.
        """
        start = torch.randn(1, *self.in_shape, generator=torch.Generator().manual_seed(0))
        # squares of small weights vanish in single precision, and those of large ones overflow
        exact = self.to(torch.float64)
        x = start.to(device=self.device, dtype=torch.float64)
        size = torch.linalg.vector_norm(x)
        for _ in range(iterations):
            x = exact.adjoint(exact.apply(x / torch.where(size > 0, size, 1)))
            size = torch.linalg.vector_norm(x)
        found = float(size)
        if not math.isfinite(found):
            raise self.not_finite()
        return math.sqrt(found)

    def not_finite(self) -> SolveError:
        """The error of an operator with NaN or infinite values."""
        m, n = self.size
        return SolveError(
            f"the operator {type(self).__name__} {m} × {n} has NaN or infinite values, so nothing can be solved with it"
        )

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """A x: `(B, *in_shape)` → `(B, *out_shape)`."""

    @abstractmethod
    def adjoint(self, r: Tensor) -> Tensor:
        """Aᵀ r: `(B, *out_shape)` → `(B, *in_shape)`."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> LinearOperator:
        """The same operator, working in another dtype."""

    def blocks(self) -> Tensor:
        """The matrices of all groups, `(groups, m / groups, n / groups)`, by unit vectors of the smaller side, in all at once."""
        m, n = (size // self.groups for size in self.size)
        side, act, shape = (n, self.apply, self.in_shape) if n <= m else (m, self.adjoint, self.out_shape)
        units = torch.eye(side, dtype=self.dtype, device=self.device).repeat(1, self.groups)
        columns = act(units.reshape(side, *shape)).reshape(side, self.groups, -1).movedim(1, 0)
        return columns.mT if n <= m else columns

    def dense(self) -> Tensor:
        """The `(m, n)` matrix."""
        blocks = self.blocks()
        if len(blocks) == 1:
            return blocks[0]
        whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        return whole


class Dense(LinearOperator):
    """y = W x for a matrix W `(m, n)`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1:], weight.shape[:1], weight)
        self.weight = weight

    def apply(self, x: Tensor) -> Tensor:
        return x @ self.weight.T

    def adjoint(self, r: Tensor) -> Tensor:
        return r @ self.weight

    def to(self, dtype: torch.dtype) -> Dense:
        return Dense(self.weight.to(dtype))

    def blocks(self) -> Tensor:
        return self.weight[None]


class Function(LinearOperator):
    """The linear part of an affine function, x ↦ f(x) − f(0); the adjoint comes from autograd.

    Args:
        function: maps `(B, *in_shape)` to `(B, …)`, row by row.
        in_shape: of one sample.
        like: has the dtype and device in which the function works.

    Raises:
        SolveError: the function does not keep samples apart.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], in_shape: Sequence[int], like: Tensor) -> None:
        self.function = function
        zero = torch.zeros(1, *in_shape, dtype=like.dtype, device=like.device)
        self.offset = function(zero).detach()
        if self.offset.dim() == 0 or len(self.offset) != 1:
            raise SolveError(
                f"a function of one sample {tuple(zero.shape)} returned {tuple(self.offset.shape)}: it does not "
                "treat every sample of a batch by itself"
            )
        super().__init__(in_shape, self.offset.shape[1:], like)

    def apply(self, x: Tensor) -> Tensor:
        return self.function(x) - self.offset

    def adjoint(self, r: Tensor) -> Tensor:
        with torch.enable_grad():
            x = torch.zeros(len(r), *self.in_shape, dtype=r.dtype, device=r.device, requires_grad=True)
            (gradient,) = torch.autograd.grad(self.function(x), x, r)
        return gradient

    def to(self, dtype: torch.dtype) -> Function:
        # the function may hold parameters of its own dtype, so it is evaluated there
        function, own = self.function, self.dtype
        return Function(lambda x: function(x.to(own)).to(dtype), self.in_shape, self.offset.to(dtype))
