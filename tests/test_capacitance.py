"""Direct solves by Fourier transforms and capacitance matrices, against dense ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_problems import F64, convolutions, matrix, relative
from test_iterative import either

from fxinvert.linalg import (
    Convolution,
    Dense,
    LinearOperator,
    SolveSettings,
    SpectralFactor,
    choose,
    factorize,
    solve_anchored,
)
from fxinvert.linalg import candidates as candidates_module
from fxinvert.linalg import capacitance as module
from fxinvert.linalg import choice as choice_module
from fxinvert.linalg import raised as raised_module
from fxinvert.linalg.capacitance import Capacitance
from fxinvert.linalg.choice import Choice
from fxinvert.linalg.embedding import embedding
from fxinvert.linalg.gram import GramFactor


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies of small maps are taken one at a time, as those of large ones are."""
    monkeypatch.setattr(module, "BLOCK", 1)


@given(convolutions(), st.booleans(), st.booleans())
def test_it_is_the_inverse(case: Any, outputs: bool, turned: bool) -> None:
    a = either(case, turned=turned)
    dense = a.dense()
    gram = dense @ dense.T if outputs else dense.T @ dense
    shift = 1e-2 * float(gram.diagonal().max()) + 1e-3
    value = torch.randn(3, *(a.out_shape if outputs else a.in_shape), dtype=F64)
    alive = (gram.diagonal() > 0).to(F64)
    solved = Capacitance(a, outputs=outputs, shift=shift).solve(value)
    expected = torch.linalg.solve(gram + shift * torch.eye(len(gram), dtype=F64), value.flatten(1).T).T
    torch.testing.assert_close(solved.flatten(1) * alive, expected * alive)


@given(convolutions(), st.booleans(), st.sampled_from([0.0, 1e-2]))
def test_answers_are_those_of_singular_values(case: Any, turned: bool, damping: float) -> None:
    a = either(case, turned=turned)
    exact = SpectralFactor(a)
    if exact.condition is None or exact.condition > 1e3:
        return
    factor = factorize(a, SolveSettings(method="capacitance"))
    r = torch.randn(3, *a.out_shape, dtype=F64)
    solved, expected = factor.solve(r, damping).correction, exact.solve(r, damping).correction
    torch.testing.assert_close(solved, expected, rtol=1e-5, atol=1e-6)


@given(convolutions(), st.booleans(), st.booleans())
def test_what_is_factorized_is_what_was_reckoned_with(case: Any, outputs: bool, turned: bool) -> None:
    a = either(case, turned=turned)
    plan, made = embedding(a, outputs=outputs), Capacitance(a, outputs=outputs, shift=1.0)
    assert made.nbytes <= plan.nbytes(module.BLOCK)
    beyond = [plan.beyond(axis) for axis in range(len(plan.sizes))]
    # every unknown and every column that is not on the map, at all positions along the axes that come later
    everything = (plan.own.channels + plan.other.channels) * torch.Size(plan.sizes).numel()
    on_map = (a.in_shape, a.out_shape)
    inside = sum(torch.Size(shape).numel() for shape in on_map) // plan.own.groups
    later = [torch.Size(plan.sizes[axis + 1 :]).numel() for axis in range(len(beyond))]
    assert sum(n * many for n, many in zip(beyond, later, strict=True)) == everything - inside


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e5])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("channels", [4, 8, 16])
def test_targets_are_reached_whatever_the_kernel(channels: int, padding: int, condition: float) -> None:
    weight = matrix(channels, 8 * 25, condition).reshape(channels, 8, 5, 5).float()
    a = Convolution(weight, (8, 10, 10), (1, 1), (padding, padding), (1, 1), 1)
    factor = factorize(a, SolveSettings(method="capacitance"))
    assert isinstance(factor, GramFactor)
    r = a.apply(torch.randn(4, *a.in_shape))
    solved = factor.solve(r, 0.0)
    assert solved.converged is None or solved.converged.all()
    assert relative(a.to(F64).apply(solved.correction.double()), r.double()) < 5e-5
    noise, settings = torch.randn(4, *a.out_shape), SolveSettings(method="capacitance")
    answer = solve_anchored(factor, noise, settings)
    expected = solve_anchored(SpectralFactor(a), noise, settings)
    assert answer.missed is None
    left, least = (torch.linalg.vector_norm(a.apply(d.value) - noise) for d in (answer, expected))
    assert left <= 1.01 * least + 1e-4 * noise.norm()


