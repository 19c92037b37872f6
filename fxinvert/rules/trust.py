"""The point of a ball that comes closest to what is wanted, measured by scales: a trust-region problem.

    z* = argmin ‖w ⊙ z − g‖² + δ‖z − z₀‖²   over ‖z‖ ≤ limit, and Σz = 0 if centered,

the problem of Moré & Sorensen (SIAM J. Sci. Stat. Comput. 4, 1983) with a diagonal matrix: with the multipliers η of the
ball and ν of the sum, z = (p − ν) / (c + η), c = w² + δ, p = w ⊙ g + δ z₀. A group has one unknown, η, the root of
‖z(η)‖ = limit. Sums over its entries are first taken at few nodes in the place of its many c, where a step of Newton's
method costs next to nothing; all entries are then seen once, and again only where that was not enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: limit of Newton's steps on the multiplier; equal weights take none, weights of 1e-6 and 1 about ten
STEPS = 60
#: nodes of a group, where its scales have more values
NODES = 8
#: a step of Newton's method that is shorter than this, relatively, leaves an error of its square
NEAR = 1e-3
#: rounding errors by which a norm may miss its limit
ROUNDINGS = 16


@dataclass(frozen=True)
class Nodes:
    """Few values in the place of the many c of a group: Σᵢ aᵢ φ(cᵢ) ≈ Σₖ Aₖ φ(cₖ), A = share · a.

    Attributes:
        value: `(K, …, 1)`, cₖ: the values themselves, if they are few, else Chebyshev nodes in log c.
        share: `(…, K, n)`, membership, or Lagrange's polynomials.
        count: `(K, …, 1)`, the sum of `share` over the entries.
    """

    value: Tensor
    share: Tensor
    count: Tensor

    @classmethod
    def of(cls, curvature: Tensor) -> Nodes:
        """For c, `(1, …, n)`, all positive; the same for all groups, or the groups of a sample are on the second axis."""
        rows = curvature.flatten(0, -2)
        distinct = [row.unique() for row in rows]
        most = max(map(len, distinct))
        if most <= NODES:
            value = torch.stack([torch.cat([d, d[-1:].expand(most - len(d))]) for d in distinct])
            places = [torch.searchsorted(d, row) for d, row in zip(distinct, rows, strict=True)]
            share = torch.stack([torch.eye(most).to(rows)[:, place] for place in places])
        else:
            value, share = _chebyshev(rows)
        lead = curvature.shape[:-1]
        value, count = (v.T.reshape(-1, *lead, 1) for v in (value, share.sum(-1)))
        return cls(value, share.reshape(*lead, *share.shape[1:]), count)

    def to(self, dtype: torch.dtype) -> Nodes:
        return Nodes(*(v.to(dtype) for v in (self.value, self.share, self.count)))

    def sums(self, pull: Tensor) -> Tensor:
        """A of p², p and 1, for p `(…, n)`: `(3, K, …, 1)`."""
        second, first = (self._gathered(value) for value in (pull.square(), pull))
        return torch.stack([second, first, self.count.expand_as(first)])

    def _gathered(self, value: Tensor) -> Tensor:
        if self.share.shape[:-2].numel() == 1:  # all groups have the same scales
            found = self.share.flatten(0, -3)[0] @ value.flatten(0, -2).mT
            return found.reshape(-1, *value.shape[:-1], 1)
        return (self.share[0] @ value.permute(1, 2, 0)).permute(1, 2, 0)[..., None]

    def multiplier(self, sums: Tensor, limit: float, *, centered: bool) -> Tensor:
        """η, `(…, 1)`, zero where the ball does not matter.

        Newton's method on 1/‖z(η)‖ = 1/limit, which is nearly linear in η, climbs to it from zero.
        """
        eta = torch.zeros_like(sums[0, 0])
        for _ in range(STEPS):
            inverse = 1 / (self.value + eta)
            once = sums * inverse
            twice = once * inverse
            square, first, count = twice.sum(1)
            cube = (twice * inverse).sum(1)
            slope = cube[0]
            if centered:
                _, along, total = once.sum(1)
                shift = along / total
                # Σ (p − ν)² φ = Σ p² φ − ν (2 Σ p φ − ν Σ φ)
                square = (square - shift * (2 * first - shift * count)).clamp(min=0)
                slope = slope - shift * (2 * cube[1] - shift * cube[2])
                slope = slope - (first - shift * count).square() / total
            step = square / slope * (square.sqrt() / limit - 1)
            step = torch.where(step > 0, step, 0)
            eta = eta + step
            if not bool((step > NEAR * eta).any()):
                break
        return eta

    def misfit(self, sums: Tensor, eta: Tensor, *, centered: bool) -> Tensor:
        """‖w ⊙ z − g‖ = ‖(η p + c ν) / w (c + η)‖, for δ = 0; `(…, 1)`."""
        second, first, count = sums
        inverse = 1 / (self.value + eta)
        total = eta.square() * second / self.value
        if centered:
            shift = (first * inverse).sum(0) / (count * inverse).sum(0)
            total = total + shift * (2 * eta * first + shift * self.value * count)
        found: Tensor = (total * inverse.square()).sum(0).clamp(min=0).sqrt()
        return found


def _chebyshev(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and Lagrange's polynomials in log c, `(R, n)` → `(R, K)`, `(R, K, n)`."""
    place = rows.log()
    low, high = place.amin(-1, keepdim=True), place.amax(-1, keepdim=True)
    half, middle = (high - low).clamp(min=1e-6) / 2, (high + low) / 2
    angle = (torch.arange(NODES).to(rows) + 0.5) * (math.pi / NODES)
    degree = torch.arange(NODES).to(rows)
    basis = torch.cos(((place - middle) / half).clamp(-1, 1).acos()[..., None] * degree)
    at_nodes = torch.cos(angle[:, None] * degree)
    return (middle + half * angle.cos()).exp(), (basis @ torch.linalg.inv(at_nodes)).mT.contiguous()


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
        inverse = 1 / (curvature + eta)
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
        bend = z * inverse
        slope = torch.linalg.vecdot(z, bend)[..., None]
        if centered:
            slope = slope - bend.sum(-1, keepdim=True).square() / total
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
