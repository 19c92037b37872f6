"""Direct solves on the smaller side, against dense singular value decompositions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_problems import F64, convolutions, matrix, relative
from torch import Tensor

from fxinvert.errors import SolveError
from fxinvert.linalg import (
    Convolution,
    Dense,
    Factor,
    LinearOperator,
    SolveSettings,
    SpectralFactor,
    TransposedConvolution,
    factorize,
    solve_anchored,
)
from fxinvert.linalg import banded as banded_module
from fxinvert.linalg import choice as choice_module
from fxinvert.linalg.anchored import Method
from fxinvert.linalg.banded import BlockBanded, Gram, layout
from fxinvert.linalg.gram import GramFactor
from fxinvert.linalg.relieved import Relieved


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps are cut into many blocks, as large ones are."""
    monkeypatch.setattr(banded_module, "SMALLEST_BLOCK", 1)
    monkeypatch.setattr(banded_module.Layout, "solve_cost", lambda self: -self.blocks)


def transposed(weight: Tensor, shape: tuple[int, ...], options: dict[str, Any]) -> TransposedConvolution:
    """The transposed convolution whose output has the shape that a convolution takes, one position cut if it can be."""
    a = Convolution(weight, shape, **options)
    positions = [max(1, size - 1) for size in a.out_shape[1:]]
    return TransposedConvolution(weight, (a.out_shape[0], *positions), shape, **options)


