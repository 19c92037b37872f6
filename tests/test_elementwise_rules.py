"""Every elementwise rule: the nearest pre-image, on one table of ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from rule_samples import Inverted, WithBuffer
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from fxinvert.rules import Branch, Status, entrywise, kernels
from fxinvert.rules.branches import Spare
from fxinvert.rules.choice import choice
from fxinvert.rules.elementwise import silu
from fxinvert.rules.rule import Kind
from fxinvert.testing import check_rule

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
INF = math.inf


@dataclass(frozen=True)
class Case:
    """An op with the interval of inputs it is tried on."""

    key: str
    make: Callable[[], Any]
    low: float = -4.0
    high: float = 4.0
    note: str = ""

    def __str__(self) -> str:
        return f"{self.key}-{self.note}" if self.note else self.key

    def op(self, dtype: torch.dtype = F64) -> Any:
        made = self.make()
        return made.to(dtype).eval() if isinstance(made, nn.Module) else made

    def batch(self, rows: int = 4, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
        uniform = torch.rand(rows, 3, 5, dtype=F64, generator=torch.Generator().manual_seed(seed))
        return (self.low + (self.high - self.low) * uniform).to(dtype)


def prelu(*slopes: float) -> nn.PReLU:
    layer = nn.PReLU(len(slopes))
    layer.weight.data = torch.tensor(slopes)
    return layer


def constant(function: Callable[[Tensor, Tensor], Tensor], *values: float) -> Callable[[], nn.Module]:
    return lambda: WithBuffer(function, torch.tensor(values))


CHANNELS = (0.5, -1.0, 2.0, 0.0, 1.0)
CASES = [
    Case("relu", nn.ReLU),
    Case("leaky_relu", lambda: nn.LeakyReLU(0.1)),
    Case("leaky_relu", lambda: nn.LeakyReLU(-0.5), note="valley"),
    Case("rrelu", nn.RReLU),
    Case("prelu", lambda: prelu(0.25)),
    Case("prelu", lambda: prelu(-1.0), note="falling"),
    Case("prelu", lambda: prelu(0.25, 0.0, -2.0), note="channels"),
    Case("threshold", lambda: lambda x: torch.threshold(x, 0.5, -1.0)),
    Case("_threshold", lambda: nn.Threshold(-0.5, 0.25)),
    Case("hardtanh", lambda: nn.Hardtanh(-1.5, 2.0)),
    Case("hardtanh", nn.ReLU6, -10, 10, note="relu6"),
    Case("hardshrink", lambda: nn.Hardshrink(0.7)),
    Case("hardshrink", lambda: nn.Hardshrink(0.0), note="none"),
    Case("softshrink", lambda: nn.Softshrink(0.7)),
    Case("tanhshrink", nn.Tanhshrink),
    Case("elu", lambda: nn.ELU(1.5)),
    Case("elu", lambda: nn.ELU(-0.5), note="valley"),
    Case("celu", lambda: nn.CELU(2.0)),
    Case("selu", nn.SELU),
    Case("tanh", nn.Tanh),
    Case("sigmoid", nn.Sigmoid),
    Case("log_sigmoid", nn.LogSigmoid),
    Case("softplus", lambda: nn.Softplus(2.0, 5.0)),
    Case("softsign", nn.Softsign),
    Case("hardsigmoid", nn.Hardsigmoid),
    Case("hardswish", nn.Hardswish),
    Case("gelu", nn.GELU, -6, 4),
    Case("gelu", lambda: nn.GELU("tanh"), -4, 4, note="tanh"),
    Case("silu", nn.SiLU, -10, 6),
    Case("mish", nn.Mish, -10, 6),
    Case("exp", lambda: torch.exp),
    Case("exp2", lambda: torch.exp2),
    Case("expm1", lambda: torch.expm1),
    Case("log", lambda: torch.log, 0.01, 5),
    Case("log2", lambda: torch.log2, 0.01, 5),
    Case("log10", lambda: torch.log10, 0.01, 5),
    Case("log1p", lambda: torch.log1p, -0.99, 5),
    Case("logit", lambda: torch.logit, 0.02, 0.6),
    Case("logit", lambda: lambda x: torch.logit(x, 0.1), -0.5, 1.5, note="clipped"),
    *(
        Case("pow", lambda p=p: lambda x: x.pow(p), *ends, note=str(p))  # type: ignore[misc]
        for p, ends in [
            (3, (-2, 2)),
            (4, (-2, 2)),
            (1.5, (0, 3)),
            (-1, (0.1, 3)),
            (-2, (-3, -0.1)),
            (-0.7, (0.1, 3)),
        ]
    ),
    Case("pow", lambda: lambda x: x.pow(0), note="zero"),
    Case("pow", lambda: lambda x: 0.3**x, note="base"),
    Case("hypot", constant(torch.hypot, 0.5, -1.0, 2.0, 0.0, 1.0)),
    Case("logaddexp", constant(torch.logaddexp, 0.5, -1.0, 2.0, 0.0, 1.0)),
    Case("square", lambda: torch.square),
    Case("sqrt", lambda: torch.sqrt, 0.01, 5),
    Case("rsqrt", lambda: torch.rsqrt, 0.05, 5),
    Case("reciprocal", lambda: torch.reciprocal, 0.1, 4),
    Case("abs", lambda: torch.abs),
    Case("sin", lambda: torch.sin, -20, 20),
    Case("cos", lambda: torch.cos, -20, 20),
    Case("asin", lambda: torch.asin, -0.6, 0.6),
    Case("acos", lambda: torch.acos, -0.6, 0.6),
    Case("atan", lambda: torch.atan),
    Case("sinh", lambda: torch.sinh),
    Case("cosh", lambda: torch.cosh),
    Case("asinh", lambda: torch.asinh),
    Case("acosh", lambda: torch.acosh, 2.1, 6),
    Case("atanh", lambda: torch.atanh, -0.6, 0.6),
    Case("erf", lambda: torch.erf, -2, 2),
    Case("erfc", lambda: torch.erfc, -2, 4),
    Case("erfinv", lambda: torch.erfinv, -0.6, 0.6),
    Case("clamp", lambda: lambda x: x.clamp(-1, 2)),
    Case("clamp", lambda: lambda x: x.clamp(max=1), note="one_end"),
    Case("clamp", lambda: lambda x: x.clamp(2, -1), note="wrong_order"),
    Case("clamp", constant(lambda x, c: torch.clamp(x, c, c + 1.5), *CHANNELS), note="tensor"),
    Case("clip", lambda: lambda x: torch.clip(x, -1, 2)),
    Case("clamp_min", lambda: lambda x: torch.clamp_min(x, 0.5)),
    Case("clamp_max", lambda: lambda x: torch.clamp_max(x, 0.5)),
    *(
        Case(key, constant(getattr(torch, key), *CHANNELS))
        for key in ("maximum", "minimum", "max", "min", "fmax", "fmin")
    ),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def test_every_elementwise_rule_is_tried() -> None:
    kinds = {key for key, rule in fxinvert.default_rules().items() if rule.kind is Kind.ELEMENTWISE}
    assert kinds == {case.key for case in CASES}


@cases
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=["float64", "float32", "bfloat16"])
def test_promises(case: Case, dtype: torch.dtype) -> None:
    report = check_rule(case.op(dtype), case.batch(dtype=dtype))
    assert report.op == case.key
    assert report.identity == 0  # bit for bit


@cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-8), (F32, 1e-4)], ids=["float64", "float32"])
def test_what_can_be_reached_is_reached(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    op, x = case.op(dtype), case.batch(dtype=dtype)
    with torch.no_grad():
        target = op(case.batch(seed=1, dtype=dtype))
        value, certificate = Inverted(op, x)(x, target)
        error = op(value) - target
    assert float(error.abs().max()) <= tolerance * max(1.0, float(target.abs().max()))
    assert float(certificate.residual.max()) <= tolerance
    assert value.dtype == dtype


@cases
def test_no_input_is_nearer(case: Case) -> None:
    """Against a dense grid: none that comes as close to the target is nearer to the anchor."""
    op, x = case.op(), case.batch(2)
    noise = torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        y = op(x)
        target = torch.where(torch.arange(5) < 3, op(case.batch(2, seed=1)), y + noise * y.std())
        value, certificate = Inverted(op, x)(x, target)
        error, moved = (op(value) - target).abs(), (value - x).abs()
        missed = 0
        for number in torch.linspace(case.low, case.high, 2001, dtype=F64).tolist():
            tried = (op(torch.full_like(x, number)) - target).abs()
            missed += 0 if case.key in APPROACHED else int((tried <= error - 1e-7).sum())
            assert not ((tried <= error) & ((x - number).abs() < moved - 1e-6)).any(), number
    assert missed == 0
    assert not certificate.failed.any()


#: ops with an end that is only approached, which an input far away may come closer to than the margin
APPROACHED = ("elu", "celu", "selu", "tanh", "sigmoid", "softsign", "erf", "erfc")


@cases
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=["float64", "float32", "bfloat16"])
def test_targets_far_away_stay_bounded(case: Case, dtype: torch.dtype) -> None:
    op, x = case.op(dtype), case.batch(dtype=dtype)
    with torch.no_grad():
        y = op(x)
        inverted = Inverted(op, x)
        for size in (1.0, -1.0, 3e3, -3e3):
            target = torch.full_like(y, size)
            value, certificate = inverted(x, target)
            assert value.isfinite().all()
            assert not certificate.failed.any()
            assert ((op(value) - target).abs() <= (y - target).abs() * (1 + 1e-6) + 1e-6).all()
        # what is infinite, or no number, fails in its own sample only
        expected, _ = inverted(x, target)
        for row, bad in enumerate((INF, -INF, math.nan)):
            target[row, 1, 2] = bad
        value, certificate = inverted(x, target)
    assert certificate.failed.tolist() == [True, True, True, False]
    assert certificate.status is Status.FAILED
    torch.testing.assert_close(value[3], expected[3])
    assert torch.equal(value[:3], x[:3])


@cases
def test_no_values_one_value_and_other_layouts(case: Case) -> None:
    op, x = case.op(), case.batch()
    inverted = Inverted(op, x)
    with torch.no_grad():
        target = op(case.batch(seed=1))
    expected, certificate = inverted(x, target)
    nothing, empty = inverted(x[:0], target[:0])
    assert nothing.shape == (0, 3, 5)
    assert empty.residual.shape == (0,)
    one, own = inverted(x[2:3], target[2:3])
    torch.testing.assert_close(one, expected[2:3])
    torch.testing.assert_close(own.residual, certificate.residual[2:3])
    turned = [v.permute(2, 1, 0).contiguous().permute(2, 1, 0) for v in (x, target)]
    torch.testing.assert_close(inverted(*turned)[0], expected)


def _name(value: Any) -> str:
    """A name that is the same in every process; functions print with their address."""
    return str(getattr(value, "__name__", value))


@pytest.mark.parametrize(
    ("op", "anchor", "target", "values", "projected"),
    [
        (nn.ReLU(), [-1.0, 2.0, 1.0], [-3.0, -1.0, 5.0], [-1.0, 0.0, 5.0], 2),
        (nn.Hardshrink(1.0), [0.5, 0.5, 3.0], [0.4, 0.9, 2.0], [0.5, 1.0, 2.0], 2),
        (nn.Threshold(1.0, -1.0), [3.0, -7.0, 0.0], [2.0, -1.0, 5.0], [2.0, -7.0, 5.0], 0),
        (nn.Softshrink(1.0), [0.5, -0.2, 3.0], [0.0, -2.0, 0.5], [0.5, -3.0, 1.5], 0),
        (torch.sin, [20.0, 6.0, 0.0], [0.0, 2.0, -1.0], [6 * math.pi, 2.5 * math.pi, -math.pi / 2], 1),
        (torch.cos, [20.0, 3.0, 1.0], [1.0, -2.0, 0.0], [6 * math.pi, math.pi, math.pi / 2], 1),
        (torch.sqrt, [1.0, 4.0, 9.0], [-1.0, 3.0, 0.0], [0.0, 9.0, 0.0], 1),
        (torch.reciprocal, [1.0, -2.0, 4.0], [0.5, 0.25, -1.0], [2.0, 4.0, -1.0], 0),
        (torch.square, [-1.0, 2.0, 0.5], [4.0, -1.0, 9.0], [-2.0, 0.0, 3.0], 1),
        (prelu(0.5, 0.0, -1.0), [-1.0, -1.0, -1.0], [-2.0, -2.0, -2.0], [-4.0, -1.0, 0.0], 2),
    ],
    ids=_name,
)
def test_examples(op: Any, anchor: Any, target: Any, values: Any, projected: int) -> None:
    x, t = (torch.tensor([v], dtype=F64) for v in (anchor, target))
    value, certificate = Inverted(op.to(F64) if isinstance(op, nn.Module) else op, x)(x, t)
    torch.testing.assert_close(value, torch.tensor([values], dtype=F64), rtol=0, atol=1e-9)
    assert certificate.projected == projected
    assert (certificate.status is Status.PROJECTED) == (projected > 0)


def test_what_has_no_branches_is_solved_matrix_free() -> None:
    """A constant that spreads the anchor, and a power with a different exponent for every entry."""
    x = torch.tensor([[1.0], [2.0]], dtype=F64)
    for function in (lambda x, c: torch.maximum(x, c), lambda x, c: x**c):
        op = WithBuffer(function, torch.tensor([0.5, 1.0, 1.5], dtype=F64))
        with torch.no_grad():
            target = op(x + 0.1)
        value, certificate = Inverted(op, x)(x, target)
        assert value.shape == x.shape
        assert not certificate.failed.any()


@cases
def test_the_answer_is_the_same_however_it_is_worked_through(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of entries, of rows (where operands have a shape, or the layout is another), or all at once."""
    op, x = case.op(F32), case.batch(6, dtype=F32)
    with torch.no_grad():
        target = op(case.batch(6, seed=1, dtype=F32))
        target[::2] += torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(2))
        inverted = Inverted(op, x)
        value, certificate = inverted(x, target)
        for block in (1, 7, 31):
            monkeypatch.setattr(entrywise, "BLOCK", block)
            for layout in (torch.contiguous_format, torch.channels_last):
                one, other = (v[..., None].contiguous(memory_format=layout)[..., 0] for v in (x, target))
                again, told = inverted(one, other)
                # a stretch's last entries are computed by other code of torch, which rounds differently
                torch.testing.assert_close(again, value, rtol=1e-6, atol=1e-6)
                assert told.projected == certificate.projected


