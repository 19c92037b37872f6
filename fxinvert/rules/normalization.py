"""Normalization: one line per op.

With fixed statistics it is a diagonal affine map. With those of the sample it is, for every group of n entries,

    y = w ⊙ z + b,   z = (x − μ) / √(σ² + ε)      (root mean square: μ = 0, σ² = mean x²),

and z ranges over a ball; `ball.py` finds the nearest pre-image.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxinvert.errors import NoRuleError
from fxinvert.rules.affine import Rows, invert_diagonal
from fxinvert.rules.ball import Ball, Bend, Lengths, Sums
from fxinvert.rules.certificate import Inverse
from fxinvert.rules.groups import settled
from fxinvert.rules.kernels import Kernel, kernel
from fxinvert.rules.op import Op
from fxinvert.rules.rule import Kind, Rule
from fxinvert.rules.scales import Scales
from fxinvert.rules.trainable import Scale, by_group, by_layer, by_size, by_statistics

#: values that are worked on at a time
CHUNK = 2**17
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
        groups: the entries that are normalized together, `(B, …)` → `(rows, G, n)`; the weights of a row's groups differ.
        eps: ε.
        centered: whether the mean is taken away.
        channels: whether the weight has an entry per channel; else one per entry of a group.
    """
    kappa = op.settings.limit(torch.float32)  # a small scale passes noise on, whatever the digits
    weight, bias = (op.parameters.get(name) for name in ("weight", "bias"))
    layout = functools.partial(_in_groups, op, groups, channels=channels)
    scales: Scales = op.cache.get(
        (kappa, op.anchor.shape[1:], op.anchor.dtype),
        tuple(value for value in (weight, bias) if value is not None),
        lambda: Scales.of(
            layout(op.anchor.new_ones(()) if weight is None else weight),
            None if bias is None else layout(bias),
            kappa,
            float(torch.finfo(torch.promote_types(op.anchor.dtype, torch.float32)).eps),
        ),
    )
    # near-zero scales need all digits
    working = torch.promote_types(target.dtype, torch.float32) if scales.tame else torch.float64
    ball = Ball(scales.to(working), eps, centered, kappa, 4 * torch.finfo(target.dtype).eps)
    rows = tuple(groups.split(value) for value in (op.anchor, op.output, target))
    answer = None
    if op.settings.compiled and scales.tame and op.anchor.numel():
        answer = _fused(op, ball, working, *rows)
    value, lengths, total, iterations = answer or _by_chunks(op, ball, working, *rows)
    if not scales.tame:
        value = torch.where(scales.largest > 0, value, rows[0].to(working))
    return settled(
        op,
        target,
        value,
        groups,
        groups,
        stay=lengths.same,
        outside=lengths.outside,
        doubtful=lengths.doubtful,
        damped=lengths.damping > 0,
        damping=float(lengths.damping.max()) if lengths.damping.numel() else 0.0,
        iterations=iterations,
        total=float(total),
    )


def _by_chunks(
    op: Op, ball: Ball, working: torch.dtype, anchor: Tensor, output: Tensor, target: Tensor
) -> tuple[Tensor, Lengths, Tensor, int]:
    """The answer by groups, `(B, G, n)`; what is known of the groups; a number that is finite only if all is; iterations."""
    # a few samples at a time, so that they stay in the processor's cache
    count = max(1, CHUNK // max(1, anchor.shape[1:].numel()))
    value = torch.empty_like(anchor, dtype=working, memory_format=torch.contiguous_format)
    parts, sums, known, iterations = [], [], [], 0
    # the less is taken and given back, the less often the system clears memory for it, which takes longer than all else
    spare = torch.empty_like(value[:count])
    for own, *given in zip(*(torch.split(v, count) for v in (value, anchor, output, target)), strict=True):
        x, y, t = (v.to(working) for v in given)
        z, of, more, steps = ball.direction(x, y, t, (own, spare[: len(own)]))
        parts.append(z)
        sums.append(torch.stack(of))
        known.append(more)
        iterations = max(iterations, steps)
    # a group's numbers are few, and an op on a few costs as much as on many
    of = Sums(*torch.cat(sums, 1).double())
    found, bend = ball.found(anchor.shape[-1], of, known)
    lengths = ball.lengths(anchor.shape[-1], of, found)
    factor, offset = lengths.factor.to(working), lengths.offset.to(working)
    bends = (
        [None] * len(parts)
        if bend is None
        else map(Bend._make, zip(*(torch.split(v, count) for v in bend), strict=True))
    )
    split = (torch.split(v, count) for v in (value, factor, offset))
    for z, own, times, plus, bent in zip(parts, *split, bends, strict=True):
        ball.placed(z, times, plus, bent, own)
    return value, lengths, _total(of, lengths), iterations


def _fused(
    op: Op, ball: Ball, working: torch.dtype, *rows: Tensor
) -> tuple[Tensor, Lengths, Tensor, int] | None:
    """The same by a kernel, for scales of one size; for other tame ones if all targets lie in the ball, else None.

    Beyond it the nearest direction takes iterations.
    """
    scales = ball.scales
    if not scales.even and not bool(ball.within(*(value[:1].to(working) for value in rows))[2].all()):
        return None  # the first sample mostly tells
    given = tuple(value.contiguous() for value in rows)
    # weights of one size are used only where they are not 1
    held = {"largest": scales.largest} | ({} if scales.ones else {"weight": scales.weight})
    held |= {} if scales.bias is None else {"bias": scales.bias}

    def function(x: Tensor, y: Tensor, t: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        own_scales: dict[str, Any] = dict(zip(held, others, strict=True))
        own = replace(ball, scales=replace(scales, **own_scales))
        z, of, there = own.within(x.to(working), y.to(working), t.to(working))
        exact = Sums(*(value.double() for value in of))
        found = None if scales.even else own.kept(exact, there)
        lengths = own.lengths(x.shape[-1], exact, found)
        factor, offset = lengths.factor.to(working), lengths.offset.to(working)
        value = (z * factor + offset).to(x.dtype)
        # what is returned is computed once, not wherever it is used
        return value, _total(of, lengths), there.all(), *lengths, factor, offset, *of

    key = (kernel, scales.even, given[0].shape[1:], given[0].dtype, given[0].device, *held)
    others = tuple(held.values())
    made: Kernel = op.cache.get(key, (), lambda: kernel(op, function, given, others, exact=True))
    value, total, there, *rest = made(*given, *others)
    if not scales.even and not bool(there):
        return None
    return value, Lengths(*rest[: len(Lengths._fields)]), total, 0


def _total(of: Sums, lengths: Lengths) -> Tensor:
    """A number that is finite only if all targets and answers are."""
    return (of.asked + of.own_size + of.size + lengths.factor + lengths.offset).sum()


def _trailing(op: Op) -> Rows:
    last = len(op.attributes["normalized_shape"])
    return Rows(lambda value: value.flatten(-last).flatten(0, -2)[:, None], torch.Tensor.reshape_as)


def _in_groups(op: Op, groups: Rows, value: Tensor, *, channels: bool) -> Tensor:
    """A weight or bias in the layout of the groups of a sample: `(1, G, n)`, or `(1, 1, n)` where all have the same."""
    value = _per_channel(op, value) if channels and value.dim() else value
    rows = groups.split(value.double().expand(1, *op.anchor.shape[1:])).flatten(0, -2)[None]
    return rows[:, :1] if not channels or bool((rows == rows[:, :1]).all()) else rows


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