def in_blocks(a: Convolution, *, outputs: bool, rows: int) -> Gram:
    """The Gram matrix with so many rows of the map in a block; the last block may reach beyond the map."""
    gram = Gram(a, outputs=outputs)
    plan = gram.layout
    reach, size = plan.reach * plan.rows, plan.shape[1 + plan.axis]
    blocks = -(-size // rows)
    gram.layout = replace(plan, rows=rows, blocks=blocks, reach=min(-(-reach // rows), blocks - 1))
    return gram


@given(convolutions(), st.booleans(), st.booleans(), st.integers(1, 3))
def test_blocks_are_those_of_the_gram_matrix(case: Any, outputs: bool, turned: bool, rows_: int) -> None:
    weight, shape, options = case
    a: Convolution = transposed(weight, shape, options) if turned else Convolution(weight, shape, **options)
    gram, dense = in_blocks(a, outputs=outputs, rows=rows_), a.dense()
    expected = dense @ dense.T if outputs else dense.T @ dense
    plan = gram.layout
    units = torch.eye(len(expected), dtype=F64).reshape(-1, *plan.shape)
    for g in range(plan.groups):
        own = plan.split(units, F64)[g]  # (unknown, its place)
        inside = own.T @ expected @ own
        # unknowns beyond the map are alone, and 1
        inside += torch.diag((own.abs().sum(0) == 0).to(F64))
        for i in range(plan.blocks):
            for j in range(plan.blocks):
                rows, columns = (slice(k * plan.block, (k + 1) * plan.block) for k in (i, j))
                made = gram.block(i, j)[1][g]
                torch.testing.assert_close(made, inside[rows, columns])
                if abs(i - j) > plan.reach:
                    assert not made.any()
    torch.testing.assert_close(plan.join(plan.split(units, F64)), units)


@given(convolutions(), st.booleans(), st.booleans(), st.integers(1, 3))
def test_banded_inverse_is_the_inverse(case: Any, outputs: bool, turned: bool, rows: int) -> None:
    weight, shape, options = case
    a: Convolution = transposed(weight, shape, options) if turned else Convolution(weight, shape, **options)
    dense = a.dense()
    gram = dense @ dense.T if outputs else dense.T @ dense
    shift = 1e-2 * float(gram.diagonal().max()) + 1e-3
    value = torch.randn(3, *(a.out_shape if outputs else a.in_shape), dtype=F64)
    alive = (gram.diagonal() > 0).to(F64)
    before = value.clone()
    solved = BlockBanded(in_blocks(a, outputs=outputs, rows=rows), shift).solve(value)
    assert torch.equal(value, before)
    expected = torch.linalg.solve(gram + shift * torch.eye(len(gram), dtype=F64), value.flatten(1).T).T
    torch.testing.assert_close(solved.flatten(1) * alive, expected * alive)


def test_blocks_of_a_long_map_are_shared() -> None:
    weight = torch.randn(2, 1, 3, 3, dtype=F64)
    sizes = []
    for rows in (40, 120):
        a = Convolution(weight, (1, rows, 4), (1, 1), (0, 0), (1, 1), 1)
        factor = BlockBanded(Gram(a, outputs=False), 30.0)
        sizes.append(factor.nbytes)
        value = torch.randn(2, 1, rows, 4, dtype=F64)
        gram = a.dense().T @ a.dense() + 30 * torch.eye(rows * 4, dtype=F64)
        torch.testing.assert_close(factor.solve(value).flatten(1) @ gram, value.flatten(1))
    assert sizes[1] < 1.5 * sizes[0]


@given(convolutions(), st.sampled_from([0.0, 1e-2]), st.booleans())
def test_banded_and_cholesky_answer_as_singular_values_do(case: Any, damping: float, turned: bool) -> None:
    weight, shape, options = case
    a: Convolution = transposed(weight, shape, options) if turned else Convolution(weight, shape, **options)
    exact = SpectralFactor(a)
    if exact.condition is None or exact.condition > 1e4:
        return
    r = torch.randn(3, *a.out_shape, dtype=F64)
    expected = exact.solve(r, damping)
    methods: tuple[Method, ...] = ("banded", "cholesky")
    for method in methods:
        factor = factorize(a, SolveSettings(method=method))
        assert isinstance(factor, GramFactor)
        solved = factor.solve(r, damping)
        torch.testing.assert_close(solved.correction, expected.correction, rtol=1e-5, atol=1e-6)
        assert factor.largest == pytest.approx(exact.largest, rel=0.1)


@given(convolutions(), st.sampled_from([0.0, 1e-2]), st.booleans(), st.sampled_from([1.0, 0.0]))
def test_singular_values_of_groups_are_those_of_the_whole(
    case: Any, damping: float, turned: bool, last: float
) -> None:
    weight, shape, options = case
    weight[-1] *= last  # the last group may have less rank than the others
    a: Convolution = transposed(weight, shape, options) if turned else Convolution(weight, shape, **options)
    units = torch.eye(a.size[1], dtype=F64).reshape(-1, *a.in_shape)
    torch.testing.assert_close(a.dense(), a.apply(units).flatten(1).T)
    found, whole = SpectralFactor(a), SpectralFactor(Dense(a.dense()))
    assert found.rank == whole.rank
    if found.condition is None or found.condition > 1e4:
        return
    assert found.condition == pytest.approx(whole.condition, rel=1e-6)
    r = torch.randn(3, *a.out_shape, dtype=F64)
    expected = whole.solve(r.flatten(1), damping).correction
    torch.testing.assert_close(found.solve(r, damping).correction.flatten(1), expected, rtol=1e-6, atol=1e-8)


def test_nearly_singular_kernels_of_channels_are_decomposed_one_by_one() -> None:
    torch.manual_seed(0)
    a = Convolution(torch.randn(64, 1, 3, 3) / 3, (64, 16, 16), (1, 1), (1, 1), (1, 1), 64)
    factor = factorize(a, SolveSettings())
    assert isinstance(factor, SpectralFactor)
    assert factor.nbytes < 8 * 3 * 64 * 256**2 + 1
    r = a.apply(torch.randn(2, *a.in_shape))
    assert relative(a.apply(factor.solve(r, 0.0).correction), r) < 1e-5


def depthwise() -> Convolution:
    """Nearly singular in some of its channels: a condition of 10¹¹."""
    torch.manual_seed(0)
    return Convolution(torch.randn(64, 1, 3, 3) / 3, (64, 16, 16), (1, 1), (1, 1), (1, 1), 64)


def test_conjugate_gradients_take_each_group_by_itself() -> None:
    a = depthwise()
    factor = factorize(a, SolveSettings(method="banded"))
    assert "shifted" in factor.explain()
    # in one space for all groups it takes 30 steps
    r = a.apply(torch.randn(2, *a.in_shape))
    found = factor.solve(r, 0.0)
    assert found.converged is not None
    assert bool(found.converged.all())
    assert found.iterations < 20
    assert relative(a.apply(found.correction), r) < 1e-5


def test_a_dear_decomposition_waits_for_a_sample_that_is_not_blown_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice_module, "DEAR", 0.0)
    a, settings = depthwise().to(F64), SolveSettings()
    exact, factor = SpectralFactor(a), factorize(a, settings)
    assert isinstance(factor, Relieved)
    without, noise = factor.nbytes, torch.randn(2, *a.out_shape, dtype=F64)
    noise[1] = 0
    blown = solve_anchored(factor, noise, settings)
    assert blown.damped.tolist() == [True, False]
    best = exact.solve(noise, blown.damping).correction
    assert relative(blown.value[:1], best[:1]) < 1e-4
    assert not blown.value[1].any()
    assert factor.nbytes < without + exact.nbytes
    reached = a.apply(torch.randn(1, *a.in_shape, dtype=F64))
    for _ in range(2):  # as it is made, and once it is
        found = solve_anchored(factor, torch.cat([reached, noise]), settings)
        assert found.damped.tolist() == [False, True, False]
        assert relative(found.value[:1], exact.solve(reached, 0.0).correction) < 1e-6
        torch.testing.assert_close(found.value[1:], blown.value)
        assert factor.nbytes > without + exact.nbytes


def test_answers_that_are_known_to_be_near_wait_for_nothing() -> None:
    torch.manual_seed(24)
    a = Convolution(torch.randn(2, 2, 3, 3), (2, 24, 24), (1, 1), (1, 1), (1, 1), 1)
    gram = factorize(a, SolveSettings(method="capacitance"))
    assert isinstance(gram, GramFactor)
    assert gram.strained
    r = torch.randn(4, *a.out_shape)
    found = Relieved(gram, lambda: pytest.fail("the Gram matrix is good enough")).solve(r, 0.0, 1e3)
    assert relative(found.correction, SpectralFactor(a).solve(r, 0.0).correction) < 1e-6


@pytest.mark.parametrize("condition", [1e6, 5e6])
@pytest.mark.parametrize(("m", "n"), [(30, 30), (20, 50), (50, 20)])
def test_what_is_said_to_be_near_is(m: int, n: int, condition: float) -> None:
    a = Dense(matrix(m, n, condition).float())
    r = torch.cat([torch.randn(4, m), a.apply(torch.randn(4, n))])
    found, exact = factorize(a, SolveSettings(method="cholesky")).solve(r, 0.0), SpectralFactor(a)
    assert found.near is not None
    assert found.near.all() or m > n
    nearest = exact.solve(r, 0.0).correction
    assert relative(found.correction[found.near], nearest[found.near]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize(("m", "n"), [(30, 30), (20, 50), (50, 20)])
def test_reachable_targets_are_reached_on_the_smaller_side(
    m: int, n: int, condition: float, dtype: torch.dtype
) -> None:
    a = Dense(matrix(m, n, condition).to(dtype))
    factor = factorize(a, SolveSettings(method="cholesky"))
    r = a.apply(torch.randn(8, n, dtype=dtype))
    solved = factor.solve(r, 0.0)
    assert solved.converged is None or solved.converged.all()
    limit = (
        (2e-6 if condition < 1e8 else 3e-5) if dtype == torch.float32 else 1e-9 if condition < 1e8 else 2e-7
    )
    assert relative(a.apply(solved.correction), r) < limit
    # and by no detour: in directions that the shift has not drowned
    if condition <= 1e4:
        nearest = SpectralFactor(a).solve(r, 0.0).correction
        assert float(solved.correction.norm() / nearest.norm()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(("m", "n"), [(20, 50), (50, 20)])
def test_a_singular_gram_matrix_is_shifted_and_refined(m: int, n: int) -> None:
    a = Dense(matrix(m, n, 10.0, rank=15))
    factor = factorize(a, SolveSettings(method="cholesky"))
    assert isinstance(factor, GramFactor)
    assert factor.strained
    assert "refined" in factor.explain()
    r = torch.randn(4, m, dtype=F64)
    r[2] = 0
    solved, best = factor.solve(r, 0.0).correction, SpectralFactor(a).solve(r, 0.0).correction
    left, least = (torch.linalg.vector_norm(a.apply(x) - r, dim=1) for x in (solved, best))
    torch.testing.assert_close(left, least, rtol=1e-6, atol=1e-12)
    assert not solved[2].any()
    # by itself the choice falls on singular values then
    assert isinstance(factorize(a, SolveSettings()), SpectralFactor)


def test_a_band_too_ill_conditioned_for_its_gram_matrix_reaches_what_can_be_reached() -> None:
    torch.manual_seed(0)
    # nearly the same filter twice: condition about 1e8
    weight = torch.randn(2, 2, 3, 3, dtype=F64)
    weight[1] = weight[0] + 1e-8 * weight[1]
    a = Convolution(weight, (2, 9, 7), (1, 1), (1, 1), (1, 1), 1)
    settings = SolveSettings(1e3, method="banded")
    factor = factorize(a, settings)
    reachable, noise = a.apply(torch.randn(3, 2, 9, 7, dtype=F64)), torch.randn(3, *a.out_shape, dtype=F64)
    solved = solve_anchored(factor, torch.cat([reachable, noise]), settings)
    assert relative(a.apply(solved.value[:3]), reachable) < 1e-6
    size = torch.linalg.vector_norm(noise.flatten(1), dim=1)
    moved = torch.linalg.vector_norm(solved.value[3:].flatten(1), dim=1)
    assert solved.damped.tolist() == [False] * 3 + [True] * 3
    assert bool((factor.largest * moved <= 1e3 * size).all())
    expected = SpectralFactor(a).solve(noise, solved.damping).correction
    torch.testing.assert_close(solved.value[3:], expected, rtol=1e-5, atol=1e-5 * float(moved.max()))


@pytest.mark.parametrize("method", ["banded", "cholesky", "spectral"])
def test_rows_do_not_know_of_each_other_directly(method: Method) -> None:
    a = Convolution(torch.randn(3, 2, 3, 3), (2, 6, 5), (1, 1), (1, 1), (1, 1), 1)
    factor = factorize(a, SolveSettings(method=method))
    r = torch.randn(6, *a.out_shape) * torch.logspace(-6, 6, 6)[:, None, None, None]
    together = factor.solve(r, 0.0).correction
    alone = torch.cat([factor.solve(row[None], 0.0).correction for row in r])
    apart = torch.linalg.vector_norm((alone - together).flatten(1), dim=1)
    assert bool((apart <= 1e-5 * torch.linalg.vector_norm(together.flatten(1), dim=1)).all())
    spoiled = r.clone()
    spoiled[3, 0, 0, 0] = torch.nan
    others = torch.arange(6) != 3
    torch.testing.assert_close(factor.solve(spoiled, 0.0).correction[others], together[others])


@pytest.mark.parametrize(("channels", "padding"), [(3, 1), (4, 0)])
def test_ill_conditioned_convolutions_are_solved_without_a_shift(channels: int, padding: int) -> None:
    """As stably as by a dense factorization: answers are the nearest ones, although K has a condition of 10¹² and more."""
    torch.manual_seed(0)
    weight = matrix(channels, 3 * 25, 1e5).reshape(channels, 3, 5, 5)
    a = Convolution(weight.float(), (3, 10, 10), (1, 1), (padding, padding), (1, 1), 1)
    factor = factorize(a, SolveSettings(method="banded"))
    assert isinstance(factor, GramFactor)
    assert "shifted" not in factor.explain()
    r = a.apply(torch.randn(3, *a.in_shape))
    found = factor.solve(r, 0.0).correction
    exact = SpectralFactor(a.to(F64)).solve(r.double(), 0.0).correction
    assert relative(a.apply(found), r) < 1e-5
    assert relative(found.double(), exact) < 0.01


# --- bad input ----------------------------------------------------------------------------------------------


def of_weight(weight: Tensor) -> list[tuple[LinearOperator, Method]]:
    convolution = Convolution(weight[:, :, None, None], (weight.shape[1], 4, 4), (1, 1), (0, 0), (1, 1), 1)
    return [
        (Dense(weight), "spectral"),
        (Dense(weight), "cholesky"),
        (Dense(weight), "iterative"),
        (convolution, "banded"),
        (convolution, "circulant"),
        (convolution, "iterative"),
    ]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.randn(3, 4)
    weight[1, 2] = bad
    for operator, method in of_weight(weight):
        with pytest.raises(SolveError, match="NaN or infinite"):
            factorize(operator, SolveSettings(method=method))


def test_kernels_larger_than_the_map_are_refused() -> None:
    with pytest.raises(
        SolveError, match=r"kernel of \(5, 3\) .* does not fit into a map of \(2, 9\) with \(2, 0\)"
    ):
        Convolution(torch.randn(2, 1, 5, 3), (1, 2, 9), (1, 1), (1, 0), (1, 1), 1)


def test_right_hand_sides_of_another_shape_or_device_are_refused() -> None:
    settings = SolveSettings()
    factor = factorize(Dense(torch.randn(3, 4)), settings)
    with pytest.raises(SolveError, match=r"\(B, 5\) on cpu .* for \(B, 3\) on cpu"):
        solve_anchored(factor, torch.randn(2, 5), settings)
    with pytest.raises(SolveError, match=r"\(B, 3\) on meta .* on cpu; both must be the same"):
        solve_anchored(factor, torch.empty(2, 3, device="meta"), settings)


def test_weights_that_are_zero_move_nothing() -> None:
    for operator, method in of_weight(torch.zeros(3, 4)):
        settings = SolveSettings(method=method)
        factor: Factor = factorize(operator, settings)
        assert factor.explain()
        solved = solve_anchored(factor, torch.randn(2, *operator.out_shape), settings)
        assert not solved.value.any()
        assert not solved.damped.any()


def test_a_dead_channel_is_left_alone() -> None:
    weight = torch.randn(3, 4, dtype=F64)
    weight[1], weight[:, 2] = 0, 0
    for operator, method in of_weight(weight):
        r = torch.randn(2, *operator.out_shape, dtype=F64)
        factor = factorize(operator, SolveSettings(method=method))
        torch.testing.assert_close(
            factor.solve(r, 0.0).correction, SpectralFactor(operator).solve(r, 0.0).correction
        )


def test_layouts_take_the_axis_that_is_cheapest() -> None:
    a = Convolution(torch.randn(4, 2, 5, 3), (2, 8, 32), (1, 1), (0, 0), (1, 1), 1)
    assert layout(a, outputs=False).axis == 1
