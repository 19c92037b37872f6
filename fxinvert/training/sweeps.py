"""Sweeps: segments are trained wave by wave, every proposal is judged, and the best state seen is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fxinvert.output_target import OutputTarget
from fxinvert.passes.plan import Segment
from fxinvert.result import Record
from fxinvert.training.best import Best
from fxinvert.training.confirm import ANY
from fxinvert.training.context import State
from fxinvert.training.judge import Candidate, Judged, Share, judge
from fxinvert.training.metrics import Metrics
from fxinvert.training.place import Place
from fxinvert.training.recalibrate import recalibrated
from fxinvert.training.repeat import CERTAIN, MEAN, mean, repeated
from fxinvert.training.work import Back, Method, Proposal, moved

Wave = tuple[Segment, ...]


@dataclass(frozen=True)
class Settings:
    """How sweeps go.

    Attributes:
        sweeps: how many, at most.
        share: how updates found together share the correction.
        frozen_inputs: whether a segment's input and target are those of the state that the sweep began with, not those
            that the updated earlier segments produce.
        recalibrate: whether batch-norm statistics are estimated anew after an update.
        patience: after how many sweeps in a row that bring too little to stop.
        least_gain: what a sweep must at least bring, as a share of the held-out loss.
        confidence: with which held-out samples must confirm the gain of all sweeps.
        folds: of the training samples, without each of which sweeps are repeated (see `fxinvert.training.repeat`); 1: they
            are not.
        in_doubt: whether they are only repeated where held-out samples leave doubt of the gain.
    """

    sweeps: int
    share: Share = "searched"
    frozen_inputs: bool = False
    recalibrate: bool = False
    patience: int = 1
    least_gain: float = 0.0
    confidence: float = 0.95
    folds: int = 1
    in_doubt: bool = False


def run_sweeps(
    place: Place,
    method: Method,
    waves: Sequence[Wave],
    targets: Sequence[OutputTarget],
    settings: Settings,
    advance: Callable[[str], None],
    watch: Callable[[Record, State], None] | None = None,
) -> tuple[Best, list[Record]]:
    """Sweeps over the waves.

    Of several output targets the one is used with which training the last segment gives the least held-out loss: that
    takes no inversion, and tells their kinds and scales apart. What held-out samples do not confirm is not taken.

    Args:
        place: where work is done.
        method: how segments are trained.
        waves: segments that are trained from the same snapshot, in order.
        targets: output targets, one or more.
        settings: how sweeps go.
        advance: is told about every wave that is done.
        watch: is shown every step, with the state that is returned if it is the last one.
    """
    begun = place.begun = place.state()
    place.begin("baseline")
    (baseline,) = place.measure([[]], [Candidate(0, ())])
    best, records = Best(baseline, begun), list[Record]()

    def sweep(number: int, ordered: Sequence[Wave]) -> None:
        place.sweep, snapshot = number, place.state()
        for wave in ordered:
            began = time.perf_counter()
            state = place.state()
            for record, changed in _wave(place, method, wave, settings, snapshot, best.latest, number):
                place.use(state | changed)
                state = place.state()
                best.see(record.after, state)
                records.append(record)
                if watch is not None:
                    watch(record, best.kept(place, settings.confidence))
            place.use(state)
            spent = time.perf_counter() - began
            advance(f"sweep {number}, {', '.join(s.name for s in wave)}: {best.latest} ({spent:.1f} s)")

    place.output_target, place.output_targets = targets[0], targets
    if len(targets) > 1:
        tried: list[tuple[Metrics, State, OutputTarget]] = []
        for place.output_target in targets:
            place.use(begun)
            best.latest = baseline
            sweep(0, [waves[-1][-1:]])
            tried.append((best.latest, place.state(), place.output_target))
        best.latest, state, place.output_target = min(tried, key=lambda result: result[0].loss)
        place.use(state)
        place.output_targets = [place.output_target]
    idle = 0
    for number in range(1, settings.sweeps + 1):
        before = best.latest.loss
        sweep(number, waves)
        gained = before - best.latest.loss
        idle = idle + 1 if number > 1 and gained <= settings.least_gain * before else 0
        if idle >= settings.patience or gained == 0:
            break
    # where any gain does, there is no doubt of one
    certain = ANY if settings.confidence == ANY else max(settings.confidence, CERTAIN)
    if settings.folds > 1 and not (settings.in_doubt and best.confirmed(place, certain)):
        once = replace(settings, folds=1, confidence=ANY)
        records.append(
            _repeat(
                place,
                best,
                settings.folds,
                waves,
                lambda own: run_sweeps(own, method, waves, targets, once, advance)[0].state,
            )
        )
        if watch is not None:
            watch(records[-1], best.kept(place, settings.confidence))
    if not best.confirmed(place, settings.confidence):
        best.metrics, best.state = baseline, begun
    return best, records


def _repeat(
    place: Place, best: Best, folds: int, waves: Sequence[Wave], sweep: Callable[[Place], State]
) -> Record:
    """Sees the mean of the best state and those of repeated sweeps, and what samples gain that these have not seen."""
    began, before = time.perf_counter(), best.metrics
    place.use(place.begun)
    best.unseen, states = repeated(place.begun, place.folds(folds), sweep)
    state = mean([best.state, *states])
    place.use(state)
    (metrics,) = place.measure([[]], [Candidate(0, ())])
    best.see(metrics, state)
    step = float(best.state is state)
    return Record(
        sweep=place.sweep,
        segments=tuple(segment.name for wave in waves for segment in wave),
        output_target=place.output_target.name,
        step=step,
        before=before,
        after=best.metrics,
        explained={MEAN: 0.0},
        damping={MEAN: 0.0},
        sizes={MEAN: step},
        seconds=time.perf_counter() - began,
    )


def _wave(
    place: Place,
    method: Method,
    wave: Wave,
    settings: Settings,
    snapshot: State,
    start: Metrics,
    number: int,
) -> Iterator[tuple[Record, State]]:
    """What is taken of a wave: records and the tensors that changed, as they come. The place may be used in between."""
    about = ("wave", method, [s.name for s in wave], place.output_target, settings, snapshot, start, number)

    def steps() -> Iterator[tuple[dict[str, Any], State]]:
        for record, changed in _steps(place, method, wave, settings, snapshot, start, number):
            yield record.to_dict(), changed

    place.begin(f"sweep {number}, {', '.join(s.name for s in wave)}")
    for record, changed in place.remembered(about, steps):
        yield Record.from_dict(record), changed


def _steps(
    place: Place,
    method: Method,
    wave: Wave,
    settings: Settings,
    snapshot: State,
    start: Metrics,
    number: int,
) -> Iterator[tuple[Record, State]]:
    current, latest, found = place.state(), start, list[tuple[Record, State]]()
    returned: State = {}

    def take(proposals: list[Proposal], began: float) -> Judged:
        """Judges proposals by what they do to the current state, and takes the best."""
        nonlocal latest, returned
        place.use(current)
        if place.context.masks:
            proposals = [[replace(u, changes=place.context.mask(u.changes)) for u in p] for p in proposals]
        judged = judge(proposals, settings.share, place, latest)
        chosen = proposals[judged.candidate.proposal]
        changed = moved(current, chosen, judged.candidate.sizes) if any(judged.candidate.sizes) else {}
        record = Record(
            sweep=number,
            segments=tuple(segment.name for segment in wave),
            output_target=place.output_target.name,
            step=max(judged.candidate.sizes, default=0.0),
            before=latest,
            after=judged.metrics,
            explained={update.op: update.explained for update in chosen},
            damping={update.op: update.damping for update in chosen},
            sizes={update.op: s for update, s in zip(chosen, judged.candidate.sizes, strict=True)},
            seconds=time.perf_counter() - began,
        )
        current.update(changed)
        place.taken = judged.candidate.proposal if any(judged.candidate.sizes) else None
        place.gained = 1 - judged.metrics.loss / latest.loss if latest.loss else 0.0
        latest = judged.metrics
        found.append((record, returned | changed))
        returned = {}
        return judged

    place.use(snapshot if settings.frozen_inputs else current)
    began = time.perf_counter()
    for step in method.train(place, wave):
        if isinstance(step, Back):
            returned = step.state
            current.update(returned)
            place.use(current)
            (latest,) = place.measure([[]], [Candidate(0, ())])
        else:
            judged = take(step, began)
            began = time.perf_counter()
            if settings.recalibrate and any(judged.candidate.sizes):
                gained, taken = place.gained, place.taken
                place.use(current)
                estimated = recalibrated(place)
                if estimated:
                    take([estimated], began)
                place.gained, place.taken = gained, taken
        yield from found
        found.clear()
        began = time.perf_counter()
        place.use(snapshot if settings.frozen_inputs else current)
