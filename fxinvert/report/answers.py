"""What a model answers, sample by sample, so that two models can be compared on the same samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxinvert.errors import DataError
from fxinvert.heads import Heads
from fxinvert.labels import IGNORED, flat_classes, is_classification
from fxinvert.output_target import regression
from fxinvert.passes.capture import evaluating
from fxinvert.training.batch import Batch
from fxinvert.training.metrics import hits_of, losses_of

#: classes that a confusion matrix is made for, and bins of a histogram
CLASSES, BINS = 50, 30


@dataclass(frozen=True, eq=False)
class Head:
    """One output's answers.

    Attributes:
        name: of the output; "" if it is the only one.
        classes: how many there are; 0 for values.
        wanted, given: class numbers, some of them perhaps `IGNORED`, or values, flat.
    """

    name: str
    classes: int
    wanted: Tensor
    given: Tensor

    def confusion(self) -> list[list[int]] | None:
        """How often each class (row) was answered as each (column); None for values and very many classes."""
        if not 0 < self.classes <= CLASSES:
            return None
        asked = self.wanted != IGNORED
        pairs = self.wanted[asked] * self.classes + self.given[asked]
        counts = torch.bincount(pairs, minlength=self.classes**2)
        return counts.reshape(self.classes, -1).tolist()


@dataclass(frozen=True, eq=False)
class Answers:
    """A model's answers over some data.

    Attributes:
        losses: `(N,)` per sample, summed over outputs, as `fxinvert.training.metrics` defines them.
        hits: `(N,)` share of a sample's class answers that are right; None where there are none.
        heads: by output.
    """

    losses: Tensor
    hits: Tensor | None
    heads: tuple[Head, ...]

    @property
    def given(self) -> list[str]:
        """Every sample's answer in words: its class, or its values."""
        return _worded(self.heads, "given", len(self.losses))

    @property
    def labels(self) -> list[str]:
        """Every sample's label in words."""
        return _worded(self.heads, "wanted", len(self.losses))


def answers(graph: fx.GraphModule, batches: Iterable[Batch]) -> Answers:
    """What a traced model answers.

    Raises:
        DataError: there are no samples, or labels do not fit.
    """
    heads = Heads.of(graph)
    losses: list[Tensor] = []
    hits: list[Tensor] = []
    parts: list[list[Head]] = []
    with torch.no_grad(), evaluating(graph):
        for batch in batches:
            outputs = graph(*graph.meta["inputs"].tensors(batch.inputs))
            found = [_answered(o, y, len(batch)) for o, y in heads.pairs(outputs, batch.labels)]
            losses.append(torch.stack([loss for loss, _, _ in found]).sum(0))
            right = [hit for _, hit, _ in found if hit is not None]
            if right:
                hits.append(torch.stack(right).mean(0))
            parts.append([head for _, _, head in found])
    if not losses:
        raise DataError("there are no samples to report on")
    names = [str(head.key) for head in heads.heads] or [""]
    joined = [
        Head(
            name,
            own[0].classes,
            torch.cat([head.wanted for head in own]),
            torch.cat([head.given for head in own]),
        )
        for name, own in zip(names, zip(*parts, strict=True), strict=True)
    ]
    return Answers(torch.cat(losses), torch.cat(hits) if hits else None, tuple(joined))


def histograms(before: Head, after: Head) -> dict[str, Any]:
    """How often errors (given − wanted) of which size came, before and after, in the same bins."""
    errors = [(head.given - head.wanted).double() for head in (before, after)]
    both = torch.cat(errors)
    low, high = (float(end) for end in (both.min(), both.max()))
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = [torch.histc(values, BINS, low, high).long().tolist() for values in errors]
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.double).tolist()
    return {"edges": edges, "before": counts[0], "after": counts[1]}


def _answered(outputs: Tensor, labels: Tensor, samples: int) -> tuple[Tensor, Tensor | None, Head]:
    """Per sample: the loss and the share of right answers; and the answers."""
    losses = losses_of(outputs, labels, samples).cpu()
    if is_classification(labels):
        logits, classes = flat_classes(outputs, labels)
        right = hits_of(outputs, labels, samples)
        return losses, right.cpu(), Head("", logits.shape[-1], classes.cpu(), logits.argmax(-1).cpu())
    wanted = regression(outputs, labels)
    return losses, None, Head("", 0, wanted.flatten().cpu(), outputs.flatten().cpu())


def _worded(heads: tuple[Head, ...], what: str, samples: int) -> list[str]:
    columns = []
    for head in heads:
        rows = getattr(head, what).reshape(samples, -1)
        texts = ["" if rows.shape[1] > 4 else ", ".join(map(_word, row)) for row in rows.tolist()]
        columns.append([f"{head.name} {text}".strip() if text else "" for text in texts])
    return ["; ".join(filter(None, row)) for row in zip(*columns, strict=True)]


def _word(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"
