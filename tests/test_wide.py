"""Normal equations without a Gram matrix: the same solution from the rows, in bounded memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import data, weights
from torch import Tensor, nn

import fxinvert
from fxinvert.training import NormalEquations, wide
from fxinvert.training.budget import Budget, Size
from fxinvert.training.wide import WideEquations

F64 = torch.float64


def problem(groups: int, rows: int, n: int, m: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # a few strong directions, as features have
    mixing = torch.randn(groups, n, n, generator=generator, dtype=F64) * torch.logspace(0, -2, n, dtype=F64)
    features = torch.randn(groups, rows, n, generator=generator, dtype=F64) @ mixing.mT
    errors = torch.randn(groups, rows, m, generator=generator, dtype=F64)
    return features, errors, torch.rand(rows, generator=generator, dtype=F64) + 0.1


@given(
    st.integers(1, 2),
    st.integers(1, 12),
    st.integers(1, 20),
    st.sampled_from([1e-3, 1e-1]),
    st.integers(0, 99),
)
def test_while_rows_are_kept_the_solution_is_that_of_the_gram_matrix(
    groups: int, rows: int, n: int, damping: float, seed: int
) -> None:
    given_rows = problem(groups, rows, n, 3, seed)
    exact, found = (kind.of(*given_rows).solve(damping) for kind in (NormalEquations, WideEquations))
    torch.testing.assert_close(found.change, exact.change, rtol=1e-6, atol=1e-9)
    assert found.explained == pytest.approx(exact.explained, rel=1e-6)
    assert found.damping == damping


@pytest.mark.parametrize("most", [10, 25])
def test_where_there_are_more_rows_memory_is_bounded_and_the_fit_nearly_as_good(
    most: int,
) -> None:
    features, errors, weights_ = problem(1, 400, 30, 2)
    errors = errors + features @ torch.randn(30, 2, dtype=F64)  # something to be explained
    exact = NormalEquations.of(features, errors, weights_)
    found = WideEquations.of(features, errors, weights_, kept=most)
    assert found.factor.shape[1] <= 2 * most
    assert found.rows == 400
    torch.testing.assert_close(found.cross, exact.cross)
    torch.testing.assert_close(found.squares, exact.gram.diagonal(dim1=1, dim2=2).sum(1))
    # 0 ⪯ G − BᵀB, and on average about `missing` is lacking
    lacking = torch.linalg.eigvalsh(exact.gram[0] - (found.factor.mT @ found.factor)[0])
    assert float(lacking[0]) > -1e-9 * float(lacking[-1])
    assert float(lacking[-1]) <= 2.001 * float(found.missing)
    change = found.solve(1e-2).change
    removed = 1 - float(((errors - features @ change.mT).square() * weights_[:, None]).sum()) / exact.error
    assert removed > (0.9 if most > 20 else 0.7) * exact.solve(1e-2).explained


def test_sums_in_the_same_order_are_the_same_bytes() -> None:
    def total() -> WideEquations:
        made, *others = (WideEquations.of(*problem(1, 10, 20, 2, seed), kept=8) for seed in range(6))
        for part in others:
            made += part
        return made

    assert torch.equal(total().factor, total().factor)
    assert total().factor.shape[1] <= 16


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 6), st.integers(0, 99))
def test_errors_are_kept_with_their_rows_and_summed_when_rows_are_reduced(
    parts: list[int], most: int, seed: int
) -> None:
    features, errors, weights_ = problem(2, sum(parts), 12, 30, seed)
    exact = NormalEquations.of(features, errors, weights_)
    pieces = (torch.split(value, parts, dim) for value, dim in ((features, 1), (errors, 1), (weights_, 0)))
    found, *others = (WideEquations.of(*piece, kept=most) for piece in zip(*pieces, strict=True))
    for other in others:
        found += other
    torch.testing.assert_close(found.cross, exact.cross)
    if sum(parts) <= 2 * most:
        assert found.nbytes == 8 * 2 * sum(parts) * (12 + 30)  # neither G nor C
    solved, again = found.solve(1e-2), replace(found, errors=None, held=found.cross).solve(1e-2)
    torch.testing.assert_close(solved.change, again.change, rtol=1e-6, atol=1e-9)
    assert solved.explained == pytest.approx(again.explained, rel=1e-6)
    assert not found.answered().solve(1e-2).change.any()


def test_dead_and_empty_ones_stay() -> None:
    features, errors, weights_ = problem(1, 9, 12, 2)
    features[..., 5] = 0
    solved = WideEquations.of(features, errors, weights_).solve(0.0)
    assert solved.dead == 1
    assert not solved.change[..., 5].any()
    assert solved.damping == wide.LEAST
    nothing = WideEquations.of(torch.zeros(1, 4, 6), torch.ones(1, 4, 2), torch.ones(4)).solve(1e-2)
    assert not nothing.change.any()


def test_of_few_samples_the_rows_are_kept_and_the_solution_is_that_of_the_gram_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 600), nn.Tanh(), nn.Linear(600, 3))
    sizes = {"0": Size(1, 600, 7), "2": Size(1, 3, 601), "rows": Size(1, 3, 601, rows=8)}
    assert Budget(2**31).rows(sizes, 1, 64) == {"0": None, "2": 64, "rows": None}
    assert not any(Budget(2**31).rows(sizes, 1, 151).values())
    # a layer whose G, and whose C too, takes more than there is
    assert Budget(2**29).rows({"wide": Size(1, 4096, 9217)}, 1, 8) == {"wide": 8}
    for method in (fxinvert.training.ClosedForm(), fxinvert.training.ClosedForm(every=32)):
        settings: dict[str, Any] = {
            "method": method,
            "sweeps": 2,
            "output_target": "cross_entropy",
            "chunk": 4,
        }
        few = fxinvert.post_train(model, data(64), **settings)
        with monkeypatch.context() as patch:
            patch.setattr(Size, "few", lambda size, samples: None)
            gram = fxinvert.post_train(model, data(64), **settings)
        assert few.final.loss < few.baseline.loss
        assert few.final.loss == pytest.approx(gram.final.loss, rel=1e-4)
        for name, value in few.model.state_dict().items():
            torch.testing.assert_close(value, gram.model.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_training_goes_the_same_way_whichever_form_is_taken() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 3))
    settings: dict[str, Any] = {
        "sweeps": 1,
        "schedule": "parallel",
        "output_target": "cross_entropy",
        "chunk": 4,
    }
    plain = fxinvert.post_train(model, data(64), **settings)
    settings["memory_limit"] = 2**22
    sizes = {"0": Size(1, 200, 7), "2": Size(1, 3, 201)}
    assert Budget(settings["memory_limit"]).rows(sizes) == {"0": None, "2": 44}
    found = fxinvert.post_train(model, data(64), **settings)
    assert found.final.loss == pytest.approx(plain.final.loss, rel=1e-4)
    assert weights(found) == weights(fxinvert.post_train(model, data(64), **settings))
    every = fxinvert.training.ClosedForm(every=32)
    assert fxinvert.post_train(model, data(64), method=every, **settings).final.loss < plain.baseline.loss
