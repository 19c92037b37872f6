"""Judging proposals: how far to go along each update, measured on held-out data; never further than it helps.

Updates of one proposal were found from one snapshot, each as if the others stayed. Taken together in full they may
overshoot, so the correction is shared among them: in equal shares, in proportion to what each explains, or as a
quadratic model of the held-out loss says. How far to go along the shares is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fxinvert.heads import Heads
from fxinvert.training.batch import Batch
from fxinvert.training.context import Context
from fxinvert.training.metrics import Metrics, Tally
from fxinvert.training.outputs import OutputsOver, outputs_over
from fxinvert.training.sizes import Quadratic
from fxinvert.training.work import Proposal, Sizes, moved

#: the multiple of an update that is tried after the whole; a parabola through their losses says which one is tried then
HALF = 0.5
#: the least and the largest multiple that it may say
LEAST, MOST = 0.05, 1.5
#: multiples nearer than this share of one that was tried are not tried
NEAR = 0.1

Share = Literal["searched", "equal", "explained", "none"]


@dataclass(frozen=True)
class Candidate:
    """A multiple of each update of one of several proposals."""

    proposal: int
    sizes: Sizes


class HeldOut(Protocol):
    """Held-out data, and a sample of them.

    Attributes:
        sampled: whether the sample is less than all of them.
    """

    @property
    def sampled(self) -> bool: ...

    def search(self, proposals: Sequence[Proposal], candidates: Sequence[Candidate]) -> list[Metrics]:
        """The metrics, on the sample, of the state changed by each of the candidates."""
        ...

    def measure(self, proposals: Sequence[Proposal], candidates: Sequence[Candidate]) -> list[Metrics]:
        """The same on all held-out data."""
        ...

    def quadratic(self, proposal: Proposal) -> Quadratic:
        """The model of the loss, on the sample, in the sizes of the updates."""
        ...


@dataclass(frozen=True)
class Judged:
    """What was found best; sizes are 0 where staying is."""

    candidate: Candidate
    metrics: Metrics


def judge(proposals: Sequence[Proposal], share: Share, held_out: HeldOut, start: Metrics) -> Judged:
    """The candidate with the least loss on a sample of held-out data, if it is better on all of them; else staying.

    Args:
        proposals: alternatives.
        share: how updates of one proposal share the correction.
        held_out: the data, and the state as it is.
        start: metrics of that state on all held-out data.
    """
    nothing = Candidate(0, (0.0,) * len(proposals[0]))
    begun = held_out.search(proposals, [nothing])[0] if held_out.sampled else start
    found = _searched(proposals, share, held_out, Judged(nothing, begun))
    if not any(found.candidate.sizes):
        return Judged(nothing, start)
    if held_out.sampled:
        (metrics,) = held_out.measure(proposals, [found.candidate])
        found = Judged(found.candidate, metrics)
    return found if found.metrics.loss < start.loss else Judged(nothing, start)


def _searched(proposals: Sequence[Proposal], share: Share, held_out: HeldOut, stay: Judged) -> Judged:
    """The best proposal with all of its shares, and then the best of a few multiples of these."""
    shares = [_shares(proposal, share) for proposal in proposals]
    most = 1.0 if share in ("equal", "explained") else MOST
    if share == "searched" and len(proposals[0]) > 1:
        sizes = held_out.quadratic(proposals[0]).least(MOST)
        if not any(sizes):
            return stay
        shares = [sizes if len(own) == len(sizes) else own for own in shares]

    def measured(candidates: list[Candidate]) -> list[Judged]:
        return list(map(Judged, candidates, held_out.search(proposals, candidates)))

    whole = min(measured([Candidate(i, own) for i, own in enumerate(shares)]), key=_loss)
    index = whole.candidate.proposal

    def at(step: float) -> Judged:
        (judged,) = measured([Candidate(index, _times(step, shares[index]))])
        return judged

    half = at(HALF)
    found = min([stay, whole, half], key=_loss)
    step = min(interpolated(stay.metrics.loss, half.metrics.loss, whole.metrics.loss), most)
    tried = [HALF, 1.0]
    if all(abs(step - other) > NEAR * other for other in tried):
        found = min([found, at(step)], key=_loss)
        tried.append(step)
    if found is stay and LEAST not in tried:  # losses that explode are no parabola
        found = min([stay, at(LEAST)], key=_loss)
    return found


def _times(step: float, shares: Sizes) -> Sizes:
    return tuple(step * share for share in shares)


def interpolated(at_0: float, at_half: float, at_1: float) -> float:
    """Where a parabola through losses at 0, ½ and 1 is least, between `LEAST` and `MOST`; a short step without one."""
    slope, curvature = 4 * at_half - 3 * at_0 - at_1, 4 * (at_0 - 2 * at_half + at_1)
    if not math.isfinite(slope + curvature) or slope >= 0:
        return LEAST
    return min(max(-slope / curvature, LEAST), MOST) if curvature > 0 else MOST


def _shares(proposal: Proposal, share: Share) -> Sizes:
    if share == "equal":
        return (1 / len(proposal),) * len(proposal)
    if share == "explained":
        explained = [max(update.explained, 0.0) for update in proposal]
        if sum(explained) > 0:
            return tuple(value / sum(explained) for value in explained)
        return (1 / len(proposal),) * len(proposal)
    return (1.0,) * len(proposal)


def _loss(judged: Judged) -> float:
    """What counts; no number at all counts as infinitely bad."""
    return math.inf if math.isnan(judged.metrics.loss) else judged.metrics.loss


def tallies(
    context: Context,
    batches: Iterable[Batch],
    *,
    proposals: Sequence[Proposal],
    candidates: Sequence[Candidate],
    outputs_over: OutputsOver = outputs_over,
) -> list[Tally]:
    """The sums that metrics are made of, for the context's state changed by each of the candidates."""
    states = [moved(context.tensors, proposals[c.proposal], c.sizes) for c in candidates]
    totals, heads = [Tally() for _ in candidates], Heads.of(context.graph)
    for batch, outputs in outputs_over(context, batches, states):
        for i, own in enumerate(outputs):
            totals[i] += Tally.of(own, batch, heads=heads)
    return totals
