"""Order: in which waves segments are trained, and in how many sweeps, where the user does not say.

Where a graph branches, the targets of all layers follow from one linearization, which costs as much as those of one of them.
So segments that are trained one after the other take a pass for each, and those that are trained from one snapshot one for all:
a method whose schedule is `"auto"` does the latter there, in twice as many sweeps.
"""

from __future__ import annotations

from collections.abc import Sequence

from fxinvert.passes.plan import Plan
from fxinvert.scheduling import waves
from fxinvert.training.context import Context
from fxinvert.training.sweeps import Wave
from fxinvert.training.work import Following, Method

AUTO = "auto"
#: at most
SWEEPS = 3


def ordered_waves(
    plan: Plan, schedule: str, method: Method, context: Context, only: Sequence[str] | str | None
) -> list[Wave]:
    """The waves of a sweep; schedule `"auto"` is the method's own.

    Raises:
        DataError, CutError: see `fxinvert.scheduling.waves`.
    """
    own = method.schedule if schedule == AUTO else schedule
    if own == AUTO:
        own = "parallel" if context.branches else "sequential"
    return waves(plan, own, context.graph.graph, only, by_gradients=isinstance(method, Following))


def most_sweeps(schedule: str, method: Method, context: Context) -> int:
    """How many sweeps there are at most, where the user does not say."""
    return 2 * SWEEPS if schedule == method.schedule == AUTO and context.branches else SWEEPS
