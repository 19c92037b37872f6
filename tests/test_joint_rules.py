"""How a target is shared by several inputs: against dense solutions and fine grids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxinvert.errors import NoRuleError
from fxinvert.rules import Status
from fxinvert.rules.joint import JOINT, held, jointly

F64 = torch.float64
ATTRIBUTES: dict[str, dict[str, Any]] = {"add": {"alpha": -2.0}, "cat": {"dim": 1}, "stack": {"dim": 2}}
BINARY = [key for key in JOINT if key not in ("cat", "stack")]
EACH = pytest.mark.parametrize("key", JOINT)


def tried(key: str, dtype: torch.dtype = F64) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """Inputs, a target that can be reached, and the op's other arguments."""
    options = ATTRIBUTES.get(key, {})
    anchors, others = ([torch.randn(5, 3, 4, dtype=dtype) for _ in range(2)] for _ in range(2))
    if key == "cat":
        anchors.append(torch.randn(5, 2, 4, dtype=dtype))
        others.append(torch.randn(5, 2, 4, dtype=dtype))
    return anchors, JOINT[key].evaluate(tuple(others), **options), options


@EACH
@pytest.mark.parametrize(
    "dtype", [F64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"]
)
def test_promises(key: str, dtype: torch.dtype) -> None:
    anchors, target, options = tried(key, dtype)
    limit = {F64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 1e-1}[dtype]
    values, certificate = jointly(key, anchors, target, **options)
    reached = JOINT[key].evaluate(values, **options)
    error = (reached - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)
    assert float(error.max()) <= limit
    assert float(certificate.residual.max()) <= limit
    assert certificate.status is Status.NEAREST
    for i in range(5):
        alone, _ = jointly(key, [x[i : i + 1] for x in anchors], target[i : i + 1], **options)
        assert all(torch.equal(a, v[i : i + 1]) for a, v in zip(alone, values, strict=True))
    output = JOINT[key].evaluate(tuple(anchors), **options)
    answers = held(key, anchors, output, **options)
    same, _ = jointly(key, anchors, output, **options)
    for anchor, together, answer in zip(anchors, same, answers, strict=True):
        assert torch.equal(together, anchor)
        assert torch.equal(answer.target, anchor)
        assert together.dtype == dtype
    nothing, none = jointly(key, [x[:0] for x in anchors], target[:0], **options)
    assert [len(value) for value in nothing] == [0] * len(anchors)
    assert none.residual.shape == (0,)


@pytest.mark.parametrize("key", ["add", "sub", "cat", "stack"])
def test_affine_splits_are_those_of_the_pseudo_inverse(key: str) -> None:
    anchors, _, options = tried(key)
    joint = JOINT[key]
    target = torch.randn_like(joint.evaluate(tuple(anchors), **options))
    values, certificate = jointly(key, anchors, target, **options)
    for n in range(5):
        own = tuple(x[n : n + 1] for x in anchors)
        jacobian: Any = torch.autograd.functional.jacobian
        parts = jacobian(lambda *x: joint.evaluate(x, **options), own)
        a = torch.cat([part.reshape(target[0].numel(), -1) for part in parts], 1)
        missing = (target[n : n + 1] - joint.evaluate(own, **options)).flatten()
        step = torch.linalg.pinv(a) @ missing
        found = torch.cat([(v[n] - x[n]).flatten() for v, x in zip(values, anchors, strict=True)])
        torch.testing.assert_close(found, step)
        torch.testing.assert_close(certificate.distance[n], step.norm())


#: points of the curve f(a, b) = t, by a parameter s
CURVES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "mul": lambda s, t: (s, t / s),
    "div": lambda s, t: (t * s, s),
    "maximum": lambda s, t: (torch.where(s > 0, t, t + s), torch.where(s > 0, t - s, t)),
    "minimum": lambda s, t: (torch.where(s > 0, t, t - s), torch.where(s > 0, t + s, t)),
}


@pytest.mark.parametrize("key", CURVES)
@pytest.mark.parametrize("at", [None, 0.0, 1.0, -1.0], ids=["anywhere", "zero", "diagonal", "antidiagonal"])
def test_no_other_pair_is_nearer(key: str, at: float | None) -> None:
    a, target = torch.randn(60, 1, dtype=F64), torch.randn(60, 1, dtype=F64) * 2
    b = torch.randn(60, 1, dtype=F64) if at is None else a * at + 0.0
    if key == "div":
        b = torch.where(b == 0, 1, b)
    (found_a, found_b), certificate = jointly(key, [a, b], target)
    assert float(certificate.residual.max()) < 1e-8
    s = torch.cat([torch.linspace(-12, 12, 20_001, dtype=F64), torch.logspace(-6, 1, 2000, dtype=F64)])
    s = s[s != 0]
    x, y = CURVES[key](s, target)
    best = ((x - a).square() + (y - b).square()).amin(1).sqrt()
    distance = torch.hypot(found_a - a, found_b - b)[:, 0]
    assert bool((distance <= best + 1e-6).all())


@pytest.mark.parametrize("key", BINARY)
def test_what_each_gets_alone(key: str) -> None:
    anchors, target, options = tried(key)
    for i, (value, certificate) in enumerate(held(key, anchors, target, **options)):
        inputs = [value if j == i else x for j, x in enumerate(anchors)]
        error = (JOINT[key].evaluate(tuple(inputs), **options) - target).flatten(1).norm(dim=1)
        torch.testing.assert_close(error / target.flatten(1).norm(dim=1), certificate.residual)
        grid = torch.linspace(-8, 8, 801, dtype=F64).reshape(-1, 1, 1, 1)
        anywhere = [grid.expand(-1, *x.shape) if j == i else x for j, x in enumerate(anchors)]
        errors = (JOINT[key].evaluate(tuple(anywhere), **options) - target).abs().amin(0)
        own = (JOINT[key].evaluate(tuple(inputs), **options) - target).abs()
        if certificate.damping == 0:
            assert bool((own <= errors + 1e-8).all())


def test_what_cannot_be_shared_is_refused() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(NoRuleError, match=r"'matmul' among several inputs; add, sub"):
        jointly("matmul", [x, x], x)
    with pytest.raises(NoRuleError, match=r"spreads an input .*\(2, 1\) to \(2, 3\)"):
        held("add", [x, x[:, :1]], x)
