"""What is measured: the loss that steps are judged by, and the accuracy that people ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fxinvert.errors import DataError
from fxinvert.output_target import OutputTarget, check_range, class_axis, regression
from fxinvert.training.data import Batch


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


def is_classification(labels: Tensor) -> bool:
    """Whether labels are class numbers: integers are, floating-point numbers are not."""
    return not labels.dtype.is_floating_point


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
    loss, hits, answers, samples = 0.0, 0, 0, 0
    classification = True
    for batch in batches:
        outputs = forward(*batch.inputs)
        classification = is_classification(batch.labels)
        if classification:
            axis = class_axis(outputs, batch.labels)
            logits = outputs.movedim(axis, -1)
            check_range(batch.labels, logits.shape[-1])
            flat, labels = logits.flatten(0, -2), batch.labels.flatten()
            losses = F.cross_entropy(flat.double(), labels, reduction="none")
            hits += int((flat.argmax(-1) == labels).sum())
            answers += len(labels)
            loss += float(losses.sum()) * len(batch) / len(labels)
        else:
            wanted = target(outputs, batch.labels) if target else regression(outputs, batch.labels)
            loss += float((outputs - wanted).double().square().reshape(len(batch), -1).mean(1).sum())
        samples += len(batch)
    if not samples:
        raise DataError("there are no samples to measure on")
    return Metrics(loss / samples, hits / answers if classification else None, samples)
