"""Softmax, log-softmax and GLU against general solvers and dense grids."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_samples import Inverted
from scipy.optimize import minimize  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from fxinvert.errors import NoRuleError
from fxinvert.rules import Op, Status
from fxinvert.rules.simplex import onto_log_simplex, onto_simplex
from fxinvert.testing import check_rule

F64, F32 = torch.float64, torch.float32
OPS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "softmax": (nn.Softmax(1), (4, 5)),
    "softmax-maps": (nn.Softmax(1), (4, 5, 3, 2)),
    "softmax-last": (lambda x: F.softmax(x, -1), (4, 3, 7)),
    "log_softmax": (nn.LogSoftmax(1), (4, 5)),
    "log_softmax-last": (lambda x: x.log_softmax(-1), (4, 3, 7)),
    "glu": (nn.GLU(1), (4, 6, 3)),
    "glu-last": (nn.GLU(), (4, 3, 8)),
}
EACH = pytest.mark.parametrize("name", OPS)


@EACH
@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16], ids=["float64", "float32", "bfloat16"])
def test_promises(name: str, dtype: torch.dtype) -> None:
    op, shape = OPS[name]
    report = check_rule(op, torch.randn(shape, dtype=dtype) * 2, dtype=dtype)
    assert report.op == name.split("-")[0]
    assert report.identity == 0


@EACH
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_what_can_be_reached_is_reached(name: str, dtype: torch.dtype) -> None:
    op, shape = OPS[name]
    x, target = torch.randn(shape, dtype=dtype) * 3, op(torch.randn(shape, dtype=dtype) * 3)
    value, certificate = Inverted(op, x)(x, target)
    assert certificate.status is Status.NEAREST
    assert certificate.projected == 0
    assert float(certificate.residual.max()) < (1e-8 if dtype == F64 else 1e-4)
    if "softmax" in name:  # the pre-images are a line along (1, …, 1): the nearest has the anchor's mean
        dim = -1 if "last" in name else 1
        torch.testing.assert_close(value.mean(dim), x.mean(dim), rtol=0, atol=1e-5)


@EACH
def test_no_samples_bad_samples_and_other_layouts(name: str) -> None:
    op, shape = OPS[name]
    x, target = torch.randn(shape, dtype=F64), op(torch.randn(shape, dtype=F64))
    inverted = Inverted(op, x)
    expected, _ = inverted(x, target)
    axes = list(reversed(range(x.dim())))
    turned = x.permute(axes).contiguous().permute(axes)
    torch.testing.assert_close(inverted(turned, target)[0], expected)
    assert inverted(x[:0], target[:0])[0].shape == (0, *shape[1:])
    target[0].flatten()[0], target[1].flatten()[0] = math.inf, math.nan
    value, certificate = inverted(x, target)
    assert certificate.failed.tolist() == [True, True, False, False]
    torch.testing.assert_close(value[2:], expected[2:])
    assert torch.equal(value[:2], x[:2])


def test_the_samples_of_a_batch_are_not_mixed() -> None:
    x = torch.randn(3, 4)
    for dim in (0, -2):
        op = Op("softmax", "scores", {"self": x}, x.softmax(dim), {}, {"dim": dim}, lambda x: x.softmax(0))
        with pytest.raises(NoRuleError, match="'scores', softmax: it combines the samples of a batch"):
            fxinvert.default_rules()["softmax"].invert(op, x)


# --- softmax ------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(0, 2**16), st.sampled_from([0.1, 1.0, 10.0]))
def test_the_nearest_point_of_the_simplex(n: int, seed: int, size: float) -> None:
    torch.manual_seed(seed)
    target = size * torch.randn(1, n, dtype=F64)
    t = target[0].numpy()
    oracle = minimize(
        lambda p: ((p - t) ** 2).sum(),
        np.full(n, 1 / n),
        jac=lambda p: 2 * (p - t),
        method="SLSQP",
        bounds=[(0, None)] * n,
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    torch.testing.assert_close(onto_simplex(target)[0], torch.from_numpy(oracle.x), rtol=0, atol=1e-6)
    x = torch.randn(1, n, dtype=F64)
    value, certificate = Inverted(nn.Softmax(1), x)(x, target)
    residual = float((value.softmax(1) - target).norm())
    assert residual <= math.sqrt(oracle.fun) + 1e-5
    assert certificate.projected == (n if residual > 1e-6 * float(target.norm()) else 0)


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_probabilities_of_zero_are_bounded_by_the_margin(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 1.0, 2.0], [0.0, -50.0, 3.0], [9.0, 9.0, 9.0], [0.0, 0.0, 0.0]], dtype=dtype)
    target = torch.tensor(
        [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1e6, -1e6, 0.0], [-5.0, -5.0, -5.0]], dtype=dtype
    )
    value, certificate = Inverted(nn.Softmax(1), x)(x, target)
    assert certificate.status in (Status.PROJECTED, Status.NEAREST)
    # the certain class keeps its logit; the others are a factor MARGIN below it, or where they were
    expected = torch.tensor([[0.0, -13.815511, -13.815511], [0.0, -50.0, -13.815511]], dtype=dtype)
    torch.testing.assert_close(value[:2], expected)
    assert float(value.abs().max()) <= 50
    torch.testing.assert_close(value[3], x[3])


def test_small_probabilities_keep_their_digits() -> None:
    x, logits = torch.zeros(1, 3, dtype=F64), torch.tensor([[0.0, -40.0, -300.0]], dtype=F64)
    value, certificate = Inverted(nn.Softmax(1), x)(x, logits.softmax(1))
    torch.testing.assert_close(value, logits - logits.mean())
    assert certificate.projected == 0


# --- log-softmax --------------------------------------------------------------------------------------------


def nearest_log_probabilities(t: Tensor) -> float:
    """The least ‖y − t‖ with log Σeʸ = 0, by a general solver from many starts."""
    v, n = t.numpy(), len(t)
    starts = [np.log(np.full(n, 1 / n)), v - np.logaddexp.reduce(v)]
    starts += [np.where(np.arange(n) == i, 0.0, v) for i in range(n)]
    found = []
    for start in starts:
        answer = minimize(
            lambda y: ((y - v) ** 2).sum(),
            start,
            jac=lambda y: 2 * (y - v),
            method="SLSQP",
            constraints={
                "type": "eq",
                "fun": np.logaddexp.reduce,
                "jac": lambda y: np.exp(y - np.logaddexp.reduce(y)),
            },
            options={"ftol": 1e-14, "maxiter": 500},
        )
        if abs(np.logaddexp.reduce(answer.x)) < 1e-9:
            found.append(answer.fun)
    return math.sqrt(min(found))


@settings(deadline=None)
@given(
    st.integers(1, 6),
    st.integers(0, 2**16),
    st.sampled_from([0.01, 1.0, 4.0]),
    st.sampled_from([0.0, 0.3, -0.3, 3.0, -3.0, 10.0, -10.0]),
)
def test_the_nearest_log_probabilities(n: int, seed: int, size: float, shift: float) -> None:
    torch.manual_seed(seed)
    target = (size * torch.randn(1, n, dtype=F64)).log_softmax(1) + shift + 0.1 * torch.randn(1, n, dtype=F64)
    y, _ = onto_log_simplex(target)
    assert abs(float(y.logsumexp(1))) < 1e-12
    least = nearest_log_probabilities(target[0])
    assert float((y - target).norm()) <= least + 1e-6
    x = torch.randn(1, n, dtype=F64)
    value, _ = Inverted(nn.LogSoftmax(1), x)(x, target)
    assert float((value.log_softmax(1) - target).norm()) <= least + 1e-6
    assert float(value.mean()) == pytest.approx(float(x.mean()), abs=1e-9)


@pytest.mark.parametrize("n", [10, 1000, 30000])
def test_many_classes(n: int) -> None:
    x = torch.randn(4, n, dtype=F64)
    for shift in (-5.0, -0.5, 0.0, 0.5, 5.0, 100.0):
        target = torch.randn(4, n, dtype=F64).log_softmax(1) + shift
        value, certificate = Inverted(nn.LogSoftmax(1), x)(x, target)
        assert certificate.iterations <= 25
        # never worse than the plain shift
        assert ((value.log_softmax(1) - target).norm(dim=1) <= abs(shift) * math.sqrt(n) + 1e-9).all()


# --- GLU ----------------------------------------------------------------------------------------------------


def test_the_nearest_pair_on_a_dense_grid() -> None:
    grid = torch.linspace(-60, 60, 240001, dtype=F64)[:, None]
    for size in (0.1, 1.0, 10.0, 30.0):
        x = torch.randn(1, 240, dtype=F64) * size
        target = torch.randn(1, 120, dtype=F64) * size
        target[0, :10] = 0
        target[0, 10:20] *= 1e-6
        value, certificate = Inverted(nn.GLU(1), x)(x, target)
        assert float(certificate.residual.max()) < 1e-12
        a, b = x.chunk(2, 1)
        cost = (target / grid.sigmoid() - a).square() + (grid - b).square()
        found = sum((v - w).square() for v, w in zip(value.chunk(2, 1), (a, b), strict=True))
        assert isinstance(found, Tensor)
        assert (found[0] <= cost.amin(0) + 1e-6 * (1 + found[0])).all()


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_extreme_gates_stay_bounded(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -1.0, 1e4, 0.0, -80.0, 600.0, -600.0, 0.0]], dtype=dtype)
    for target in ([[1e4, 1.0, 0.0, -1e4]], [[-1e-30, 0.0, 1e-30, 1.0]]):
        wanted = torch.tensor(target, dtype=dtype)
        value, certificate = Inverted(nn.GLU(1), x)(x, wanted)
        assert value.isfinite().all()
        assert not certificate.failed.any()
        torch.testing.assert_close(F.glu(value, 1), wanted, rtol=1e-4, atol=1e-8)
