"""Ops with one unknown operand, the others held at their anchors: values that differ from sample to sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from held_cases import AFFINE, CURVED, F64, WHOLE, Call, Held
from torch import Tensor

from fxinvert.errors import NoRuleError
from fxinvert.linalg.vectors import flat
from fxinvert.rules import FactorCache, Inverse, Status

F32, BF16 = torch.float32, torch.bfloat16
ALL = [*AFFINE, *CURVED, *WHOLE]
#: relative residual of a target that can be reached
REACHED = {F64: 1e-8, F32: 1e-4, BF16: 1e-1}
#: statuses that excuse a target that is not reached
EXCUSED = (Status.DAMPED, Status.PROJECTED)
#: torch has no kernel in half precision
SINGLE_ONLY = "upsample-aa", "upsample-bicubic-aa", "lp_pool3d"
each = pytest.mark.parametrize("case", ALL, ids=str)
affine = pytest.mark.parametrize("case", [case for case in ALL if case.affine], ids=str)


def by_row(value: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(flat(value.double()), dim=1)
    return norms


def reachable(call: Call) -> Tensor:
    return call(call.x * (torch.rand(call.x.shape) + 0.5).to(call.x))


def anywhere(call: Call) -> Tensor:
    output = call(call.x)
    return output + 0.3 * torch.randn(output.shape).to(output)


@each
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=["float64", "float32", "bfloat16"])
def test_promises(case: Held, dtype: torch.dtype) -> None:
    if dtype == BF16 and case.note in SINGLE_ONLY:
        pytest.skip("torch has no kernel for it")
    call = Call(case, 4, dtype)
    output = call(call.x)
    same = call.inverse(output)
    assert float(by_row(same.target - call.x).max()) == 0
    for target in (reachable(call), anywhere(call)):
        value, certificate = call.inverse(target)
        assert value.dtype == dtype
        assert not bool(certificate.failed.any())
        residual = by_row(call(value) - target) / by_row(target)
        slack = {F64: 1e-9, F32: 1e-5, BF16: 2e-2}[dtype]
        torch.testing.assert_close(certificate.residual.double(), residual, atol=slack, rtol=slack)
        torch.testing.assert_close(
            certificate.distance.double(), by_row(value - call.x), atol=slack, rtol=max(slack, 1e-5)
        )
        assert bool((residual <= by_row(output - target) / by_row(target) + slack).all())
        if certificate.status in (Status.EXACT, Status.NEAREST, Status.PASSED_THROUGH):
            assert float(residual.max()) <= max(REACHED[dtype], 2 * torch.finfo(dtype).eps ** 0.5)
    value, certificate = call.inverse(reachable(call))
    assert certificate.status in EXCUSED or float(certificate.residual.max()) <= REACHED[dtype]


@affine
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_the_answer_is_that_of_the_pseudo_inverse(case: Held, dtype: torch.dtype) -> None:
    call = Call(case, 4, dtype)
    target = anywhere(call)
    value, certificate = call.inverse(target)
    if certificate.status is Status.DAMPED:
        pytest.skip("damped")
    missing = (target - call(call.x)).double()
    for i in range(4):
        row = call.rows(slice(i, i + 1))
        jacobian: Any = torch.autograd.functional.jacobian
        dense = jacobian(row, row.x).reshape(target[0].numel(), -1).double()
        step = torch.linalg.pinv(dense, rtol=1e-6) @ missing[i].flatten()
        tolerance = {F64: 1e-7, F32: 2e-3}[dtype]
        error = (value - call.x)[i].flatten().double() - step
        assert float(error.norm()) <= tolerance * (1 + float(step.norm()))


@each
def test_samples_are_independent(case: Held) -> None:
    call = Call(case, 4)
    target = anywhere(call)
    together = call.inverse(target).target
    for i in range(4):
        alone = call.rows(slice(i, i + 1)).inverse(target[i : i + 1]).target
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-7, atol=1e-7)


@each
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(case: Held, batch: int) -> None:
    call = Call(case, 1)
    empty = call.rows(slice(0, batch))
    value, certificate = empty.inverse(empty(empty.x))
    assert value.shape == empty.x.shape
    assert certificate.residual.shape == (batch,)


@each
def test_what_is_not_finite_stays_in_its_sample(case: Held) -> None:
    call = Call(case, 3)
    target = anywhere(call)
    expected = call.inverse(target).target
    spoiled = target.clone()
    spoiled[1] = torch.nan
    value, certificate = call.inverse(spoiled)
    assert certificate.failed.tolist() == [False, True, False]
    assert torch.equal(value[1], call.x[1])
    torch.testing.assert_close(value[[0, 2]], expected[[0, 2]], rtol=1e-7, atol=1e-7)


@each
def test_the_layout_of_the_input_does_not_matter(case: Held) -> None:
    call = Call(case, 3)
    target = anywhere(call)
    expected = call.inverse(target).target
    if call.x.dim() == 4:
        call.x = call.x.contiguous(memory_format=torch.channels_last)
    else:
        call.x = call.x.transpose(0, -1).contiguous().transpose(0, -1)
    found = call.inverse(target.transpose(0, -1).contiguous().transpose(0, -1)).target
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("case", [*AFFINE, *CURVED], ids=str)
def test_no_copy_of_the_batch_is_kept(case: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []

    def get(self: FactorCache, key: Any, parameters: tuple[Tensor, ...], build: Any) -> Any:
        kept.extend(len(p) for p in parameters if p.dim())
        return build()

    monkeypatch.setattr(FactorCache, "get", get)
    call = Call(case, 11)
    call.inverse(anywhere(call))
    assert 11 not in kept


def test_shares_of_a_join_along_the_batch_are_refused() -> None:
    joined = Held(
        "cat-batch", torch.ops.aten.cat.default, lambda b: ([torch.ones(b, 2), torch.ones(b, 2)], 0)
    )
    call = Call(joined, 2)
    with pytest.raises(NoRuleError, match=r"joins batches \(dim=0\)"):
        call.inverse(call(call.x))


def test_a_query_that_may_look_nowhere_asks_for_nothing() -> None:
    nowhere = torch.ones(3, 1, 5, 7, dtype=torch.bool)
    nowhere[:, :, 2] = False
    case = next(case for case in AFFINE if case.note == "attention-value")
    masked = Held(
        "nowhere", case.function, lambda b: (*case.arguments(b), nowhere.expand(b, 1, 5, 7)), case.unknown
    )
    call = Call(masked, 3)
    target = anywhere(call)
    value, _ = call.inverse(target)
    target[:, :, 2] = 7
    found: Inverse = call.inverse(target)
    torch.testing.assert_close(found.target, value)
