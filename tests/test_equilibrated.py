"""Convolutions equilibrated by their channels, against dense singular value decompositions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_problems import F64, convolutions, matrix, relative
from test_iterative import either

from fxinvert.linalg import Convolution, PaddedConvolution, SolveSettings, SpectralFactor, factorize
from fxinvert.linalg.anchored import Method
from fxinvert.linalg.equilibrated import equilibrated
from fxinvert.linalg.gram import GramFactor

SHAPE = (3, 12, 12)


def ill_conditioned(c_out: int, c_in: int, *, outputs: bool) -> torch.Tensor:
    """A kernel of 5 × 5 whose output, or input, channels have a condition of 1e5."""
    rows, columns = (c_out, c_in) if outputs else (c_in, c_out)
    made = matrix(rows, columns * 25, 1e5).reshape(rows, columns, 5, 5)
    return made if outputs else made.transpose(0, 1).contiguous()


@given(convolutions(), st.booleans(), st.booleans(), st.booleans())
def test_an_operator_is_mixed_from_its_equilibrated_one(
    case: Any, turned: bool, outputs: bool, padded: bool
) -> None:
    weight, shape, options = case
    # channels of very different sizes
    sizes = torch.tensor([1e-3, 1.0], dtype=F64)
    weight = weight * torch.outer(sizes.repeat(2)[: len(weight)], sizes[: weight.shape[1]]).reshape(
        *weight.shape[:2], *[1] * (weight.dim() - 2)
    )
    if padded:
        rows = [[*range(size), 0, size - 1] for size in shape[1:]]
        a: Convolution = PaddedConvolution(weight, shape, rows, **options)
    else:
        a = either((weight, shape, options), turned=turned)
    found = equilibrated(a, outputs=outputs)
    if found is None:
        return
    x, r = (torch.randn(2, *side, dtype=F64) for side in (a.in_shape, a.out_shape))
    # H⁻¹A or A H⁻ᵀ
    made = found.solve(a.apply(x)) if outputs else a.apply(found.solve_transposed(x))
    torch.testing.assert_close(found.operator.apply(x), made, rtol=1e-8, atol=1e-8)
    back = a.adjoint(found.solve_transposed(r)) if outputs else found.solve(a.adjoint(r))
    torch.testing.assert_close(found.operator.adjoint(r), back, rtol=1e-8, atol=1e-8)
    groups, even = options["groups"], found.operator.weight
    by_group = even.reshape(groups, -1, *even.shape[1:])
    rows_ = (by_group if outputs == a.forward else by_group.transpose(1, 2)).flatten(2)
    torch.testing.assert_close(rows_ @ rows_.mT, torch.eye(rows_.shape[1], dtype=F64).expand(groups, -1, -1))


@pytest.mark.parametrize("method", ["capacitance", "banded", "cholesky"])
@pytest.mark.parametrize(("c_out", "padding", "dtype"), [(3, 1, torch.float32), (2, 0, F64), (4, 2, F64)])
def test_ill_conditioned_kernels_have_nearest_answers(
    method: Method, c_out: int, padding: int, dtype: torch.dtype
) -> None:
    """Of any right-hand side, where the Gram matrix has a condition of 10¹⁴ and its map without ends none at all."""
    torch.manual_seed(0)
    outputs = c_out <= 3
    weight = ill_conditioned(c_out, 3, outputs=outputs).to(dtype)
    a = Convolution(weight, SHAPE, (1, 1), (padding, padding), (1, 1), 1)
    factor = factorize(a, SolveSettings(method=method))
    assert isinstance(factor, GramFactor)
    assert "equilibrated" in factor.explain()
    assert not factor.strained
    exact = SpectralFactor(a.to(F64))
    assert factor.condition == pytest.approx(exact.condition, rel=0.1)
    assert factor.solve(torch.empty(0, *a.out_shape, dtype=dtype), 0.0).correction.shape == (0, *SHAPE)
    for r in (a.apply(torch.randn(3, *SHAPE, dtype=dtype)), torch.randn(3, *a.out_shape, dtype=dtype)):
        nearest = exact.solve(r.double(), 0.0).correction
        assert relative(factor.solve(r, 0.0).correction.double(), nearest) < (
            1e-6 if dtype == torch.float32 else 1e-8
        )
        # damped answers are not those of the equilibrated operator
        damping = 1e-6 * factor.largest**2
        expected = exact.solve(r.double(), damping).correction
        assert relative(factor.solve(r, damping).correction.double(), expected) < 1e-5


def test_an_operator_of_less_than_full_rank_is_not_equilibrated() -> None:
    """The kernel has full rank, but of it the map meets the middle only, which has not."""
    weight = torch.randn(3, 3, 3, 3, dtype=F64) * torch.tensor([1.0, 1e-2, 1e-3], dtype=F64).reshape(
        3, 1, 1, 1
    )
    weight[2, :, 1, 1] = weight[1, :, 1, 1] - weight[0, :, 1, 1]
    a = Convolution(weight, (3, 1, 1), (1, 1), (1, 1), (1, 1), 1)
    assert equilibrated(a, outputs=True) is not None
    factor = factorize(a, SolveSettings(method="cholesky"))
    assert "equilibrated" not in factor.explain()
    r = torch.randn(4, 3, 1, 1, dtype=F64)
    expected = SpectralFactor(a).solve(r, 0.0).correction
    torch.testing.assert_close(factor.solve(r, 0.0).correction, expected, rtol=1e-6, atol=1e-6)
