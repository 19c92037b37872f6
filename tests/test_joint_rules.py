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
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "add": {"alpha": -2.0},
    "cat": {"dim": 1},
    "stack": {"dim": 2},
    "lerp": {"weight": 0.3},
    "where": {"condition": torch.arange(60).reshape(5, 3, 4) % 3 > 0},
}
#: ops that are shared in closed form, entry by entry
BINARY = [key for key in JOINT if key not in ("cat", "stack", "matmul")]
CLOSED = [key for key in JOINT if key != "matmul"]
EACH = pytest.mark.parametrize("key", CLOSED)


def tried(key: str, dtype: torch.dtype = F64) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """Inputs, a target that can be reached, and the op's other arguments."""
    options = ATTRIBUTES.get(key, {})
    anchors, others = ([torch.randn(5, 3, 4, dtype=dtype) for _ in range(2)] for _ in range(2))
    if key == "cat":
        anchors.append(torch.randn(5, 2, 4, dtype=dtype))
        others.append(torch.randn(5, 2, 4, dtype=dtype))
    return anchors, JOINT[key].evaluate(tuple(others), **options), options


def rows(options: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """The options of some samples."""
    return {name: v[start:end] if isinstance(v, Tensor) else v for name, v in options.items()}


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
        alone, _ = jointly(key, [x[i : i + 1] for x in anchors], target[i : i + 1], **rows(options, i, i + 1))
        assert all(torch.equal(a, v[i : i + 1]) for a, v in zip(alone, values, strict=True))
    output = JOINT[key].evaluate(tuple(anchors), **options)
    answers = held(key, anchors, output, **options)
    same, _ = jointly(key, anchors, output, **options)
    for anchor, together, answer in zip(anchors, same, answers, strict=True):
        assert torch.equal(together, anchor)
        assert torch.equal(answer.target, anchor)
        assert together.dtype == dtype
    nothing, none = jointly(key, [x[:0] for x in anchors], target[:0], **rows(options, 0, 0))
    assert [len(value) for value in nothing] == [0] * len(anchors)
    assert none.residual.shape == (0,)


#: shapes of a sample of each input
SHAPES = {
    "same": ((3, 4), (3, 4)),
    "row": ((3, 4), (1, 4)),
    "cross": ((3, 1), (1, 4)),
    "number": ((1, 1), (3, 4)),
    "numbers": ((1, 1), (1, 1)),
}


@pytest.mark.parametrize(
    ("key", "shapes"),
    [
        ("cat", "same"),
        ("stack", "same"),
        *[
            (key, s)
            for key in ("add", "sub", "where", "lerp")
            for s in SHAPES
            if (key, s) != ("lerp", "numbers")
        ],
    ],
)
def test_affine_splits_are_those_of_the_pseudo_inverse(key: str, shapes: str) -> None:
    options = ATTRIBUTES.get(key, {})
    anchors = [torch.randn(5, *shape, dtype=F64) for shape in SHAPES[shapes]]
    joint = JOINT[key]
    target = torch.randn_like(joint.evaluate(tuple(anchors), **options))
    values, certificate = jointly(key, anchors, target, **options)
    for n in range(5):
        own = tuple(x[n : n + 1] for x in anchors)
        given = rows(options, n, n + 1)
        jacobian: Any = torch.autograd.functional.jacobian
        parts = jacobian(lambda *x, given=given: joint.evaluate(x, **given), own)
        a = torch.cat([part.reshape(target[0].numel(), -1) for part in parts], 1)
        missing = (target[n : n + 1] - joint.evaluate(own, **given)).flatten()
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


#: what is solved for: anchors' shapes, and the op's other arguments
SOLVED: dict[str, tuple[str, tuple[tuple[int, ...], ...]]] = {
    "matmul": ("matmul", ((3, 4), (4, 2))),
    "matmul-heads": ("matmul", ((2, 3, 4), (2, 4, 5))),
    "mul-gate": ("mul", ((3, 4), (1, 4))),
    "div-scale": ("div", ((3, 4), (3, 1))),
    "lerp-weight": ("lerp", ((3, 4), (3, 4), (3, 4))),
    "maximum-row": ("maximum", ((3, 4), (1, 4))),
    "minimum-row": ("minimum", ((1, 4), (3, 4))),
}


@pytest.mark.parametrize("case", SOLVED)
def test_what_has_no_closed_form_is_solved_in_all_inputs_together(case: str) -> None:
    """Near by, the target is reached, by a correction without a part in the null space of the whole Jacobian."""
    key, shapes = SOLVED[case]
    anchors = [torch.rand(4, *shape, dtype=F64) + 0.5 for shape in shapes]
    evaluate = JOINT[key].evaluate
    target = evaluate(tuple(x * (1 + 0.05 * torch.randn_like(x)) for x in anchors))
    values, certificate = jointly(key, anchors, target)
    if key in ("maximum", "minimum"):  # not smooth: it may end at a corner, and then says so
        before = (evaluate(tuple(anchors)) - target).flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1)
        assert bool((certificate.residual < before).all())
    else:
        assert certificate.status in (Status.NEAREST, Status.EXACT)
        assert float(certificate.residual.max()) <= 1e-8
    moved = torch.cat([(v - x).flatten(1) for v, x in zip(values, anchors, strict=True)], 1)
    torch.testing.assert_close(certificate.distance, moved.norm(dim=1))
    jacobian: Any = torch.autograd.functional.jacobian
    for n in range(4):
        parts = jacobian(lambda *x: evaluate(x), tuple(v[n : n + 1] for v in values))
        a = torch.cat([part.reshape(target[0].numel(), -1) for part in parts], 1)
        inside = torch.linalg.pinv(a) @ (a @ moved[n])
        if certificate.status is Status.NEAREST:
            assert float((moved[n] - inside).norm()) <= 1e-3 * float(moved[n].norm())
    same, _ = jointly(key, anchors, evaluate(tuple(anchors)))
    assert all(torch.equal(s, x) for s, x in zip(same, anchors, strict=True))


@pytest.mark.parametrize("case", [case for case in SOLVED if case != "lerp-weight"])
def test_each_alone_where_inputs_are_spread(case: str) -> None:
    key, shapes = SOLVED[case]
    anchors = [torch.rand(4, *shape, dtype=F64) + 0.5 for shape in shapes]
    output = JOINT[key].evaluate(tuple(anchors))
    for answer, anchor in zip(held(key, anchors, output), anchors, strict=True):
        assert torch.equal(answer.target, anchor)
    target = output + 0.05 * torch.randn_like(output)
    for i, (value, certificate) in enumerate(held(key, anchors, target)):
        reached = JOINT[key].evaluate(tuple(value if j == i else x for j, x in enumerate(anchors)))
        error = (reached - target).flatten(1).norm(dim=1)
        torch.testing.assert_close(error / target.flatten(1).norm(dim=1), certificate.residual)
        assert bool((error <= (output - target).flatten(1).norm(dim=1) + 1e-12).all())


def test_what_cannot_be_shared_is_refused() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(NoRuleError, match=r"'tanh' among several inputs; add, sub"):
        jointly("tanh", [x, x], x)
