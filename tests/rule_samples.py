"""One table of ops to try every rule on, and the dense oracle that affine rules are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxinvert
from fxinvert.linalg import SolveSettings
from fxinvert.passes.inverse_op import InverseOp
from fxinvert.rules import Certificate, RuleSet, Status

Op = nn.Module | Callable[..., Any]


@dataclass(frozen=True)
class Sample:
    """An op to try: its key, how it is made, and the shape of a batch.

    Attributes:
        kind: `"affine"`, `"scalar"`, `"maximum"` or `"moves"`: which oracle applies.
    """

    key: str
    make: Callable[[], Op]
    shape: tuple[int, ...]
    kind: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.key}-{self.note}" if self.note else self.key

    def batch(self, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> Tensor:
        return torch.randn(self.shape, dtype=dtype) * spread


class WithParameter(nn.Module):
    """`function(x, p)` with a parameter p."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.p = function, nn.Parameter(torch.randn(shape) + 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.p)


class WithBuffer(nn.Module):
    """`function(x, c)` with a constant c."""

    c: Tensor

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], constant: Tensor) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("c", constant)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.c)


def trained_norm(norm: nn.Module, zeros: int = 0) -> nn.Module:
    """A batch norm with statistics and scales as if trained; `zeros` of its scales are zero, as after pruning."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.3, 3)
    if norm.affine:
        nn.init.normal_(norm.weight, 1.0, 0.5)
        nn.init.normal_(norm.bias)
        norm.weight.data[:zeros] = 0
    return norm


def same(key: str, kind: str, shape: tuple[int, ...], **makes: Callable[[], Op]) -> list[Sample]:
    return [Sample(key, make, shape, kind, note) for note, make in makes.items()]


MAP1, MAP2, MAP3 = (3, 4, 12), (3, 4, 7, 8), (3, 2, 4, 5, 4)
ROWS = (4, 60)

AFFINE = [
    *same(
        "linear",
        "affine",
        (4, 6),
        wide=lambda: nn.Linear(6, 3),
        tall=lambda: nn.Linear(6, 9),
        square=lambda: nn.Linear(6, 6),
        no_bias=lambda: nn.Linear(6, 4, bias=False),
    ),
    Sample("linear", lambda: nn.Linear(5, 3), (4, 2, 3, 5), "affine", "positions"),
    *same(
        "conv1d",
        "affine",
        MAP1,
        plain=lambda: nn.Conv1d(4, 3, 3),
        strided=lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1),
        dilated=lambda: nn.Conv1d(4, 3, 3, dilation=2, padding=2),
        grouped=lambda: nn.Conv1d(4, 6, 3, groups=2),
        same=lambda: nn.Conv1d(4, 3, 4, padding="same"),
        pointwise=lambda: nn.Conv1d(4, 7, 1),
    ),
    *same(
        "conv2d",
        "affine",
        MAP2,
        plain=lambda: nn.Conv2d(4, 3, 3, padding=1),
        more_channels=lambda: nn.Conv2d(4, 9, 3, padding=1),
        strided=lambda: nn.Conv2d(4, 5, (3, 2), stride=(2, 3), padding=(1, 0)),
        depthwise=lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1),
        dilated=lambda: nn.Conv2d(4, 3, 3, dilation=(2, 1), padding=(2, 1)),
        same=lambda: nn.Conv2d(4, 3, (2, 4), padding="same"),
        valid=lambda: nn.Conv2d(4, 3, 2, padding="valid"),
        pointwise=lambda: nn.Conv2d(4, 2, 1),
        pointwise_strided=lambda: nn.Conv2d(4, 6, 1, stride=2),
        pointwise_grouped=lambda: nn.Conv2d(4, 6, 1, groups=2),
    ),
    *same(
        "conv3d",
        "affine",
        MAP3,
        plain=lambda: nn.Conv3d(2, 3, 2),
        padded=lambda: nn.Conv3d(2, 2, 3, padding=1),
    ),
    Sample("batch_norm", lambda: trained_norm(nn.BatchNorm1d(6)), (4, 6), "affine", "vectors"),
    Sample("batch_norm", lambda: trained_norm(nn.BatchNorm1d(4)), MAP1, "affine", "1d"),
    *same(
        "batch_norm",
        "affine",
        MAP2,
        maps=lambda: trained_norm(nn.BatchNorm2d(4)),
        zero_scales=lambda: trained_norm(nn.BatchNorm2d(4), zeros=2),
        not_affine=lambda: trained_norm(nn.BatchNorm2d(4, affine=False)),
    ),
    Sample("batch_norm", lambda: trained_norm(nn.BatchNorm3d(2)), MAP3, "affine", "3d"),
    *same(
        "avg_pool1d", "affine", MAP1, plain=lambda: nn.AvgPool1d(3), overlapping=lambda: nn.AvgPool1d(3, 1, 1)
    ),
    *same(
        "avg_pool2d",
        "affine",
        MAP2,
        plain=lambda: nn.AvgPool2d(2),
        overlapping=lambda: nn.AvgPool2d(3, 2, 1),
        dense=lambda: nn.AvgPool2d((3, 2), 1),
        ceil=lambda: nn.AvgPool2d(3, 2, ceil_mode=True),
        without_padding=lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        divisor=lambda: nn.AvgPool2d(2, divisor_override=3),
        everything=lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    ),
    *same(
        "avg_pool3d", "affine", MAP3, plain=lambda: nn.AvgPool3d(2), overlapping=lambda: nn.AvgPool3d(2, 1)
    ),
    *same(
        "adaptive_avg_pool1d",
        "affine",
        MAP1,
        divides=lambda: nn.AdaptiveAvgPool1d(4),
        overlaps=lambda: nn.AdaptiveAvgPool1d(5),
    ),
    *same(
        "adaptive_avg_pool2d",
        "affine",
        MAP2,
        one=lambda: nn.AdaptiveAvgPool2d(1),
        overlaps=lambda: nn.AdaptiveAvgPool2d((3, 5)),
        larger=lambda: nn.AdaptiveAvgPool2d((9, 8)),
        kept=lambda: nn.AdaptiveAvgPool2d((None, 3)),
    ),
    *same("adaptive_avg_pool3d", "affine", MAP3, overlaps=lambda: nn.AdaptiveAvgPool3d((2, 3, 3))),
    *same(
        "add",
        "affine",
        MAP2,
        number=lambda: lambda x: x + 3,
        reversed=lambda: lambda x: 0.5 + x,
        channels=lambda: WithParameter(lambda x, p: x + p, 4, 1, 1),
        alpha=lambda: WithParameter(lambda x, p: torch.add(x, p, alpha=3), 1, 4, 1, 8),
        alpha_reversed=lambda: WithParameter(lambda x, p: torch.add(p, x, alpha=3), 8),
    ),
    Sample("add", lambda: WithParameter(lambda x, p: x + p, 3, 5), (4, 3, 1), "affine", "spread"),
    *same(
        "sub",
        "affine",
        MAP2,
        number=lambda: lambda x: x - 3,
        tensor=lambda: WithParameter(lambda x, p: x - p, 7, 8),
        reversed=lambda: WithParameter(lambda x, p: torch.sub(p, x, alpha=-1), 4, 7, 8),
        alpha_reversed=lambda: WithParameter(lambda x, p: torch.sub(p, x, alpha=2), 8),
    ),
    *same(
        "rsub",
        "affine",
        MAP2,
        number=lambda: lambda x: 2 - x,
        alpha=lambda: lambda x: torch.rsub(x, 2, alpha=3),
        tensor=lambda: WithParameter(lambda x, p: p - x, 4, 1, 8),
    ),
    *same(
        "mul",
        "affine",
        MAP2,
        number=lambda: lambda x: x * -1.5,
        channels=lambda: WithParameter(lambda x, p: x * p, 4, 1, 1),
        reversed=lambda: WithParameter(lambda x, p: p * x, 1, 4, 7, 1),
        zeros=lambda: WithBuffer(lambda x, c: x * c, torch.tensor([0.0, 1.0, 0.0, -2.0])[:, None, None]),
        zero=lambda: lambda x: x * 0,
    ),
    Sample("mul", lambda: WithParameter(lambda x, p: x * p, 3, 5), (4, 3, 1), "affine", "spread"),
    *same(
        "div",
        "affine",
        MAP2,
        number=lambda: lambda x: x / 3,
        tensor=lambda: WithParameter(lambda x, p: x / p, 8),
    ),
    Sample("neg", lambda: torch.neg, MAP2, "affine"),
]

SCALAR = [
    *same("relu", "scalar", ROWS, module=nn.ReLU, function=lambda: F.relu),
    *same(
        "leaky_relu",
        "scalar",
        ROWS,
        usual=lambda: nn.LeakyReLU(0.1),
        steep=lambda: nn.LeakyReLU(2.0),
        valley=lambda: nn.LeakyReLU(-0.3),
        flat=lambda: nn.LeakyReLU(0.0),
    ),
    *same(
        "hardtanh", "scalar", ROWS, usual=nn.Hardtanh, relu6=nn.ReLU6, shifted=lambda: nn.Hardtanh(-0.5, 2.0)
    ),
    *same(
        "elu",
        "scalar",
        ROWS,
        usual=nn.ELU,
        large=lambda: nn.ELU(2.5),
        valley=lambda: nn.ELU(-0.5),
        flat=lambda: nn.ELU(0.0),
        scaled=lambda: lambda x: torch.ops.aten.elu(x, 1.5, 2.0, 0.5),
    ),
    *same("celu", "scalar", ROWS, usual=nn.CELU, wide=lambda: nn.CELU(2.0), negative=lambda: nn.CELU(-1.5)),
    Sample("selu", nn.SELU, ROWS, "scalar"),
    Sample("tanh", nn.Tanh, ROWS, "scalar"),
    Sample("sigmoid", nn.Sigmoid, ROWS, "scalar"),
    Sample("log_sigmoid", nn.LogSigmoid, ROWS, "scalar"),
    *same("softplus", "scalar", ROWS, usual=nn.Softplus, sharp=lambda: nn.Softplus(3.0, 5.0)),
    Sample("softsign", nn.Softsign, ROWS, "scalar"),
    Sample("hardsigmoid", nn.Hardsigmoid, ROWS, "scalar"),
    Sample("hardswish", nn.Hardswish, ROWS, "scalar"),
    *same("gelu", "scalar", ROWS, erf=nn.GELU, tanh=lambda: nn.GELU("tanh")),
    Sample("silu", nn.SiLU, ROWS, "scalar"),
    Sample("mish", nn.Mish, ROWS, "scalar"),
    Sample("exp", lambda: torch.exp, ROWS, "scalar"),
    Sample("square", lambda: torch.square, ROWS, "scalar"),
    Sample("abs", lambda: torch.abs, ROWS, "scalar"),
]

MAXIMUM = [
    *same(
        "max_pool1d",
        "maximum",
        MAP1,
        disjoint=lambda: nn.MaxPool1d(3),
        overlapping=lambda: nn.MaxPool1d(3, 1),
        dilated=lambda: nn.MaxPool1d(2, 1, dilation=3),
    ),
    *same(
        "max_pool2d",
        "maximum",
        MAP2,
        disjoint=lambda: nn.MaxPool2d(2),
        gaps=lambda: nn.MaxPool2d(2, 3),
        overlapping=lambda: nn.MaxPool2d(3, 2),
        padded=lambda: nn.MaxPool2d(3, 2, padding=1),
        ceil=lambda: nn.MaxPool2d((2, 3), ceil_mode=True),
        dilated=lambda: nn.MaxPool2d(2, 1, dilation=(3, 2), padding=1),
        everything=lambda: nn.MaxPool2d(3, 2, padding=1, dilation=2, ceil_mode=True),
    ),
    *same(
        "max_pool3d",
        "maximum",
        MAP3,
        disjoint=lambda: nn.MaxPool3d(2),
        overlapping=lambda: nn.MaxPool3d(2, 1),
    ),
]

MOVES = [
    Sample("alias", nn.Identity, MAP2, "moves"),
    Sample("clone", lambda: torch.clone, MAP2, "moves"),
    Sample("contiguous", lambda: lambda x: x.contiguous(), MAP2, "moves"),
    Sample("detach", lambda: lambda x: x.detach(), MAP2, "moves"),
    *same("dropout", "moves", MAP2, module=nn.Dropout, function=lambda: lambda x: F.dropout(x, 0.5, False)),
    Sample("feature_dropout", nn.Dropout2d, MAP2, "moves"),
    Sample("alpha_dropout", nn.AlphaDropout, MAP2, "moves"),
    Sample("feature_alpha_dropout", nn.FeatureAlphaDropout, MAP2, "moves"),
    *same("flatten", "moves", MAP2, module=nn.Flatten, part=lambda: lambda x: x.flatten(2)),
    *same("reshape", "moves", MAP2, method=lambda: lambda x: x.reshape(x.shape[0], -1, 8)),
    *same("view", "moves", MAP2, method=lambda: lambda x: x.view(x.size(0), -1)),
    Sample("unflatten", lambda: nn.Unflatten(1, (2, 2)), MAP2, "moves"),
    Sample("squeeze", lambda: lambda x: x.squeeze(2), (3, 4, 1, 5), "moves"),
    Sample("squeeze", lambda: lambda x: x.squeeze(-1), (3, 1), "moves", "to_numbers"),
    Sample("unsqueeze", lambda: lambda x: x.unsqueeze(1), MAP2, "moves"),
    *same(
        "permute",
        "moves",
        MAP2,
        last=lambda: lambda x: x.permute(0, 2, 3, 1),
        negative=lambda: lambda x: torch.permute(x, (0, -1, 1, -2)),
    ),
    *same("transpose", "moves", MAP2, method=lambda: lambda x: x.transpose(1, -1)),
    *same("flip", "moves", MAP2, method=lambda: lambda x: x.flip(1, 3)),
]

ALL = AFFINE + SCALAR + MAXIMUM + MOVES


class Inverted:
    """One op with its inverse, called with an anchor and a target; `op(x)` evaluates it."""

    def __init__(self, op: Op, example: Tensor, rules: RuleSet | None = None, **settings: Any) -> None:
        model = _Applied(op)
        self.op = fxinvert.trace(model, example, rules=rules)
        self.inverse = fxinvert.invert(self.op, output_target=lambda outputs, labels: labels, rules=rules)
        for module in self.inverse.graph_module.modules():
            if isinstance(module, InverseOp):
                module.settings = SolveSettings(**settings)

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Certificate]:
        found = self.inverse(x, target)
        first, *_ = found.names
        return found.targets[first], found.certificates[first]


class _Applied(nn.Module):
    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Any:
        return self.op(x)


@dataclass(frozen=True)
class Answer:
    """What the one equation gives, from a dense singular value decomposition in float64.

    Attributes:
        value: `(B, n)`, x* flattened.
        residual: `(B,)`, ‖f(x*) − t‖.
        distance: `(B,)`, ‖x* − x0‖.
        damped: `(B,)`.
        damping: λ of the damped samples.
        sharp: `(B,)`, whether κ is clearly exceeded or clearly not.
    """

    value: Tensor
    residual: Tensor
    distance: Tensor
    damped: Tensor
    damping: float
    sharp: Tensor


def jacobian(function: Callable[[Tensor], Tensor], sample: Tensor) -> Tensor:
    """The dense `(m, n)` Jacobian of one sample `(1, …)`."""
    dense: Tensor = torch.autograd.functional.jacobian(function, sample)  # type: ignore[no-untyped-call]
    return dense.reshape(-1, sample.numel())


def dense_answer(a: Tensor, x: Tensor, output: Tensor, target: Tensor, limit: float = 1e3) -> Answer:
    """x0 + A⁺_λ (t − f(x0)), λ = 0 unless σ_max‖A⁺r‖ > κ‖r‖, then (σ_max/κ)²."""
    a, anchor = a.double(), x.flatten(1).double()
    r = (target - output).flatten(1).double()
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    kept = s > max(a.shape) * torch.finfo(torch.float64).eps * s[0]
    u, s, vt = u[:, kept], s[kept], vt[kept]
    largest = float(s[0]) if len(s) else 0.0
    free = (r @ u / s) @ vt
    ratio = largest * free.norm(dim=1) / r.norm(dim=1).clamp(min=1e-300) / limit
    damping = (largest / limit) ** 2
    d = torch.where((ratio > 1)[:, None], (r @ u * (s / (s**2 + damping))) @ vt, free)
    return Answer(
        value=anchor + d,
        residual=(d @ a.T - r).norm(dim=1),
        distance=d.norm(dim=1),
        damped=ratio > 1,
        damping=damping if bool((ratio > 1).any()) else 0.0,
        sharp=(ratio - 1).abs() > 1e-3,
    )


def assert_solves(inverted: Inverted, x: Tensor) -> Tensor:
    """An affine op's answers, to a target that can be reached and to one that cannot; returns the former target."""
    with torch.no_grad():
        reachable: Tensor = inverted.op(torch.randn_like(x))
    assert_is_dense_answer(inverted, x, reachable)
    assert_is_dense_answer(inverted, x, torch.randn_like(reachable))
    certificate = inverted(x, reachable)[1]
    assert certificate.status in (Status.EXACT, Status.NEAREST)
    assert float(certificate.residual.max()) <= (1e-8 if x.dtype == torch.float64 else 1e-4)
    return reachable


