"""Schedules: which segments are trained from the same snapshot, and in which order."""

from __future__ import annotations

from collections.abc import Callable

from fxinvert.errors import DataError
from fxinvert.passes.plan import Plan, Segment

Wave = tuple[Segment, ...]


def _sequential(segments: tuple[Segment, ...]) -> list[Wave]:
    """Each segment sees what the updated earlier ones produce."""
    return [(segment,) for segment in segments]


def _parallel(segments: tuple[Segment, ...]) -> list[Wave]:
    """All segments from one snapshot."""
    return [segments]


SCHEDULES: dict[str, Callable[[tuple[Segment, ...]], list[Wave]]] = {
    "sequential": _sequential,
    "parallel": _parallel,
}


def waves(plan: Plan, schedule: str) -> list[Wave]:
    """The waves of one sweep: segments with something to train, grouped and ordered by the schedule.

    Raises:
        DataError: there is no such schedule, or the plan has nothing to train.
    """
    if schedule not in SCHEDULES:
        raise DataError(f"unknown schedule {schedule!r}; known are {', '.join(SCHEDULES)}")
    trained = tuple(segment for segment in plan.segments if segment.trained)
    if not trained:
        raise DataError("the plan has no segment with parameters that can be trained in closed form")
    return SCHEDULES[schedule](trained)
