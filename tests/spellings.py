"""Ways to write the same op: activations, ops that move values, arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten


class Spellings(NamedTuple):
    """Ways to write one op, for inputs of a shape: modules, or functions of the input and the tensors."""

    op: str
    shape: tuple[int, ...]
    ways: list[Any]
    tensors: tuple[Tensor, ...] = ()


class Written(nn.Module):
    """A function of the input and some parameters, as a model."""

    def __init__(self, function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.function = function
        self.tensors = nn.ParameterList(tensors)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.tensors)


def by_number(function: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x, 1.5)


def elementwise() -> Iterator[Spellings]:
    flat = (2, 3)
    relu6 = [
        nn.ReLU6(),
        nn.ReLU6(inplace=True),
        F.relu6,
        lambda x: F.relu6(x, True),
        lambda x: F.relu6(input=x),
        aten.relu6,
    ]
    yield Spellings("relu", flat, [
        nn.ReLU(), nn.ReLU(inplace=True), F.relu, F.relu_, torch.relu, torch.relu_, aten.relu, aten.relu.default, aten.relu_.default,
        lambda x: F.relu(x, inplace=True), lambda x: F.relu(input=x), lambda x: x.relu(), lambda x: x.relu_(),
    ])  # fmt: skip
    yield Spellings(
        "hardtanh",
        flat,
        [*relu6, nn.Hardtanh(0, 6), lambda x: F.hardtanh(x, 0.0, 6.0), lambda x: F.hardtanh_(x, 0, 6)],
    )
    yield Spellings(
        "hardtanh", flat, [nn.Hardtanh(), F.hardtanh, aten.hardtanh, lambda x: F.hardtanh(x, -1, 1)]
    )
    yield Spellings("leaky_relu", flat, [
        nn.LeakyReLU(0.2), nn.LeakyReLU(0.2, inplace=True), lambda x: F.leaky_relu(x, 0.2), lambda x: F.leaky_relu(x, negative_slope=0.2),
        lambda x: F.leaky_relu_(x, 0.2), lambda x: aten.leaky_relu(x, 0.2),
    ])  # fmt: skip
    yield Spellings("leaky_relu", flat, [nn.LeakyReLU(), F.leaky_relu, aten.leaky_relu])
    yield Spellings(
        "elu", flat, [nn.ELU(), nn.ELU(inplace=True), F.elu, F.elu_, aten.elu, lambda x: F.elu(x, alpha=1.0)]
    )
    yield Spellings("elu", flat, [nn.ELU(0.5), lambda x: F.elu(x, 0.5), lambda x: aten.elu(x, 0.5)])
    yield Spellings(
        "celu",
        flat,
        [nn.CELU(0.7), lambda x: F.celu(x, 0.7), lambda x: torch.celu(x, 0.7), lambda x: torch.celu_(x, 0.7)],
    )
    yield Spellings("selu", flat, [nn.SELU(), nn.SELU(inplace=True), F.selu, torch.selu, torch.selu_])
    yield Spellings("gelu", flat, [nn.GELU(), F.gelu, aten.gelu, lambda x: F.gelu(x, approximate="none")])
    yield Spellings(
        "gelu",
        flat,
        [
            nn.GELU("tanh"),
            lambda x: F.gelu(x, approximate="tanh"),
            lambda x: aten.gelu(x, approximate="tanh"),
        ],
    )
    yield Spellings(
        "silu", flat, [nn.SiLU(), nn.SiLU(inplace=True), F.silu, lambda x: F.silu(x, True), aten.silu]
    )
    yield Spellings("mish", flat, [nn.Mish(), nn.Mish(inplace=True), F.mish, aten.mish])
    yield Spellings(
        "hardswish", flat, [nn.Hardswish(), nn.Hardswish(inplace=True), F.hardswish, aten.hardswish]
    )
    yield Spellings(
        "hardsigmoid",
        flat,
        [nn.Hardsigmoid(), nn.Hardsigmoid(inplace=True), F.hardsigmoid, aten.hardsigmoid],
    )
    yield Spellings(
        "tanh", flat, [nn.Tanh(), F.tanh, torch.tanh, aten.tanh, lambda x: x.tanh(), lambda x: x.tanh_()]
    )
    yield Spellings("sigmoid", flat, [
        nn.Sigmoid(), F.sigmoid, torch.sigmoid, torch.special.expit, aten.sigmoid, lambda x: x.sigmoid(), lambda x: x.sigmoid_(),
    ])  # fmt: skip
    yield Spellings("log_sigmoid", flat, [nn.LogSigmoid(), F.logsigmoid, aten.log_sigmoid])
    yield Spellings(
        "softplus", flat, [nn.Softplus(), F.softplus, aten.softplus, lambda x: F.softplus(x, 1, 20)]
    )
    yield Spellings("softplus", flat, [nn.Softplus(2, 10), lambda x: F.softplus(x, beta=2, threshold=10)])
    yield Spellings("softsign", flat, [nn.Softsign(), F.softsign])
    yield Spellings("exp", flat, [torch.exp, aten.exp, lambda x: x.exp(), lambda x: x.exp_()])
    yield Spellings(
        "square",
        flat,
        [
            torch.square,
            aten.square,
            lambda x: x.square(),
            lambda x: x**2,
            lambda x: x.pow(2),
            lambda x: torch.pow(x, 2),
        ],
    )
    yield Spellings(
        "abs",
        flat,
        [torch.abs, torch.absolute, operator.abs, abs, aten.abs, lambda x: x.abs(), lambda x: x.abs_()],
    )
    yield Spellings(
        "neg", flat, [torch.neg, torch.negative, operator.neg, aten.neg, lambda x: -x, lambda x: x.neg()]
    )


def moves() -> Iterator[Spellings]:
    cube, flat = (2, 3, 4), (2, 12)
    yield Spellings(
        "alias",
        flat,
        [nn.Sequential(nn.Identity()), nn.Sequential(nn.Sequential(), nn.Identity(5, unused=1))],
    )
    yield Spellings("clone", flat, [torch.clone, aten.clone, lambda x: x.clone()])
    yield Spellings("contiguous", flat, [aten.contiguous, lambda x: x.contiguous()])
    yield Spellings("detach", flat, [torch.detach, aten.detach, lambda x: x.detach()])
    yield Spellings("dropout", flat, [
        nn.Dropout(0.3), nn.Dropout(0.3, inplace=True), lambda x: aten.dropout(x, 0.3, False),
        lambda x: F.dropout(x, 0.3, False), lambda x: F.dropout(x, p=0.3, training=False), lambda x: torch.dropout(x, 0.3, False),
    ])  # fmt: skip
    yield Spellings("feature_dropout", cube, [nn.Dropout1d(0.3), lambda x: F.dropout1d(x, 0.3, False)])
    yield Spellings(
        "feature_dropout", (2, 3, 2, 2), [nn.Dropout2d(0.3), lambda x: F.dropout2d(x, 0.3, training=False)]
    )
    yield Spellings(
        "feature_dropout", (2, 3, 2, 2, 2), [nn.Dropout3d(0.3), lambda x: F.dropout3d(x, 0.3, False)]
    )
    yield Spellings("alpha_dropout", flat, [nn.AlphaDropout(0.3), lambda x: F.alpha_dropout(x, 0.3, False)])
    yield Spellings(
        "feature_alpha_dropout",
        cube,
        [nn.FeatureAlphaDropout(0.3), lambda x: F.feature_alpha_dropout(x, 0.3, False)],
    )
    yield Spellings("flatten", cube, [
        nn.Flatten(), lambda x: torch.flatten(x, 1), lambda x: torch.flatten(x, start_dim=1), lambda x: x.flatten(1),
        lambda x: x.flatten(start_dim=1), lambda x: x.flatten(1, -1), lambda x: aten.flatten(x, 1),
    ])  # fmt: skip
    yield Spellings("reshape", cube, [
        lambda x: x.reshape(-1, 12), lambda x: x.reshape((-1, 12)), lambda x: x.reshape(shape=(-1, 12)),
        lambda x: torch.reshape(x, (-1, 12)), lambda x: aten.reshape(x, [-1, 12]),
    ])  # fmt: skip
    yield Spellings(
        "view",
        cube,
        [lambda x: x.view(-1, 12), lambda x: x.view((-1, 12)), lambda x: x.view(torch.Size((-1, 12)))],
    )
    yield Spellings(
        "unflatten",
        flat,
        [nn.Unflatten(1, (3, 4)), lambda x: x.unflatten(1, (3, 4)), lambda x: torch.unflatten(x, 1, (3, 4))],
    )
    yield Spellings("permute", cube, [
        lambda x: x.permute(0, 2, 1), lambda x: x.permute((0, 2, 1)), lambda x: x.permute(dims=[0, 2, 1]), lambda x: torch.permute(x, (0, 2, 1)),
    ])  # fmt: skip
    yield Spellings("transpose", cube, [
        lambda x: x.transpose(1, 2), lambda x: torch.transpose(x, 1, 2), lambda x: x.transpose(dim0=1, dim1=2), lambda x: x.swapaxes(1, 2),
        lambda x: torch.swapdims(x, 1, 2),
    ])  # fmt: skip
    yield Spellings(
        "unsqueeze",
        flat,
        [lambda x: x.unsqueeze(1), lambda x: torch.unsqueeze(x, 1), lambda x: x.unsqueeze(dim=1)],
    )
    yield Spellings(
        "squeeze",
        (2, 1, 3),
        [lambda x: x.squeeze(1), lambda x: torch.squeeze(x, 1), lambda x: x.squeeze(dim=1)],
    )
    yield Spellings(
        "flip",
        flat,
        [
            lambda x: x.flip(1),
            lambda x: x.flip((1,)),
            lambda x: x.flip(dims=[1]),
            lambda x: torch.flip(x, (1,)),
        ],
    )


def arithmetic() -> Iterator[Spellings]:
    flat, p = (2, 3), (torch.randn(3),)
    yield Spellings("add", flat, [
        lambda x: x + 1.5, lambda x: 1.5 + x, lambda x: torch.add(x, 1.5), lambda x: torch.add(1.5, x), lambda x: x.add(1.5),
        lambda x: x.add_(1.5), by_number(operator.iadd), lambda x: aten.add(x, 1.5), lambda x: torch.add(x, other=1.5),
    ])  # fmt: skip
    yield Spellings("sub", flat, [
        lambda x: x - 1.5, lambda x: torch.sub(x, 1.5), lambda x: torch.subtract(x, 1.5), lambda x: x.sub_(1.5), by_number(operator.isub),
    ])  # fmt: skip
    yield Spellings(
        "rsub", flat, [lambda x: 1.5 - x, lambda x: torch.rsub(x, 1.5), lambda x: torch.sub(1.5, x)]
    )
    yield Spellings("mul", flat, [
        lambda x: x * 1.5, lambda x: 1.5 * x, lambda x: torch.mul(x, 1.5), lambda x: torch.multiply(x, 1.5), lambda x: x.mul_(1.5),
        by_number(operator.imul),
    ])  # fmt: skip
    yield Spellings("div", flat, [
        lambda x: x / 1.5, lambda x: torch.div(x, 1.5), lambda x: torch.true_divide(x, 1.5), lambda x: x.divide(1.5), lambda x: x.div_(1.5),
        by_number(operator.itruediv),
    ])  # fmt: skip
    yield Spellings(
        "add",
        flat,
        [
            lambda x, p: x + p,
            lambda x, p: p + x,
            torch.add,
            lambda x, p: torch.add(p, x),
            lambda x, p: x.add_(p),
        ],
        p,
    )
    yield Spellings("add", flat, [lambda x, p: torch.add(x, p, alpha=2), lambda x, p: x.add(p, alpha=2)], p)
    yield Spellings("sub", flat, [lambda x, p: x - p, torch.sub, lambda x, p: x.subtract(p)], p)
    yield Spellings("rsub", flat, [lambda x, p: p - x, torch.rsub, lambda x, p: torch.sub(p, x)], p)
    yield Spellings(
        "mul", flat, [lambda x, p: x * p, lambda x, p: p * x, torch.mul, lambda x, p: torch.multiply(p, x)], p
    )
    yield Spellings("div", flat, [lambda x, p: x / p, torch.div, lambda x, p: x.true_divide(p)], p)


def several_meanings() -> Iterator[Spellings]:
    """Calls that ATen's resolution takes for another overload, and those that take as many tensors as one likes."""
    flat, matrix = (2, 3), (torch.randn(3, 2),)
    yield Spellings("einsum", flat, [
        lambda x, w: torch.einsum("bi,ij->bj", x, w), lambda x, w: torch.einsum("bi,ij->bj", [x, w]),
        lambda x, w: aten.einsum("bi,ij->bj", [x, w]),
    ], matrix)  # fmt: skip
    for name, function in (("std", torch.std), ("var", torch.var)):
        yield Spellings(name, flat, [
            operator.methodcaller(name, -1), lambda x, f=function: f(x, -1), lambda x, f=function: f(x, dim=(-1,)),
        ])  # fmt: skip
    yield Spellings("where", flat, [
        lambda x, p: x.where(p > 0, p), lambda x, p: torch.where(p > 0, x, p), lambda x, p: aten.where(p > 0, x, p),
    ], (torch.tensor([1.0, -1.0, 0.5]),))  # fmt: skip
