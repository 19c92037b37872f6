"""Whether held-out samples confirm that a model has become better.

Steps are chosen by the mean held-out loss, which of few samples is mostly chance: chosen among many, one that lowers it may
do so by luck. Each sample is compared with itself instead. With the differences d = ℓ_before − ℓ_after of its loss, over n
samples,

    mean(d) > z · sd(d) / √n,    z the quantile of the normal distribution,

says with a given confidence that the loss has fallen for samples that nobody has looked at (the paired test of Student,
Biometrika 6, 1908, in its normal limit; that a step was chosen by the same samples is not accounted for). A class that was
missing gains much, the others nothing, and that spread says nothing about chance: it is the same in other samples whose
classes are as frequent. So where samples have classes, C of them and at least twice as many samples, sd is the spread
within classes (the residual of an analysis of variance: Fisher, Statistical Methods for Research Workers, 1925),

    sd² = Σ (d − mean of its class)² / (n − C).

The loss can fall although answers become no better. With the differences a of the share of a sample's answers that are right, ±1 of a single
answer that changes,

    Σ a + 6 > z · √(Σ a² + 6)

says the same of them: the test of McNemar (Psychometrika 12, 1947), with six answers that turned right added, for which the
fallen loss speaks, so that a few that change decide nothing (as Agresti and Coull, The American Statistician 52, 1998, add
four). Where two sets of samples are asked, Student's test is made with the sum of their mean(d) √n / sd(d) over √2 (Stouffer
et al., The American Soldier, 1949), so that heavy tails of the one do not hide what the other says. On validation splits of the studies' tasks that halved the runs that end below their start, and the mean gain rose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

from fxinvert.heads import Heads
from fxinvert.training.batch import Batch
from fxinvert.training.context import Context, State
from fxinvert.training.metrics import sample_classes, sample_hits, sample_losses
from fxinvert.training.outputs import OutputsOver, outputs_over

#: answers that turned right, which a loss that has fallen counts as
PRIOR = 6
#: the confidence that any gain has
ANY = 0.5
#: samples, beyond which answers count that were lost where nothing was chosen
MANY = 256


@dataclass(frozen=True)
class Differences:
    """What changes from sample to sample; sums, which add up across batches, chunks and machines.

    Attributes:
        classes: of every class of samples how many there are, and the total of their differences.
        squares: the sum of the squares of all differences.
    """

    classes: Mapping[int, tuple[int, float]] = field(default_factory=dict)
    squares: float = 0.0

    @classmethod
    def of(cls, values: Tensor, classes: Tensor | None = None) -> Differences:
        """Of a batch, `(B,)`, whose samples have classes `(B,)`; by default all the same."""
        classes = torch.zeros(len(values), dtype=torch.int64) if classes is None else classes
        names, places, counts = torch.unique(classes, return_inverse=True, return_counts=True)
        totals = values.new_zeros(len(names)).index_add_(0, places, values)
        found = zip(names.tolist(), zip(counts.tolist(), totals.tolist(), strict=True), strict=True)
        return cls(dict(found), float(values.square().sum()))

    def __add__(self, other: Differences) -> Differences:
        classes = dict(self.classes)
        for name, (samples, total) in other.classes.items():
            before = classes.get(name, (0, 0.0))
            classes[name] = before[0] + samples, before[1] + total
        return Differences(classes, self.squares + other.squares)

    @property
    def samples(self) -> int:
        """How many, n."""
        return sum(samples for samples, _ in self.classes.values())

    @property
    def total(self) -> float:
        """The sum of the differences."""
        return sum(total for _, total in self.classes.values())

    @property
    def mean(self) -> float:
        """Of the differences."""
        return self.total / self.samples

    @property
    def error(self) -> float:
        """The standard error of the mean; infinite of a single sample."""
        n, parts = self.samples, list(self.classes.values())
        if n < 2 * len(parts):
            parts = [(n, self.total)]
        if n < 2:
            return math.inf
        within = self.squares - sum(total**2 / samples for samples, total in parts)
        return math.sqrt(max(within, 0.0) / (n - len(parts)) / n)

    @property
    def score(self) -> float:
        """The mean in standard errors; 0 without samples."""
        if self.samples and self.error:
            return self.mean / self.error
        return math.copysign(math.inf, self.total) if self.total else 0.0


@dataclass(frozen=True)
class Gain:
    """What samples gain from a change.

    Attributes:
        loss: by how much theirs falls.
        right: by how much the share of their right answers rises; 0 where answers are numbers.
    """

    loss: Differences = Differences()
    right: Differences = Differences()

    def __add__(self, other: Gain) -> Gain:
        return Gain(self.loss + other.loss, self.right + other.right)

    def __str__(self) -> str:
        loss = f"the held-out loss fell by {self.loss.mean:.4f} ± {self.loss.error:.4f}"
        if not self.right.squares:
            return loss
        return f"{loss}, right answers rose by {self.right.total:g} ± {math.sqrt(self.right.squares):.1f}"

    @property
    def lost(self) -> bool:
        """Whether samples that nothing was chosen by have lost: in their loss or, if they are many, in right answers.

        Of few samples a few answers say less: on the way to learning a missing class, others are lost before it is gained.
        """
        return self.loss.total < 0 or (self.right.total < 0 and self.loss.samples > MANY)

    def confirmed(self, confidence: float, other: Gain | None = None) -> bool:
        """Whether samples that nobody has looked at gain, too: the loss has fallen, and answers have not become worse.

        Args:
            confidence: the probability with which that is said, at least `ANY`.
            other: what other samples gain; both together say so.
        """
        gains, quantile = [self, *([other] if other else [])], NormalDist().inv_cdf(confidence)
        if quantile:
            fallen = sum(own.loss.score for own in gains) > quantile * math.sqrt(len(gains))
        else:
            fallen = self.loss.mean > 0
        right = sum((own.right for own in gains), Differences())
        changed = right.squares
        return fallen and (not changed or right.total + PRIOR > quantile * math.sqrt(changed + PRIOR))


def gain(
    context: Context, batches: Iterable[Batch], *, state: State, outputs_over: OutputsOver = outputs_over
) -> Gain:
    """What samples gain from another state over the context's."""
    total, heads = Gain(), Heads.of(context.graph)
    changed = {name: v for name, v in state.items() if not torch.equal(v, context.tensors[name])}
    for batch, outputs in outputs_over(context, batches, [{}, changed]):
        before, after = outputs
        loss, loss_after = (sample_losses(own, batch, heads) for own in (before, after))
        right, right_after = (sample_hits(own, batch, heads) for own in (before, after))
        classes = sample_classes(before, batch, heads)
        total += Gain(Differences.of(loss - loss_after, classes), Differences.of(right_after - right))
    return total
