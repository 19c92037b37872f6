"""Softmax and its kin: one line per op."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fxinvert.rules.affine import Rows
from fxinvert.rules.branches import MARGIN
from fxinvert.rules.certificate import Inverse, apart
from fxinvert.rules.groups import along, axes, settled
from fxinvert.rules.op import Op
from fxinvert.rules.rule import Kind, Rule

#: how far below the largest a coordinate's probability is 0 in every dtype: e⁻⁷⁴⁵ is the smallest number of double
#: precision
HIDDEN = -745.0
#: limit of Newton's steps; ten do, unless there is no such point to be found
STEPS = 25
#: values that are worked on at once
BLOCK = 1 << 16
#: steps of Newton's method for all entries of a gate, which are enough for all but few
FREE_STEPS = {torch.float32: 5, torch.float64: 7}
#: limit of steps where Newton's method is safeguarded by bisection
GUARDED_STEPS = 60


def softmax(op: Op, target: Tensor) -> Inverse:
    """y = eˣ / Σeˣ: the pre-images of a point p inside the simplex are log p + c, and c = mean(x0 − log p) is nearest.

    Any other target is first moved to the nearest point of the simplex. A coordinate that is zero there is reached only
    at infinity: it becomes MARGIN times the largest, or stays at its anchor if that is lower.

    What a mask hides, by −∞ or by a number so low that its probability is 0 in every dtype (−10⁴, `finfo.min`), is not
    sought: such a coordinate has yᵢ = 0 and ∂yⱼ/∂xᵢ = 0 for all j, and the pre-image that would show it, log p + c, is
    as far away as the mask is low. With H these coordinates and V the others, x_H = x0_H, and on x_V the op is a softmax
    of its own, whose range is the face {p ≥ 0, Σ_V p = 1, p_H = 0} of the simplex: a target is moved to the nearest point
    of that, and c is the mean over V. Low is what is far below the largest of a row: in one that is hidden as a whole
    its entries are as they were, for they have no digits left to change.
    """
    group = along(axes(op, op.attributes["dim"]))
    working = torch.promote_types(target.dtype, torch.float32)
    wanted, anchor = group.split(target).to(working), group.split(op.anchor).to(working)
    top = anchor.amax(-1, keepdim=True)
    below = anchor - top
    # a point of the simplex is taken as it is: small coordinates have digits that a projection would round away
    on = (wanted.amin(-1) > 0) & (below.amin(-1) > HIDDEN) & _sums_to_one(wanted, target.dtype)
    logs = wanted.log()
    value = logs.add_((below - logs).mean(-1, keepdim=True) + top)
    if not bool(on.all()):
        value[~on] = _onto_face(wanted[~on], anchor[~on], target.dtype)
    return settled(op, target, value, group, group, outside=~on[..., None])


def _onto_face(wanted: Tensor, anchor: Tensor, given: torch.dtype) -> Tensor:
    """The same, `(…, n)`, for targets that are off the simplex or have to be moved onto a face of it."""
    top = anchor.amax(-1, keepdim=True)
    below = anchor - top
    hidden = below <= HIDDEN
    p = onto_simplex(torch.where(hidden, -torch.inf, wanted))
    lowest = MARGIN * p.amax(-1, keepdim=True)
    inside = p > lowest
    on = torch.where(hidden, wanted == 0, wanted > 0).all(-1) & _sums_to_one(wanted, given)
    inside, p = torch.where(on[..., None], ~hidden, inside), torch.where(on[..., None], wanted, p)
    logs = torch.where(inside, p, 1).log()
    shift = torch.where(inside, below - logs, 0).sum(-1, keepdim=True) / inside.sum(-1, keepdim=True)
    value = torch.where(inside, logs + shift, torch.minimum(below, lowest.log() + shift)) + top
    return torch.where(hidden, anchor, value)


def _sums_to_one(value: Tensor, given: torch.dtype) -> Tensor:
    """Whether Σ = 1 along the last axis, `(…, n)` → `(…)`, but for the rounding of the dtype it was given in."""
    return (value.sum(-1) - 1).abs() <= 8 * torch.finfo(given).eps


def log_softmax(op: Op, target: Tensor) -> Inverse:
    """y = x − log Σeˣ: the range is log Σeʸ = 0; the pre-images of a point y there are y + c, c = mean(x0 − y).

    What a mask hides stays, as for softmax, and is left out of both sums and of the residual.
    """
    group = along(axes(op, op.attributes["dim"]))
    working = torch.promote_types(target.dtype, torch.float32)
    wanted, anchor = group.split(target).to(working), group.split(op.anchor).to(working)
    top = anchor.amax(-1, keepdim=True)
    below = anchor - top
    hidden = below <= HIDDEN
    masked = bool(hidden.any())
    if masked:
        wanted = wanted.masked_fill(hidden, -torch.inf)
    on = _sums_to_one(wanted.exp(), target.dtype)
    y, iterations = wanted, 0
    if not bool(on.all()):
        found, iterations = onto_log_simplex(wanted[~on].double())
        y = wanted.clone()
        y[~on] = found.to(working)
    if masked:
        shift = (below - y).masked_fill(hidden, 0).sum(-1, keepdim=True) / (~hidden).sum(-1, keepdim=True)
        value = torch.where(hidden, anchor, y + (shift + top))
        op, target = _without(op, target, group.join(hidden, target))
    else:
        value = y + ((below - y).mean(-1, keepdim=True) + top)
    return settled(op, target, value, group, group, outside=~on[..., None], iterations=iterations)


def _without(op: Op, target: Tensor, hidden: Tensor) -> tuple[Op, Tensor]:
    """An op and its target with 0 in hidden places of the output: they follow the others there, and are not sought."""

    def shown(value: Tensor) -> Tensor:
        return value.masked_fill(hidden, 0)

    shown_op = replace(op, output=shown(op.output), evaluate=lambda *inputs: shown(op(*inputs)))
    return shown_op, shown(target)


def glu(op: Op, target: Tensor) -> Inverse:
    """y = a σ(b) (Dauphin et al., arXiv 1612.08083): jointly nearest a = t / σ(b) and b."""
    (dim,) = axes(op, op.attributes["dim"])

    pairs = Rows(
        lambda value: torch.unflatten(value, dim, (2, -1)).movedim(dim, -1),
        lambda value, like: value.movedim(-1, dim).flatten(dim, dim + 1),
    )
    single = Rows(lambda value: value[..., None], lambda value, like: value[..., 0])
    working = torch.promote_types(target.dtype, torch.float32)
    a, b = (half.reshape(-1).to(working) for half in op.anchor.chunk(2, dim))
    found = nearest_gated(a, b, target.reshape(-1).to(working)).reshape(2, *target.shape).movedim(0, -1)
    return settled(op, target, found, pairs, single)


def onto_simplex(value: Tensor, total: Tensor | float = 1.0) -> Tensor:
    """Nearest point of {p ≥ 0, Σp = total} along the last axis: max(v − τ, 0).

    Held, Wolfe & Crowder, Math. Program. 6 (1974). Newton's method on Σ max(v − τ, 0) = total, which is convex and falls in
    straight pieces, climbs to τ from below and ends on its piece (as Michelot, J. Optim. Theory Appl. 50, 1986, by sets).
    """
    # a common shift changes nothing, and large values would round Σ − total away
    value = value - value.amax(-1, keepdim=True)
    tau = torch.zeros_like(value[..., :1]) - total
    while True:
        above = (value - tau).clamp_(min=0)
        excess = above.sum(-1, keepdim=True) - total
        following = tau + excess / above.sign().sum(-1, keepdim=True).clamp(min=1)
        if not bool((following > tau).any()):
            return above
        tau = torch.maximum(tau, following)


def onto_log_simplex(value: Tensor) -> tuple[Tensor, int]:
    """Nearest point of {log Σeʸ = 0} along the last axis, and the number of iterations.

    Stationary points have y + η eʸ = v; Newton's step on that and log Σeʸ = 0 takes one division per entry, for the
    matrix is diagonal but for its last row and column. From outside (log Σeᵛ > 0) {log Σeʸ ≤ 0} is convex and the
    solution unique. From inside, the second-order conditions leave two kinds: all entries are raised a little, or mostly
    the largest one. Both are started from, and the nearest is kept, the plain shift v − log Σeᵛ included. What is −∞
    stays.
    """
    total = value.logsumexp(-1, keepdim=True)
    best = value - total
    largest = torch.zeros_like(value).scatter(-1, value.argmax(-1, keepdim=True), 1) > 0
    others = torch.where(largest, -torch.inf, value).logsumexp(-1, keepdim=True).exp()
    lifted = torch.where(largest, torch.log1p(-others.clamp(max=1 - 1e-12)), value)
    steps = 0
    # a little is at most 1 each
    for start, possible in ((best, total > -1), (lifted, total < 0)):
        y, count = _stationary(start, value, possible)
        y = y - y.logsumexp(-1, keepdim=True)
        nearer = _squared(apart(y, value)) < _squared(apart(best, value))
        best, steps = torch.where(nearer, y, best), max(steps, count)
    return torch.where(total.abs() <= 4 * torch.finfo(value.dtype).eps, value, best), steps


def _stationary(y: Tensor, value: Tensor, moving: Tensor) -> tuple[Tensor, int]:
    """Newton's method for y + η eʸ = v, log Σeʸ = 0, in the groups that move; each stops by itself."""
    p = y.softmax(-1)
    eta = (apart(value, y) * p).sum(-1, keepdim=True) / p.square().sum(-1, keepdim=True)
    steps = 0
    while steps < STEPS and bool(moving.any()):
        steps += 1
        p = y.exp()
        matrix = 1 + eta * p
        error = apart(y + eta * p, value)
        weights = p / matrix
        total = p.sum(-1, keepdim=True)
        turn = (total.log() * total - (weights * error).sum(-1, keepdim=True)) / (weights * p).sum(
            -1, keepdim=True
        )
        # no entry grows by more than a factor e at once
        step = (-(error + turn * p) / matrix).clamp(-1, 1)
        y = torch.where(moving, y + step, y)
        eta = torch.where(moving, eta + turn, eta)
        moving = moving & (step.abs() > 1e-10 * (1 + y.abs())).any(-1, keepdim=True)
    return y, steps


