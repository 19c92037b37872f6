"""Sums over the data of the affine ops of segments: the normal equations that their closed-form training solves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxinvert.inversion.inverse_graph import InverseGraph
from fxinvert.inversion.replay import Values
from fxinvert.output_target import OutputTarget
from fxinvert.passes.capture import evaluating
from fxinvert.passes.computed import expression, weights_of
from fxinvert.passes.synthesize import parameters_of
from fxinvert.rules import ByPosition, Op, Trainable
from fxinvert.training.batch import Batch
from fxinvert.training.blocks import BLOCK, Equations, added, equations, equations_over
from fxinvert.training.budget import Size
from fxinvert.training.context import Context
from fxinvert.training.grams import Shifts
from fxinvert.training.lookups import LookupEquations
from fxinvert.training.positions import drawn_positions
from fxinvert.training.sensitivity import sensitivities

#: by use: one op, or several that share their parameters
Sums = dict[str, Equations]


def sums(
    context: Context,
    batches: Iterable[Batch],
    *,
    output_targets: Sequence[OutputTarget],
    paths: Sequence[str],
    satisfied_weight: float,
    weighted: bool,
    position_fraction: float | None = None,
    summed: Sequence[str] | None = None,
    samples: float = math.inf,
) -> list[Sums]:
    """G and C of some ops over batches, by what the op does with which parameters, for each output target.

    Ops that do the same with the same are added.

    Args:
        context: the model.
        batches: the samples.
        output_targets: what the output should have been; each is told for itself.
        paths: of the ops that are trained together, among whose places the drawn positions are told apart.
        satisfied_weight: weight of the samples whose output is its own target, the others weigh 1.
        weighted: whether errors are weighted by how sensitive the output is to them.
        position_fraction: see `ClosedForm`.
        summed: the paths of those that are summed, where statistics take several passes; None: all.
        samples: how many there are in all batches that are summed, at most.
    """
    inverses, totals = (
        [context.inverse(target) for target in output_targets],
        [Sums() for _ in output_targets],
    )
    places = {context.nodes[path]: i for i, path in enumerate(paths)}
    nodes = [context.nodes[path] for path in (paths if summed is None else summed)]
    kept: dict[str, int | None] = {}
    with torch.no_grad(), evaluating(context.graph):
        for number, batch in enumerate(batches):
            first = 0
            for part in context.parts(batch):
                values = inverses[0].forward(part.inputs)
                kept = kept or context.budget.rows(
                    _sizes(context, inverses[0], nodes, values), len(inverses), samples
                )
                felt = sensitivities(inverses[0], nodes, part) if weighted else {}
                for inverse, total in zip(inverses, totals, strict=True):
                    last = inverse.output_node
                    targets = inverse.targets(values, part.labels, [*nodes, last])
                    weights = sample_weights(values[last], targets[last], satisfied_weight)
                    for node in nodes:
                        op, trainable = inverse.op(node, values), inverse.trainable(node)
                        at = None
                        if isinstance(trainable, ByPosition):
                            # the place in the piece of data, so that the same are drawn wherever it is worked on
                            seed = number * len(places) + places[node]
                            at = drawn_positions(op, position_fraction, seed, len(batch))
                            at = None if at is None else at[first : first + len(part)]
                        errors, key = targets[node] - values[node], use_of(node)
                        made = _sums_of(
                            op,
                            trainable,
                            errors,
                            weights,
                            felt.get(node),
                            at,
                            kept[key],
                            context.budget.block,
                        )
                        total[key] = added(total[key], made) if key in total else made
                first += len(part)
    return totals


def in_passes(
    context: Context, paths: Sequence[str], output_targets: Sequence[OutputTarget], samples: float
) -> list[list[str]]:
    """The paths of ops that are trained together, by the pass over the data in which they are summed (`Budget.passes`).

    Args:
        context: the model.
        paths: of the ops.
        output_targets: for each of which all sums are held.
        samples: how many there are to sum over, at most.
    """
    by_use: dict[str, list[str]] = {}
    for path in paths:
        by_use.setdefault(use_of(context.nodes[path]), []).append(path)
    if len(by_use) == 1:
        return [list(paths)]
    sizes = _sizes_of(context, paths, output_targets[0])
    passes = context.budget.passes(sizes, len(output_targets), samples)
    return [[path for use in uses for path in by_use[use]] for uses in passes]


def told_together(
    context: Context, paths: Sequence[str], output_targets: Sequence[OutputTarget], samples: float
) -> list[list[OutputTarget]]:
    """The output targets whose sums are held at the same time: all, or each by itself if that is too much.

    Args:
        context, paths, output_targets, samples: as for `in_passes`; the ops of one pass.
    """
    if len(output_targets) > 1:
        sizes = _sizes_of(context, paths, output_targets[0])
        if not context.budget.holds(sizes, len(output_targets), samples):
            return [[target] for target in output_targets]
    return [list(output_targets)]


def _sizes_of(context: Context, paths: Sequence[str], output_target: OutputTarget) -> dict[str, Size]:
    """Of the equations of some ops, by their use."""
    nodes = [context.nodes[path] for path in paths]
    inverse, values = context.inverse(output_target), dict[fx.Node, Any]()
    if not context.sizes.keys() >= {use_of(node) for node in nodes}:
        with torch.no_grad(), evaluating(context.graph):
            values = inverse.forward(context.first.inputs)
    return _sizes(context, inverse, nodes, values)


def _sizes(
    context: Context, inverse: InverseGraph, nodes: Sequence[fx.Node], values: Values
) -> dict[str, Size]:
    """Of the equations of some ops, whatever the samples whose values are given; those known already need none."""
    for node in nodes:
        if use_of(node) in context.sizes:
            continue
        op, trainable = inverse.op(node, values), inverse.trainable(node)
        if trainable.diagonal:
            outputs, count = trainable.outputs(op, op.output).shape[2], trainable.lookups(op).size
            context.sizes[use_of(node)] = Size(1, outputs, count, diagonal=True)
            continue
        op = op if op.by_sample else op.samples(slice(0, 1))
        if isinstance(trainable, ByPosition):
            at = torch.zeros(len(op.output), 1, dtype=torch.long, device=op.output.device)
            rows, errors = trainable.features(op, at), trainable.outputs(op, op.output, at)
            count = op.output.shape[2:].numel()
        else:
            rows, errors = trainable.features(op), trainable.outputs(op, op.output)
            count = rows.shape[1]
        context.sizes[use_of(node)] = Size(len(rows), errors.shape[2], rows.shape[2], rows=count)
    return {use_of(node): context.sizes[use_of(node)] for node in nodes}


def add(known: Sums, more: Sums) -> Sums:
    """Sums over more samples; those that are known already are overwritten."""
    return known | {key: added(known[key], value) if key in known else value for key, value in more.items()}


def _sums_of(
    op: Op,
    trainable: Trainable,
    errors: Tensor,
    weights: Tensor,
    felt: Tensor | None,
    at: Tensor | None,
    kept: int | None = None,
    block: int = BLOCK,
) -> Equations:
    """The sums of one op over one batch.

    Args:
        op: the op.
        trainable: its parameter side.
        errors: t − y, of the op's output.
        weights: of the samples, `(B,)`.
        felt: how sensitive the output is to the op's, where errors are weighted by it.
        at: the positions that are summed over, `(B, p)`; None: all.
        kept: so many rows are kept in place of a Gram matrix; None: a Gram matrix.
        block: bytes of features that are made at a time.
    """

    def features(samples: slice) -> Tensor:
        part = op.samples(samples)
        if at is not None and isinstance(trainable, ByPosition):
            return trainable.features(part, at[samples])
        return trainable.features(part)

    def rows(value: Tensor) -> Tensor:
        if at is not None and isinstance(trainable, ByPosition):
            return trainable.outputs(op, value, at)
        return trainable.outputs(op, value)

    if at is not None:  # what is drawn stands for what is not
        weights = weights * (op.output[0, 0].numel() / at.shape[1])
    if felt is not None:
        sensitive = rows(felt).square().mean((0, 2))
        weights = sensitive * weights.repeat_interleave(len(sensitive) // len(weights))
    if trainable.diagonal:
        indices, count, padding = trainable.lookups(op)
        return LookupEquations.of(indices, count, rows(errors), weights, padding)
    if op.by_sample:
        return equations([features(slice(None))], rows(errors), weights, None, kept)
    shifts = None
    if at is None and isinstance(trainable, ByPosition):
        window, _ = trainable.sliding(op)
        if window.steps is not None:
            shifts = Shifts(window.kernel, tuple(op.output.shape[2:]), window.steps)
    return equations_over(features, rows(errors), weights, len(op.output), shifts, kept, block)


def sample_weights(outputs: Tensor, targets: Tensor, satisfied: float) -> Tensor:
    """1 for each sample whose output is not its own target, `satisfied` for the others: `(B, …)` → `(B,)`."""
    moved = (targets != outputs).reshape(len(outputs), -1).any(1)
    return torch.where(moved, 1.0, satisfied).to(outputs.dtype)


def use_of(node: fx.Node) -> str:
    """What an op does with which parameters: in a x and a y it is the same, in a x + b or aᵀx another."""
    whole = node.op == "call_module"
    own = parameters_of(node) if whole else {name: expression(v) for name, v in weights_of(node).items()}
    read = ", ".join(f"{argument}={told}" for argument, told in own.items())
    return f"{node.meta['op']}({read})"
