"""What is measured: the loss that steps are judged by, and the accuracy that people ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fxinvert.errors import DataError
from fxinvert.heads import Heads
from fxinvert.labels import IGNORED, flat_classes, is_classification, shares
from fxinvert.output_target import OutputTarget, regression
from fxinvert.training.batch import Batch


@dataclass(frozen=True)
class Metrics:
    """Measured over a data set.

    Attributes:
        loss: mean cross-entropy (classification) or mean squared error.
        accuracy: share of labels predicted (classification), else None.
        samples: how many samples were measured.
    """

    loss: float
    accuracy: float | None
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def no_worse_than(self, other: Metrics) -> bool:
        """Whether neither loss nor accuracy is worse."""
        if self.accuracy is not None and other.accuracy is not None and self.accuracy < other.accuracy:
            return False
        return self.loss <= other.loss

    def __str__(self) -> str:
        loss = f"loss {self.loss:.4f}"
        return loss if self.accuracy is None else f"accuracy {100 * self.accuracy:.2f} %, {loss}"


@dataclass(frozen=True)
class Tally:
    """What metrics are made of: sums over samples, which add up across batches, chunks and machines."""

    loss: float = 0.0
    hits: int = 0
    answers: int = 0
    samples: int = 0

    @classmethod
    def of(
        cls, outputs: Tensor, batch: Batch, target: OutputTarget | None = None, heads: Heads | None = None
    ) -> Tally:
        """The sums over one batch; losses of several outputs are added.

        Args:
            outputs: of the model.
            batch: with the labels.
            target: measures the distance to this output target where labels are neither class numbers nor outputs.

            heads: what the outputs are joined of, if they are several.

        Raises:
            DataError: the labels do not fit the outputs.
        """
        pairs = (heads or Heads(())).pairs(outputs, batch.labels)
        total = sum((cls._of_head(own, labels, len(batch), target) for own, labels in pairs), cls())
        return replace(total, samples=len(batch))

    @classmethod
    def _of_head(cls, outputs: Tensor, labels: Tensor, samples: int, target: OutputTarget | None) -> Tally:
        if not is_classification(labels):
            return cls(float(_squares(outputs, labels, samples, target).sum()))
        logits, classes = flat_classes(outputs, labels)
        hits = int((logits.argmax(-1) == classes).sum())
        return cls(
            float(_cross_entropies(logits, classes, samples).sum()), hits, int((classes != IGNORED).sum())
        )

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.loss + other.loss,
            self.hits + other.hits,
            self.answers + other.answers,
            self.samples + other.samples,
        )

    @property
    def metrics(self) -> Metrics:
        """The means.

        Raises:
            DataError: there are no samples.
        """
        if not self.samples:
            raise DataError("there are no samples to measure on")
        accuracy = self.hits / self.answers if self.answers else None
        return Metrics(self.loss / self.samples, accuracy, self.samples)


def sample_losses(outputs: Tensor, batch: Batch, heads: Heads) -> Tensor:
    """The loss of every sample `(B,)`, float64; losses of several outputs are added.

    Raises:
        DataError: the labels do not fit the outputs.
    """
    pairs = heads.pairs(outputs, batch.labels)
    return torch.stack([losses_of(own, labels, len(batch)) for own, labels in pairs]).sum(0)


def sample_hits(outputs: Tensor, batch: Batch, heads: Heads) -> Tensor:
    """The share of every sample's answers that are right `(B,)`, float64; those of several outputs are added.

    Raises:
        DataError: the labels do not fit the outputs.
    """
    pairs = heads.pairs(outputs, batch.labels)
    return torch.stack([hits_of(own, labels, len(batch)) for own, labels in pairs]).sum(0)


def sample_classes(outputs: Tensor, batch: Batch, heads: Heads) -> Tensor | None:
    """The class of every sample `(B,)`, if labels ask for one of each."""
    ((_, labels), *others) = heads.pairs(outputs, batch.labels)
    one_each = not others and is_classification(labels) and labels.numel() == len(batch)
    return labels.reshape(-1) if one_each else None


def hits_of(outputs: Tensor, labels: Tensor, samples: int) -> Tensor:
    """The share of every sample's answers that are right, for one output: `(B,)`, float64; 0 where they are numbers.

    Raises:
        DataError: the labels do not fit the outputs.
    """
    if not is_classification(labels):
        return outputs.new_zeros(samples, dtype=torch.float64)
    logits, classes = flat_classes(outputs, labels)
    hits = (logits.argmax(-1) == classes).double()
    return (hits * shares(classes, samples)).reshape(samples, -1).sum(1)


def losses_of(outputs: Tensor, labels: Tensor, samples: int) -> Tensor:
    """The loss of every sample for one output: `(B,)`, float64.

    Raises:
        DataError: the labels do not fit the outputs.
    """
    if is_classification(labels):
        return _cross_entropies(*flat_classes(outputs, labels), samples)
    return _squares(outputs, labels, samples)


def _cross_entropies(logits: Tensor, classes: Tensor, samples: int) -> Tensor:
    """Of every sample, the mean over the positions that are asked for."""
    losses = F.cross_entropy(logits.double(), classes, reduction="none", ignore_index=IGNORED)
    return (losses * shares(classes, samples)).reshape(samples, -1).sum(1)


def _squares(outputs: Tensor, labels: Tensor, samples: int, target: OutputTarget | None = None) -> Tensor:
    """Of every sample, the mean over its numbers."""
    wanted = target(outputs, labels) if target else regression(outputs, labels)
    return (outputs - wanted).double().square().reshape(samples, -1).mean(1)


def task_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the positions whose class is asked for, mean squared error for numbers.

    Raises:
        DataError: the labels do not fit the outputs.
    """
    if is_classification(labels):
        logits, classes = flat_classes(outputs, labels)
        total = F.cross_entropy(logits, classes, reduction="sum", ignore_index=IGNORED)
        return total / (classes != IGNORED).sum().clamp(min=1)
    return F.mse_loss(outputs, regression(outputs, labels))


def evaluate(
    forward: Callable[..., Tensor], batches: Iterable[Batch], target: OutputTarget | None = None
) -> Metrics:
    """Loss and accuracy over batches.

    Args:
        forward: the model.
        batches: the data.
        target: measures the distance to this output target where labels are neither class numbers nor outputs.

    Raises:
        DataError: the labels do not fit the outputs.
    """
    tallies = (Tally.of(forward(*batch.inputs), batch, target) for batch in batches)
    return sum(tallies, Tally()).metrics
