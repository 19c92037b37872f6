"""The cost of a rule, against the evaluation of its op, on a million values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fxinvert
from benchmarks.measure import Ratio, ratio

#: module, the largest ratio aimed at
CASES: list[tuple[nn.Module, float]] = [
    (nn.ReLU(), 4),
    (nn.LeakyReLU(0.1), 4),
    (nn.Tanh(), 4),
    (nn.Sigmoid(), 4),
    (nn.GELU(), 4),
    (nn.SiLU(), 4),
    (nn.Hardswish(), 4),
    (nn.Flatten(), 4),
    (nn.BatchNorm2d(16), 6),
    (nn.MaxPool2d(2), 6),
    (nn.AvgPool2d(2), 6),
]


def run(rows: int = 64) -> Iterator[Ratio]:
    """Inverse over forward, for `rows` samples of 16×32×32 values."""
    torch.manual_seed(0)
    x, other = torch.randn(2, rows, 16, 32, 32)

    def given(outputs: Tensor, labels: Tensor) -> Tensor:
        return labels

    for module, aim in CASES:
        module.eval()
        inverse = fxinvert.invert(module, x[:2], output_target=given)
        values = inverse.forward(x)
        target = module(other).detach()
        entry = next(node for node in values if node.op == "placeholder")
        with torch.no_grad():
            yield ratio(
                f"{type(module).__name__}: invert",
                lambda i=inverse, v=values, t=target, n=entry: i.targets(v, t, [n]),  # type: ignore[misc]
                "forward",
                lambda m=module: m(x),  # type: ignore[misc]
                aim,
            )
