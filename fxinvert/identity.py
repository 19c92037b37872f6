"""What a run is about: which model, graph, plan, data and settings, so that another one is not taken for it."""

from __future__ import annotations

from typing import Any

import torch

import fxinvert
from fxinvert.errors import CutError, DataError
from fxinvert.feed import Feed
from fxinvert.passes.capture import attribute
from fxinvert.passes.plan import Plan
from fxinvert.scheduling.keys import content_key
from fxinvert.training.context import Context, digest_of


def check_plan(plan: Plan, context: Context) -> None:
    """Checks that a plan was made for this graph.

    Raises:
        CutError: it was not, and it is said what differs; or it is no plan.
    """
    if not isinstance(plan, Plan):
        raise CutError(f"the plan is {type(plan).__name__}; one from fxinvert.partition is needed")
    made = "the plan was made for another graph"
    known = dict(context.graph.named_parameters(remove_duplicate=False)) | context.nodes
    for segment in plan.segments:
        for name in (*segment.parameters, *segment.nodes, *segment.entry.split(", ")):
            if name not in known:
                raise CutError(f"{made}: this one has no {name!r}")
        for name, op in zip(segment.nodes, segment.ops, strict=False):
            here = context.nodes[name].meta.get("op", context.nodes[name].op)
            if here != op:
                raise CutError(f"{made}: {name!r} is {op} there and {here} here")
        count = sum(attribute(context.graph, name).numel() for name in segment.parameters)
        if count != segment.parameter_count:
            raise CutError(
                f"{made}: segment {segment.name!r} has {segment.parameter_count:,} parameters there and {count:,} here"
            )


def check_finite(plan: Plan, context: Context) -> None:
    """Checks that the parameters that are to be trained are finite.

    Raises:
        DataError: one of them is not.
    """
    for name in dict.fromkeys(name for segment in plan.segments for name in segment.parameters):
        value = attribute(context.graph, name)
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise DataError(
                f"parameter {name!r} has NaN or infinite values in {bad} of {value.numel()} places; load weights that "
                "are finite"
            )


def identity(
    context: Context, plan: Plan, feeds: dict[str, Feed], settings: tuple[Any, ...]
) -> dict[str, Any]:
    """What a run is about, part by part, so that it can be said what differs."""
    trainer, sweeping, ordered, targets, threads = settings
    return {
        "fxinvert": fxinvert.__version__,
        "torch": torch.__version__,
        "model": {name: digest_of({name: value})[:16] for name, value in sorted(context.state().items())},
        "graph": content_key(context.graph.code)[:16],
        "plan": content_key(plan.to_dict())[:16],
        "data": {name: f"{feed.part} {feed.total}" for name, feed in feeds.items()},
        "settings": {
            "method": f"{trainer.name} {content_key(trainer)[:16]}",
            "sweeps": repr(sweeping),
            "reconstruction": context.reconstruction,
            "waves": [[segment.name for segment in wave] for wave in ordered],
            "output_target": [target.name for target in targets],
            "chunks": {name: len(feed.counts) for name, feed in feeds.items()},
            "threads": threads,
            "memory_limit": context.budget.limit,
            "solvers": context.solvers,
            "compiled": context.compiled,
            "masks": digest_of(context.masks)[:16] if context.masks else "",
        },
    }
