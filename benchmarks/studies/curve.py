"""How well a model does over time, while a method improves it.

A method is an iterator of models. Time runs while it works and stands while its models are measured, so that all
methods are measured alike. It is processor time of one thread: it depends far less than wall time on what else runs.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxinvert.models.samples import Samples, by_name, loss, score

Curve = list[dict[str, Any]]

#: AdamW's epochs that are looked at grow by 1.6 each time: four are seven times as many epochs
PATIENCE = 4


@dataclass(frozen=True)
class Timed:
    """A model that a method has shown on its way, and the processor seconds that it had taken until then."""

    seconds: float
    model: nn.Module


def follow(
    snapshots: Iterable[nn.Module | Timed],
    held_out: Samples,
    tests: Mapping[str, Samples],
    seconds: float = math.inf,
    patience: int = PATIENCE,
    every: bool = False,
) -> Curve:
    """Measures the models that a method gives: `{"seconds": …, "held_out": {"loss": …, "score": …}, test: …, …}` for each.

    Args:
        snapshots: the method; models that are not `Timed` are timed as they are given.
        held_out: what its user would choose by.
        tests: what is reported, by name: of the last model, and of those that are the best so far on held-out data.
        seconds: of processor time, after which it is not followed further.
        patience: after how many models in a row that are no better on held-out data it is not followed further.
        every: whether all models are reported, and followed to the end.
    """
    curve, spent, least, idle, models = Curve(), 0.0, math.inf, 0, iter(snapshots)
    while spent < seconds and (every or idle < patience):
        began = time.process_time()
        model = next(models, None)
        spent += time.process_time() - began
        if model is None:
            break
        if isinstance(model, Timed):
            spent, model = model.seconds, model.model
        last = model
        point: dict[str, Any] = {"seconds": spent, "held_out": metrics(model, held_out)}
        better = point["held_out"]["loss"] < least
        if better or every:
            least = min(least, point["held_out"]["loss"])
            point |= {name: metrics(model, part) for name, part in tests.items()}
        idle = 0 if better else idle + 1
        curve.append(point)
    if idle and not every:
        curve[-1] |= {name: metrics(last, part) for name, part in tests.items()}
    return curve


def settle() -> None:
    """Collects garbage, and lets later collections pass by all that is loaded: with torch they take a quarter of a second."""
    gc.collect()
    gc.freeze()


@torch.no_grad()
def metrics(model: nn.Module, samples: Samples) -> dict[str, float]:
    """Mean loss, and accuracy (of classes) or R² (of numbers), the mean over the outputs; in eval mode."""
    training = model.training
    model.eval()
    outputs = [by_name(model(*part.inputs)) for part in samples.split(500)]
    model.train(training)
    joined = {name: torch.cat([part[name] for part in outputs]) for name in samples.labels}
    reached = [score(joined[name], labels) for name, labels in samples.labels.items()]
    return {"loss": float(loss(joined, samples.labels)), "score": sum(reached) / len(reached)}


def best(curve: Curve, seconds: float = math.inf) -> dict[str, Any]:
    """The point with the least loss on held-out data among those reached in a time; the first one if none was."""
    reached = [point for point in curve if point["seconds"] <= seconds] or curve[:1]
    return min(reached, key=lambda point: point["held_out"]["loss"])


def running(curve: Curve) -> Iterator[dict[str, Any]]:
    """At each point, the best one so far."""
    for point in curve:
        yield {**best(curve, point["seconds"]), "seconds": point["seconds"]}
