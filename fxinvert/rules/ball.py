"""The nearest pre-image of a normalization, group by group.

The normalized values z = (x − μ) / √(σ² + ε) of n entries range over a ball: Σz = 0 and ‖z‖² = n σ² / (σ² + ε) < n. Its
pre-images differ by their mean alone, for ε ties the spread to the norm: σ² + ε = ε n / (n − ‖z‖²). The one equation,
residual first, then nearest, is solved in that order:

1. z* = argmin ‖w ⊙ z + b − t‖² over the closed ball: the trust-region problem of Moré & Sorensen (SIAM J. Sci. Stat.
   Comput. 4, 1983) with a diagonal matrix, one unknown per group. (t − b) / w itself if that lies in the ball, and
   its projection if all scales are of one size;
2. x* = μ₀ + ρ z*/‖z*‖: the mean is the anchor's, ρ = ‖z*‖ √(ε n / (n − ‖z*‖²)) is what the norm of z* demands. A norm
   is only known to its rounding, which leaves an interval for ρ; the one nearest to the anchor's, ρ₀ = ⟨x0 − μ₀, z*/‖z*‖⟩,
   is taken. On the sphere itself, where ρ = ∞, any norm within MARGIN of it will do; less if the target
   is nearer.

A target inside the ball is therefore reached by shrinking the group to where ε is felt. Where that moves the input by
more than κ times what was asked of the output, ρ goes only so far towards its value, and the certificate says damped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fxinvert.rules.branches import MARGIN

#: limit of Newton's steps on the sphere's multiplier; equal weights take none, weights of 1e-6 and 1 about ten
STEPS = 60


@dataclass(frozen=True)
class Scales:
    """The weights w.

    Attributes:
        weight: `(1, …, n)`.
        largest: `(1, …, 1)`, the largest size in a group.
        tame: whether no scale is so small beside the others that it would blow corrections up.
        even: whether all scales of a group are of one size, and not zero.
        ones: whether all scales are 1.
    """

    weight: Tensor
    largest: Tensor
    tame: bool
    even: bool
    ones: bool

    @classmethod
    def of(cls, weight: Tensor, kappa: float) -> Scales:
        """The scales, looked at; `kappa` is the largest amplification."""
        size = weight.abs()
        largest, smallest = size.amax(-1, keepdim=True), size.amin(-1, keepdim=True)
        tame = bool(((smallest > 0) & (largest <= kappa * smallest)).all())
        even = tame and bool((smallest == largest).all())
        return cls(weight, largest, tame, even, bool((weight == 1).all()))

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.largest.nbytes

    def to(self, dtype: torch.dtype) -> Scales:
        return replace(self, weight=self.weight.to(dtype))


class Sums(NamedTuple):
    """Of every group, `(…, 1)`: μ; ‖r‖; ‖x − μ‖; 1 / √(σ² + ε); ‖z‖ and mean of z, of which that is to be taken away;
    ⟨x − μ, z⟩."""

    mean: Tensor
    asked: Tensor
    own_size: Tensor
    inverse: Tensor
    size: Tensor
    shift: Tensor
    inner: Tensor


class Direction(NamedTuple):
    """Of every group, `(…, 1)`: ‖z*‖; whether z* lies on the sphere; how far w ⊙ z* is from what is wanted; whether
    corrections are amplified."""

    size: Tensor
    outside: Tensor
    misfit: Tensor
    amplified: Tensor


class Lengths(NamedTuple):
    """Of every group, `(…, 1)`: the nearest pre-images are factor · z + offset; whether nothing is missing; whether the
    target is off the range; λ, 0 where not damped."""

    factor: Tensor
    offset: Tensor
    same: Tensor
    outside: Tensor
    damping: Tensor


@dataclass(frozen=True)
class Ball:
    """How the entries of a group are normalized, and how well that is known.

    Attributes:
        scales: w.
        eps: ε.
        centered: whether the mean is taken away.
        kappa: κ.
        rounding: how well a norm is known, relatively.
    """

    scales: Scales
    eps: float
    centered: bool
    kappa: float
    rounding: float

    def direction(self, x: Tensor, r: Tensor) -> tuple[Tensor, Sums, Direction | None, int]:
        """z*, of any length if it lies on the sphere, for anchors and what is missing from their outputs, `(…, n)`.

        Returns:
            z* plus the shift that the sums tell, as a rule in the place of r; the sums; what else is known of z*, None for
            scales of one size, where it follows from the sums; the number of iterations.
        """
        none = torch.zeros_like(x[..., :1])
        mean = x.mean(-1, keepdim=True) if self.centered else none
        moved = x - mean if self.centered else x
        asked, own_size = _norm(r), _norm(moved)
        inverse = (own_size.double().square() / x.shape[-1] + self.eps).rsqrt().to(x.dtype)
        found, steps = None, 0
        if self.scales.even:
            z = self._wanted(moved, r, inverse)
        else:
            z, found, steps = (self._direct if self.scales.tame else self._solved)(moved, r, inverse)
        size = none if found else _norm(z)
        shift = z.mean(-1, keepdim=True) if self.centered and not found else none
        inner = torch.linalg.vecdot(moved, z)[..., None]
        return z, Sums(mean, asked, own_size, inverse, size, shift, inner), found, steps

    def lengths(self, n: int, of: Sums, found: Direction | None = None) -> Lengths:
        """What becomes of the directions of groups of n entries.

        Args:
            n: entries of a group.
            of: the sums, in float64: 1 − ‖z‖²/n is as small as ε/σ², and the spread hangs on it.
            found: what else is known of the directions.
        """
        limit, rounding, largest = math.sqrt(n), self.rounding, self.scales.largest
        asked, own_size = of.asked, of.own_size
        amplified: Tensor | bool = False
        if found is None:
            off = of.shift.square() * n
            size = (of.size.square() - off).clamp(min=0).sqrt()
            over = size - limit
            outside = over > rounding * limit
            misfit = (over.clamp(min=0).square() + off).sqrt() * largest
        else:
            size, outside, misfit, amplified = found
        spread = 1 / of.inverse
        flat = size == 0
        own = torch.where(flat, 0, of.inner / size)
        unreached = misfit > rounding * asked
        # as near to the sphere as the target is far from the range
        margin = torch.where(outside, misfit / (largest * limit), 0).clamp(rounding, max(MARGIN, rounding))
        demanded = torch.where(outside, limit, size)
        if self.eps == 0:
            unreached, demanded = unreached | (size < limit * (1 - rounding)), torch.full_like(size, limit)
        reach = margin * limit
        least, most = _radius(torch.stack([demanded - reach, demanded + reach]), limit, self.eps)
        # the entries must be told apart beside their mean: to half of the digits, where there are digits to spare
        if self.centered:
            apart = 4 * max(rounding, min(math.sqrt(rounding), 1e-3))
            least = torch.maximum(least, torch.minimum(most, apart * limit * of.mean.abs()))
        radius = torch.minimum(torch.maximum(own, least), most)
        # no correction is blown up more than κ times
        allowed = self.kappa * asked * spread / torch.where(largest > 0, largest, 1)
        room = (allowed.square() - (own_size.square() - own.square()).clamp(min=0)).clamp(min=0).sqrt()
        bounded = torch.minimum(torch.maximum(radius, own - room), own + room).clamp(min=0)
        far = (radius - bounded).abs() > 1e-9 * (1 + radius)
        damping = torch.where(far | amplified, (largest / self.kappa / torch.where(far, spread, 1)) ** 2, 0)
        factor = torch.where(flat, 0, bounded / size)
        return Lengths(factor, of.mean - factor * of.shift, asked == 0, unreached, damping)

    def _wanted(self, moved: Tensor, r: Tensor, inverse: Tensor) -> Tensor:
        """(t − b) / w, in the place of r; `inverse` is 1 / √(σ² + ε)."""
        missing = r if self.scales.ones else r.div_(self.scales.weight)
        return missing.addcmul_(moved, inverse)

    def _direct(self, moved: Tensor, r: Tensor, inverse: Tensor) -> tuple[Tensor, Direction, int]:
        """For tame scales: what is wanted, if that lies in the ball."""
        limit, scales = math.sqrt(moved.shape[-1]), self.scales
        wanted = self._wanted(moved, r, inverse)
        whole = _norm(wanted).double()
        nothing, none = torch.zeros_like(whole), torch.zeros_like(whole, dtype=torch.bool)
        there = whole <= (1 + self.rounding) * limit
        if self.centered:
            there &= wanted.mean(-1, keepdim=True).abs() <= 4 * self.rounding
        if bool(there.all()):
            return wanted, Direction(whole, none, nothing, none), 0
        rest = ~there[..., 0]
        weight, begin = scales.weight.expand_as(moved)[rest], (moved * inverse)[rest]
        asked = (wanted[rest] - begin) * weight
        bounds = torch.full_like(begin[..., :1], limit)
        damping = torch.finfo(begin.dtype).eps * weight.square().amax(-1, keepdim=True)
        z, eta, steps = nearest_in_ball(
            begin, asked, weight, damping, bounds, torch.zeros_like(bounds), centered=self.centered
        )
        outside, misfit = none.clone(), nothing.clone()
        wanted[rest], outside[rest] = z, eta > 0
        misfit[rest] = _norm(weight * (z - begin) - asked).double()
        return wanted, Direction(_norm(wanted).double(), outside, misfit, none), steps

    def _solved(self, moved: Tensor, r: Tensor, inverse: Tensor) -> tuple[Tensor, Direction, int]:
        """The same for scales of any size."""
        start = moved * inverse
        weight, largest = self.scales.weight, self.scales.largest
        amplified = _amplified(r, weight, self.kappa)
        damping = torch.where(
            amplified, (largest / self.kappa) ** 2, torch.finfo(start.dtype).eps * largest**2
        )
        z, outside, iterations = _nearest_value(start, r, weight, damping, amplified, centered=self.centered)
        misfit, size = _norm(weight * (z - start) - r).double(), _norm(z).double()
        return z, Direction(size, outside, misfit, amplified), iterations


def _nearest_value(
    start: Tensor, r: Tensor, weight: Tensor, damping: Tensor, amplified: Tensor, *, centered: bool
) -> tuple[Tensor, Tensor, int]:
    """z*; `(…, 1)`, whether it lies on the sphere; iterations.

    Entries without a scale take up what the others leave of the anchor's norm, if that is enough for the others.
    """
    limit, none = (
        torch.full_like(start[..., :1], math.sqrt(start.shape[-1])),
        torch.zeros_like(start[..., :1]),
    )
    free = (weight == 0).any(-1, keepdim=True)
    ball = torch.where(free, _norm(start), limit)
    eta = torch.where(free & ~amplified, -0.999 * damping, none)
    z, eta, steps = nearest_in_ball(start, r, weight, damping, ball, eta, centered=centered)
    short = free & (eta > 1e-9 * weight.square().amax(-1, keepdim=True))
    if bool(short.any()):
        again, more, further = nearest_in_ball(start, r, weight, damping, limit, none, centered=centered)
        z, eta, steps = torch.where(short, again, z), torch.where(short, more, eta), steps + further
    return z, (eta > 0) & (short | ~free), steps


def nearest_in_ball(
    start: Tensor,
    r: Tensor,
    weight: Tensor,
    damping: Tensor,
    limit: Tensor,
    eta: Tensor,
    *,
    centered: bool,
) -> tuple[Tensor, Tensor, int]:
    """z = argmin ‖w ⊙ (z − z₀) − r‖² + δ‖z − z₀‖² over ‖z‖ ≤ limit, and Σz = 0 if centered.

    With the multipliers η of the ball and ν of the sum: z = (d z₀ + w r − ν) / (d + η), d = w² + δ. Newton's method on
    1/‖z(η)‖ = 1/limit, which is nearly linear in η, climbs to the solution from the η that it is given; with equal
    weights it is there at once. From η = 0 the constraint is an inequality; a start just above −δ makes it an equality,
    to be met by the entries without weight.

    Returns:
        z; η `(…, 1)`, positive where the closest point lies on the sphere; the number of iterations.
    """
    curvature = weight.square() + damping
    curvature = torch.where(curvature > 0, curvature, 1)
    pull = curvature * start + weight * r
    done, steps = 4 * torch.finfo(start.dtype).eps, 0
    while True:
        inverse = 1 / (curvature + eta)
        z = pull * inverse
        bend = z * inverse
        if centered:
            share = inverse / inverse.sum(-1, keepdim=True)
            z = z - z.sum(-1, keepdim=True) * share
            bend = z * inverse - (z * inverse).sum(-1, keepdim=True) * share
        size, slope = _norm(z), (z * bend).sum(-1, keepdim=True)
        over = size > limit * (1 + done)
        if steps == STEPS or not bool(over.any()):
            return z, eta, steps
        steps += 1
        eta = torch.where(over, eta + size.square() / slope * (size / limit - 1), eta)


def _amplified(r: Tensor, weight: Tensor, kappa: float) -> Tensor:
    """`(…, 1)`: where near-zero scales blow the correction up; zeros say nothing of their entries."""
    size = weight.abs()
    largest = size.amax(-1, keepdim=True)
    if not bool((largest > kappa * torch.where(size > 0, size, torch.inf)).any()):
        return torch.zeros_like(r[..., :1], dtype=torch.bool)
    return largest * _norm(torch.where(size > 0, r / weight, 0)) > kappa * _norm(r)


def _radius(size: Tensor, limit: float, eps: float) -> Tensor:
    """‖x − μ‖ for ‖z‖ = size: size √(ε n / (n − size²)), infinite from the sphere on."""
    size = size.clamp(min=0)
    inside = size < limit
    gap = torch.where(inside, (limit - size) * (limit + size), 1)
    return torch.where(inside, size * (eps / gap).sqrt() * limit, torch.inf)


def _norm(value: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
    return norm