def test_large_batches_are_worked_through_in_blocks() -> None:
    x, target = torch.randn(2, 6, 50000, dtype=F64)
    c = torch.randn(50000, dtype=F64)
    assert x.numel() > entrywise.BLOCK
    value, certificate = Inverted(WithBuffer(torch.maximum, c), x)(x, target)
    expected = torch.where(target > c, target, torch.minimum(x, c))
    assert torch.equal(value, torch.where(torch.maximum(x, c) == target, x, expected))
    assert certificate.projected == int((target < c).sum())


@pytest.mark.parametrize("bad", [INF, math.nan])
def test_what_overflows_is_bounded_whatever_else_is_in_the_batch(bad: float) -> None:
    """1e38 asks a slope of 1e-3 for more than the largest number there is."""
    x, target = torch.zeros(2, 3, dtype=F32), torch.full((2, 3), 1e38, dtype=F32)
    inverted = Inverted(nn.LeakyReLU(1e-3), x)
    value, certificate = inverted(x, -target)
    assert torch.equal(value, torch.full_like(x, -torch.finfo(F32).max))
    assert not certificate.failed.any()
    target[1, 1] = -bad
    again, told = inverted(x, -target)
    assert torch.equal(again[0], value[0])
    assert told.failed.tolist() == [False, True]


