"""The cost of a rule, against the evaluation of its op, on a million values; and what the matrix-free fallback takes.

The targets are what the op makes of other inputs, so that they can be reached. Certificates are not looked at: they are
measured when somebody does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fxinvert
from benchmarks.measure import Ratio, keep_memory, ratio_in_turn
from fxinvert.rules import Op
from fxinvert.rules.fallback import invert_matrix_free

#: module, the largest ratio aimed at
CASES: list[tuple[nn.Module, float | None]] = [
    (nn.ReLU(), 4),
    (nn.LeakyReLU(0.1), 4),
    (nn.PReLU(), 4),
    (nn.RReLU(), 4),
    (nn.ReLU6(), 4),
    (nn.Hardtanh(), 4),
    (nn.ELU(), 4),
    (nn.SELU(), 4),
    (nn.CELU(), 4),
    (nn.Tanh(), 4),
    (nn.Sigmoid(), 4),
    (nn.LogSigmoid(), 4),
    (nn.Softplus(), 4),
    (nn.Softsign(), 4),
    (nn.Tanhshrink(), 4),
    (nn.Hardsigmoid(), 4),
    (nn.Hardswish(), 4),
    (nn.Hardshrink(), 4),
    (nn.Softshrink(), 4),
    (nn.Threshold(0.1, 0.0), 4),
    (nn.GELU(), 4),
    (nn.GELU("tanh"), 4),
    (nn.SiLU(), 4),
    (nn.Mish(), 4),
    (nn.BatchNorm2d(16), 6),
    (nn.LayerNorm(32), 6),
    (nn.LayerNorm((16, 32, 32)), 6),
    (nn.RMSNorm(32), 6),
    (nn.GroupNorm(4, 16), 6),
    (nn.InstanceNorm2d(16), 6),
    (nn.Softmax(-1), None),
    (nn.LogSoftmax(-1), None),
    (nn.GLU(1), None),
    (nn.AdaptiveAvgPool2d(1), None),
    (nn.MaxPool2d(2), 6),
    (nn.AvgPool2d(2), 6),
]


def _uneven(module: nn.Module) -> nn.Module:
    """A norm with scales from 1/2 to 2, and offsets, as if trained."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(False)
        if name == "weight":
            parameter.uniform_(0.5, 2, generator=generator)
        else:
            parameter.normal_(generator=generator)
    return module


#: norms with uneven scales
UNEVEN = [
    _uneven(norm)
    for norm in (
        nn.LayerNorm(32),
        nn.LayerNorm((16, 32, 32)),
        nn.RMSNorm(32),
        nn.GroupNorm(4, 16),
        nn.InstanceNorm2d(16, affine=True),
    )
]

#: what can be compiled, and its aim
COMPILED = [(module, aim) for module, aim in CASES if aim == 4 or "Norm" in type(module).__name__]
COMPILED += [(module, 6) for module in UNEVEN]

#: smooth ops, solved by Jacobian-vector products as if they had no rule
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "lgamma": lambda x: torch.lgamma(x + 3),
    "i0": torch.special.i0,
    "sinc": torch.sinc,
    "prod": lambda x: (1 + x / 10).prod(1, keepdim=True),
    "cumprod": lambda x: torch.cumprod(1 + x / 10, 1),
    "logcumsumexp": lambda x: torch.logcumsumexp(x, 1),
    "softmax": lambda x: x.softmax(1),
    "layer_norm": lambda x: nn.functional.layer_norm(x, x.shape[1:]),
    "attention": lambda x: (x[:, :, None] * x[:, None]).softmax(-1) @ x[..., None],
}


def run(rows: int = 64) -> Iterator[Ratio]:
    """Inverse over forward, for `rows` samples of 16×32×32 values."""
    keep_memory()
    torch.manual_seed(0)
    x, other = torch.randn(2, rows, 16, 32, 32)
    for module, aim in CASES:
        module.eval()
        inverted = inversion(module, x, module(other).detach())
        with torch.no_grad():
            yield ratio_in_turn(
                f"{name_of(module)}: invert", inverted, "forward", functools.partial(module, x), aim
            )
    for module in UNEVEN:
        forward = functools.partial(module, x)
        reached, off = module(other), module(other) + torch.randn_like(other) / 2
        for target, what in ((reached, ""), (off, ", targets off the range")):
            inverted = inversion(module, x, target)
            with torch.no_grad():
                yield ratio_in_turn(
                    f"{name_of(module)}, uneven scales: invert{what}", inverted, "forward", forward, 6
                )
    # a view moves nothing and takes no time: what can be asked of its inverse is a copy's
    flattened = inversion(nn.Flatten(), x, other.flatten(1))
    yield ratio_in_turn("Flatten: invert", flattened, "a copy of the values", x.clone, 4)
    for module, aim in COMPILED:
        inverted = inversion(module, x, module(other).detach(), compiled=True)
        with torch.no_grad():
            scales = ", uneven scales" if module in UNEVEN else ""
            yield ratio_in_turn(
                f"{name_of(module)}{scales}: invert, compiled",
                inverted,
                "forward",
                functools.partial(module, x),
                aim,
            )
    yield from _products()


def _products() -> Iterator[Ratio]:
    """Pairs of Jacobian-vector products until the error is 1e-5 of the target: a count, not a time."""
    for values in (6, 20):
        x, other = torch.randn(2, 8, values)
        for name, function in SMOOTH.items():
            op = Op(name, name, {"x": x}, function(x), {}, {}, function)
            found = invert_matrix_free(op, function(x + 0.3 * other.tanh())).certificate
            left = f"error {float(found.residual.max()):.1e}"
            yield Ratio(f"{name} of {values}: matrix-free, products", "one", found.iterations, 30, left)


def name_of(module: nn.Module) -> str:
    """The module's class, with the first of its arguments where the table has several."""
    several = [other for other, _ in CASES if type(other) is type(module)]
    first = str(module).partition("(")[2].removesuffix(")")
    return f"{type(module).__name__}({first})" if len(several) > 1 else type(module).__name__


def _given(outputs: Tensor, labels: Tensor) -> Tensor:
    return labels


def inversion(
    module: nn.Module, x: Tensor, target: Tensor, *, compiled: bool = False
) -> Callable[[], object]:
    inverse = fxinvert.invert(module, x[:2], output_target=_given, compiled=compiled)
    values = inverse.forward(x)
    entry = next(node for node in values if node.op == "placeholder")
    return lambda: inverse.targets(values, target, [entry])
