"""Solves that iterate: with a circulant preconditioner and without, from true residuals, rows leaving as they are done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_problems import F64, convolutions, matrix, relative
from torch import Tensor

from fxinvert.linalg import (
    Convolution,
    Dense,
    IterativeFactor,
    SolveSettings,
    SpectralFactor,
    TransposedConvolution,
    choose,
    factorize,
    solve_anchored,
)
from fxinvert.linalg.anchored import Method
from fxinvert.linalg.circulant import Circulant, torus
from fxinvert.linalg.solvers import ARRIVED


class Counted(Dense):
    """Notes how many rows it is applied to."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.rows: list[int] = []

    def apply(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return super().apply(x)


def either(case: Any, *, turned: bool) -> Convolution:
    weight, shape, options = case
    a = Convolution(weight, shape, **options)
    return TransposedConvolution(weight, a.out_shape, shape, **options) if turned else a


@given(convolutions(), st.booleans(), st.booleans())
def test_a_map_is_put_together_as_it_was_cut(case: Any, outputs: bool, turned: bool) -> None:
    around = torus(either(case, turned=turned), outputs=outputs)
    value = torch.randn(3, *around.shape, dtype=F64)
    parts = around.split(value)
    assert parts.shape == (3, around.groups, around.channels, *around.sizes)
    assert torch.equal(around.join(parts), value)
    assert float(parts.square().sum()) == pytest.approx(float(value.square().sum()))


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize(
    ("kernel", "shape", "options"),
    [
        ((4, 2, 4), (2, 26), {"stride": (3,), "padding": (1,), "dilation": (2,), "groups": 1}),
        ((4, 1, 3, 2), (2, 11, 12), {"stride": (1, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}),
        ((3, 2, 3, 3), (2, 13, 12), {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}),
    ],
    ids=["1d", "2d groups", "2d stride"],
)
def test_away_from_the_ends_the_circulant_is_the_gram_matrix(
    kernel: tuple[int, ...], shape: tuple[int, ...], options: dict[str, Any], turned: bool, outputs: bool
) -> None:
    a = either((torch.randn(kernel, dtype=F64), shape, options), turned=turned)
    made = Circulant(a, outputs=outputs, shift=0.1, floor=0.1)
    middle = torch.zeros(1, *made.torus.shape, dtype=F64)
    middle[(0, 0, *(size // 2 for size in made.torus.shape[1:]))] = 1
    product = a.apply(a.adjoint(middle)) if outputs else a.adjoint(a.apply(middle))
    parts = made.torus.split(middle)
    ridge = made.torus.join(torch.einsum("gij,bgj...->bgi...", made.ridge, parts))
    torch.testing.assert_close(made.solve(product + ridge), middle)


@given(convolutions(), st.booleans(), st.sampled_from([0.0, 1e-2]))
def test_preconditioned_answers_are_those_of_singular_values(case: Any, turned: bool, damping: float) -> None:
    a = either(case, turned=turned)
    exact = SpectralFactor(a)
    if exact.condition is None or exact.condition > 1e3:
        return
    factor = factorize(a, SolveSettings(method="circulant", max_iterations=3000))
    assert isinstance(factor, IterativeFactor)
    r = torch.randn(3, *a.out_shape, dtype=F64)
    r[1] = 0
    solved, expected = factor.solve(r, damping), exact.solve(r, damping).correction
    assert solved.converged is not None
    assert solved.converged.all()
    left, least = (
        torch.linalg.vector_norm((a.apply(x) - r).flatten(1), dim=1) for x in (solved.correction, expected)
    )
    torch.testing.assert_close(left, least, rtol=1e-6, atol=1e-7)
    m, n = a.size
    if damping or m <= n:  # the shortest one, too; with more outputs only where the columns are independent
        torch.testing.assert_close(solved.correction, expected, rtol=1e-5, atol=1e-6)


def test_a_kernel_that_mixes_channels_badly_needs_the_preconditioner() -> None:
    weight = matrix(4, 8 * 25, 100.0).reshape(4, 8, 5, 5).float()
    a = Convolution(weight, (8, 24, 24), (1, 1), (1, 1), (1, 1), 1)
    r = a.apply(torch.randn(4, *a.in_shape))
    with_it, without = (
        factorize(a, SolveSettings(method=method)).solve(r, 0.0) for method in ("circulant", "iterative")
    )
    assert with_it.converged is not None
    assert with_it.converged.all()
    assert with_it.iterations < 30
    assert without.converged is not None
    assert not without.converged.any()
    assert relative(a.apply(with_it.correction), r) < 2e-6
    # the shortest of the solutions: in the range of Aᵀ, where A⁺A changes nothing
    again = factorize(a, SolveSettings(method="banded")).solve(r, 0.0).correction
    assert relative(with_it.correction, again) < 1e-3


def test_targets_that_no_input_reaches_are_left_to_the_normal_equations() -> None:
    weight = torch.randn(3, 4, 3, dtype=F64)
    weight[1] = 0  # a dead output channel: AAᵀ is singular
    a = Convolution(weight, (4, 9), (1,), (1,), (1,), 1)
    factor = factorize(a, SolveSettings(method="circulant"))
    r = torch.randn(5, *a.out_shape, dtype=F64)
    solved = factor.solve(r, 0.0)
    assert solved.converged is not None
    assert solved.converged.all()
    torch.testing.assert_close(
        solved.correction, SpectralFactor(a).solve(r, 0.0).correction, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e5])
@pytest.mark.parametrize("reachable", [True, False])
def test_what_is_said_to_have_converged_has(condition: float, reachable: bool) -> None:
    a = Dense(matrix(40, 60, condition).float())
    r = a.apply(torch.randn(6, 60)) if reachable else torch.randn(6, 40)
    solved = IterativeFactor(a, 400).solve(r, 0.0)
    assert solved.converged is not None
    x, exact = solved.correction.double(), a.to(F64)
    rho = r.double() - exact.apply(x)
    far = rho.norm(dim=1) / r.double().norm(dim=1)
    steep = exact.adjoint(rho).norm(dim=1) / rho.norm(dim=1)
    # σ_max = 1; an answer is returned in float32
    done = torch.minimum(far, steep) < 1.5 * ARRIVED[torch.float32]
    assert bool((done | ~solved.converged).all())
    assert solved.converged.all() or condition > 1e2


def test_rows_that_are_done_are_not_carried_on() -> None:
    a = Counted(matrix(30, 40, 30.0).float())
    r = a.apply(torch.randn(8, 40))
    r[:6] = a.weight[:, :6].T  # each is a column: some are easier
    r[6] = 0
    solved = IterativeFactor(a, 300).solve(r, 0.0)
    assert solved.converged is not None
    assert solved.converged.all()
    assert min(a.rows) < max(a.rows[25:])


def test_on_a_large_map_with_little_memory_the_preconditioner_is_taken() -> None:
    weight = torch.nn.Conv2d(16, 8, 3).weight.detach()
    a = Convolution(weight, (16, 64, 64), (1, 1), (1, 1), (1, 1), 1)
    settings = SolveSettings(memory_limit=40_000_000)
    choice = choose(a, settings)
    assert choice.chosen.method == "circulant"
    assert "circulant" in choice.explain()
    factor = choice.chosen.make()
    assert 0 < factor.nbytes <= choice.chosen.memory
    assert "preconditioned by a circulant" in factor.explain()


@pytest.mark.parametrize("method", ["iterative", "circulant", "cholesky"])
@pytest.mark.parametrize("of_weights", [1e-18, 1.0, 1e18])
@pytest.mark.parametrize("of_targets", [1e-15, 1.0, 1e15])
def test_scales_do_not_matter(method: Method, of_weights: float, of_targets: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, 3, 3)
    a = Convolution(weight * of_weights, (3, 12), (1,), (1,), (1,), 1)
    r = a.apply(torch.randn(3, 3, 12)) * of_targets
    solved = factorize(a, SolveSettings(method=method)).solve(r, 0.0)
    assert solved.converged is None or bool(solved.converged.all())
    expected = SpectralFactor(a.to(F64)).solve(r.double(), 0.0).correction
    assert relative(solved.correction.double(), expected) < 1e-4


def test_what_there_are_no_numbers_for_has_not_converged() -> None:
    a = Dense(torch.tensor([[1e-30, 0.0], [0.0, 1.0]]))
    solved = IterativeFactor(a, 50).solve(torch.tensor([[1e30, 0.0], [0.0, 1.0]]), 0.0)
    assert solved.converged is not None
    finite = torch.isfinite(solved.correction).all(1)
    assert bool((finite | ~solved.converged).all())


def test_a_map_that_is_better_conditioned_than_the_torus_needs_few_iterations() -> None:
    """As many outputs as inputs: at some frequency hardly anything is left of a channel, on the map there is."""
    torch.manual_seed(0)
    a = Convolution(
        matrix(8, 8 * 25, 1.0).reshape(8, 8, 5, 5).float(), (8, 24, 24), (1, 1), (1, 1), (1, 1), 1
    )
    r = a.apply(torch.randn(2, *a.in_shape))
    solved = factorize(a, SolveSettings(method="circulant")).solve(r, 0.0)
    assert solved.converged is not None
    assert solved.converged.all()
    assert solved.iterations < 150


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_samples_that_iterations_do_not_lead_to_are_damped_until_they_do(dtype: torch.dtype) -> None:
    """The answer is the one of that damping, and comes closer than the anchor; others are answered as they would be alone."""
    torch.manual_seed(0)
    a = Convolution(torch.randn(8, 8, 3, 3, dtype=dtype), (8, 12, 12), (1, 1), (1, 1), (1, 1), 1)
    settings = SolveSettings(method="circulant", max_iterations=100)
    factor = factorize(a, settings)
    r = torch.cat([torch.randn(2, *a.out_shape, dtype=dtype), torch.zeros(1, *a.out_shape, dtype=dtype)])
    found = solve_anchored(factor, r, settings)
    assert found.damped.tolist() == [True, True, False]
    assert found.missed is None
    assert found.damping == pytest.approx((factor.largest / factor.manageable) ** 2)
    assert factor.manageable < settings.limit(dtype)
    expected = SpectralFactor(a).solve(r, found.damping).correction
    tolerance = 1e-2 * float(expected.norm())
    assert float((found.value - expected).norm()) < tolerance
    left = (r - a.apply(found.value)).flatten(1).norm(dim=1)
    assert bool((left[:2] < 0.5 * r[:2].flatten(1).norm(dim=1)).all())


def test_what_a_preconditioner_keeps_from_arriving_arrives_without_it() -> None:
    class Misleading:
        nbytes = 0

        def solve(self, value: Tensor) -> Tensor:
            return value * torch.logspace(0, -9, value.shape[1], dtype=F64)

    a = Dense(matrix(200, 240, 10.0))
    r = torch.randn(3, 200, dtype=F64)
    solved = IterativeFactor(a, 300, Misleading()).solve(r, 0.0)
    assert solved.converged is not None
    assert solved.converged.all()
    assert relative(a.apply(solved.correction), r) < 1e-10
