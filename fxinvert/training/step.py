"""Step search: how far to go along an update, judged by held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fxinvert.training.metrics import Metrics

#: shares of the full update that are tried; a linear model of the loss is only good nearby
STEPS = (1.0, 0.5, 0.25, 0.1)


class Step(NamedTuple):
    """The step taken: its size (0: none was better), and the held-out metrics there."""

    size: float
    metrics: Metrics


def search_step(
    parameters: Mapping[str, Tensor],
    changes: Mapping[str, Tensor],
    measure: Callable[[], Metrics],
    start: Metrics,
    sizes: Sequence[float] = STEPS,
) -> Step:
    """Moves parameters along their changes by the size with the least held-out loss, or not at all.

    Args:
        parameters: by name, changed in place.
        changes: ΔΘ by name, for a full step.
        measure: the held-out metrics with the parameters as they are.
        start: the held-out metrics before.
        sizes: what is tried, the largest first.
    """
    before = {name: parameters[name].detach().clone() for name in changes}

    def move(size: float) -> None:
        for name, change in changes.items():
            # the sum is made in the solution's float64, so that rounding happens once
            parameters[name].copy_((before[name].double() + size * change).to(before[name].dtype))

    best = Step(0.0, start)
    with torch.no_grad():
        for size in sizes:
            move(size)
            metrics = measure()
            if metrics.loss < best.metrics.loss:
                best = Step(size, metrics)
        move(best.size)
    return best
