"""Judging proposals: how far to go along each update, measured on held-out data; never further than it helps.

Updates of one proposal were found from one snapshot, each as if the others stayed. Taken together in full they may
overshoot, so the correction is shared among them: in equal shares, in proportion to what each explains, or searched,
one after the other, for the multiple of each that is best on held-out data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from fxinvert.errors import DataError
from fxinvert.heads import Heads
from fxinvert.passes.capture import evaluating
from fxinvert.training.batch import Batch
from fxinvert.training.context import Context, State
from fxinvert.training.metrics import Metrics, Tally
from fxinvert.training.work import Proposal

#: multiples of the full update that are tried; a linear model of the loss is only good nearby
STEPS = (1.0, 0.5, 0.25, 0.1)
#: batches that are read before all candidates are tried on them
_AT_A_TIME = 8

Share = Literal["searched", "equal", "explained", "none"]
#: the multiple of each update of a proposal
Sizes = tuple[float, ...]


@dataclass(frozen=True)
class Candidate:
    """A multiple of each update of one of several proposals."""

    proposal: int
    sizes: Sizes


class Measure(Protocol):
    """The held-out metrics of candidates."""

    def __call__(self, proposals: Sequence[Proposal], candidates: Sequence[Candidate]) -> list[Metrics]: ...


@dataclass(frozen=True)
class Judged:
    """What was found best; sizes are 0 where staying is."""

    candidate: Candidate
    metrics: Metrics


def check_share(share: str) -> None:
    """Raises DataError unless there is such a way to share."""
    if share not in get_args(Share):
        raise DataError(f"unknown share {share!r}; known are {', '.join(get_args(Share))}")


def judge(proposals: Sequence[Proposal], share: Share, measure: Measure, start: Metrics) -> Judged:
    """The candidate with the least held-out loss, or that which stays.

    Args:
        proposals: alternatives.
        share: how updates of one proposal share the correction.
        measure: held-out metrics.
        start: of the state as it is.
    """
    candidates = [
        Candidate(i, tuple(step * size for size in _shares(proposal, share)))
        for i, proposal in enumerate(proposals)
        for step in STEPS
    ]
    stay = Judged(Candidate(0, (0.0,) * len(proposals[0])), start)
    found = _best(proposals, candidates, measure, stay)
    if share == "searched" and len(proposals[found.candidate.proposal]) > 1:
        searched = _search(proposals, found.candidate.proposal, measure, start)
        found = min(found, searched, key=lambda judged: judged.metrics.loss)
    return found


def _shares(proposal: Proposal, share: Share) -> Sizes:
    if share == "equal":
        return (1 / len(proposal),) * len(proposal)
    if share == "explained":
        explained = [max(update.explained, 0.0) for update in proposal]
        if sum(explained) > 0:
            return tuple(value / sum(explained) for value in explained)
        return (1 / len(proposal),) * len(proposal)
    return (1.0,) * len(proposal)


def _search(proposals: Sequence[Proposal], index: int, measure: Measure, start: Metrics) -> Judged:
    """Settles the size of one update after the other, those whose turn has not come yet 0.

    The last comes first: nearest to the output an update does what it promises, and the earlier ones, whose promises
    hold only nearby, then add what is left to gain.
    """
    count = len(proposals[index])
    found = Judged(Candidate(index, (0.0,) * count), start)
    for i in reversed(range(count)):
        sizes = found.candidate.sizes
        tried = [Candidate(index, (*sizes[:i], step, *sizes[i + 1 :])) for step in STEPS]
        found = _best(proposals, tried, measure, found)
    return found


def _best(
    proposals: Sequence[Proposal], candidates: Sequence[Candidate], measure: Measure, best: Judged
) -> Judged:
    for candidate, metrics in zip(candidates, measure(proposals, candidates), strict=True):
        if metrics.loss < best.metrics.loss:
            best = Judged(candidate, metrics)
    return best


def moved(state: Mapping[str, Tensor], proposal: Proposal, sizes: Sizes) -> State:
    """The tensors that a proposal changes, after some multiple of each of its updates."""
    total: dict[str, Tensor] = {}
    for update, size in zip(proposal, sizes, strict=True):
        for name, change in update.changes.items():
            # the sum is made in the solution's float64, so that rounding happens once
            before = total[name] if name in total else state[name].double()
            total[name] = before + size * change.double()
    return {name: value.to(state[name].dtype) for name, value in total.items()}


def tallies(
    context: Context,
    batches: Iterable[Batch],
    *,
    proposals: Sequence[Proposal],
    candidates: Sequence[Candidate],
) -> list[Tally]:
    """The sums that metrics are made of, for the context's state changed by each of the candidates."""
    base = context.state()
    states = [moved(base, proposals[c.proposal], c.sizes) for c in candidates]
    totals = [Tally() for _ in candidates]
    stream = iter(batches)
    with torch.no_grad(), evaluating(context.graph):
        while piece := list(islice(stream, _AT_A_TIME)):
            for i, state in enumerate(states):
                context.load(base | state)
                for batch in piece:
                    outputs = context.graph(*context.graph.meta["inputs"].tensors(batch.inputs))
                    totals[i] += Tally.of(outputs, batch, heads=Heads.of(context.graph))
    context.load(base)
    return totals
