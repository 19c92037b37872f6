"""Solves of linear layers against their forward product, and the paper's grid of convolutions against the exact answer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.measure import Ratio, ratio, seconds
from fxinvert.linalg import Convolution, Dense, SolveSettings, choose, factorize, solve_anchored

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


def _grid(settings: SolveSettings) -> Iterator[Ratio]:
    """8→{4, 8, 16} channels, kernel 5: worst residuals and the time of a solve over that of a forward pass."""
    for size, batch in SIZES.items():
        reached, beyond, ratios, taken, late = 0.0, 0.0, [], set(), 0
        for channels, padding, condition in GRID:
            weight = of_condition(channels, 8 * 25, condition).reshape(channels, 8, 5, 5)
            a = Convolution(weight, (8, size, size), (1, 1), (padding, padding), (1, 1), 1)
            choice = choose(a, settings)
            factor = choice.chosen.make()
            taken.add(choice.chosen.method)
            r = a.apply(torch.randn(batch, *a.in_shape))
            correction = solve_anchored(factor, r, settings)
            solved = correction.value
            late += bool(correction.damped.any())
            reached = max(reached, float((a.apply(solved) - r).norm() / r.norm()))
            of_solve = seconds(lambda f=factor, r=r: f.solve(r, 0.0), warm=False)  # type: ignore[misc]
            ratios.append(of_solve / seconds(lambda a=a, x=solved: a.apply(x)))  # type: ignore[misc]
            noise = torch.randn_like(r)
            answer = solve_anchored(factor, noise, settings)
            # stationary: the slope of ‖A d − r‖² + λ‖d‖² is zero
            slope = a.adjoint(a.apply(answer.value) - noise) + answer.damping * answer.value
            beyond = max(beyond, float(slope.norm() / (factor.largest * noise.norm())))
        yield Ratio(
            f"grid of {len(ratios)} convolutions 8→4, 8, 16 k5, {size} pixels: worst solve",
            "forward pass",
            max(ratios),
            note=f"reachable: residual ≤ {reached:.1e}, {late} of them not converged; noise: slope ≤ {beyond:.1e}; "
            f"by {', '.join(sorted(taken))}",
        )
