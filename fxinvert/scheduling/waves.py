"""Schedules: which segments are trained from the same snapshot, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from fxinvert.errors import CutError, DataError
from fxinvert.passes.plan import Plan, Segment
from fxinvert.settings import check_choice, names_of

Wave = tuple[Segment, ...]


def _one_by_one(segments: Wave, graph: fx.Graph) -> list[Wave]:
    """Each segment sees what the updated earlier ones produce."""
    return [(segment,) for segment in segments]


def _together(segments: Wave, graph: fx.Graph) -> list[Wave]:
    """All segments from one snapshot."""
    return [segments]


def _single(segments: Wave, graph: fx.Graph) -> list[Wave]:
    """One segment."""
    if len(segments) > 1:
        names = ", ".join(segment.name for segment in segments)
        raise DataError(f"schedule 'single' trains one segment; say which of {names}")
    return [segments]


def _waves(segments: Wave, graph: fx.Graph) -> list[Wave]:
    """Segments of which none feeds another together; each wave sees what the updated earlier ones produce."""
    depth: dict[str, int] = {}
    upstream = _upstream(segments, graph)
    for segment in segments:
        depth[segment.name] = 1 + max((depth[name] for name in upstream[segment.name]), default=-1)
    return [
        tuple(segment for segment in segments if depth[segment.name] == level)
        for level in sorted(set(depth.values()))
    ]


SCHEDULES: dict[str, Callable[[Wave, fx.Graph], list[Wave]]] = {
    "sequential": _one_by_one,
    "parallel": _together,
    "waves": _waves,
    "single": _single,
}


def waves(
    plan: Plan,
    schedule: str,
    graph: fx.Graph,
    names: Sequence[str] | str | None = None,
    *,
    by_gradients: bool = False,
) -> list[Wave]:
    """The waves of one sweep: segments with something to train, grouped and ordered by the schedule.

    Args:
        plan: the segments.
        schedule: "sequential", "parallel", "waves" or "single".
        graph: what the plan was made for.
        names: of the segments to train; None: all.
        by_gradients: whether the method follows gradients, so that it trains what cannot be solved for, too.

    Raises:
        DataError: there is no such schedule, or the plan has nothing to train.
        CutError: a segment is named that there is not, or that there is twice.
    """
    check_choice("schedule", schedule, (*SCHEDULES, "auto"))
    return SCHEDULES[schedule](_chosen(plan, names, by_gradients), graph)


def trained_segments(plan: Plan, by_gradients: bool = False) -> Wave:
    """The segments with something to train, or to solve for.

    Raises:
        DataError: there are none.
    """
    followed = tuple(segment for segment in plan.segments if segment.parameters)
    trained = followed if by_gradients else tuple(segment for segment in followed if segment.trained)
    if trained:
        return trained
    why = "no segment with parameters that can be trained"
    if not followed:
        raise DataError(f"the plan has {why}: none of its ops depends on any that is not frozen")
    raise DataError(
        f"the plan has {why} in closed form: no rule tells how those of {followed[0].name!r} follow from what it should have "
        "produced (weights that are computed from parameters otherwise than affinely or by weight_norm, as by spectral_norm or "
        "orthogonal, stay as they are; methods 'auto', 'gradient' and 'joint' train what they are computed from)"
    )


def _chosen(plan: Plan, names: Sequence[str] | str | None, by_gradients: bool) -> Wave:
    known = [segment.name for segment in plan.segments]
    twice = sorted({name for name in known if known.count(name) > 1})
    if twice:
        raise CutError(f"the plan has several segments of the name {', '.join(twice)}")
    trained = trained_segments(plan, by_gradients)
    if names is None:
        return trained
    wanted = names_of("only", names)
    if not wanted:
        raise CutError("only names no segment to train; leave it out to train them all")
    if len(set(wanted)) < len(wanted):
        raise CutError(f"segments are named twice: {', '.join(wanted)}")
    possible = [segment.name for segment in trained]
    for name in wanted:
        if name not in possible:
            why = "it has nothing to train" if name in known else "the plan has none of this name"
            raise CutError(f"no segment {name!r} to train: {why}; those to train are {', '.join(possible)}")
    return tuple(segment for segment in trained if segment.name in wanted)


def _upstream(segments: Wave, graph: fx.Graph) -> dict[str, set[str]]:
    """The segments that lead to each, however far away."""
    own = {path: segment.name for segment in segments for path in segment.nodes}
    reached: dict[fx.Node, set[str]] = {}
    found: dict[str, set[str]] = {segment.name: set() for segment in segments}
    for node in graph.nodes:
        before = set[str]().union(*(reached[n] for n in node.all_input_nodes))
        name = own.get(node.meta.get("path", ""))
        if name is not None:
            found[name] |= before - {name}
            before = before | {name}
        reached[node] = before
    return found
