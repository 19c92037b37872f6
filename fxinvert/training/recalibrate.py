"""Batch-norm statistics, estimated anew for parameters that have changed: sums over samples, like all statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxinvert.inversion.replay import forward_values
from fxinvert.passes.capture import evaluating
from fxinvert.training.batch import Batch
from fxinvert.training.context import Context
from fxinvert.training.costs import Probe, Stage, size_of
from fxinvert.training.replay import batch_norms, replay, statistics_of
from fxinvert.training.variants import given_by
from fxinvert.training.work import Proposal, Update, Work

#: what the update of all batch-norm statistics is called in results
NAME = "batch-norm statistics"


@dataclass(frozen=True)
class Moments:
    """Per channel, float64: Σ x and Σ x² over samples, each the mean over its positions; and the samples counted."""

    first: Tensor
    second: Tensor
    samples: int

    @classmethod
    def of(cls, value: Tensor) -> Moments:
        """Of what a batch norm sees, `(B, C, …)`."""
        rows = value.double().movedim(1, 0).flatten(1)
        share = len(value) / rows.shape[1]
        return cls(rows.sum(1) * share, rows.square().sum(1) * share, len(value))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.first + other.first, self.second + other.second, self.samples + other.samples)

    @property
    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """Over all samples and positions."""
        mean = self.first / self.samples
        return mean, (self.second / self.samples - mean.square()).clamp(min=0)


def recalibrated(work: Work) -> Proposal:
    """The change of all batch-norm statistics to those of the training data; empty if there is nothing to change."""
    context, total = work.context, dict[str, Moments]()
    if not batch_norms(context):
        return []
    for block in work.blocks(moments, {}, None):
        for part in block:
            total = {path: total[path] + own if path in total else own for path, own in part.items()}
    changes: dict[str, Tensor] = {}
    for path, own in total.items():
        names = statistics_of(context, context.nodes[path])
        for name, value in zip(names, own.mean_and_variance, strict=True):
            changes[name] = value - context.tensors[name].double()
    return [Update(NAME, changes)] if changes else []


def recalibration(probe: Probe) -> Iterator[Stage]:
    """What `recalibrated` costs, if there is something to change."""
    if batch_norms(probe.context):
        cost, found = probe.measured(moments, {})
        yield Stage(
            tasks=((NAME, cost),),
            by_chunk=True,
            samples=probe.samples,
            memory=2 * probe.batch_size * probe.values,
            sent=size_of(found),
        )


def moments(context: Context, batches: Iterable[Batch]) -> dict[str, Moments]:
    """What every batch norm sees while all of them normalize by the batch, by the path of the op.

    Batches of one sample have no variance, and are left out.
    """
    nodes = batch_norms(context)
    names = [name for node in nodes for name in statistics_of(context, node)]
    placeholders = list(context.graph.graph.find_nodes(op="placeholder"))
    total: dict[str, Moments] = {}
    with torch.no_grad(), evaluating(context.graph):
        for batch in (batch for batch in batches if len(batch) > 1):
            given = context.graph.meta["inputs"].tensors(batch.inputs)
            values = forward_values(context.graph, dict(zip(placeholders, given, strict=True)))
            moving = given_by(context, {name: context.tensors[name].clone() for name in names})
            values = replay(context, values, moving, nodes[-1], training=True)
            for node in nodes:
                path, own = node.meta["path"], Moments.of(values[node.all_input_nodes[0]])
                total[path] = total[path] + own if path in total else own
    return total