def test_a_slope_for_every_channel_is_the_scalar_rule_channel_by_channel() -> None:
    slopes = (0.25, 0.0, -2.0)
    x, target = torch.randn(2, 4, 3, 5, dtype=F64)
    value, _ = Inverted(prelu(*slopes).to(F64), x)(x, target)
    for channel, slope in enumerate(slopes):
        own, goal = x[:, channel], target[:, channel]
        assert torch.equal(value[:, channel], Inverted(nn.LeakyReLU(slope), own)(own, goal)[0])


@pytest.mark.parametrize(
    "module", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Tanhshrink()], ids=str
)
def test_inverses_without_a_closed_form_have_five_digits_in_single_precision(module: nn.Module) -> None:
    """From its own side of the lowest point, every input is found again."""
    x = torch.cat([torch.linspace(-4, -2, 200, dtype=F64), torch.linspace(0.5, 30, 400, dtype=F64)])[None]
    value, _ = Inverted(module, x.float())(x.float(), module(x * 1.01).float())
    # where the slope is small, rounding of the target is what is seen
    slope = torch.func.vmap(torch.func.grad(lambda v: module(v)))((x * 1.01)[0]).abs()
    lost = 2 * torch.finfo(F32).eps * module(x * 1.01)[0].abs() / slope
    assert ((value[0] - x[0] * 1.01).abs() <= 2e-5 * x[0].abs().clamp(min=1) + lost).all()


