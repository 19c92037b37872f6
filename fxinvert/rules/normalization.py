"""Normalization: one line per op.

With fixed statistics it is a diagonal affine map. With those of the sample it is, for every group of n entries,

    y = w ⊙ z + b,   z = (x − μ) / √(σ² + ε)      (root mean square: μ = 0, σ² = mean x²),

and z ranges over a ball: Σz = 0 and ‖z‖² = n σ² / (σ² + ε) < n. Its pre-images differ by their mean alone, for ε ties
the spread to the norm: σ² + ε = ε n / (n − ‖z‖²). The one equation, residual first, then nearest, is solved in that order:

1. z* = argmin ‖w ⊙ z + b − t‖² over the closed ball: the trust-region problem of Moré & Sorensen (SIAM J. Sci. Stat.
   Comput. 4, 1983) with a diagonal matrix, one unknown per group;
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

import torch
from torch import Tensor

from fxinvert.errors import NoRuleError
from fxinvert.rules.affine import Rows, invert_diagonal
from fxinvert.rules.branches import MARGIN
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.groups import settled
from fxinvert.rules.op import Op
from fxinvert.rules.registry import Kind, Rule
from fxinvert.rules.trainable import Scale, by_group, by_layer, by_size, by_statistics

#: limit of Newton's steps on the sphere's multiplier; equal weights take one, weights of 1e-6 and 1 about ten
STEPS = 60
#: values that are worked on at a time
CHUNK = 2**15
#: every channel of a sample is a group: `(B, C, …)` → `(B, C, entries)`
CHANNELS = Rows(lambda value: value.flatten(2), torch.Tensor.reshape_as)


def batch_norm(op: Op, target: Tensor) -> Inverse:
    """Batch norm in evaluation is a diagonal affine map, y = w (x − μ) / √(σ² + ε) + b."""
    if op.attributes["training"]:
        raise NoRuleError(
            f"node {op.name!r}, batch_norm: it normalizes by the statistics of the batch, so that no sample has a "
            "target of its own; give it running statistics (track_running_stats=True)"
        )
    return _fixed_statistics(op, target)


def instance_norm(op: Op, target: Tensor) -> Inverse:
    """Every channel of a sample by its own statistics (Ulyanov et al., arXiv 1607.08022), or by the running ones."""
    if not op.attributes["use_input_stats"]:
        return _fixed_statistics(op, target)
    return invert_normalized(op, target, CHANNELS, op.attributes["eps"])


def group_norm(op: Op, target: Tensor) -> Inverse:
    """Groups of channels by their own statistics (Wu & He, arXiv 1803.08494)."""
    count = op.attributes["num_groups"]
    entries = op.anchor.shape[1:].numel() // count
    groups = Rows(lambda value: value.reshape(-1, count, entries), torch.Tensor.reshape_as)
    return invert_normalized(op, target, groups, op.attributes["eps"])


def layer_norm(op: Op, target: Tensor) -> Inverse:
    """The last axes by their own statistics (Ba et al., arXiv 1607.06450)."""
    return invert_normalized(op, target, _trailing(op), op.attributes["eps"], channels=False)


def rms_norm(op: Op, target: Tensor) -> Inverse:
    """The last axes by their root mean square (Zhang & Sennrich, arXiv 1910.07467); ε by default that of the dtype."""
    eps = op.attributes["eps"]
    eps = torch.finfo(op.anchor.dtype).eps if eps is None else eps
    return invert_normalized(op, target, _trailing(op), eps, centered=False, channels=False)


def invert_normalized(
    op: Op, target: Tensor, groups: Rows, eps: float, *, centered: bool = True, channels: bool = True
) -> Inverse:
    """Nearest of the inputs whose normalized values come closest to the target, group by group.

    Args:
        op: an op with parameters weight and bias, if any.
        target: `(B, …)`.
        groups: the entries that are normalized together.
        eps: ε.
        centered: whether the mean is taken away.
        channels: whether the weight has an entry per channel; else one per entry of a group.
    """
    weight = _weight(op, groups, channels=channels)
    limit = op.settings.limit(torch.float32)  # a small scale passes noise on, whatever the digits
    how = _How(eps, centered, limit, 4 * torch.finfo(target.dtype).eps)
    # a few samples at a time, so that they stay in the processor's cache
    count = max(1, CHUNK // max(1, op.anchor.shape[1:].numel()))
    parts = [
        _pre_image(x.double(), t.double() - y.double(), weight, how)
        for x, y, t in zip(
            *(torch.split(groups.split(value), count) for value in (op.anchor, op.output, target)),
            strict=True,
        )
    ]
    value, outside, damping = (torch.cat(same) for same in list(zip(*parts, strict=True))[:3])
    return settled(
        op,
        target,
        value,
        groups,
        groups,
        outside=outside,
        damped=damping > 0,
        damping=float(damping.max()) if damping.numel() else 0.0,
        iterations=max(part[3] for part in parts),
    )


@dataclass(frozen=True)
class _How:
    """ε, whether the mean is taken away, κ, and how well a norm is known, relatively."""

    eps: float
    centered: bool
    kappa: float
    rounding: float


def _pre_image(x: Tensor, r: Tensor, weight: Tensor, how: _How) -> tuple[Tensor, Tensor, Tensor, int]:
    """The nearest pre-images; `(…, 1)`, whether the target was off the range; λ, 0 where not damped; iterations.

    In float64: 1 − ‖z‖²/n is as small as ε/σ², and the spread hangs on it.
    """
    limit, rounding = math.sqrt(x.shape[-1]), how.rounding
    mean = x.mean(-1, keepdim=True) if how.centered else torch.zeros_like(x[..., :1])
    moved = x - mean
    spread = (moved.square().mean(-1, keepdim=True) + how.eps).sqrt()
    start, asked, largest = moved / spread, _norm(r), weight.abs().amax(-1, keepdim=True)
    amplified = _amplified(r, weight, how.kappa)
    damping = torch.where(amplified, (largest / how.kappa) ** 2, torch.finfo(x.dtype).eps * largest**2)
    z, outside, iterations = _nearest_value(start, r, weight, damping, amplified, how)
    misfit = _norm(weight * (z - start) - r)

    size = _norm(z)
    direction = torch.where(size > 0, z / size, 0)
    own = (moved * direction).sum(-1, keepdim=True)
    # as near to the sphere as the target is far from the range
    margin = torch.where(outside, misfit / (largest * limit), 0).clamp(rounding, max(MARGIN, rounding))
    size = torch.where(outside | (how.eps == 0), limit, size)
    least, most = (_radius(size + sign * margin * limit, limit, how.eps) for sign in (-1, 1))
    # the entries must be told apart beside their mean
    least = torch.maximum(least, torch.minimum(most, 4 * rounding * mean.abs() * limit))
    radius = torch.minimum(torch.maximum(own, least), most)
    # no correction is blown up more than κ times
    allowed = how.kappa * asked * spread / torch.where(largest > 0, largest, 1)
    room = (allowed.square() - _norm(moved - own * direction).square()).clamp(min=0).sqrt()
    bounded = torch.minimum(torch.maximum(radius, own - room), own + room).clamp(min=0)
    far = (radius - bounded).abs() > 1e-9 * (1 + radius)
    value = torch.where(largest > 0, mean + bounded * direction, x)
    applied = torch.where(far | amplified, (largest / how.kappa / torch.where(far, spread, 1)) ** 2, 0)
    # without ε every value lies on the sphere
    unreached = (misfit > rounding * asked) | ((how.eps == 0) & (_norm(z) < limit * (1 - rounding)))
    return value, unreached, applied, iterations


def _amplified(r: Tensor, weight: Tensor, kappa: float) -> Tensor:
    """`(…, 1)`: where near-zero scales blow the correction up; zeros say nothing of their entries."""
    size = weight.abs()
    largest = size.amax(-1, keepdim=True)
    if not bool((largest > kappa * torch.where(size > 0, size, torch.inf)).any()):
        return torch.zeros_like(r[..., :1], dtype=torch.bool)
    return largest * _norm(torch.where(size > 0, r / weight, 0)) > kappa * _norm(r)


def _nearest_value(
    start: Tensor, r: Tensor, weight: Tensor, damping: Tensor, amplified: Tensor, how: _How
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
    z, eta, steps = nearest_in_ball(start, r, weight, damping, ball, eta, centered=how.centered)
    short = free & (eta > 1e-9 * weight.square().amax(-1, keepdim=True))
    if bool(short.any()):
        again, more, further = nearest_in_ball(start, r, weight, damping, limit, none, centered=how.centered)
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
    done, steps = 1e-14, 0
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


def _radius(size: Tensor, limit: float, eps: float) -> Tensor:
    """‖x − μ‖ for ‖z‖ = size: size √(ε n / (n − size²)), infinite from the sphere on."""
    size = size.clamp(min=0)
    inside = size < limit
    gap = torch.where(inside, (limit - size) * (limit + size), 1)
    return torch.where(inside, size * (eps / gap).sqrt() * limit, torch.inf)


def _norm(value: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
    return norm


def _trailing(op: Op) -> Rows:
    last = len(op.attributes["normalized_shape"])
    return Rows(lambda value: value.flatten(-last), torch.Tensor.reshape_as)


def _weight(op: Op, groups: Rows, *, channels: bool) -> Tensor:
    """w in the layout of the groups, one sample: `(1, …, n)`."""
    weight = op.parameters.get("weight")
    if weight is None:
        weight = op.anchor.new_ones(())
    elif channels:
        weight = _per_channel(op, weight)
    return groups.split(weight.double().expand(1, *op.anchor.shape[1:]))


def _per_channel(op: Op, value: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (op.anchor.dim() - 2))


def _fixed_statistics(op: Op, target: Tensor) -> Inverse:
    gain = (op.parameters["running_var"] + op.attributes["eps"]).rsqrt()
    if "weight" in op.parameters:
        gain = gain * op.parameters["weight"]
    return invert_diagonal(op, target, _per_channel(op, gain))


def rules() -> list[Rule]:
    return [
        Rule("batch_norm", batch_norm, Kind.AFFINE, trainable=Scale(by_statistics, channels=True)),
        Rule("instance_norm", instance_norm, Kind.CLOSED_FORM),
        Rule("group_norm", group_norm, Kind.CLOSED_FORM, trainable=Scale(by_group, channels=True)),
        Rule("layer_norm", layer_norm, Kind.CLOSED_FORM, trainable=Scale(by_layer, channels=False)),
        Rule("rms_norm", rms_norm, Kind.CLOSED_FORM, trainable=Scale(by_size, channels=False)),
    ]
