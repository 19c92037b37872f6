"""Solves with the directions of earlier systems: those of the pseudo-inverse, and cheaper for a system that is near."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxinvert.linalg import Dense
from fxinvert.linalg.recycled import Recycled
from fxinvert.linalg.solvers import Gradients, cgls


def solve(
    known: Recycled,
    matrix: Tensor,
    r: Tensor,
    small: float = 1e-10,
    brief: Tensor | bool = False,
    limit: int = 100,
) -> Gradients:
    rows = r.new_zeros(len(r))
    return known.solve(
        Dense(matrix),
        r,
        largest=rows,
        tolerance=1e-13,
        small_enough=rows + small * torch.linalg.vector_norm(r, dim=1),
        limit=torch.full_like(rows, limit, dtype=torch.long),
        slope=rows + 1e-11,
        skip=rows > 0,
        brief=brief,
    )


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_from_nothing_it_is_the_pseudo_inverse(shape: tuple[int, int]) -> None:
    matrix, r = torch.randn(shape).double(), torch.randn(3, shape[0]).double()
    found = solve(Recycled(r[:, 0]), matrix, r)
    torch.testing.assert_close(found.correction, r @ torch.linalg.pinv(matrix).T)
    torch.testing.assert_close(found.correction, found.dual @ matrix)
    torch.testing.assert_close(found.slope, (r @ matrix).norm(dim=1))
    assert bool(found.converged.all())
    assert int(found.iterations.max()) <= min(shape)


def test_the_same_system_costs_nothing_again() -> None:
    matrix, r = torch.randn(6, 9).double(), torch.randn(3, 6).double()
    known = Recycled(r[:, 0])
    solve(known, matrix, r)
    other = torch.randn(3, 6).double()
    found = solve(known, matrix, other, small=1e-8)
    assert int(found.iterations.max()) == 0
    assert bool(torch.isinf(found.slope).all())
    torch.testing.assert_close(found.correction, other @ torch.linalg.pinv(matrix).T)


def test_what_is_forgotten_is_made_anew() -> None:
    matrix, r = torch.randn(6, 9).double(), torch.randn(3, 6).double()
    known = Recycled(r[:, 0])
    solve(known, matrix, r)
    known.forget(torch.tensor([False, True, False]))
    assert known.known.tolist() == [True, False, True]
    changed = torch.randn(6, 9).double()
    found = solve(known, changed, r)
    torch.testing.assert_close(found.correction[1], torch.linalg.pinv(changed) @ r[1])
    assert found.iterations.tolist()[0] == 0


def test_a_brief_solve_ends_where_an_iteration_does_much_less_than_those_before() -> None:
    """The first that takes off no more than a fifth of what they have taken off on average; other rows go on."""
    matrix = torch.randn(60, 30).double() @ torch.diag(torch.logspace(0, -2, 30).double())
    r, brief = torch.randn(4, 60).double(), torch.tensor([True, True, False, False])

    def removed(found: Gradients) -> Tensor:
        return r.square().sum(1) - (r - found.correction @ matrix.T).square().sum(1)

    total = torch.stack([removed(solve(Recycled(r[:, 0]), matrix, r, limit=k)) for k in range(1, 25)])
    share = torch.arange(2, 25)[:, None] * total.diff(dim=0) / total[1:]
    found = solve(Recycled(r[:, 0]), matrix, r, brief=brief)
    assert found.iterations[brief].tolist() == ((share <= 0.2).int().argmax(0) + 2)[brief].tolist()
    assert bool((found.iterations[~brief] > 24).all())
    assert bool(found.converged.all())


@pytest.mark.parametrize("limit", [1, 4])
def test_conjugate_gradients_take_no_product_that_nobody_needs(limit: int) -> None:
    class Counted(Dense):
        pulled = 0

        def adjoint(self, r: Tensor) -> Tensor:
            self.pulled += 1
            return super().adjoint(r)

    matrix, r = torch.randn(8, 12).double(), torch.randn(3, 8).double()
    none, operators = r.new_zeros(3), (Counted(matrix), Counted(matrix))
    found, given = (
        cgls(a, r, none, largest=none, tolerance=0.0, small_enough=none, limit=limit, pulled=pulled)
        for a, pulled in zip(operators, (None, r @ matrix), strict=True)
    )
    assert [a.pulled for a in operators] == [limit, limit - 1]
    torch.testing.assert_close(given.correction, found.correction)
    # the best that there is in the Krylov space
    powers = [r @ matrix]
    for _ in range(limit - 1):
        powers.append(powers[-1] @ matrix.T @ matrix)
    space = torch.stack(powers, 2)
    weights = torch.linalg.lstsq(matrix @ space, r[:, :, None]).solution
    torch.testing.assert_close(found.correction, (space @ weights)[:, :, 0])
