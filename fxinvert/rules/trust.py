"""The point of a ball that comes closest to what is wanted, measured by scales: a trust-region problem.

    z* = argmin ‖w ⊙ z − g‖² + δ‖z − z₀‖²   over ‖z‖ ≤ limit, and Σz = 0 if centered,

the problem of Moré & Sorensen (SIAM J. Sci. Stat. Comput. 4, 1983) with a diagonal matrix: with the multipliers η of the
ball and ν of the sum, z = (p − ν) / (c + η), c = w² + δ, p = w ⊙ g + δ z₀. A group has one unknown, η, the root of
‖z(η)‖ = limit. Where no scale is much smaller than the others, sums over the entries are taken once, at few nodes in the
place of their many c, where a step of Newton's method costs next to nothing; else all entries are seen at every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: limit of Newton's steps on the multiplier; equal weights take none, weights of 1e-6 and 1 about ten
STEPS = 60
#: rounding errors by which a norm may miss its limit
ROUNDINGS = 16


class Nearest(NamedTuple):
    """Of every group, `(…, 1)`: η; ν; ‖z‖; ⟨m, z⟩ for some m; ‖w ⊙ z − g‖."""

    multiplier: Tensor
    shift: Tensor
    size: Tensor
    inner: Tensor
    misfit: Tensor


@dataclass(frozen=True)
class Nodes:
    """Few values in the place of the many c of a group: Σᵢ aᵢ φ(cᵢ) = Σₖ Aₖ φ(cₖ), A = share · a, to working precision.

    Attributes:
        value: `(K, 1, G, 1)`, cₖ: the values themselves, if they are few, else Chebyshev nodes in log c.
        count: likewise, A of ones.
        share: `(G, K, C)`, Lagrange's polynomials at the c of a group's C runs; None where those are the nodes.
        run: entries side by side that have one c; a group has n = C · run.
    """

    value: Tensor
    count: Tensor
    share: Tensor | None
    run: int

    @classmethod
    def of(cls, curvature: Tensor, eps: float) -> Nodes:
        """For c, `(1, G, n)`, all positive.

        1 / (c + η)² is analytic in log c but at ±iπ + log η: interpolation converges like exp(−K asinh(π / half)) on an
        interval of twice `half` (Trefethen, Approximation Theory and Approximation Practice, 2013, theorem 8.2).
        """
        rows, n = curvature[0], curvature.shape[-1]
        run = math.gcd(n, *((rows[:, 1:] != rows[:, :-1]).any(0).nonzero()[:, 0] + 1).tolist())
        rows = rows[:, ::run]
        place = rows.log()
        low, high = place.amin(-1, keepdim=True), place.amax(-1, keepdim=True)
        half, middle = (high - low).clamp(min=1e-6) / 2, (high + low) / 2
        k = 1 + math.ceil(-math.log(eps) / math.asinh(math.pi / float(half.max())))
        if rows.shape[-1] <= k:
            value, count, share = rows, torch.full_like(rows, run), None
        else:
            angle, degree = (torch.arange(k).to(rows) + 0.5) * (math.pi / k), torch.arange(k).to(rows)
            basis = torch.cos(((place - middle) / half).clamp(-1, 1).acos()[..., None] * degree)
            at_nodes = torch.cos(angle[:, None] * degree)
            value, share = (middle + half * angle.cos()).exp(), (basis @ torch.linalg.inv(at_nodes)).mT
            count = share.sum(-1) * run
        value, count = (v.T[:, None, :, None].contiguous() for v in (value, count))
        return cls(value, count, None if share is None else share.contiguous(), run)

    def to(self, dtype: torch.dtype) -> Nodes:
        share = None if self.share is None else self.share.to(dtype)
        return Nodes(self.value.to(dtype), self.count.to(dtype), share, self.run)

    @property
    def nbytes(self) -> int:
        return sum(v.nbytes for v in (self.value, self.count, self.share) if v is not None)

    def runs(self, value: Tensor) -> Tensor:
        """`(R, G, n)` → `(R, G, C, run)`."""
        return value.reshape(*value.shape[:-1], value.shape[-1] // self.run, self.run)

    def sums(self, wanted: Tensor, moved: Tensor) -> Tensor:
        """A of p², p, m ⊙ p and m, for g / w and m `(R, G, n)`: `(4, K, R, G, 1)`.

        p = c ⊙ g / w, and c is as smooth at the nodes as what the sums are used for.
        """
        product = moved * wanted
        mixed = self._gathered(product) * self.value
        second = self._gathered(torch.mul(wanted, wanted, out=product)) * self.value.square()
        return torch.stack([second, self._gathered(wanted) * self.value, mixed, self._gathered(moved)])

    def _gathered(self, value: Tensor) -> Tensor:
        by_run = self.runs(value).sum(-1) if self.run > 1 else value
        if self.share is not None:
            by_run = (by_run.transpose(0, 1) @ self.share.mT).transpose(0, 1)
        return by_run.permute(2, 0, 1)[..., None]

    def nearest(self, sums: Tensor, limit: float, *, centered: bool) -> Nearest:
        """What the point of the ball is, for δ = 0; η is zero where the ball does not matter.

        Newton's method on 1/‖z(η)‖ = 1/limit, which is nearly linear in η, climbs to it from zero. A step leaves an error
        of its square.
        """
        near = torch.finfo(sums.dtype).eps ** 0.5 / 4
        pull = torch.cat([sums[:2], self.count.expand_as(sums[:1])]) if centered else sums[:1]
        eta = torch.zeros_like(sums[0, 0])
        moves = torch.ones_like(eta, dtype=torch.bool)
        for _ in range(STEPS):
            square, slope, _ = self._norm(pull, eta, centered=centered)
            step = square / slope * (square.sqrt() / limit - 1)
            step = torch.where(moves & (step > 0), step, 0)
            eta, moves = eta + step, step > near * (eta + step)
            if not bool(moves.any()):
                break
        square, _, shift = self._norm(pull, eta, centered=centered)
        inverse = (self.value + eta).reciprocal()
        second, first, mixed, moved = sums
        missed = eta.square() * second / self.value
        if centered:
            missed = missed + shift * (2 * eta * first + shift * self.value * self.count)
        misfit = (missed * inverse.square()).sum(0).clamp(min=0).sqrt()
        return Nearest(eta, shift, square.sqrt(), ((mixed - shift * moved) * inverse).sum(0), misfit)

    def _norm(self, pull: Tensor, eta: Tensor, *, centered: bool) -> tuple[Tensor, Tensor, Tensor]:
        """‖z‖², −½ of its derivative, and ν."""
        inverse = (self.value + eta).reciprocal()
        term = pull * inverse
        once, twice, thrice = term.sum(1), term.mul_(inverse).sum(1), term.mul_(inverse).sum(1)
        if not centered:
            return twice[0], thrice[0], torch.zeros_like(eta)
        shift = once[1] / once[2]
        # Σ (p − ν)² φ = Σ p² φ − ν (2 Σ p φ − ν Σ φ)
        square = (twice[0] - shift * (2 * twice[1] - shift * twice[2])).clamp(min=0)
        slope = thrice[0] - shift * (2 * thrice[1] - shift * thrice[2])
        return square, slope - (twice[1] - shift * twice[2]).square() / once[2], shift


def nearest_value(
    start: Tensor, r: Tensor, weight: Tensor, damping: Tensor, amplified: Tensor, *, centered: bool
) -> tuple[Tensor, Tensor, int]:
    """z* for scales of any size, from z₀ and r = g − w ⊙ z₀.

    Entries without a scale take up what the others leave of the anchor's norm, if that is enough for the others.

    Returns:
        z*; `(…, 1)`, whether it lies on the sphere; the number of iterations.
    """
    none = torch.zeros_like(start[..., :1])
    limit = torch.full_like(none, math.sqrt(start.shape[-1]))
    curvature = weight.square() + damping
    curvature = torch.where(curvature > 0, curvature, 1)
    pull = curvature * start + weight * r
    free = (weight == 0).any(-1, keepdim=True)
    ball = torch.where(free, norm(start), limit)
    eta = torch.where(free & ~amplified, -0.999 * damping, none)
    z, eta, steps = nearest_in_ball(pull, curvature, ball, eta, eta, centered=centered)
    short = free & (eta > 1e-9 * weight.square().amax(-1, keepdim=True))
    if bool(short.any()):
        again, more, further = nearest_in_ball(pull, curvature, limit, none, none, centered=centered)
        z, eta, steps = torch.where(short, again, z), torch.where(short, more, eta), steps + further
    return z, (eta > 0) & (short | ~free), steps


def nearest_in_ball(
    pull: Tensor, curvature: Tensor, limit: Tensor | float, least: Tensor, eta: Tensor, *, centered: bool
) -> tuple[Tensor, Tensor, int]:
    """z = (p − ν) / (c + η) of norm `limit`, or smaller where η is `least`.

    Newton's method on 1/‖z(η)‖ = 1/limit, which is nearly linear in η, goes to the solution from the η that it is given. With
    a least η of zero the constraint is an inequality; one just above −δ makes it an equality, to be met by the entries
    without weight.

    Returns:
        z; η `(…, 1)`, more than the least where the closest point lies on the sphere; the number of iterations.
    """
    done, steps = ROUNDINGS * torch.finfo(pull.dtype).eps, 0
    while True:
        inverse = (curvature + eta).reciprocal_()
        z = pull * inverse
        if centered:
            total = inverse.sum(-1, keepdim=True)
            z.addcmul_(inverse, z.sum(-1, keepdim=True) / total, value=-1)
        size = norm(z)
        excess = size / limit - 1
        moves = (excess > done) | ((excess < -done) & (eta > least))
        if steps == STEPS or not bool(moves.any()):
            return z, eta, steps
        steps += 1
        bend = inverse.mul_(z)
        along = bend.sum(-1, keepdim=True) if centered else None
        slope = bend.mul_(z).sum(-1, keepdim=True)
        if along is not None:
            slope = slope - along.square() / total
        eta = torch.where(moves, torch.maximum(eta + size.square() / slope * excess, least), eta)


def amplified(r: Tensor, weight: Tensor, kappa: float) -> Tensor:
    """`(…, 1)`: where near-zero scales blow the correction up; zeros say nothing of their entries."""
    size = weight.abs()
    largest = size.amax(-1, keepdim=True)
    if not bool((largest > kappa * torch.where(size > 0, size, torch.inf)).any()):
        return torch.zeros_like(r[..., :1], dtype=torch.bool)
    return largest * norm(torch.where(size > 0, r / weight, 0)) > kappa * norm(r)


def norm(value: Tensor) -> Tensor:
    """Euclidean norm over the last axis, which is kept."""
    found: Tensor = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
    return found
