"""The Jacobian of a function at a batch of points, as a linear operator: products only, no matrix.

Jᵀ u comes from reverse-mode differentiation, and J v is the derivative of the linear map u ↦ Jᵀ u, by reverse mode again
(Griewank & Walther 2008, §3.2): this map is recorded once for a point, so that a product is one pass over what depends on
u, without the function. Where an op on the way cannot be differentiated twice, J v comes from forward mode, which in torch
evaluates the function anew for every product, and its affine ops twice, once for the parameters, which have no part in it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxinvert.errors import SolveError
from fxinvert.linalg.operators import LinearOperator
from fxinvert.linalg.vectors import flat, per_sample


class Jacobian(LinearOperator):
    """y = J_b x for every row b, J_b the Jacobian of a function at row b of a point.

    Args:
        function: maps `(B, *in_shape)` to `(B, *out_shape)`, row by row.
        point: `(B, *in_shape)`.

    Raises:
        SolveError: the function is not differentiable in its input.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], point: Tensor) -> None:
        with differentiable(), torch.enable_grad():
            leaf = point.detach().clone().requires_grad_()
            output = function(leaf)
        self._set(function, leaf, output)

    @classmethod
    def several(
        cls, functions: Sequence[Callable[[Tensor], Tensor]], leaves: Sequence[Tensor], output: Tensor
    ) -> Iterator[Jacobian]:
        """The Jacobians of one output in several values on the way to it: u ↦ Jᵀ u is recorded once for all of them.

        Args:
            functions: from each of the values to the output.
            leaves: the values, `(B, …)`, as they were recorded.
            output: that follows from them.

        Raises:
            SolveError: the output is not differentiable.
        """
        with differentiable(), torch.enable_grad():
            dual = _somewhere(output)
            try:
                pulled: Sequence[Tensor | None] = torch.autograd.grad(
                    output, leaves, dual, retain_graph=True, create_graph=True, allow_unused=True
                )
            except (NotImplementedError, RuntimeError):  # see `apply`
                pulled = [None] * len(leaves)
        for function, leaf, product in zip(functions, leaves, pulled, strict=True):
            jacobian = cls.__new__(cls)
            jacobian._set(function, leaf, output)
            jacobian._recorded, jacobian._twice = (
                (dual, product) if product is not None else None,
                product is not None,
            )
            yield jacobian

    def _set(self, function: Callable[[Tensor], Tensor], leaf: Tensor, output: Tensor) -> None:
        self.function, self.point, self._leaf, self._output = function, leaf.detach(), leaf, output
        super().__init__(leaf.shape[1:], output.shape[1:], self.point)
        #: some u and Jᵀ u, once that has been recorded; and whether it can be
        self._recorded: tuple[Tensor, Tensor] | None = None
        self._twice = True
        if not output.requires_grad:
            raise _not_differentiable()

    @property
    def output(self) -> Tensor:
        """The function's value at the point."""
        return self._output.detach()

    def apply(self, x: Tensor) -> Tensor:
        if self._twice:
            try:
                return self._reverse_twice(x)
            except (NotImplementedError, RuntimeError, SolveError):
                # the exception's type does not tell why; what is wrong otherwise is wrong in forward mode, too
                self._twice = False
        return self._forward_mode(x)

    def adjoint(self, r: Tensor) -> Tensor:
        return self._pulled_back(self._output, self._leaf, r, keep=True)

    def to(self, dtype: torch.dtype) -> Jacobian:
        function, own = self.function, self.dtype
        return Jacobian(lambda x: function(x.to(own)).to(dtype), self.point.to(dtype))

    def _forward_mode(self, x: Tensor) -> Tensor:
        with differentiable(), torch.no_grad(), forward_ad.dual_level():
            try:
                output = self.function(forward_ad.make_dual(self.point.clone(), x))  # type: ignore[no-untyped-call]
            except NotImplementedError as error:
                said = str(error).partition(".")[0]
                raise SolveError(f"an op can be differentiated neither twice nor forwards: {said}") from error
            tangent = forward_ad.unpack_dual(output).tangent  # type: ignore[no-untyped-call]
        return torch.zeros_like(self._output) if tangent is None else tangent.detach()

    def _reverse_twice(self, x: Tensor) -> Tensor:
        with differentiable(), torch.enable_grad():
            if self._recorded is None:
                dual = _somewhere(self._output)
                pulled = self._pulled_back(self._output, self._leaf, dual, keep=True, create_graph=True)
                self._recorded = dual, pulled
            dual, pulled = self._recorded
            return self._pulled_back(pulled, dual, x, keep=True)

    def _pulled_back(
        self, output: Tensor, leaf: Tensor, r: Tensor, *, keep: bool, create_graph: bool = False
    ) -> Tensor:
        """The product of `r` with the derivative of `output` in `leaf`.

        Raises:
            SolveError: there is none.
        """
        gradient = None
        if output.requires_grad:
            (gradient,) = torch.autograd.grad(
                output, leaf, r, retain_graph=keep, create_graph=create_graph, allow_unused=True
            )
        if gradient is None:
            raise _not_differentiable()
        return gradient if create_graph else gradient.detach()


def _somewhere(output: Tensor) -> Tensor:
    """A u to record u ↦ Jᵀ u at: anywhere but at zero, where torch's derivative of logcumsumexp has a kink in u."""
    return torch.linspace(1, 2, output.numel()).to(output).reshape(output.shape).requires_grad_()


