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
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fxinvert.linalg.memory import waits
from fxinvert.rules.branches import MARGIN
from fxinvert.rules.trust import Nodes, amplified, nearest_in_ball, nearest_value, norm


@dataclass(frozen=True)
class Scales:
    """The weights w and offsets b.

    Attributes:
        weight: `(1, …, n)`, or `(1, …, 1, n)` where all groups have the same.
        bias: `(1, …, n)`; None where all are zero.
        largest: `(1, …, 1)`, the largest size in a group.
        tame: whether no scale is so small beside the others that it would blow corrections up.
        even: whether all scales of a group are of one size, and not zero.
        ones: whether all scales are 1.
        nodes: for tame scales that are not even.
    """

    weight: Tensor
    bias: Tensor | None
    largest: Tensor
    tame: bool
    even: bool
    ones: bool
    nodes: Nodes | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, kappa: float) -> Scales:
        """The scales, looked at; `kappa` is the largest amplification."""
        rows = weight.flatten(0, -2)
        if bool((rows == rows[:1]).all()):
            weight = rows[:1].reshape(*[1] * (weight.dim() - 1), -1)
        if bias is not None and not bool(bias.any()):
            bias = None
        size = weight.abs()
        largest, smallest = size.amax(-1, keepdim=True), size.amin(-1, keepdim=True)
        tame = bool(((smallest > 0) & (largest <= kappa * smallest)).all())
        even = tame and bool((smallest == largest).all())
        nodes = Nodes.of(weight.square()) if tame and not even else None
        return cls(weight, bias, largest, tame, even, bool((weight == 1).all()), nodes)

    @property
    def nbytes(self) -> int:
        nodes = () if self.nodes is None else (self.nodes.share, self.nodes.value, self.nodes.count)
        held = (self.weight, self.largest, *nodes, *(() if self.bias is None else (self.bias,)))
        return sum(value.nbytes for value in held)

    def to(self, dtype: torch.dtype) -> Scales:
        bias = None if self.bias is None else self.bias.to(dtype)
        nodes = None if self.nodes is None else self.nodes.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias, nodes=nodes)

    def wanted(self, target: Tensor, out: Tensor | None = None) -> Tensor:
        """(t − b) / w, for tame scales; `out` may be written to, in a kernel there is none."""
        found = target if self.bias is None else torch.sub(target, self.bias, out=out)
        return found if self.ones else torch.div(found, self.weight, out=out)


class Sums(NamedTuple):
    """Of every group, `(…, 1)`: μ; ‖t − y‖; ‖x − μ‖; ‖z‖ and mean of z, of which that is to be taken away."""

    mean: Tensor
    asked: Tensor
    own_size: Tensor
    size: Tensor
    shift: Tensor


class Direction(NamedTuple):
    """Of every group, `(…, 1)`: ‖z*‖; ⟨x − μ, z*⟩; whether z* lies on the sphere; how far w ⊙ z* is from what is wanted;
    whether corrections are amplified."""

    size: Tensor
    inner: Tensor
    outside: Tensor
    misfit: Tensor
    amplified: Tensor


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
    ) -> tuple[Tensor, Sums, Direction | None, int]:
        """z*, of any length if it lies on the sphere, for anchors, outputs and targets, `(…, n)`.

        Args:
            x, y, t: anchors, outputs and targets.
            out: two tensors that may be written to, for even scales one is enough; in a kernel there are none.

        Returns:
            z* plus the shift that the sums tell; the sums; what else is known of z*, None for scales of one size, where it
            follows from the sums; the number of iterations.
        """
        own, spare = out
        missing = torch.sub(t, y, out=own)
        asked, even = norm(missing), self.scales.even
        mean = x.mean(-1, keepdim=True) if self.centered else torch.zeros_like(asked)
        moved = torch.sub(x, mean, out=spare) if self.centered else x
        own_size = norm(moved)
        if even:
            z = self.scales.wanted(t, own)
            shift = z.mean(-1, keepdim=True) if self.centered else torch.zeros_like(asked)
            return z, Sums(mean, asked, own_size, norm(z), shift), None, 0
        if self.scales.tame:
            z, found, steps = self._direct(moved, self.scales.wanted(t, own))
        else:
            inverse = 1 / self._spread(own_size.double(), x.shape[-1]).to(x.dtype)
            z, found, steps = self._solved(moved, missing, inverse)
        none = torch.zeros_like(asked)
        return z, Sums(mean, asked, own_size, none, none), found, steps

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
        return Lengths(factor, of.mean - factor * of.shift, of.asked == 0, unreached, doubtful, damping)

    def _direct(self, moved: Tensor, wanted: Tensor) -> tuple[Tensor, Direction, int]:
        """For tame scales: what is wanted, if that lies in the ball. It may be written to."""
        limit, scales, nodes = math.sqrt(moved.shape[-1]), self.scales, self.scales.nodes
        assert nodes is not None
        size = norm(wanted)
        nothing, none = torch.zeros_like(size).double(), torch.zeros_like(size, dtype=torch.bool)
        there = size <= (1 + self.rounding) * limit
        if self.centered:
            there &= wanted.mean(-1, keepdim=True).abs() <= 4 * self.rounding
        z, misfit, outside, steps = wanted, nothing, none, 0
        if not bool(there.all()):
            curvature = scales.weight.square()
            pull = wanted * curvature
            sums = nodes.sums(pull)
            eta = nodes.multiplier(sums, limit, centered=self.centered)
            least = torch.zeros_like(eta)
            z, eta, steps = nearest_in_ball(pull, curvature, limit, least, eta, centered=self.centered)
            missed = nodes.misfit(sums, eta, centered=self.centered)
            if bool(there.any()):
                z = torch.where(there, wanted, z)
            outside, misfit = ~there & (eta > 0), torch.where(there, 0, missed).double()
            size = norm(z)
        inner = torch.linalg.vecdot(moved, z)[..., None].double()
        return z, Direction(size.double(), inner, outside, misfit, none), steps

    def _solved(self, moved: Tensor, r: Tensor, inverse: Tensor) -> tuple[Tensor, Direction, int]:
        """The same for scales of any size, of what is missing."""
        start = moved * inverse
        weight, largest = self.scales.weight, self.scales.largest
        blown = amplified(r, weight, self.kappa)
        damping = torch.where(blown, (largest / self.kappa) ** 2, torch.finfo(start.dtype).eps * largest**2)
        z, outside, iterations = nearest_value(start, r, weight, damping, blown, centered=self.centered)
        misfit, size = norm(weight * (z - start) - r).double(), norm(z).double()
        inner = torch.linalg.vecdot(moved, z)[..., None].double()
        return z, Direction(size, inner, outside, misfit, blown), iterations


def _radius(size: Tensor, limit: float, eps: float) -> Tensor:
    """‖x − μ‖ for ‖z‖ = size · limit: it is limit · size · √(ε / (1 − size²)), infinite from the sphere on."""
    size = size.clamp(0, 1)
    # without ε all but the sphere belongs to no spread at all
    return size * (limit * math.sqrt(max(eps, 1e-300))) / ((1 - size) * (1 + size)).sqrt()
