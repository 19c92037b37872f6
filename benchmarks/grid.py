"""The paper's grid of convolutions, 8→{4, 8, 16} channels, kernel 5: answers against exact ones, a case at a time.

Exact answers d are our own in float64, refined, and proved: whoever made them, with σ the least singular value,

    ‖d − A⁺r‖ ≤ ‖d − Aᵀy‖ + ‖r − A d‖ / σ  for every y, where A has full row rank, and ≤ ‖Aᵀ(r − A d)‖ / σ²  where its columns are independent:

the first term is what d has outside the range of Aᵀ, the orthogonal complement of A's null space, and the others what it lacks inside.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import Ratio
from benchmarks.solvers import of_condition
from fxinvert.linalg import Convolution, Factor, SolveSettings, choose, factorize, solve_anchored
from fxinvert.linalg.gram import GramFactor

#: pixels, and images that are solved for at once
SIZES = {16: 8, 32: 8, 64: 1, 128: 1}
CHANNELS = (4, 8, 16)
#: of the kernel as a matrix
PADDINGS, CONDITIONS = (0, 1), (1.0, 1e2, 1e5)
#: the default on an idle machine of 8 GiB
SETTINGS = SolveSettings(memory_limit=2**31)
#: forward passes that are timed, together
FORWARDS = 30
#: times that an exact answer is refined
REFINED = 3
#: σ is known from inverse iteration, which comes from above: so much of it is taken
SURE = 0.5


class Shown(NamedTuple):
    """What of a convolution was shown.

    Attributes:
        reached: the residual of a reachable target, relative to it.
        distance: how far its answer is from the exact nearest one, relative to that one's distance from the anchor.
        least: how far the residual of noise, undamped, is above that of the exact answer rounded to float32, relative to the noise.
        damped: how far the damped problem's objective is above the least, with the κ that is the default.
        proved: how far the exact answers may be from what they should be, relative to them.
    """

    reached: float
    distance: float
    least: float
    damped: float
    proved: float

    def holds(self) -> bool:
        """Whether all is as it should be."""
        return self.reached <= 1e-4 and max(self.distance + self.proved, self.least, self.damped) <= 0.01


def cases() -> Mapping[str, Callable[[], Ratio]]:
    """What to measure, by name."""
    shapes = [(size, channels) for size in SIZES for channels in CHANNELS]
    return {_name(size, c): partial(_measured, size, c) for size, c in shapes}


def run() -> Iterator[Ratio]:
    """All of them."""
    return (measure() for measure in cases().values())


def _name(size: int, channels: int) -> str:
    return f"8→{channels} k5, {size}²: median solve"


def _measured(size: int, channels: int) -> Ratio:
    """Two paddings and three conditions: what holds, and the time of a solve over that of a forward pass."""
    torch.manual_seed(0)
    ratios, found, made, missed, by = [], list[Shown](), [], list[str](), dict[str, None]()
    for padding in PADDINGS:
        for condition in CONDITIONS:
            weight = of_condition(channels, 8 * 25, condition).reshape(channels, 8, 5, 5)
            a = Convolution(weight, (8, size, size), (1, 1), (padding, padding), (1, 1), 1)
            factors: list[Factor] = []
            made.append(_busy(lambda a=a, f=factors: f.append(factorize(a, SETTINGS))))  # type: ignore[misc]
            (factor,) = factors
            by[factor.explain().split(" of A")[0].split(" (")[0]] = None
            x = torch.randn(SIZES[size], *a.in_shape)
            r = a.apply(torch.randn_like(x))
            of_solve = _busy(lambda f=factor, r=r: f.solve(r, 0.0))  # type: ignore[misc]
            a.apply(x)
            ratios.append(of_solve / _busy(lambda a=a, x=x: a.apply(x), FORWARDS))  # type: ignore[misc]
            found.append(_shown(a, SIZES[size], factor))
            if not found[-1].holds():
                missed.append(f"missed: padding {padding}, condition {condition:g}: {_told([found[-1]])}")
    held = sum(shown.holds() for shown in found)
    note = f"holds for {held} of {len(found)}; {_told(found)}; made in {max(made):.1f} s of the processor at most, by {', '.join(by)}"
    return Ratio(
        _name(size, channels),
        "forward pass",
        median(ratios),
        note="; ".join([note, *missed]),
    )


def _busy(function: Callable[[], object], times: int = 1) -> float:
    """Seconds of the processor for a call."""
    start = time.process_time()
    for _ in range(times):
        function()
    return (time.process_time() - start) / times


def _told(found: list[Shown]) -> str:
    """The largest of each figure."""
    return ", ".join(f"{name} {max(getattr(shown, name) for shown in found):.1e}" for name in Shown._fields)


def _shown(a: Convolution, batch: int, factor: Factor) -> Shown:
    """Measured against answers in float64, refined and proved."""
    undamped = replace(SETTINGS, condition_limit=math.inf)
    exact, r = a.to(torch.float64), a.apply(torch.randn(batch, *a.in_shape))

    def left(d: Tensor, r: Tensor, damping: float = 0.0) -> float:
        """√(‖A d − r‖² + λ‖d‖²)."""
        total = (exact.apply(d.double()) - r).square().sum() + damping * d.double().square().sum()
        return math.sqrt(float(total))

    ours = solve_anchored(factor, r, undamped).value
    reached = left(ours, r) / float(r.norm())
    able = {c.method: c for c in choose(exact, SETTINGS).candidates if not c.why_not}
    oracle = next(able[name] for name in ("banded", "capacitance") if name in able).make()
    assert isinstance(oracle, GramFactor)

    def solved(r: Tensor, damping: float = 0.0) -> Tensor:
        d = oracle.solve(r.double(), damping).correction
        if not damping:
            for _ in range(REFINED):
                d = d + oracle.solve(r.double() - exact.apply(d), 0.0).correction
        return d

    noise = torch.randn(batch, *a.out_shape)
    nearest, best = solved(r), solved(noise)
    fit, kept = solve_anchored(factor, noise, undamped).value, solve_anchored(factor, noise, SETTINGS)
    damped = 0.0
    if kept.damping:
        goal = left(solved(noise, kept.damping), noise, kept.damping)
        damped = (left(kept.value, noise, kept.damping) - goal) / goal
    return Shown(
        reached,
        distance=float((ours - nearest).norm() / nearest.norm()),
        least=(left(fit, noise) - left(best.float(), noise)) / float(noise.norm()),
        damped=damped,
        proved=max(_doubt(oracle, *pair) for pair in ((nearest, r.double()), (best, noise.double()))),
    )


def _doubt(factor: GramFactor, d: Tensor, r: Tensor) -> float:
    """The bound on ‖d − A⁺r‖ / ‖d‖, for a factorization in float64."""
    a, least = factor.operator, SURE * factor.largest / (factor.condition or math.inf)
    left = r - a.apply(d)
    if not factor.dual:
        return float(a.adjoint(left).norm()) / least**2 / float(d.norm())
    beyond = d
    for _ in range(1 + REFINED):
        beyond = beyond - a.adjoint(factor.unrefined(a.apply(beyond)))
    return (float(beyond.norm()) + float(left.norm()) / least) / float(d.norm())
