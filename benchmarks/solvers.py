"""Solves of linear layers against their forward product."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.measure import Ratio, ratio
from fxinvert.linalg import Dense, SolveSettings, factorize, solve_anchored

BATCH = 256
#: inputs, outputs, condition
LINEAR = ((512, 10, 10.0), (128, 512, 10.0), (512, 512, 3e3))


def of_condition(m: int, n: int, condition: float) -> Tensor:
    """A random matrix with singular values spaced by their ratios from 1 to 1 / condition."""
    k = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(size, k, dtype=torch.float64))[0] for size in (m, n))
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), k, dtype=torch.float64)
    made: Tensor = u * values @ v.T
    return made.float()


def run() -> Iterator[Ratio]:
    """Linear layers, batch 256, warm: time over that of the forward product."""
    torch.manual_seed(0)
    settings = SolveSettings()
    for n, m, condition in LINEAR:
        a = Dense(of_condition(m, n, condition))
        factor, x = factorize(a, settings), torch.randn(BATCH, n)
        r = a.apply(torch.randn(BATCH, n))
        left = float((a.apply(solve_anchored(factor, r, settings).value) - r).norm() / r.norm())
        yield ratio(
            f"linear {n}→{m}, condition {condition:g}",
            lambda f=factor, r=r: solve_anchored(f, r, settings),  # type: ignore[misc]
            "forward product",
            lambda a=a, x=x: a.apply(x),  # type: ignore[misc]
            aim=3.0,
            note=f"reachable target: residual {left:.1e}; {factor.explain()}",
        )
