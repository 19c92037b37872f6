"""The nearest tuple of inputs with a given result, in closed form, for the ops of `joint.py`.

Every function takes the inputs, in float32 at least, and the target, and gives the inputs' new values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Values = tuple[Tensor, ...]
#: (inputs, target) → inputs
Split = Callable[..., Values]

#: halvings of the interval of the product's multiplier
STEPS = 60


# --- sums -----------------------------------------------------------------------------------------------


def spread_evenly(x: Values, r: Tensor, gain: float) -> Values:
    """The least (d, e) with d + gain · e = r, or as near as it can be, where d and e may be spread over more entries.

    With P the mean over the entries that share a value and k their number, A Aᵀ = k P + gain² l Q, and P and Q
    commute: on the four spaces that they make, it is a number.
    """
    k, m = (r.shape[1:].numel() / max(1, value.shape[1:].numel()) for value in x)
    first, second = ((r.sum_to_size(v.shape) / n).expand_as(r) for v, n in zip(x, (k, m), strict=True))
    both = (first.sum_to_size(x[1].shape) / m).expand_as(r)
    pull = gain**2 * m
    dual = both / (k + pull) + (first - both) / k + ((second - both) / pull if pull else 0)
    return dual.sum_to_size(x[0].shape), gain * dual.sum_to_size(x[1].shape)


def between(x: Values, t: Tensor, weight: Tensor | float) -> Values:
    """y = (1 − w) a + w b: each by its share of the squared gain."""
    missing = t - torch.lerp(x[0], x[1], weight)
    total = (1 - weight) ** 2 + weight**2
    return x[0] + (1 - weight) * missing / total, x[1] + weight * missing / total


def interpolated(x: Values, weight: Tensor | float | None = None) -> Tensor:
    return torch.lerp(*x) if weight is None else torch.lerp(x[0], x[1], weight)


# --- choices --------------------------------------------------------------------------------------------


def chosen(x: Values, t: Tensor, condition: Tensor) -> Values:
    """What the condition gives to each; a value that is spread takes the mean of what its places ask for."""
    return tuple(
        value + (given * (t - value)).sum_to_size(value.shape) / given.sum_to_size(value.shape).clamp(min=1)
        for value, given in zip(
            x, ((c.to(t.dtype)).expand_as(t) for c in (condition, ~condition)), strict=True
        )
    )


# --- products -------------------------------------------------------------------------------------------


def nearest_product(x: Values, t: Tensor) -> Values:
    """Nearest (a, b) with ab = t.

    With u = (a + b)/√2 and v = (a − b)/√2 it is u² − v² = 2t, and the multiplier λ gives u = u₀/(1 − λ),
    v = v₀/(1 + λ). On (−1, 1), where the nearest point has its λ, u² − v² increases. The coordinate that λ tells well
    is taken from it, the other from the equation, so that a start at u₀ = 0 or v₀ = 0 needs no case of its own.
    """
    u0, v0 = (x[0] + x[1]) / 2**0.5, (x[0] - x[1]) / 2**0.5
    low, high = torch.full_like(t, -1), torch.ones_like(t)
    for _ in range(STEPS):
        middle = (low + high) / 2
        less = (u0 / (1 - middle)).square() - (v0 / (1 + middle)).square() < 2 * t
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    multiplier = (low + high) / 2
    u, v = u0 / (1 - multiplier), v0 / (1 + multiplier)
    upper = (v.square() + 2 * t).clamp(min=0).sqrt() * torch.where(u0 < 0, -1, 1)
    lower = (u.square() - 2 * t).clamp(min=0).sqrt() * torch.where(v0 < 0, -1, 1)
    u, v = torch.where(multiplier < 0, u, upper), torch.where(multiplier < 0, lower, v)
    return (u + v) / 2**0.5, (u - v) / 2**0.5


def nearest_quotient(x: Values, t: Tensor) -> Values:
    """Nearest (a, b) with a = t b: the projection onto a line; at its zero, where a/b is nothing, the anchors stay."""
    b = (x[0] * t + x[1]) / (1 + t.square())
    return torch.where(b == 0, x[0], t * b), torch.where(b == 0, x[1], b)


# --- extremes -------------------------------------------------------------------------------------------


def nearest_maximum(x: Values, t: Tensor) -> Values:
    """What is above comes down; where both are below, the larger comes up."""
    first, below = x[0] >= x[1], torch.maximum(*x) < t
    a, b = (torch.minimum(value, t) for value in x)
    return torch.where(below & first, t, a), torch.where(below & ~first, t, b)


def mirrored(split: Split) -> Split:
    """min x = −max −x."""
    return lambda x, t: tuple(-value for value in split(tuple(-v for v in x), -t))


# --- joins ----------------------------------------------------------------------------------------------


def parts(x: Values, t: Tensor, dim: int = 0) -> Values:
    parts: Values = torch.split(t, [value.shape[dim] for value in x], dim)
    return parts


def layers(x: Values, t: Tensor, dim: int = 0) -> Values:
    return t.unbind(dim)
