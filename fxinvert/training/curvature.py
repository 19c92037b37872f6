"""Gradient and curvature of the task's loss in the parameters of affine ops: what a Gauss–Newton step is made of.

For the output o of a sample, with J = ∂o/∂θ and H the curvature of its loss in o, the loss changes with the parameters as

    ℓ(θ + d) ≈ ℓ(θ) − dᵀg + ½ dᵀ Jᵀ H J d,    g = −Jᵀ ∂ℓ/∂o,

which is least squares of the error at the output, in the metric of the loss (Schraudolph, Neural Computation 14, 2002). With
H = Σ s sᵀ (`loss_metric`), rows sᵀJ are, for an op y = Θ ã at several positions, the sums of (Jᵀ_y s) ⊗ ã over these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx
from torch.func import vmap

from fxinvert.heads import Heads
from fxinvert.inversion.inverse_graph import InverseGraph
from fxinvert.inversion.replay import Values
from fxinvert.linalg.memory import full_precision
from fxinvert.output_target import output_target
from fxinvert.passes.capture import evaluating
from fxinvert.passes.computed import is_open
from fxinvert.passes.synthesize import parameters_of
from fxinvert.rules import Op, Trainable
from fxinvert.training.batch import Batch, tensors_of
from fxinvert.training.computed import pulled
from fxinvert.training.context import Context
from fxinvert.training.fingerprint import bits_hash, mixed
from fxinvert.training.jacobian_rows import JacobianRows
from fxinvert.training.loss_metric import Answers, answers, directions
from fxinvert.training.metrics import sample_losses
from fxinvert.training.replay import leaves_of
from fxinvert.training.variants import runner_with

#: of a hash, that tell whether a sample is drawn
_BITS = 32


@dataclass
class Curvature:
    """Sums over samples, and rows of some of them.

    Attributes:
        descent: g summed, by parameter name, float64.
        rows: sᵀJ of the samples that were drawn.
        loss: of all samples.
        samples, drawn: how many, and how many of them were drawn.
    """

    descent: dict[str, Tensor]
    rows: JacobianRows
    loss: float
    samples: int
    drawn: int


def curvature(
    context: Context, batches: Iterable[Batch], *, paths: Sequence[str], share: float, count: int
) -> Curvature:
    """The sums over batches.

    Args:
        context: the model.
        batches: the samples.
        paths: of the ops whose parameters change.
        share: of the samples, chosen by their content, that rows are made of.
        count: of directions of every sample that is drawn, see `loss_metric.directions`.
    """
    inverse = context.inverse(output_target("regression"))
    nodes, leaves = [context.nodes[path] for path in paths], leaves_of(context, changed_by(context, paths))
    descent = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in leaves.items()}
    total, rows = Curvature(descent, JacobianRows(), 0.0, 0, 0), list[JacobianRows]()
    with evaluating(context.graph), full_precision(context.device):
        for batch in batches:
            for part in context.parts(batch):
                hashes = bits_hash(tensors_of(part.inputs)[0])
                drawn = _drawn(hashes, share)
                for which in (drawn, ~drawn):
                    if not bool(which.any()):
                        continue
                    own = part if bool(which.all()) else part.select(which).to(context.device)
                    values, asked = _run(context, inverse, leaves, own)
                    _descend(context, leaves, own, values[inverse.output_node], asked, total)
                    if which is drawn:
                        rows.append(_rows(context, inverse, nodes, values, asked, hashes[which], count))
                        total.drawn += len(own)
    total.rows = JacobianRows.joined(rows)
    return total


def joined(parts: Sequence[Curvature]) -> Curvature:
    """The same over the samples of all parts, in their order."""
    return Curvature(
        {name: torch.stack([part.descent[name] for part in parts]).sum(0) for name in parts[0].descent},
        JacobianRows.joined([part.rows for part in parts if part.drawn]),
        sum(part.loss for part in parts),
        sum(part.samples for part in parts),
        sum(part.drawn for part in parts),
    )


def changed_by(context: Context, paths: Sequence[str]) -> list[str]:
    """The names of the parameters of some ops, in their order."""
    read = (name for path in paths for name in parameters_of(context.nodes[path]).values())
    return [n for n in dict.fromkeys(read) if n in context.tensors and is_open(context.graph, n)]


def _drawn(hashes: Tensor, share: float) -> Tensor:
    """Which samples are drawn, by their content: `(B,)` int64 → bool."""
    drawn: Tensor = (mixed(hashes) >> 16 & (2**_BITS - 1)) < share * 2**_BITS
    return drawn


def _run(
    context: Context, inverse: InverseGraph, leaves: Mapping[str, Tensor], batch: Batch
) -> tuple[Values, list[Answers]]:
    """The values of all nodes for a batch, differentiable in all that follows from the leaves, and what is asked of the output."""
    runner = runner_with(context, leaves, batch.inputs)
    with torch.enable_grad():
        for node in context.graph.graph.nodes:
            if node.op != "output" and node not in runner.env:
                runner.env[node] = runner.run_node(node)
        output = runner.env[inverse.output_node]
        return runner.env, [answers(*pair) for pair in Heads.of(context.graph).pairs(output, batch.labels)]


def _descend(
    context: Context,
    leaves: Mapping[str, Tensor],
    batch: Batch,
    output: Tensor,
    asked: Sequence[Answers],
    total: Curvature,
) -> None:
    """Adds loss and descent of a batch."""
    found = torch.autograd.grad(
        [own.values for own in asked],
        list(leaves.values()),
        [own.descent for own in asked],
        retain_graph=True,
        materialize_grads=True,
    )
    for name, value in context.mask(dict(zip(leaves, found, strict=True))).items():
        total.descent[name] += value
    total.loss += float(sample_losses(output.detach(), batch, Heads.of(context.graph)).sum())
    total.samples += len(batch)


def _rows(
    context: Context,
    inverse: InverseGraph,
    nodes: Sequence[fx.Node],
    values: Values,
    asked: Sequence[Answers],
    hashes: Tensor,
    count: int,
) -> JacobianRows:
    """sᵀJ of some samples: all directions of the first one, then those of the second."""
    outputs, wanted = [values[node] for node in nodes], [own.values for own in asked]
    found = [
        torch.autograd.grad(wanted, outputs, own, retain_graph=True, materialize_grads=True)
        for own in directions(asked, hashes, count)
    ]
    rows = JacobianRows()
    shared = _shared(nodes)
    with torch.no_grad():
        for node, felt in zip(nodes, map(list, zip(*found, strict=True)), strict=True):
            op, names = inverse.op(node, values), parameters_of(node)
            trainable = inverse.trainable(node)
            own = tuple(names[argument] for argument in ("weight", "bias") if argument in names)
            alone = not shared & set(own) and not context.masks.keys() & set(own)
            alone &= set(own) == {*names.values()} == {n for n in own if is_open(context.graph, n)}
            if alone and "weight" in names and node.meta["op"] == "linear" and op.output.dim() == 2:
                features = trainable.features(op)[0].repeat_interleave(len(felt), 0)
                rows.factors[own] = torch.stack(felt, 1).flatten(0, 1), features
                continue
            matrix = _summed(op, trainable, felt, context.budget.block)
            slopes = vmap(partial(trainable.changes, op.parameters))(matrix)
            for name, value in context.mask(pulled(context.graph, node, slopes)).items():
                rows.whole[name] = rows.whole[name] + value if name in rows.whole else value
    return rows


def _shared(nodes: Sequence[fx.Node]) -> set[str]:
    """The parameters that several of the ops read."""
    seen, found = set[str](), set[str]()
    for node in nodes:
        own = set(parameters_of(node).values())
        found |= seen & own
        seen |= own
    return found


def _summed(op: Op, trainable: Trainable, felt: Sequence[Tensor], block: int) -> Tensor:
    """Σ over positions of (Jᵀ_y s) ⊗ ã: `(B · directions, groups, outputs, inputs [+ 1])`."""
    samples = len(op.output)
    step = samples if op.by_sample else 1
    made, first = list[Tensor](), 0
    while first < samples:
        part = slice(first, first + step)
        own = op if op.by_sample else op.samples(part)
        features = trainable.features(own)
        count = len(own.output)
        each = _by_sample(features, count)
        given = torch.stack([_by_sample(trainable.outputs(own, value[part]), count) for value in felt], 2)
        # (groups, B, directions, positions, outputs) and (groups, B, positions, inputs [+ 1])
        sums = given.transpose(-1, -2).flatten(2, 3) @ each
        sums = sums.reshape(*sums.shape[:2], len(felt), -1, sums.shape[-1])
        made.append(sums.movedim(0, 2).flatten(0, 1))
        first += count
        if step == 1:
            step = max(1, block // max(1, features.nbytes))
    return torch.cat(made)


def _by_sample(rows: Tensor, samples: int) -> Tensor:
    """`(groups, B · positions, n)` → `(groups, B, positions, n)`."""
    return rows.reshape(len(rows), samples, -1, rows.shape[-1])
