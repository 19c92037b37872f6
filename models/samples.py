"""Samples of any task: one or several inputs, labels for one or several outputs, and how well a network does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxinvert.errors import DataError
from fxinvert.labels import class_axis

#: what the only output of a network is called
OUTPUT = "output"

Inputs = Tensor | tuple[Tensor, ...]
Labels = Tensor | dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples in a fixed order.

    Attributes:
        inputs: the model's arguments, each (N, …).
        labels: for each output, (N, …): class numbers are int64, measured values float32.
    """

    inputs: tuple[Tensor, ...]
    labels: dict[str, Tensor]

    def __post_init__(self) -> None:
        lengths = {len(values) for values in (*self.inputs, *self.labels.values())}
        if len(lengths) != 1:
            raise DataError(f"inputs and labels of {sorted(lengths)} samples; every input needs its label")

    def __len__(self) -> int:
        return len(self.inputs[0])

    def select(self, rows: Tensor) -> Samples:
        """The samples with these numbers, in their order."""
        return Samples(
            tuple(values[rows] for values in self.inputs),
            {name: labels[rows] for name, labels in self.labels.items()},
        )

    def split(self, batch_size: int) -> list[Samples]:
        """Cut into parts of `batch_size` samples, in order, the last one as short as needed; nothing is copied."""
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; it must be at least 1")
        starts = range(0, len(self), batch_size)
        return [
            Samples(
                tuple(values[start : start + batch_size] for values in self.inputs),
                {name: labels[start : start + batch_size] for name, labels in self.labels.items()},
            )
            for start in starts
        ]

    def batches(self, output: str | None = None, batch_size: int = 256) -> list[tuple[Inputs, Labels]]:
        """Batches (inputs, labels) as `fxinvert.post_train` takes them; they can be iterated any number of times.

        A single input is a tensor, several are a tuple. Likewise the labels of a single output, or of the named
        one, are a tensor; those of several a dict.

        Raises:
            DataError: there are no labels for `output`, or the batch size is less than 1.
        """
        if output is not None and output not in self.labels:
            raise DataError(f"no labels for the output {output!r}; there are: {', '.join(self.labels)}")
        only = next(iter(self.labels)) if len(self.labels) == 1 else output
        return [
            (
                part.inputs if len(part.inputs) > 1 else part.inputs[0],
                part.labels if only is None else part.labels[only],
            )
            for part in self.split(batch_size)
        ]


@dataclass(frozen=True, eq=False)
class Parts:
    """Three disjoint parts of a task's samples: to train on, to choose by, and to report."""

    train: Samples
    held_out: Samples
    test: Samples


def loss(outputs: Tensor | Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
    """The sum over the outputs of cross-entropy (class numbers) or mean squared error (values); a scalar."""
    named = by_name(outputs)
    return torch.stack([_loss(named[name], wanted) for name, wanted in labels.items()]).sum()


@torch.no_grad()
def scores(model: nn.Module, samples: Samples) -> dict[str, float]:
    """How well a network does, by output, evaluated in eval mode; its mode is left as it was.

    Class numbers: the accuracy, over all positions. Values: R², the share of the labels' variance explained.

    Raises:
        DataError: there are no samples.
    """
    if not len(samples):
        raise DataError("the score over no samples is not defined")
    training = model.training
    model.eval()
    parts = [by_name(model(*part.inputs)) for part in samples.split(256)]
    model.train(training)
    return {
        name: score(torch.cat([part[name] for part in parts]), wanted)
        for name, wanted in samples.labels.items()
    }


def by_name(outputs: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A network's outputs by their names; one that returns a tensor has the one output `OUTPUT`."""
    return {OUTPUT: outputs} if isinstance(outputs, Tensor) else outputs


def _loss(outputs: Tensor, labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        return F.mse_loss(outputs, labels)
    return F.cross_entropy(outputs.movedim(class_axis(outputs, labels), 1), labels)


def score(outputs: Tensor, labels: Tensor) -> float:
    """Accuracy for class numbers, over all positions; R² for values."""
    if labels.is_floating_point():
        missed = (outputs - labels).square().sum()
        return float(1 - missed / (labels - labels.mean(0)).square().sum())
    return float((outputs.argmax(class_axis(outputs, labels)) == labels).double().mean())
