"""The nearest pre-image of a normalization, group by group.

The normalized values z = (x − μ) / √(σ² + ε) of n entries range over a ball: Σz = 0 and ‖z‖² = n σ² / (σ² + ε) < n. Its
pre-images differ by their mean alone, for ε ties the spread to the norm: σ² + ε = ε n / (n − ‖z‖²). The one equation,
residual first, then nearest, is solved in that order:

1. z* = argmin ‖w ⊙ z + b − t‖² over the closed ball (`trust.py`). (t − b) / w itself if that lies in the ball, and its
   projection if all scales are of one size;
2. x* = μ₀ + ρ z*/‖z*‖: the mean is the anchor's, ρ = ‖z*‖ √(ε n / (n − ‖z*‖²)) is what the norm of z* demands. A norm
   is only known to its rounding, which leaves an interval for ρ; the one nearest to the anchor's, ρ₀ = ⟨x0 − μ₀, z*/‖z*‖⟩,
   is taken. On the sphere itself, where ρ = ∞, any norm within MARGIN of it will do; less if the target
   is nearer.

A target inside the ball is therefore reached by shrinking the group to where ε is felt. Where that moves the input by
more than κ times what was asked of the output, ρ goes only so far towards its value, and the certificate says damped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxinvert.linalg.memory import waits
from fxinvert.rules.branches import MARGIN
from fxinvert.rules.scales import Scales
from fxinvert.rules.trust import amplified, nearest_in_ball, nearest_value, norm


class Sums(NamedTuple):
    """Of every group, `(…, 1)`: μ; ‖t − y‖; ‖x − μ‖; for tame scales, of g / w, the norm, the mean, which is to be taken away,
    and, where they are not even, the product with x − μ."""

    mean: Tensor
    asked: Tensor
    own_size: Tensor
    size: Tensor
    shift: Tensor
    inner: Tensor


class Direction(NamedTuple):
    """Of every group, `(…, 1)`: ‖z*‖; ⟨x − μ, z*⟩; whether z* lies on the sphere; how far w ⊙ z* is from what is wanted;
    whether corrections are amplified."""

    size: Tensor
    inner: Tensor
    outside: Tensor
    misfit: Tensor
    amplified: Tensor


class Bend(NamedTuple):
    """Of every group, `(…, 1)`: η and ν; z* = (c ⊙ g / w − ν) / (c + η), both are 0 in the ball."""

    multiplier: Tensor
    shift: Tensor


class Lengths(NamedTuple):
    """Of every group, `(…, 1)`: the nearest pre-images are factor · z + offset; whether nothing is missing; whether the
    target is off the range; whether they may not be closer to it; λ, 0 where not damped."""

    factor: Tensor
    offset: Tensor
    same: Tensor
    outside: Tensor
    doubtful: Tensor
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

    def direction(
        self, x: Tensor, y: Tensor, t: Tensor, out: tuple[Tensor | None, Tensor | None] = (None, None)
    ) -> tuple[Tensor, Sums, Tensor | Direction | None, int]:
        """What is read of anchors, outputs and targets, `(R, G, n)`.

        Args:
            x, y, t: anchors, outputs and targets.
            out: a tensor for z, and another that may be written to; in a kernel there are none.

        Returns:
            z, which is g / w for tame scales, else z*; the sums; what else is known: nothing for even scales, sums at nodes for
            tame ones (zeros if all targets lie in the ball), else the direction of z*; the number of iterations.
        """
        z, moved, of = self._read(x, y, t, out)
        scales, spare = self.scales, out[1]
        if scales.even:
            return z, of, None, 0
        if not scales.tame:
            return self._solved(moved, z, of)
        if scales.nodes is None:
            return self._searched(moved, z, of, spare)
        if bool(self._there(of, x.shape[-1]).all()):
            at_nodes = torch.zeros_like(of.size).expand(4, len(scales.nodes.value), *of.size.shape)
        else:
            at_nodes = scales.nodes.sums(z, moved)
        return z, of._replace(inner=torch.mul(moved, z, out=spare).sum(-1, keepdim=True)), at_nodes, 0

    def within(self, x: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Sums, Tensor]:
        """For tame scales: z = g / w, the sums, and `(R, G, 1)`, where z lies in the ball, so that nothing else need be known."""
        z, moved, of = self._read(x, y, t, (None, None))
        if not self.scales.even:
            of = of._replace(inner=(moved * z).sum(-1, keepdim=True))
        return z, of, self._there(of, x.shape[-1])

    def kept(self, of: Sums, there: Tensor) -> Direction:
        """The direction of g / w, of the groups where it lies in the ball."""
        return Direction(of.size, of.inner, ~there, torch.zeros_like(of.size), ~there)

    def _read(
        self, x: Tensor, y: Tensor, t: Tensor, out: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Tensor, Tensor, Sums]:
        """g / w for tame scales, else t − y; x − μ; the sums but for the product."""
        (own, spare), scales = out, self.scales
        # what is read of t and y comes before what is read of x, so that it is still in the processor's cache
        asked = norm(torch.sub(t, y, out=spare))
        z = scales.wanted(t, own) if scales.tame else t - y
        none = torch.zeros_like(asked)
        size = norm(z) if scales.tame else none
        shift = z.mean(-1, keepdim=True) if scales.tame and self.centered else none
        mean = x.mean(-1, keepdim=True) if self.centered else none
        moved = torch.sub(x, mean, out=spare) if self.centered else x
        return z, moved, Sums(mean, asked, norm(moved), size, shift, none)

    def found(self, n: int, of: Sums, known: list[Any]) -> tuple[Direction | None, Bend | None]:
        """The directions of z*, and how it comes of g / w, of all that `direction` found; `of` in float64."""
        if self.scales.even:
            return None, None
        if self.scales.nodes is None:
            return Direction(*map(torch.cat, zip(*known, strict=True))), None
        there = self._there(of, n)
        nothing = torch.zeros_like(of.size)
        if bool(there.all()):
            return self.kept(of, there), None
        near = self.scales.nodes.nearest(torch.cat(known, 2), math.sqrt(n), centered=self.centered)
        eta, shift, misfit = (torch.where(there, 0, v) for v in (near.multiplier, near.shift, near.misfit))
        size, inner = (torch.where(there, a, b) for a, b in ((of.size, near.size), (of.inner, near.inner)))
        return Direction(size, inner, eta > 0, misfit.double(), nothing > 0), Bend(eta, shift)

    def placed(self, z: Tensor, factor: Tensor, offset: Tensor, bend: Bend | None, out: Tensor) -> None:
        """factor · z* + offset, of what `direction` gave; `out` may be that itself."""
        if bend is not None and bool((bend.multiplier != 0).any() | (bend.shift != 0).any()):
            nodes = self.scales.nodes
            assert nodes is not None
            z, out = (nodes.runs(v) for v in (z, out))
            curvature = self.scales.weight[..., :: nodes.run, None].square()
            # where η and ν are 0 that is z, bit for bit
            below = curvature + bend.multiplier[..., None]
            offset = offset[..., None] - (bend.shift * factor)[..., None] / below
            factor = curvature / below * factor[..., None]
        torch.mul(z, factor, out=out)
        if self.centered:
            out.add_(offset)

    def _there(self, of: Sums, n: int) -> Tensor:
        """Whether g / w lies in the ball."""
        near = of.size.double() <= (1 + self.rounding) * math.sqrt(n)
        return near & (of.shift.double().abs() <= 4 * self.rounding)

    def _spread(self, size: Tensor, n: int) -> Tensor:
        """√(σ² + ε), for ‖x − μ‖."""
        return (size.square() / n + self.eps).sqrt()

    def lengths(self, n: int, of: Sums, found: Direction | None = None) -> Lengths:
        """What becomes of the directions of groups of n entries.

        Args:
            n: entries of a group.
            of: the sums, in float64: 1 − ‖z‖²/n is as small as ε/σ², and the spread hangs on it.
            found: what else is known of the directions.
        """
        limit, rounding, largest = math.sqrt(n), self.rounding, self.scales.largest
        # what a change of z of the ball's size makes of the output
        unit = torch.where(largest > 0, largest, 1) * limit
        asked, own_size, spread = of.asked / unit, of.own_size, self._spread(of.own_size, n)
        amplified: Tensor | None = None
        shift = of.shift if found is None else torch.zeros_like(of.shift)
        if found is None:
            whole, off = (of.size / limit).square(), of.shift.square()
            size = (whole - off).clamp(min=0).sqrt()
            # z = z₀ + (t − y) / w, z₀ = (x − μ) / spread, and the norms of all three are known
            begin = own_size / spread / limit
            if self.eps == 0:
                begin = torch.where(own_size > 0, begin, 0)
            inner = (whole + begin.square() - asked.square()) * (spread * limit / 2)
            outside = size > 1 + rounding
            misfit = ((size - 1).clamp(min=0).square() + off).sqrt()
            known = size.square() >= 100 * rounding * whole
        else:
            size, inner, misfit = found.size / limit, found.inner / limit, found.misfit / unit
            outside, amplified = found.outside, found.amplified
            known = size > 0
        own = torch.minimum(torch.maximum(inner / size, -own_size), own_size)
        unreached = misfit > rounding * asked
        # as near to the sphere as the target is far from the range
        margin = torch.where(outside, misfit, 0).clamp(rounding, max(MARGIN, rounding))
        demanded = torch.where(outside, 1, size)
        if self.eps == 0:
            unreached, demanded = unreached | (size < 1 - rounding), torch.ones_like(size)
        least, most = _radius(torch.stack([demanded - margin, demanded + margin]), limit, self.eps)
        # the entries must be told apart beside their mean: to half of the digits, where there are digits to spare
        if self.centered:
            apart = 4 * max(rounding, min(math.sqrt(rounding), 1e-3))
            least = torch.maximum(least, torch.minimum(most, of.mean.abs() * (apart * limit)))
        radius = torch.minimum(torch.maximum(own, least), most)
        # no correction is blown up more than κ times
        allowed = asked * spread * (self.kappa * limit)
        room = (allowed.square() - (own_size - own) * (own_size + own)).clamp(min=0).sqrt()
        far, bounded = (radius - own).abs() > room + 1e-9 * (1 + radius), radius
        damped = far if amplified is None else far | amplified
        damping = torch.zeros_like(radius)
        if waits(far) or bool(damped.any()):
            bounded = torch.minimum(torch.maximum(radius, own - room), own + room).clamp(min=0)
            damping = torch.where(damped, (largest / self.kappa / torch.where(far, spread, 1)).square(), 0)
        factor = torch.where(size > 0, bounded / (size * limit), 0)
        doubtful = unreached | damped
        if self.eps > 0:  # else there are spreads of which no values come at all
            # a norm is met to the margin, entries are rounded, and little is known of those that hardly differ or nearly vanish
            closer = (misfit + (0.01 + 4 * rounding) < asked) & (bounded > rounding * own_size) & known
            doubtful = (unreached & ~closer) | damped
        return Lengths(factor, of.mean - factor * shift, of.asked == 0, unreached, doubtful, damping)

    def _searched(
        self, moved: Tensor, wanted: Tensor, of: Sums, spare: Tensor | None
    ) -> tuple[Tensor, Sums, Direction, int]:
        """For tame scales that have no nodes; `spare` may be written to."""
        weight, there = self.scales.weight, self._there(of, moved.shape[-1])
        z, size, misfit, outside, steps = wanted, of.size, torch.zeros_like(of.size), ~there, 0
        if not bool(there.all()):
            curvature, least, limit = weight.square(), torch.zeros_like(size), math.sqrt(moved.shape[-1])
            # where η would be for scales of one size
            start = (size / limit - 1).clamp(min=0) / curvature.reciprocal().mean(-1, keepdim=True)
            z, eta, steps = nearest_in_ball(
                wanted * curvature, curvature, limit, least, start, centered=self.centered
            )
            z = torch.where(there, wanted, z)
            size, misfit, outside = norm(z), norm(weight * (wanted - z)), ~there & (eta > 0)
        inner = torch.mul(moved, z, out=spare).sum(-1, keepdim=True)
        found = Direction(size.double(), inner.double(), outside, misfit.double(), size < 0)
        return z, of, found, steps

    def _solved(self, moved: Tensor, r: Tensor, of: Sums) -> tuple[Tensor, Sums, Direction, int]:
        """For scales of any size, of what is missing."""
        start = moved / self._spread(of.own_size.double(), moved.shape[-1]).to(moved.dtype)
        weight, largest = self.scales.weight, self.scales.largest
        blown = amplified(r, weight, self.kappa)
        damping = torch.where(blown, (largest / self.kappa) ** 2, torch.finfo(start.dtype).eps * largest**2)
        z, outside, iterations = nearest_value(start, r, weight, damping, blown, centered=self.centered)
        misfit, size = norm(weight * (z - start) - r).double(), norm(z).double()
        inner = torch.linalg.vecdot(moved, z)[..., None].double()
        return z, of, Direction(size, inner, outside, misfit, blown), iterations


def _radius(size: Tensor, limit: float, eps: float) -> Tensor:
    """‖x − μ‖ for ‖z‖ = size · limit: it is limit · size · √(ε / (1 − size²)), infinite from the sphere on."""
    size = size.clamp(0, 1)
    # without ε all but the sphere belongs to no spread at all
    return size * (limit * math.sqrt(max(eps, 1e-300))) / ((1 - size) * (1 + size)).sqrt()