def nearest_gated(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """The nearest (a, b), stacked, with a σ(b) = t. Flat tensors.

    a = t (1 + e⁻ᵇ) leaves φ(b) = (t (1 + e⁻ᵇ) − a₀)² + (b − b₀)². With w = b₀ − b, q = t e⁻ᵇ = t e⁻ᵇ⁰ eʷ and d = a₀ − t,

        φ' = −2h,      h = q (q − d) + w,      h' = q (2q − d) + 1,

    so that h rises, and has one root, unless d has the sign of t and |d| > √8. Newton's method finds it in few steps from
    w = −½ log(1 + h(0)), where it lies if q is large, or from zero; where it does not, or where h may have several roots,
    b is searched with care.
    """
    found = torch.stack([a, b])
    near = torch.empty_like(t, dtype=torch.bool)
    blocks = (*(torch.split(v, BLOCK) for v in (a, b, t, near)), torch.split(found, BLOCK, 1))
    for a0, b0, wanted, done, out in zip(*blocks, strict=True):
        own, d = wanted * (-b0).exp_(), a0 - wanted
        w = (own * (own - d)).clamp_(min=0).log1p_().mul_(-0.5)
        for _ in range(FREE_STEPS[t.dtype]):
            q = w.exp().mul_(own)
            beyond = q - d
            step = torch.addcmul(w, q, beyond).div_(beyond.add_(q).mul_(q).add_(1)).clamp_(-1, 1)
            w.sub_(step)
        torch.sub(b0, w, out=out[1])
        torch.mul(wanted, (-out[1]).exp_().add_(1), out=out[0])
        # the next step is about the square of the last
        done.copy_((step.abs_() <= torch.finfo(t.dtype).eps ** 0.5) & (d.mul_(wanted.sign()) <= 8**0.5))
    rest = (~near).nonzero()[:, 0]
    return found.index_copy_(1, rest, _searched(a[rest], b[rest], t[rest]))


def _searched(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """The same, safeguarded by bisection: φ' rises but between the two roots of φ'', if there are any.

    A minimum may lie on either side of these; the lower one is kept.
    """
    zero = t == 0
    t = torch.where(zero, 1, t)
    # where φ' is negative for certain, and where positive: t e⁻ᵇ < a₀ − t changes the sign of its second term
    turn = -(torch.where(a / t > 1, a / t - 1, 1)).log()
    least = torch.where(a / t > 1, torch.minimum(b, turn), b)
    most = torch.where(a / t > 1, torch.maximum(b, turn), b.clamp(min=0) + t.abs() * (2 * t.abs() + a.abs()))
    slack = ((t - a) / 4).square() - 0.5
    q = ((a - t) / 4)[..., None] + slack.clamp(min=0).sqrt()[..., None] * torch.tensor([-1.0, 1.0]).to(a)
    ends = -(q / t[..., None]).clamp(min=torch.finfo(t.dtype).tiny).log()
    two = (slack > 0) & (((a - t) / t) > 0)
    left = _root(a, b, t, least, torch.where(two, ends.amin(-1).clamp(least, most), most))
    right = left.clone()
    right[two] = _root(a[two], b[two], t[two], ends.amax(-1).clamp(least, most)[two], most[two])
    costs = [(t * (1 + (-x).exp()) - a).square() + (x - b).square() for x in (left, right)]
    gate = torch.where(zero, b, torch.where(costs[0] <= costs[1], left, right))
    return torch.stack([torch.where(zero, 0, t * (1 + (-gate).exp())), gate])


def _root(a: Tensor, b: Tensor, t: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Where φ', rising on [low, high], changes its sign; an end if it does not. Flat tensors."""
    # a step goes little farther than 1 where q is large: from there to q = 1 there would be many
    result = torch.maximum(b, t.abs().log()).clamp(low, high)
    index = torch.isfinite(t).nonzero()[:, 0]
    a, b, t, low, high, x = (value[index] for value in (a, b, t, low, high, result))
    for _ in range(GUARDED_STEPS):
        q = t * (-x).exp()
        slope, bend = x - b - q * (t + q - a), 2 * q.square() + q * (t - a) + 1
        low, high = torch.where(slope > 0, low, x), torch.where(slope > 0, x, high)
        step = x - slope / bend
        following = torch.where((step >= low) & (step <= high), step, (low + high) / 2)
        far = (following - x).abs() > 16 * torch.finfo(x.dtype).eps * (1 + x.abs())
        x, left = following, int(far.sum())
        # sorting out costs more than a few steps on entries that are done
        if 4 * left < len(x):
            result[index] = x
            index, a, b, t, low, high, x = (value[far] for value in (index, a, b, t, low, high, x))
        if not left:
            break
    result[index] = x
    return result


def _squared(value: Tensor) -> Tensor:
    return value.square().sum(-1, keepdim=True)


def rules() -> list[Rule]:
    return [
        Rule("softmax", softmax, Kind.CLOSED_FORM),
        Rule("log_softmax", log_softmax, Kind.CLOSED_FORM),
        Rule("glu", glu, Kind.CLOSED_FORM),
    ]
