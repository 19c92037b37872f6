"""Whether held-out samples confirm that a model has become better.

Steps are chosen by the mean held-out loss, which of few samples is mostly chance: chosen among many, one that lowers it may
do so by luck. The losses ℓ of the same sample before and after are compared instead. With d = ℓ_before − ℓ_after of n samples,

    mean(d) > z · sd(d) / √n,    z the quantile of the normal distribution,

says with a given confidence that the loss has fallen for samples that nobody has looked at (the paired test of Student,
Biometrika 6, 1908, in its normal limit; that a step was chosen by the same samples is not accounted for).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

import torch

from fxinvert.heads import Heads
from fxinvert.training.batch import Batch
from fxinvert.training.context import Context, State
from fxinvert.training.metrics import sample_losses
from fxinvert.training.outputs import OutputsOver, outputs_over


@dataclass(frozen=True)
class Gain:
    """What samples gain from a change; sums, which add up across batches, chunks and machines.

    Attributes:
        samples: n.
        total: of the differences d.
        squares: of their squares.
    """

    samples: int = 0
    total: float = 0.0
    squares: float = 0.0

    def __add__(self, other: Gain) -> Gain:
        return Gain(self.samples + other.samples, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        """By how much the mean loss has fallen."""
        return self.total / self.samples

    @property
    def error(self) -> float:
        """The standard error of the mean; infinite of a single sample."""
        if self.samples < 2:
            return math.inf
        spread = max(self.squares - self.total**2 / self.samples, 0.0) / (self.samples - 1)
        return math.sqrt(spread / self.samples)

    def confirmed(self, confidence: float) -> bool:
        """Whether the loss has fallen for samples that nobody has looked at, too.

        Args:
            confidence: the probability with which that is said, at least 1/2.
        """
        quantile = NormalDist().inv_cdf(confidence)
        return self.mean > (quantile * self.error if quantile else 0.0)


def gain(
    context: Context, batches: Iterable[Batch], *, state: State, outputs_over: OutputsOver = outputs_over
) -> Gain:
    """What samples gain from another state over the context's."""
    total, heads = Gain(), Heads.of(context.graph)
    changed = {name: v for name, v in state.items() if not torch.equal(v, context.tensors[name])}
    for batch, outputs in outputs_over(context, batches, [{}, changed]):
        before, after = (sample_losses(own, batch, heads) for own in outputs)
        fallen = before - after
        total += Gain(len(batch), float(fallen.sum()), float(fallen.square().sum()))
    return total
