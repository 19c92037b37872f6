"""Reductions against closed forms, brute force and a general solver."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rule_samples import Inverted
from scipy.optimize import minimize  # type: ignore[import-untyped]
from test_simplex_rules import nearest_log_probabilities
from torch import Tensor

from fxinvert.errors import NoRuleError
from fxinvert.rules import Status
from fxinvert.testing import check_rule

F64, F32 = torch.float64, torch.float32
Function = Callable[[Tensor], Tensor]
OPS: dict[str, Function] = {
    "mean": lambda x: x.mean(1),
    "mean-map": lambda x: x.mean((2, 3)),
    "mean-kept": lambda x: x.mean((-2, -1), keepdim=True),
    "mean-axis": lambda x: torch.mean(x, axis=1),  # type: ignore[call-overload]
    "sum": lambda x: x.sum(-1),
    "sum-sample": lambda x: x.sum((1, 2, 3)),
    "sum-crossed": lambda x: x.sum((3, 1), keepdim=True),
    "amax": lambda x: x.amax((2, 3)),
    "amax-kept": lambda x: x.amax(1, keepdim=True),
    "amin": lambda x: torch.amin(x, 1),
    "logsumexp": lambda x: torch.logsumexp(x, 1),
    "logsumexp-kept": lambda x: x.logsumexp((1, 2), keepdim=True),
    "norm": lambda x: x.norm(dim=1),
    "norm-1": lambda x: x.norm(1, dim=1),
    "norm-fro": lambda x: x.norm(dim=(1, 2), keepdim=True),
    "linalg_norm": lambda x: torch.linalg.norm(x, dim=1),
    "linalg_norm-matrix": lambda x: torch.linalg.norm(x, dim=(2, 3)),
    "linalg_norm-inf": lambda x: torch.linalg.norm(x, math.inf, dim=3),
    "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, dim=(1, 2)),
    "linalg_vector_norm-1": lambda x: torch.linalg.vector_norm(x, 1, dim=-1),
    "linalg_vector_norm-inf": lambda x: torch.linalg.vector_norm(x, math.inf, dim=(1, 3)),
}
EACH = pytest.mark.parametrize("name", OPS)


@EACH
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=["float64", "float32", "bfloat16"])
def test_promises(name: str, dtype: torch.dtype) -> None:
    report = check_rule(OPS[name], torch.randn(4, 3, 4, 5, dtype=dtype) * 2)
    assert report.op == name.split("-")[0]
    assert report.identity == 0


@EACH
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_what_can_be_reached_is_reached(name: str, dtype: torch.dtype) -> None:
    x, other = torch.randn(4, 3, 4, 5, dtype=dtype), torch.randn(4, 3, 4, 5, dtype=dtype) * 3
    _, certificate = Inverted(OPS[name], x)(x, OPS[name](other))
    assert certificate.status is Status.NEAREST
    assert float(certificate.residual.max()) < (1e-8 if dtype == F64 else 1e-4)


@EACH
def test_no_samples_bad_samples_and_other_layouts(name: str) -> None:
    x = torch.randn(4, 3, 4, 5, dtype=F64)
    target = OPS[name](torch.randn(4, 3, 4, 5, dtype=F64))
    inverted = Inverted(OPS[name], x)
    expected, _ = inverted(x, target)
    torch.testing.assert_close(inverted(x.to(memory_format=torch.channels_last), target)[0], expected)
    assert inverted(x[:0], target[:0])[0].shape == (0, 3, 4, 5)
    target.view(4, -1)[0, 0], target.view(4, -1)[1, 0] = math.inf, math.nan
    value, certificate = inverted(x, target)
    assert certificate.failed.tolist() == [True, True, False, False]
    torch.testing.assert_close(value[2:], expected[2:])
    assert torch.equal(value[:2], x[:2])


def test_what_has_no_closed_form_is_refused() -> None:
    x = torch.randn(3, 4, 5)
    with pytest.raises(NoRuleError, match="order 3"):
        Inverted(lambda x: x.norm(3, dim=1), x)(x, x[:, 0])
    with pytest.raises(NoRuleError, match="matrix norm of order 2"):
        Inverted(lambda x: torch.linalg.norm(x, 2, dim=(1, 2)), x)(x, x[:, 0, 0])


# --- the nearest entries ------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(0, 2**16), st.sampled_from(["mean", "sum"]))
def test_what_is_missing_is_spread_evenly(n: int, seed: int, name: str) -> None:
    torch.manual_seed(seed)
    x, target = torch.randn(2, n, dtype=F64), torch.randn(2, dtype=F64)
    row = torch.full((1, n), 1.0 if name == "sum" else 1 / n, dtype=F64)
    expected = x + (target[:, None] - x @ row.T) @ torch.linalg.pinv(row).T
    value, _ = Inverted(lambda x: getattr(x, name)(1), x)(x, target)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


@given(st.lists(st.integers(-2, 2).map(float), min_size=1, max_size=5), st.integers(-3, 3).map(float))
def test_extremes_by_trying(entries: list[float], wanted: float) -> None:
    x, target = torch.tensor([entries], dtype=F64), torch.tensor([wanted], dtype=F64)
    functions: list[Function] = [
        lambda x: x.amax(1),
        lambda x: x.amin(1),
        lambda x: torch.linalg.vector_norm(x, math.inf, dim=1),
    ]
    for function in functions:
        value, certificate = Inverted(function, x)(x, target)
        reached = max(wanted, 0.0) if function is functions[2] else wanted
        tried = torch.tensor(list(itertools.product(*([v, reached, -reached] for v in entries))), dtype=F64)
        attains = function(tried) == reached
        assert float(function(value)) == reached
        assert float(certificate.distance) == pytest.approx(float((tried - x).norm(dim=1)[attains].min()))
        assert certificate.projected == int(reached != wanted)


def test_the_first_of_equals_is_raised() -> None:
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    value, _ = Inverted(lambda x: x.amax(1), x)(x, torch.tensor([4.0]))
    assert value.tolist() == [[1.0, 4.0, 3.0, 2.0]]


@given(st.integers(1, 6), st.integers(0, 2**16), st.sampled_from([-8.0, -1.0, -0.1, 0.1, 1.0, 8.0]))
def test_the_nearest_entries_with_a_log_sum(n: int, seed: int, change: float) -> None:
    torch.manual_seed(seed)
    x = 2 * torch.randn(1, n, dtype=F64)
    target = x.logsumexp(1) + change
    _, certificate = Inverted(lambda x: x.logsumexp(1), x)(x, target)
    assert float(certificate.residual.max()) < 1e-10
    assert float(certificate.distance) <= nearest_log_probabilities((x - target)[0]) + 1e-6


@given(st.integers(1, 6), st.integers(0, 2**16), st.floats(0, 12))
def test_the_nearest_entries_with_an_absolute_sum(n: int, seed: int, total: float) -> None:
    torch.manual_seed(seed)
    x = 2 * torch.randn(1, n, dtype=F64)
    size = x[0].abs().numpy()
    # no entry changes its sign: a convex problem
    oracle = minimize(
        lambda s: ((s - size) ** 2).sum(),
        np.full(n, total / n),
        jac=lambda s: 2 * (s - size),
        method="SLSQP",
        bounds=[(0, None)] * n,
        constraints={"type": "eq", "fun": lambda s: s.sum() - total, "jac": np.ones_like},
        options={"ftol": 1e-15, "maxiter": 500},
    )
    value, certificate = Inverted(lambda x: x.norm(1, dim=1), x)(x, torch.tensor([total], dtype=F64))
    assert float(value.abs().sum()) == pytest.approx(total, abs=1e-9)
    assert float(certificate.distance) <= math.sqrt(oracle.fun) + 1e-6


def test_lengths_are_changed_along_the_ray() -> None:
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0], [3.0, 4.0], [0.0, 2.0]], dtype=F64)
    target = torch.tensor([10.0, 2.0, -1.0, 0.0], dtype=F64)
    value, certificate = Inverted(lambda x: x.norm(dim=1), x)(x, target)
    even = math.sqrt(2)
    expected = torch.tensor([[6.0, -8.0], [even, even], [0.0, 0.0], [0.0, 0.0]], dtype=F64)
    torch.testing.assert_close(value, expected)
    assert certificate.projected == 1
    assert certificate.status is Status.PROJECTED
    # |‖x‖ − ‖x0‖| ≤ ‖x − x0‖: nothing is nearer
    torch.testing.assert_close(certificate.distance, torch.tensor([5.0, 2.0, 5.0, 2.0], dtype=F64))
