"""The last layer to its end: where it is affine, the task's loss is convex in its parameters.

For logits z = Θ ã, wanted probabilities p and weights w, what is minimized over the change Δ of Θ is

    Σ w CE(p, (Θ + Δ) ã) + ¼λ ‖Δ‖²,    λ = ρ·mean(diag G),    G = Σ w ã ãᵀ.

The Hessian of the cross-entropy in the logits is at most ½ I (Böhning 1992; ¼ I for truth values), so that the least-squares
fit to the output target `cross_entropy`, Δ + 2 (C − ½λ Δ)(G + λ I)⁻¹ with C = Σ w (p − softmax z) ãᵀ, cannot raise it. Only C is
summed anew for the next one: G is factorized once, or the products of the rows among each other where these are fewer than
features. Nesterov's momentum makes the fits fewer, begun anew where it points uphill (O'Donoghue & Candès 2015). Damping falls
step by step, each from where the one before ended (Friedman, Hastie & Tibshirani 2010), and held-out data choose among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxinvert.errors import SolveError
from fxinvert.heads import Heads
from fxinvert.labels import IGNORED, class_axis, fit, is_classification
from fxinvert.linalg.vectors import per_sample
from fxinvert.output_target import one_hot, output_target
from fxinvert.passes.capture import evaluating
from fxinvert.passes.plan import Segment
from fxinvert.passes.synthesize import parameters_of
from fxinvert.rules import Op, Trainable
from fxinvert.training.batch import Batch
from fxinvert.training.computed import changes_of
from fxinvert.training.context import Context
from fxinvert.training.wide import divided

#: dampings ρ, one after the other, and the fits with each
DAMPINGS = ((1e-1, 4), (1e-2, 8), (1e-3, 8), (1e-4, 8))
#: samples that are used, at most: one worker passes over them, and few parameters need no more
MOST = 16_384
#: numbers that are held for every row: its logits, what is wanted of them, and two results made of these
HELD = 4
#: targets play no part in it
LOSS = output_target("cross_entropy")


def last_layer(context: Context, segments: Sequence[Segment]) -> str | None:
    """The path of the op of some segments whose output is the model's only one, if nothing else reads its parameters."""
    graph = context.graph.graph
    (node,) = graph.output_node().all_input_nodes[:1]
    names = set(parameters_of(node).values())
    users = [n for n in graph.nodes if names & set(parameters_of(n).values()) and n.meta["fed"]]
    path = node.meta["path"]
    trained = any(path in segment.trained for segment in segments)
    return path if trained and len(users) == 1 and not Heads.of(context.graph).heads else None


def asks_for_classes(labels: Any) -> bool:
    """Whether the labels of a model with one output ask for classes."""
    return isinstance(labels, Tensor) and is_classification(labels)


def descend(
    context: Context, batches: Iterable[Batch], *, path: str, samples: int
) -> list[dict[str, Tensor]]:
    """The changes of the last layer's parameters, by name, at the end of every damping.

    Args:
        context: the model.
        batches: the data.
        path: of the layer.
        samples: how many to use, at most; fewer where their rows do not fit into memory.

    Returns:
        As many as there are dampings; none where the classes of one label are not the outputs of one row, the layer works in
        groups, or its features are all zero.

    Raises:
        SolveError: the features or the loss overflow.
    """
    inverse, node = context.inverse(LOSS), context.nodes[path]
    trainable = inverse.trainable(node)
    features, logits, wanted, weights = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    truths, room = False, float(context.budget.sums)
    with torch.no_grad(), evaluating(context.graph):
        for batch in batches:
            for part in context.parts(batch):
                op = inverse.op(node, inverse.forward(part.inputs))
                if len(trainable.outputs(op, op.output)) > 1:
                    return []
                truths = fit(op.output, part.labels)
                for kept, rows in zip(
                    (features, logits, wanted, weights),
                    _rows(op, trainable, part.labels, truths),
                    strict=True,
                ):
                    kept.append(rows)
                room -= features[-1].nbytes + HELD * logits[-1].nbytes
                samples -= len(part)
            if samples <= 0 or room <= 0:
                break
        a, z, p, w = map(torch.cat, (features, logits, wanted, weights))
        if not truths and not torch.equal(p.sum(1), (w > 0).to(p.dtype)):
            return []
        return [
            changes_of(inverse, node, change[None]).changes for change in path_of(a, z, p, w[:, None], truths)
        ]


def path_of(features: Tensor, logits: Tensor, wanted: Tensor, weights: Tensor, truths: bool) -> list[Tensor]:
    """Δ at the end of every damping, `(m, n)`.

    Args:
        features: ã, `(rows, n)`.
        logits: as they are, `(rows, m)`.
        wanted: probabilities of the same shape.
        weights: of the rows, `(rows, 1)`.
        truths: whether each logit is one of a truth value, by itself; else a row's are those of classes.

    Raises:
        SolveError: they overflow.
    """
    rows = weights.double().sqrt() * features.double()
    gram = rows @ rows.mT if len(rows) < rows.shape[1] else rows.mT @ rows
    level = float(gram.diagonal().sum()) / rows.shape[1]
    if not bool(torch.isfinite(gram).all() & torch.isfinite(logits).all()):
        raise SolveError("the features or outputs of the last layer are not finite")
    if level <= 0:
        return []
    bound, probabilities = (0.25, torch.sigmoid) if truths else (0.5, _softmax)
    # classes first: a softmax over a few neighbours in memory takes ten times as long
    logits, wanted, weights = (value.mT.contiguous() for value in (logits, wanted, weights))
    change, found = torch.zeros_like(logits[:, :1]) @ torch.zeros_like(features[:1]), list[Tensor]()
    for damping, fits in DAMPINGS:
        ridge = damping * level
        damped = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        factor = torch.linalg.cholesky(damped)
        ahead, momentum = change, 1.0
        for _ in range(fits):
            missing = weights * (wanted - probabilities(torch.addmm(logits, ahead, features.mT)))
            descent = missing @ features - bound * ridge * ahead
            step = _solved(descent.double(), rows, factor, ridge)
            following = ahead + step.to(ahead.dtype) / bound
            if float((descent * (following - change)).sum()) < 0:
                momentum = 1.0
            grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead = following + (momentum - 1) / grown * (following - change)
            change, momentum = following, grown
        found.append(change.double())
    return found


def _solved(value: Tensor, rows: Tensor, factor: Tensor, ridge: float) -> Tensor:
    """V (RᵀR + λI)⁻¹ from the Cholesky factor of that, or, of fewer rows than features, of RRᵀ + λI."""
    if len(factor) == rows.shape[1]:
        return torch.cholesky_solve(value.mT, factor).mT
    return divided(value, rows, factor, ridge)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(0)


def _rows(
    op: Op, trainable: Trainable, labels: Tensor, truths: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ã, logits, wanted probabilities and weights, row by row; every sample weighs 1."""
    output = op.output
    if truths:
        wanted = labels.reshape(output.shape).to(output.dtype)
        asked = torch.ones_like(output)
    else:
        axis = class_axis(output, labels)
        wanted = one_hot(torch.zeros_like(output), labels)
        asked = (labels != IGNORED).unsqueeze(axis).to(output.dtype)
    answers = asked.flatten(1).sum(1).clamp(min=1)
    weights = (asked / per_sample(answers, asked)).expand_as(output)
    dtype = torch.promote_types(output.dtype, torch.float32)
    logits, wanted, weights = (trainable.outputs(op, v)[0].to(dtype) for v in (output, wanted, weights))
    return trainable.features(op)[0].to(dtype), logits, wanted, weights[:, 0]