def assert_is_dense_answer(
    inverted: Inverted, x: Tensor, target: Tensor, limit: float | None = None
) -> Answer:
    """An affine op's answer is that of the dense solution: distance, residual, damping and, in float64, the point."""
    double = x.dtype == torch.float64
    tolerance, residual_tolerance = (1e-6, 1e-8) if double else (1e-4, 1e-4)
    with torch.no_grad():
        output = inverted.op(x)
    limit = limit or (1e6 if double else 1e3)
    dense = dense_answer(jacobian(inverted.op, x[:1]), x, output, target, limit)
    value, certificate = inverted(x, target)
    assert value.shape == x.shape
    assert value.dtype == x.dtype
    if not bool(dense.sharp.all()):
        return dense
    size = target.flatten(1).double().norm(dim=1).clamp(min=1e-12)
    residual = (inverted.op(value).detach() - target).flatten(1).double().norm(dim=1)
    torch.testing.assert_close(
        residual / size, dense.residual / size, rtol=tolerance, atol=residual_tolerance
    )
    distance = (value - x).flatten(1).double().norm(dim=1)
    torch.testing.assert_close(distance, dense.distance, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        certificate.residual.double(), residual / size, rtol=tolerance, atol=residual_tolerance
    )
    torch.testing.assert_close(certificate.distance.double(), distance, rtol=tolerance, atol=tolerance)
    assert certificate.damping == pytest.approx(dense.damping, rel=1e-3)
    assert (certificate.status is Status.DAMPED) == bool(dense.damped.any())
    assert not certificate.failed.any()
    if double:
        torch.testing.assert_close(value.flatten(1), dense.value, rtol=1e-5, atol=1e-6)
    return dense
