"""Operators and solvers against dense float64 oracles."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_problems import F64, convolutions, damped_inverse, matrix, relative

from fxinvert.errors import SolveError
from fxinvert.linalg import (
    Convolution,
    Dense,
    Function,
    IterativeFactor,
    LinearOperator,
    SolveSettings,
    SpectralFactor,
    factorize,
    solve_anchored,
    solve_diagonal,
)
from fxinvert.linalg.anchored import Method

#: that any convolution can be solved with
METHODS = [method for method in get_args(Method) if method != "diagonal"]

# --- operators ----------------------------------------------------------------------------------------------


@given(convolutions())
def test_convolution_is_torchs_and_its_adjoint_is_its_transpose(case: Any) -> None:
    weight, shape, options = case
    a = Convolution(weight, shape, **options)
    convolve = [torch.conv1d, torch.conv2d, torch.conv3d][len(shape) - 2]
    x, r = torch.randn(3, *shape, dtype=F64), torch.randn(3, *a.out_shape, dtype=F64)
    torch.testing.assert_close(a.apply(x), convolve(x, weight, None, **options))
    m, n = a.size
    dense = a.dense()
    assert dense.shape == (m, n)
    torch.testing.assert_close(a.apply(x).flatten(1), x.flatten(1) @ dense.T)
    torch.testing.assert_close(a.adjoint(r).flatten(1), r.flatten(1) @ dense)


@pytest.mark.parametrize("shape", [(2, 5), (5, 2)])
def test_function_is_the_linear_part(shape: tuple[int, int]) -> None:
    w, b = torch.randn(shape, dtype=F64), torch.randn(shape[0], dtype=F64)
    a = Function(lambda x: x @ w.T + b, (shape[1],), w)
    x, r = torch.randn(3, shape[1], dtype=F64), torch.randn(3, shape[0], dtype=F64)
    torch.testing.assert_close(a.apply(x), x @ w.T)
    torch.testing.assert_close(a.adjoint(r), r @ w)
    torch.testing.assert_close(a.dense(), w)
    assert not a.adjoint(r).requires_grad


def test_function_refuses_to_mix_samples() -> None:
    other = torch.randn(4, 3)
    with pytest.raises(SolveError, match=r"one sample \(1, 3\) returned \(4, 3\)"):
        Function(lambda x: x + other, (3,), other)


@pytest.mark.parametrize(
    "operator",
    [
        Dense(torch.randn(3, 4)),
        Convolution(torch.randn(2, 3, 2), (3, 5), (1,), (1,), (1,), 1),
        Function(lambda x: 2 * x[:, :2] + 1, (4,), torch.zeros(())),
    ],
    ids=lambda operator: type(operator).__name__,
)
def test_an_operator_can_work_in_another_dtype(operator: LinearOperator) -> None:
    double = operator.to(F64)
    x = torch.randn(2, *operator.in_shape, dtype=F64)
    r = torch.randn(2, *operator.out_shape, dtype=F64)
    assert double.dtype == double.apply(x).dtype == double.adjoint(r).dtype == double.dense().dtype == F64
    torch.testing.assert_close(double.dense().float(), operator.dense())


# --- solvers ------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 12), st.integers(0, 2**16))
def test_spectral_factor_is_the_pseudo_inverse(m: int, n: int, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    rank = min(rank, m, n)
    a = matrix(m, n, 100.0, rank)
    factor, r = SpectralFactor(Dense(a)), torch.randn(4, m, dtype=F64)
    torch.testing.assert_close(factor.solve(r, 0.0).correction, r @ torch.linalg.pinv(a, rtol=1e-12).T)
    torch.testing.assert_close(factor.solve(r, 1e-3).correction, r @ damped_inverse(a, 1e-3).T)
    if rank:
        assert factor.largest == pytest.approx(1.0)
        assert factor.condition == pytest.approx(float(1 / torch.linalg.svdvals(a)[rank - 1]))
    else:
        assert (factor.largest, factor.condition) == (0.0, None)
        assert not factor.solve(r, 0.0).correction.any()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("condition", [1e3, 1e5, 1e7, 1e10])
@pytest.mark.parametrize(("m", "n"), [(30, 30), (20, 50), (50, 20)])
def test_a_target_that_can_be_reached_is_reached_whatever_the_condition(
    m: int, n: int, condition: float, dtype: torch.dtype
) -> None:
    a = matrix(m, n, condition).to(dtype)
    r = torch.randn(8, n, dtype=dtype) @ a.T
    solved = SpectralFactor(Dense(a)).solve(r, 0.0).correction
    assert relative(solved @ a.T, r) < (1e-10 if dtype == F64 else 2e-6)


@given(
    st.integers(1, 25), st.integers(1, 25), st.booleans(), st.sampled_from([0.0, 1e-2]), st.integers(0, 2**16)
)
def test_conjugate_gradients_agree_with_the_direct_solver(
    m: int, n: int, deficient: bool, damping: float, seed: int
) -> None:
    torch.manual_seed(seed)
    a = Dense(matrix(m, n, 20.0, rank=max(1, min(m, n) - 2) if deficient else None))
    r = torch.randn(5, m, dtype=F64)
    r[2] = 0
    solved, expected = IterativeFactor(a, 300).solve(r, damping), SpectralFactor(a).solve(r, damping)
    assert solved.converged is not None
    assert solved.converged.all()
    assert 0 < solved.iterations <= 3 * min(m, n) + 10
    torch.testing.assert_close(solved.correction, expected.correction, rtol=1e-7, atol=1e-9)
    assert not solved.correction[2].any()


@pytest.mark.parametrize("reachable", [True, False])
def test_conjugate_gradients_converge_in_float32(reachable: bool) -> None:
    a = matrix(60, 40, 100.0).float()
    r = torch.randn(6, 40) @ a.T if reachable else torch.randn(6, 60)
    solved = IterativeFactor(Dense(a), 300).solve(r, 0.0)
    assert solved.converged is not None
    assert solved.converged.all()
    expected = torch.linalg.pinv(a.double())
    left = (solved.correction @ a.T - r).double()
    best = r.double() @ expected.T @ a.double().T - r.double()
    assert float(((left.norm(dim=1) - best.norm(dim=1)) / r.norm(dim=1)).max()) < 1e-4


def test_conjugate_gradients_stopped_early_say_so() -> None:
    a, r = matrix(40, 40, 1e4), torch.randn(3, 40, dtype=F64)
    r[1] = 0
    solved = IterativeFactor(Dense(a), 5).solve(r, 0.0)
    assert solved.iterations == 5
    assert solved.converged is not None
    assert solved.converged.tolist() == [False, True, False]


@pytest.mark.parametrize("kind", [SpectralFactor, lambda a: IterativeFactor(a, 100)])
def test_rows_do_not_know_of_each_other(kind: Any) -> None:
    factor = kind(Dense(matrix(12, 20, 50.0)))
    r = torch.randn(6, 12, dtype=F64) * torch.logspace(-6, 6, 6, dtype=F64)[:, None]
    together = factor.solve(r, 0.0).correction
    alone = torch.cat([factor.solve(row[None], 0.0).correction for row in r])
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=0)
    spoiled = r.clone()
    spoiled[3, 5] = torch.nan
    others = torch.arange(6) != 3
    solved = factor.solve(spoiled, 0.0)
    torch.testing.assert_close(solved.correction[others], together[others], rtol=1e-9, atol=0)
    assert solved.iterations < 100


def test_a_row_that_has_converged_is_left_alone_bit_for_bit() -> None:
    scale = torch.linspace(1, 3, 20)
    scale[15:] = 0  # something is left over in the end
    # no matrix product, so that rounding is each row's own
    factor = IterativeFactor(Function(lambda x: x * scale, (20,), scale), 100)
    r = torch.randn(4, 20)
    r[0, :14] *= 1e-3  # done sooner than the others
    together = factor.solve(r, 0.0)
    assert together.iterations > factor.solve(r[:1], 0.0).iterations
    for row, value in zip(r, together.correction, strict=True):
        assert torch.equal(factor.solve(row[None], 0.0).correction[0], value)


@pytest.mark.parametrize("method", METHODS)
def test_no_samples(method: Method) -> None:
    settings_ = SolveSettings(method=method)
    a = Convolution(torch.randn(2, 3, 2), (3, 5), (1,), (0,), (1,), 1)
    solved = solve_anchored(factorize(a, settings_), torch.zeros(0, 2, 4), settings_)
    assert solved.value.shape == (0, 3, 5)
    assert solved.damping == 0.0
    diagonal = solve_diagonal(torch.randn(3, 1), torch.zeros(0, 3, 5), settings_)
    assert diagonal.value.shape == (0, 3, 5)


# --- damping ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spectral", "cholesky", "iterative"])
@pytest.mark.parametrize(("m", "n"), [(40, 40), (30, 50), (50, 30)])
def test_noise_is_damped_and_what_can_be_reached_is_not(m: int, n: int, method: Method) -> None:
    a = matrix(m, n, 1e5)
    settings_ = SolveSettings(1e3, method=method, max_iterations=20_000)
    factor = factorize(Dense(a), settings_)
    r = torch.stack([torch.randn(m, dtype=F64), a @ torch.randn(n, dtype=F64)] * 2)
    solved = solve_anchored(factor, r, settings_)
    assert solved.damped.tolist() == [True, False, True, False]
    # power iteration finds σ_max = 1 from below
    assert solved.damping == pytest.approx(1e-6, rel=1e-9 if method == "spectral" else 0.1)
    expected = r @ damped_inverse(a, solved.damping).T
    torch.testing.assert_close(solved.value[::2], expected[::2], rtol=1e-5, atol=1e-6)
    assert relative(solved.value[1::2] @ a.T, r[1::2]) < 1e-8


def test_without_a_limit_float64_has_the_square_of_float32s() -> None:
    assert SolveSettings().limit(torch.float32) == SolveSettings().limit(torch.bfloat16) == 1e3
    assert SolveSettings().limit(F64) == 1e6
    a, r = matrix(64, 64, 1e4), torch.randn(3, 64, dtype=F64)
    solved = solve_anchored(SpectralFactor(Dense(a)), r, SolveSettings())
    assert not solved.damped.any()
    torch.testing.assert_close(solved.value @ a.T, r)


def test_the_limit_is_the_users() -> None:
    a, r = matrix(20, 20, 1e4), torch.randn(3, 20, dtype=F64)
    factor = SpectralFactor(Dense(a))
    for limit in (1e2, 1e3, 1e8):
        solved = solve_anchored(factor, r, SolveSettings(condition_limit=limit))
        assert solved.damped.all() == (limit < 1e4)
        assert solved.damping == pytest.approx(limit**-2 if limit < 1e4 else 0.0)
        # what damping is for: no correction is blown up further
        assert (solved.value.norm(dim=1) <= limit * r.norm(dim=1)).all()


def test_a_sample_is_damped_or_not_whatever_its_neighbours_are() -> None:
    a = matrix(20, 20, 1e5)
    factor, chosen = SpectralFactor(Dense(a)), SolveSettings(1e3)
    r = torch.cat([torch.randn(4, 20, dtype=F64), torch.randn(4, 20, dtype=F64) @ a.T])
    together = solve_anchored(factor, r, chosen)
    for i, row in enumerate(r):
        alone = solve_anchored(factor, row[None], chosen)
        assert alone.damped.item() == together.damped[i]
        torch.testing.assert_close(alone.value[0], together.value[i])


@given(
    st.lists(st.sampled_from([0.0, 1e-9, 1e-3, 0.5, -1.0, 3.0]), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([1e1, 1e3, 1e12]),
    st.integers(0, 2**16),
)
def test_diagonal_is_the_dense_solution(
    scales: list[float], per_sample: bool, limit: float, seed: int
) -> None:
    torch.manual_seed(seed)
    chosen = SolveSettings(condition_limit=limit)
    scale = torch.tensor(scales, dtype=F64)
    if per_sample:
        scale = torch.stack([scale, 2 * scale, scale.flip(0)])
    r = torch.randn(3, len(scales), dtype=F64)
    solved = solve_diagonal(scale, r, chosen)
    for i in range(3):
        own = scale[i] if per_sample else scale
        dense = solve_anchored(SpectralFactor(Dense(torch.diag(own))), r[i : i + 1], chosen)
        assert solved.damped[i] == dense.damped[0]
        torch.testing.assert_close(solved.value[i], dense.value[0], rtol=1e-6, atol=1e-9)


def test_diagonal_of_zeros_moves_nothing() -> None:
    solved = solve_diagonal(torch.zeros(2, 1), torch.randn(3, 2, 4), SolveSettings())
    assert not solved.value.any()
    assert not solved.damped.any()
    assert solved.condition is None


@pytest.mark.slow
@settings(max_examples=500)
@given(convolutions(), st.sampled_from([0.0, 1e-2]))
def test_convolutions_solved_iteratively_and_directly(case: Any, damping: float) -> None:
    weight, shape, options = case
    a = Convolution(weight, shape, **options)
    direct, iterative = SpectralFactor(a), IterativeFactor(a, 5000)
    if direct.condition is not None and direct.condition > 1e3:
        return
    r = torch.randn(3, *a.out_shape, dtype=F64)
    expected = direct.solve(r, damping).correction
    torch.testing.assert_close(iterative.solve(r, damping).correction, expected, rtol=1e-6, atol=1e-7)