def _not_differentiable() -> SolveError:
    return SolveError("the output does not depend on the input in a way that can be differentiated")


class Explicit(LinearOperator):
    """The same as a matrix for every row, made by as many products as its smaller side has entries.

    Attributes:
        matrix: `(B, m, n)`.
        pairs: how many pairs of products with J and Jᵀ that was worth.
    """

    def __init__(self, jacobian: Jacobian) -> None:
        super().__init__(jacobian.in_shape, jacobian.out_shape, jacobian.point)
        (m, n), rows = self.size, len(jacobian.point)
        side, act, shape = (
            (n, jacobian.apply, self.in_shape) if n < m else (m, jacobian.adjoint, self.out_shape)
        )
        units = torch.eye(side, dtype=self.dtype, device=self.device).reshape(side, 1, *shape)
        lines = [flat(act(unit.expand(rows, *shape).contiguous())) for unit in units]
        self.matrix, self.pairs = torch.stack(lines, 2 if n < m else 1), -(-side // 2)

    def apply(self, x: Tensor) -> Tensor:
        return (self.matrix @ flat(x)[..., None]).reshape(-1, *self.out_shape)

    def adjoint(self, r: Tensor) -> Tensor:
        return (self.matrix.mT @ flat(r)[..., None]).reshape(-1, *self.in_shape)

    def learn(self, step: Tensor, change: Tensor) -> None:
        """The least change that makes it map a step to the change of the output (Broyden, Math. Comp. 19, 1965).

        Args:
            step: `(B, *in_shape)`; zero where nothing is learnt.
            change: `(B, *out_shape)`.
        """
        missing = _per_square(flat(change - self.apply(step)), flat(step))
        self.matrix = self.matrix + missing[..., None] * flat(step)[:, None]

    def learn_adjoint(self, multipliers: Tensor, pulled: Tensor) -> None:
        """The least change that makes its adjoint map multipliers to what Jᵀ makes of them (the same, of the adjoint).

        Args:
            multipliers: `(B, *out_shape)`; zero where nothing is learnt.
            pulled: `(B, *in_shape)`.
        """
        missing = _per_square(flat(pulled - self.adjoint(multipliers)), flat(multipliers))
        self.matrix = self.matrix + flat(multipliers)[..., None] * missing[:, None]

    def multipliers(self, correction: Tensor, rank: Tensor) -> Tensor:
        """The least z for which Jᵀ z comes closest to a correction.

        Args:
            correction: `(B, *in_shape)`.
            rank: `(B,)`, what counts as zero, relative to the largest singular value.
        """
        finite = torch.isfinite(self.matrix).all(-1).all(-1)[:, None, None]
        inverse = torch.linalg.pinv(torch.where(finite, self.matrix, 0).mT.double(), rtol=rank.double())
        found: Tensor = inverse @ flat(correction).double()[..., None]
        return found.to(correction).reshape(-1, *self.out_shape)

    def to(self, dtype: torch.dtype) -> Explicit:
        made = copy.copy(self)
        made.matrix = self.matrix.to(dtype)
        return made


def _per_square(missing: Tensor, along: Tensor) -> Tensor:
    """What is missing, over the squared length that it is missing for: rows of vectors, as it is where that is zero."""
    square = along.square().sum(1, keepdim=True)
    return missing / torch.where(square > 0, square, 1)


class Partly(LinearOperator):
    """The same, written out for some rows, `(B,)`."""

    def __init__(self, explicit: Explicit, jacobian: Jacobian, rows: Tensor) -> None:
        super().__init__(jacobian.in_shape, jacobian.out_shape, jacobian.point)
        self.explicit, self.jacobian, self.rows = explicit, jacobian, rows

    def apply(self, x: Tensor) -> Tensor:
        product = self.jacobian.apply(x)
        return torch.where(per_sample(self.rows, product), self.explicit.apply(x), product)

    def adjoint(self, r: Tensor) -> Tensor:
        product = self.jacobian.adjoint(r)
        return torch.where(per_sample(self.rows, product), self.explicit.adjoint(r), product)

    def to(self, dtype: torch.dtype) -> Partly:
        return Partly(self.explicit.to(dtype), self.jacobian.to(dtype), self.rows)


def acts_on_values(jacobian: Jacobian) -> Tensor:
    """`(B,)`, the rows with a diagonal Jacobian: J v = (J 1) ⊙ v for a random v, up to rounding.

    Two products tell; one that is not diagonal passes with probability zero.
    """
    one = torch.ones_like(jacobian.point)
    if jacobian.in_shape != jacobian.out_shape:
        return torch.zeros(len(one), dtype=torch.bool, device=one.device)
    probe = torch.rand(jacobian.in_shape, generator=torch.Generator().manual_seed(0)).to(one) + 0.5
    found, diagonal = jacobian.apply(probe.expand_as(one).contiguous()), jacobian.apply(one)
    rounding = 1e3 * torch.finfo(one.dtype).eps * flat(diagonal).abs().amax(1)
    return (flat(found - diagonal * probe).abs() <= rounding[:, None]).all(1)


@contextmanager
def differentiable() -> Iterator[None]:
    """Runs the body with the kernels of attention that can be differentiated in forward mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # forward_ad loads its decompositions through torch.jit, which says that it is old
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
