"""How large updates that were found together should be, so that they do not overshoot together.

With s the multiples of the updates and o(s) the outputs, taken as affine in s, held-out loss is to second order

    L(s) = L(0) + gᵀs + ½ sᵀHs,   g_i = Σ ∇ℓ·d_i,   H_ij = Σ d_iᵀ ∇²ℓ d_j,   d_i = 2 (o(½e_i) − o(0)),

with the loss ℓ's derivatives in the outputs (the generalized Gauss–Newton matrix, Schraudolph 2002). g and H are sums over
samples; one partial forward pass per update gives them all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxinvert.heads import Heads
from fxinvert.labels import flat_classes, is_classification, shares
from fxinvert.training.batch import Batch
from fxinvert.training.context import Context
from fxinvert.training.outputs import OutputsOver, outputs_over
from fxinvert.training.work import Proposal, Sizes, moved

#: the multiple of each update that its effect on the outputs is measured at
PROBE = 0.5
#: rounds of coordinate descent
ROUNDS = 50


@dataclass(frozen=True)
class Quadratic:
    """The sums g `(n,)` and H `(n, n)` of n updates, float64."""

    slope: Tensor
    curvature: Tensor

    def __add__(self, other: Quadratic) -> Quadratic:
        return Quadratic(self.slope + other.slope, self.curvature + other.curvature)

    def least(self, most: float) -> Sizes:
        """The sizes between 0 and `most` where the model is least, by coordinate descent."""
        sizes = torch.zeros_like(self.slope)
        own = self.curvature.diagonal().clamp(min=torch.finfo(sizes.dtype).tiny)
        for _ in range(ROUNDS):
            for i in range(len(sizes)):
                rest = self.slope[i] + self.curvature[i] @ sizes - own[i] * sizes[i]
                sizes[i] = (-rest / own[i]).clamp(0, most)
        return tuple(sizes.tolist())


def quadratic(
    context: Context,
    batches: Iterable[Batch],
    *,
    proposal: Proposal,
    outputs_over: OutputsOver = outputs_over,
) -> Quadratic:
    """The quadratic model of the loss in the multiples of a proposal's updates, at the context's state."""
    sizes = PROBE * torch.eye(len(proposal))
    states = [moved(context.tensors, proposal, tuple(row.tolist())) for row in sizes]
    heads = Heads.of(context.graph)
    none = torch.zeros(len(proposal), dtype=torch.float64, device=context.device)
    total = Quadratic(none, none.new_zeros(len(proposal), len(proposal)))
    for batch, (start, *others) in outputs_over(context, batches, [{}, *states]):
        effects = (torch.stack(others) - start) / PROBE
        parts = [[own for own, _ in heads.pairs(effect, batch.labels)] for effect in effects]
        for i, (outputs, labels) in enumerate(heads.pairs(start, batch.labels)):
            total += _of_head(outputs, labels, torch.stack([part[i] for part in parts]))
    return total


def _of_head(outputs: Tensor, labels: Any, effects: Tensor) -> Quadratic:
    """Of one output `(B, …)`, its labels, and the updates' effects on it `(n, B, …)`."""
    outputs, effects = outputs.double(), effects.double()
    if not is_classification(labels):
        weight = 2 * len(outputs) / outputs.numel()
        flat = effects.flatten(1)
        return Quadratic(
            weight * flat @ (outputs - labels.reshape(outputs.shape)).flatten(), weight * flat @ flat.T
        )
    logits, classes = flat_classes(outputs, labels)
    same = labels.expand(len(effects), *labels.shape).flatten(0, 1)
    moves = flat_classes(effects.flatten(0, 1), same)[0].reshape(len(effects), *logits.shape)
    likely = logits.softmax(-1)
    counts = shares(classes, len(outputs))[:, None]
    residual = likely.scatter_add(1, classes.clamp(min=0)[:, None], -torch.ones_like(likely))
    mean = (moves * likely).sum(-1)
    square = (moves * likely * counts).flatten(1) @ moves.flatten(1).T - (mean * counts[:, 0]) @ mean.T
    return Quadratic(moves.flatten(1) @ (residual * counts).flatten(), square)
