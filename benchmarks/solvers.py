"""Solves of linear layers against their forward product, and the paper's grid of convolutions against the exact answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import Ratio, ratio, seconds
from fxinvert.linalg import Convolution, Dense, Factor, SolveSettings, choose, factorize, solve_anchored

BATCH = 256
#: inputs, outputs, condition
LINEAR = ((512, 10, 10.0), (128, 512, 10.0), (512, 512, 3e3))
#: output channels, padding, condition of the kernel as a matrix
GRID = [(c, p, k) for c in (4, 8, 16) for p in (0, 1) for k in (1.0, 1e2, 1e5)]
#: pixels, and images that are solved for at once
SIZES = {16: 8, 32: 8, 64: 1, 128: 1}


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
    yield from _grid(SolveSettings(memory_limit=2**30))


#: times that an exact answer is refined
REFINED = 3


class Case(NamedTuple):
    """What of a convolution of the grid was shown.

    Attributes:
        reached: the residual of a reachable target.
        distance: how far its answer's norm is from that of the exact nearest one, relative to it.
        least: how far the residual of noise, undamped, is above the least, relative to the noise.
        damped: the same for the damped problem's objective, with the κ that is the default.
    """

    reached: float
    distance: float
    least: float
    damped: float

    def holds(self) -> bool:
        """Whether all is as it should be."""
        return self.reached <= 1e-4 and max(self.distance, self.least, self.damped) <= 0.01


def _case(a: Convolution, batch: int, factor: Factor, settings: SolveSettings) -> Case:
    """Measured against answers in float64, by another method where one fits, refined."""
    exact = a.to(torch.float64)
    able = {c.method: c for c in choose(exact, SolveSettings(memory_limit=2**32)).candidates if not c.why_not}
    oracle = next(able[name] for name in ("qr", "banded", "capacitance") if name in able).make()
    undamped = replace(settings, condition_limit=math.inf)
    r, noise = a.apply(torch.randn(batch, *a.in_shape)), torch.randn(batch, *a.out_shape)

    def left(d: Tensor, r: Tensor, damping: float = 0.0) -> float:
        """√(‖A d − r‖² + λ‖d‖²)."""
        total = (exact.apply(d.double()) - r).square().sum() + damping * d.double().square().sum()
        return math.sqrt(float(total))

    def solved(r: Tensor, damping: float = 0.0) -> Tensor:
        d = oracle.solve(r.double(), damping).correction
        if not damping:
            for _ in range(REFINED):
                d = d + oracle.solve(r.double() - exact.apply(d), 0.0).correction
        return d

    ours, nearest = solve_anchored(factor, r, undamped).value, solved(r)
    fit, best = solve_anchored(factor, noise, undamped).value, solved(noise)
    kept = solve_anchored(factor, noise, settings)
    if kept.damping:
        goal = left(solved(noise, kept.damping), noise, kept.damping)
        damped = (left(kept.value, noise, kept.damping) - goal) / goal
    else:
        damped = 0.0
    return Case(
        reached=left(ours, r) / float(r.norm()),
        distance=abs(float(ours.double().norm() / nearest.norm()) - 1),
        least=(left(fit, noise) - left(best, noise)) / float(noise.norm()),
        damped=damped,
    )


def _grid(settings: SolveSettings) -> Iterator[Ratio]:
    """8→{4, 8, 16} channels, kernel 5: what holds, and the time of a solve over that of a forward pass."""
    for size, batch in SIZES.items():
        ratios, taken, missed, held, made = [], Counter[str](), list[str](), 0, []
        for channels, padding, condition in GRID:
            weight = of_condition(channels, 8 * 25, condition).reshape(channels, 8, 5, 5)
            a = Convolution(weight, (8, size, size), (1, 1), (padding, padding), (1, 1), 1)
            choice = choose(a, settings)
            factors: list[Factor] = []
            made.append(seconds(lambda c=choice, f=factors: f.append(c.chosen.make()), warm=False))  # type: ignore[misc]
            (factor,) = factors
            taken[choice.chosen.method] += 1
            r = a.apply(torch.randn(batch, *a.in_shape))
            of_solve = seconds(lambda f=factor, r=r: f.solve(r, 0.0), warm=False)  # type: ignore[misc]
            x = torch.randn(batch, *a.in_shape)
            ratios.append(of_solve / seconds(lambda a=a, x=x: a.apply(x)))  # type: ignore[misc]
            case = _case(a, batch, factor, settings)
            held += case.holds()
            if not case.holds():
                told = ", ".join(f"{name} {value:.1e}" for name, value in case._asdict().items())
                missed.append(f"8→{channels} p{padding} condition {condition:g}: {told}")
        yield Ratio(
            f"grid of {len(ratios)} convolutions 8→4, 8, 16 k5, {size} pixels: median solve",
            "forward pass",
            median(ratios),
            note=f"all conditions hold for {held} of {len(ratios)}{''.join(f'; {m}' for m in missed)}; worst solve "
            f"{max(ratios):.0f}; made in {max(made):.1f} s at most; by "
            + ", ".join(f"{method} ({count})" for method, count in taken.most_common()),
        )