def test_a_large_map_takes_little_memory() -> None:
    weight = torch.randn(8, 8, 5, 5)
    a = Convolution(weight, (8, 128, 128), (1, 1), (1, 1), (1, 1), 1)
    memory = {c.method: c.memory for c in choose(a, SolveSettings()).candidates}
    assert memory["capacitance"] < 2**30 < memory["banded"]
    assert choose(a, SolveSettings(memory_limit=2**30)).chosen.method == "capacitance"


@pytest.mark.parametrize(("m", "n"), [(30, 50), (50, 30), (30, 30)])
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_an_orthogonal_factorization_is_the_pseudo_inverse(m: int, n: int, damping: float) -> None:
    a = Dense(matrix(m, n, 1e3))
    r = torch.randn(4, m, dtype=F64)
    factor = factorize(a, SolveSettings(method="qr"))
    expected = SpectralFactor(a).solve(r, damping).correction
    torch.testing.assert_close(factor.solve(r, damping).correction, expected, rtol=1e-9, atol=1e-10)
    assert "QR" in factor.explain()
    assert factor.condition == pytest.approx(1e3)


@pytest.mark.parametrize(("rank", "method"), [(60, "qr"), (40, "spectral")])
def test_where_the_gram_matrix_is_strained_the_operator_itself_is_decomposed(rank: int, method: str) -> None:
    a = Dense(matrix(60, 80, 1e8, rank=rank).float())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates_module, "PATIENCE", 0.0)
        patch.setattr(candidates_module, "ITERATIONS", 1e9)
        settings = SolveSettings(expected=1)
        assert choose(a, settings).chosen.method == "cholesky"
        factor = factorize(a, settings)
    assert f"{method} was taken: the Gram matrix is too ill-conditioned" in factor.chosen
    assert ("qr was tried" in factor.chosen) == (method == "spectral")
    r = a.apply(torch.randn(3, 80))
    assert relative(a.apply(factor.solve(r, 0.0).correction), r) < 1e-5


def test_where_a_capacitance_matrix_loses_too_much_blocks_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # without ends a map could be moved by a constant unseen
    weight = torch.randn(1, 1, 3, 3)
    a = Convolution(weight - weight.mean(), (1, 12, 12), (1, 1), (1, 1), (1, 1), 1)

    def as_on_large_maps(operator: LinearOperator, settings: SolveSettings) -> Choice:
        found = choose(operator, settings)
        cut = next(c for c in found.candidates if c.method == "capacitance")
        return replace(found, chosen=cut)

    monkeypatch.setattr(choice_module, "choose", as_on_large_maps)
    monkeypatch.setattr(raised_module, "MOST", 0)
    factor = factorize(a, SolveSettings())
    assert "banded was taken: the Gram matrix is too ill-conditioned" in factor.chosen
    r = a.apply(torch.randn(2, *a.in_shape))
    exact = SpectralFactor(a.to(F64)).solve(r.double(), 0.0).correction
    assert relative(factor.solve(r, 0.0).correction.double(), exact) < 1e-5


def annulling(outputs: int, frequency: tuple[int, int]) -> Convolution:
    """In a channel of the smaller side its kernel annuls one frequency of a torus of 10 × 12."""
    torch.manual_seed(0)
    weight, taps = torch.randn(outputs, 3, 3, 3, dtype=F64), torch.arange(3, dtype=F64)
    own = weight[0] if outputs == 3 else weight[:, 0]
    turns = math.tau * (frequency[0] / 10 * taps[:, None] + frequency[1] / 12 * taps)
    waves = torch.stack([turns.cos(), turns.sin()]).flatten(1)
    own -= (own.flatten(1) @ torch.linalg.pinv(waves) @ waves).reshape(own.shape)
    return Convolution(weight, (3, 9, 11), (1, 1), (1, 1), (1, 1), 1)


@pytest.mark.parametrize("frequency", [(0, 0), (3, 0), (3, 2), (5, 6), (2, 6)])
@pytest.mark.parametrize("outputs", [3, 4])
def test_what_the_torus_annuls_and_the_map_does_not_costs_no_digits(
    outputs: int, frequency: tuple[int, int]
) -> None:
    a = annulling(outputs, frequency)
    exact, inverse = SpectralFactor(a), Capacitance(a, outputs=outputs == 3, shift=0.0)
    assert exact.condition is not None
    value, dense = torch.randn(4, 3, 9, 11, dtype=F64), a.dense()
    gram = dense @ dense.T if outputs == 3 else dense.T @ dense
    product = inverse.solve(value).flatten(1) @ gram
    assert relative(product, value.flatten(1)) < 1e-13 * max(exact.condition**2, 1e5)
