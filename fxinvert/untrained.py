"""Parameters that keep their values although they are not frozen: told, since nothing else in a result shows it."""

from __future__ import annotations

from torch import fx

from fxinvert.passes.capture import attribute
from fxinvert.passes.computed import is_open
from fxinvert.passes.plan import Plan
from fxinvert.passes.synthesize import parameters_of

#: names that are listed; of more only the number
_LISTED = 3


def untrained(plan: Plan, graph: fx.GraphModule, by_gradients: bool) -> list[str]:
    """What to note of parameters that the graph computes with and the plan does not train, in a sentence; nothing if there are none.

    Args:
        plan: of the graph.
        graph: the traced model.
        by_gradients: whether the method follows gradients, so that it trains what cannot be solved for, too.
    """
    solved = {path for segment in plan.segments for path in segment.trained}
    read = {
        name for n in graph.graph.nodes if n.meta.get("path") in solved for name in parameters_of(n).values()
    }
    owned = [name for segment in plan.segments for name in segment.parameters]
    trained = {id(attribute(graph, name)) for name in owned if by_gradients or name in read}
    named = dict(graph.named_parameters())
    kept = [name for name, value in named.items() if id(value) not in trained and is_open(graph, name)]
    if not kept:
        return []
    more = f" and {len(kept) - _LISTED} more" if len(kept) > _LISTED else ""
    share = sum(named[name].numel() for name in kept) / sum(value.numel() for value in named.values())
    note = (
        f"{', '.join(kept[:_LISTED])}{more}, {100 * share:.0f} % of the parameters, keep their values: what computes with them "
        "cannot be trained, or has others that are frozen"
    )
    left = [name for name in owned if name in kept]
    if left:
        note += f"; methods that follow gradients, as 'auto', train {', '.join(left[:_LISTED])}{' …' * (len(left) > _LISTED)}"
    return [note]
