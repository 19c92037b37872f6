"""How well refined targets do: pushed forward from every cut of the reference networks, against the output target."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import fxinvert
from benchmarks.measure import Ratio
from fxinvert import models
from fxinvert.inversion.attainable import attainable
from fxinvert.inversion.replay import output_given
from fxinvert.inversion.rest import Rest
from fxinvert.inversion.stationary import first_order_error
from fxinvert.inversion.stepping import TOLERANCE
from fxinvert.models.zoo import NETWORKS
from fxinvert.passes.flow import by_sample
from fxinvert.rules.certificate import relative

#: steps, and samples of the training part; of large outputs fewer, and as many of the test part
STEPS, COUNT, FEW, LARGE = 20, 64, 8, 64


@dataclass(frozen=True)
class Row:
    """One network and output target: the shares of the samples that reach the output target from its cuts.

    Attributes:
        moved: the share of the samples whose output is to change at all.
        worst: the least share among the cuts,
        at: and the cut,
        mean: of the cuts.
        beyond: the share of the samples whose output target is proven to be out of reach of the earlier cuts.
        stationary: of those that miss there all the same, the share whose derivative shows no way on.
        seconds: for all cuts' targets.
    """

    network: str
    samples: int
    output_target: str
    cuts: int
    moved: float
    worst: float
    at: str
    mean: float
    beyond: float
    stationary: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def consistency(name: str, output_target: str, *, count: int = COUNT, steps: int = STEPS) -> Row:
    """The figures of a converged network: `"nearest"` of the whole test part, others of some training samples.

    What is right already need not move for the nearest; with a margin most has to.
    """
    parts = models.data_of(name)
    samples = parts.test if output_target == "nearest" else parts.train
    output = next(iter(samples.labels))
    inputs, labels = samples.inputs, samples.labels[output]
    graph = fxinvert.trace(
        models.load(name, "converged"),
        tuple(values[:2] for values in inputs),
        output=output if len(samples.labels) > 1 else None,
    )
    target = "regression" if labels.is_floating_point() else output_target
    inverse = fxinvert.invert(graph, output_target=target, refine=steps, reconstruction="linearized")
    if int(inverse.output_node.meta["tensor_meta"].shape[1:].numel()) > LARGE:
        count = FEW
    elif output_target == "nearest":
        count = len(labels)
    inputs, labels = tuple(values[:count] for values in inputs), labels[:count]
    exits = {segment.exit for segment in fxinvert.partition(graph).segments}
    cuts = [node for node in graph.graph.nodes if exits & {node.name, node.meta.get("path")}]
    values = inverse.forward(inputs if len(inputs) > 1 else inputs[0])
    with torch.no_grad():
        goal = inverse.output_target(values[inverse.output_node], labels)
        start = time.perf_counter()
        found = inverse.targets(values, labels, cuts)
        seconds = time.perf_counter() - start

        def missed(result: Tensor) -> Tensor:
            return relative(result - goal, goal) > TOLERANCE

        missing = [missed(output_given(graph, values, cut, found[cut])) for cut in cuts]
        shares = [1 - float(rows.float().mean()) for rows in missing]
        moved = float(missed(values[inverse.output_node]).float().mean())
        bound = attainable(graph, values, goal)
        beyond = 0.0 if bound is None else float((bound.least > TOLERANCE).float().mean())
        worst = min(range(len(cuts)), key=shares.__getitem__)
        rest = Rest(graph, values, cuts[worst])
        sticking = missing[worst] if bound is None else missing[worst] & ~bound.forbids(rest)
        rows = sticking.nonzero()[:, 0]
        stationary = 0.0
        if len(rows):
            value = by_sample(cuts[worst], found[cuts[worst]])[rows]
            left = first_order_error(rest.of(rows), value, by_sample(rest.exit, goal)[rows])
            stationary = float((left > TOLERANCE).sum()) / len(labels)
    return Row(
        name,
        len(labels),
        target,
        len(cuts),
        moved,
        shares[worst],
        cuts[worst].meta["path"],
        sum(shares) / len(cuts),
        beyond,
        stationary,
        seconds,
    )


def rows(names: Sequence[str] = tuple(NETWORKS)) -> Iterator[Row]:
    """The table; classes by the nearest output with the label on top, and by a margin."""
    for name in names:
        row = consistency(name, "nearest")
        yield row
        if row.output_target == "nearest":
            yield consistency(name, "margin")


def run() -> Iterator[Ratio]:
    """The share of the samples that miss at the worst cut; aim 1 %."""
    for row in rows():
        yield Ratio(
            f"{row.network}, {row.output_target}",
            "all samples",
            1 - row.worst,
            0.01,
            f"missed at {row.at}, the worst of {row.cuts} cuts; {1 - row.mean:.1%} in the mean; "
            f"{row.moved:.0%} of {row.samples} had to move, {row.beyond:.1%} are proven to be out of reach, "
            f"{row.stationary:.1%} stationary there; {row.seconds:.1f} s",
        )