def test_logarithms_of_kernels_have_six_digits() -> None:
    x = torch.cat(
        [torch.logspace(-37, 38, 10_000, dtype=F64), torch.linspace(0.5, 2, 10_001, dtype=F64)]
    ).float()
    expected = x.double().log()
    assert ((kernels.logarithm(x) - expected).abs() <= 3e-7 * expected.abs().clamp(min=1)).all()


def _mirrored(branch: Branch) -> Branch:
    """That of x ↦ f(−x)."""
    return replace(
        branch,
        low=-branch.high,
        high=-branch.low,
        inverse=lambda y, anchor: -branch.inverse(y, -anchor),
        rises=not branch.rises,
    )


def _turned(branch: Branch) -> Branch:
    """That of x ↦ −f(x)."""
    return replace(
        branch,
        least=-branch.most,
        most=-branch.least,
        inverse=lambda y, anchor: branch.inverse(-y, anchor),
        rises=not branch.rises,
    )


@pytest.mark.parametrize(
    ("turn", "function"),
    [
        (lambda b: b, F.silu),
        (_mirrored, lambda x: F.silu(-x)),
        (_turned, lambda x: -F.silu(x)),
    ],
    ids=["valley", "mirrored", "hill"],
)
def test_a_costly_branch_is_asked_only_where_it_may_be_the_nearer(
    turn: Callable[[Branch], Branch], function: Callable[[Tensor], Tensor]
) -> None:
    asked = []

    def counted(y: Tensor, anchor: Tensor) -> Tensor:
        asked.append(y.numel())
        return left.inverse(y, anchor)

    left, right = (turn(side) for side in silu())
    costly = choice((replace(left, inverse=counted), right))
    plain = choice((replace(left, costly=False), replace(right, costly=False)))
    x, other = 2 * torch.randn(2, 40, 30, dtype=F64, generator=torch.Generator().manual_seed(0))
    target, output = function(other), function(x)
    for given in (output, torch.where(x > 1, target, output)):  # some stay
        found, expected = (
            choose(x, target, given, F64, torch.empty_like(x), False, Spare()) for choose in (costly, plain)
        )
        # processors round single entries and whole vectors of them differently
        torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(F64).eps, atol=0)
        assert 0 < asked[-1] < x.numel() / 2
    assert (found == x).any()


@pytest.mark.parametrize("step", [2, 500], ids=["many", "few"])
@pytest.mark.parametrize(
    "op",
    [nn.Hardsigmoid(), nn.Hardswish(), nn.GELU(), nn.Sigmoid(), nn.LeakyReLU(), nn.ReLU6(), nn.Hardtanh()],
)
def test_entries_stay_whether_few_or_many_do(op: nn.Module, step: int) -> None:
    x, other = torch.randn(2, 4, 1500, generator=torch.Generator().manual_seed(0))
    inverted, stays = Inverted(op, x), torch.zeros(x.shape, dtype=torch.bool)
    stays.view(-1)[::step] = True
    alone, _ = inverted(x, op(other))
    found, _ = inverted(x, torch.where(stays, op(x), op(other)))
    assert torch.equal(found, torch.where(stays, x, alone))
