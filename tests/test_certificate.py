"""Certificates are measured when somebody looks at them, on the very answer that was given, or not at all."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rule_samples import Inverted
from torch import Tensor, nn

import fxinvert
from fxinvert.errors import DataError
from fxinvert.rules import Certificate, Op, Status, invert_branches, rising
from fxinvert.rules.certificate import certified

OPS: dict[str, Any] = {
    "relu": nn.ReLU(),
    "tanh": nn.Tanh(),
    "linear": nn.Linear(6, 3),
    "layer_norm": nn.LayerNorm(6),
    "softmax": nn.Softmax(-1),
    "flatten": nn.Flatten(),
    "flip": lambda x: x.flip(1),
    "mean": lambda x: x.mean(1, keepdim=True),
}
ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


class Counted:
    """A function that counts its evaluations."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function, self.times = function, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.times += 1
        return self.function(x)


def doubled(x: Tensor, t: Tensor) -> tuple[Certificate, Counted]:
    """The certificate of inverting y = 2x, and the function that it evaluates."""
    evaluate = Counted(lambda x: 2 * x)
    op = Op("double", "double", {"x": x}, 2 * x, {}, {}, evaluate)
    return certified(op, t, t / 2, Status.EXACT).certificate, evaluate


def facts(certificate: Certificate) -> list[Any]:
    values = [getattr(certificate, entry.name) for entry in dataclasses.fields(certificate)]
    return [value.tolist() if isinstance(value, Tensor) else value for value in values]


def test_nothing_is_measured_before_somebody_looks_and_then_once() -> None:
    certificate, evaluate = doubled(torch.ones(3, 4), torch.zeros(3, 4))
    assert not certificate.is_measured
    assert evaluate.times == 0
    assert certificate.distance.tolist() == [2, 2, 2]
    assert certificate.status is Status.EXACT
    assert str(certificate).startswith("exact, residual 0")
    assert certificate.to_dict()["failed"] == 0
    assert certificate.is_measured
    assert evaluate.times == 1
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        getattr(certificate, "colour")  # noqa: B009


@ops
def test_training_pays_for_no_certificate(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets alone are found without a single measurement."""
    x = torch.randn(4, 6)
    inverse = Inverted(op, x).inverse
    values = inverse.forward(x)
    entry = next(node for node in values if node.op == "placeholder")
    target = values[inverse.output_node].roll(1, 0)

    def refuse(self: Certificate) -> Certificate:
        raise AssertionError("measured")

    with monkeypatch.context() as patched:
        patched.setattr(Certificate, "measured", refuse)
        found = inverse.targets(values, target, [entry])[entry]
    rec = inverse(x, target)
    assert torch.equal(found, rec.targets[rec.names[0]])


@ops
@pytest.mark.parametrize(
    "move",
    [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))],
    ids=["copy", "deep", "pickle"],
)
def test_copies_and_pickles_hold_the_numbers(op: Any, move: Callable[[Certificate], Certificate]) -> None:
    x = torch.randn(4, 6)
    inverted = Inverted(op, x)
    with torch.no_grad():
        target = op(x.roll(1, 0)) + 0.1
    expected = facts(inverted(x, target)[1])
    certificate = inverted(x, target)[1]
    moved = move(certificate)
    assert moved.is_measured
    assert facts(moved) == expected
    assert facts(dataclasses.replace(inverted(x, target)[1], iterations=7)) == [
        7 if entry.name == "iterations" else value
        for entry, value in zip(dataclasses.fields(Certificate), expected, strict=True)
    ]


@pytest.mark.parametrize("what", ["anchor", "target", "answer", "parameter"])
def test_what_has_been_changed_is_not_measured(what: str) -> None:
    x, target = torch.randn(2, 3), torch.randn(2, 3)
    inverted = Inverted(nn.Linear(3, 3), x)
    (_, seen), (answer, certificate) = inverted(x, target), inverted(x, target)
    before = facts(seen)
    weight = next(iter(inverted.inverse.graph.parameters()))
    changed = {"anchor": x, "target": target, "answer": answer, "parameter": weight}[what]
    with torch.no_grad():
        changed.mul_(3)
    with pytest.raises(DataError, match="changed in place"):
        certificate.residual  # noqa: B018
    assert facts(seen) == before  # what has been measured stays


def test_what_torch_does_not_count_is_measured_at_once() -> None:
    with torch.inference_mode():
        certificate, evaluate = doubled(torch.ones(3, 4), torch.zeros(3, 4))
    assert certificate.is_measured
    assert evaluate.times == 1


def test_a_module_of_the_users_is_measured_while_it_is_as_it_was() -> None:
    """Its state may be another when somebody looks: here it is put back into training mode."""
    rules = fxinvert.default_rules().extend({Noisy: lambda op, target: target / 2})
    x = torch.ones(2, 3)
    _, certificate = Inverted(Noisy().train(), x, rules)(x, 4 * x)
    assert certificate.is_measured
    assert certificate.status is Status.EXACT


@pytest.mark.parametrize(
    "op", [nn.ReLU(), nn.Softsign(), nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")]
)
def test_a_function_without_a_state_is_measured_later(op: nn.Module) -> None:
    x = torch.ones(2, 2, 5)
    _, certificate = Inverted(op, x)(x, op(x).detach())
    assert not certificate.is_measured


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x + torch.rand_like(x) if self.training else 2 * x


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@ops
def test_a_failed_sample_is_left_at_its_anchor_before_anybody_looks(op: Any, bad: float) -> None:
    x = torch.randn(4, 6)
    with torch.no_grad():
        target = op(x.roll(1, 0)).clone()
    expected, _ = Inverted(op, x)(x, target)
    target[1, ..., 0] = bad
    value, certificate = Inverted(op, x)(x, target)
    assert torch.equal(value[1], x[1])
    torch.testing.assert_close(value[[0, 2, 3]], expected[[0, 2, 3]])
    assert certificate.failed.tolist() == [False, True, False, False]
    assert certificate.status is Status.FAILED
    assert certificate.distance[1] == 0


def test_sums_that_overflow_are_no_failure() -> None:
    """A sum may be infinite although all its terms are finite."""
    x = torch.full((2, 4), 1e38)
    value, certificate = Inverted(nn.Identity(), x)(x, 2 * x)
    assert torch.equal(value, 2 * x)
    assert not certificate.failed.any()
    branches = (rising(-torch.inf, torch.inf, (-torch.inf, torch.inf), lambda y: y / 2),)
    op = Op("double", "double", {"x": x}, 2 * x, {}, {}, lambda x: 2 * x)
    assert invert_branches(op, 2 * x, branches).target.isfinite().all()
