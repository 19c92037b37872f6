"""The sample of held-out data that steps are searched on: bounded, in memory, the same however and wherever data are read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxinvert.labels import asks
from fxinvert.training.batch import Batch, tensors_of
from fxinvert.training.fingerprint import bits_hash

#: samples that are kept, at most
KEPT = 1024

Shapes = tuple[tuple[int, ...], ...]

#: above every hash
ALL = 2**63 - 1


def bound(hashes: Tensor) -> int:
    """The largest of the hashes of the samples that are kept, given those of all."""
    return int(hashes.kthvalue(KEPT).values) if len(hashes) > KEPT else ALL


class HeldOutSample:
    """The samples whose inputs have the least hashes of all that were added: a random choice that repeats.

    Args:
        share: one sample in so many of the data's batches is added.

    Attributes:
        seen: how many samples were added.
        largest: how many at once, at most.
    """

    def __init__(self, share: int = 1) -> None:
        self.share, self.seen, self.largest = share, 0, 0
        self._parts: dict[Shapes, tuple[Tensor, Batch]] = {}

    def add(self, batch: Batch) -> None:
        """Takes in the samples of a batch, as far as they belong to those that are kept."""
        self.seen += len(batch)
        self.largest = max(self.largest, len(batch))
        shapes = tuple(tuple(value.shape[1:]) for value in pytree.tree_leaves((batch.inputs, batch.labels)))
        self._take(shapes, bits_hash(tensors_of(batch.inputs)[0]).cpu(), batch)

    def join(self, other: HeldOutSample) -> None:
        """Takes in the samples that another one keeps."""
        for shapes, (hashes, batch) in other._parts.items():
            self._take(shapes, hashes, batch)

    def _take(self, shapes: Shapes, hashes: Tensor, batch: Batch) -> None:
        if shapes in self._parts:
            before, kept = self._parts[shapes]
            hashes, batch = torch.cat([before, hashes]), _joined(kept, batch)
        self._parts[shapes] = hashes, batch
        if sum(len(own) for own, _ in self._parts.values()) > 2 * KEPT:
            self._prune()

    @property
    def hashes(self) -> Tensor:
        """Of the samples that may be kept, `(n,)` int64 on the CPU."""
        return torch.cat([own for own, _ in self._parts.values()] or [torch.zeros(0, dtype=torch.int64)])

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left out."""
        return self.seen <= KEPT

    @property
    def asked(self) -> bool:
        """Whether any label asks for something."""
        return any(asks(batch.labels) for _, batch in self._parts.values())

    def batches(self) -> list[Batch]:
        """The samples, in batches about as large as those of the data."""
        self._prune()
        ordered = []
        for _, (hashes, batch) in sorted(self._parts.items(), key=lambda part: part[0]):
            rows = hashes.argsort(stable=True)
            ordered += [batch.select(own) for own in torch.split(rows, self.share * self.largest)]
        return ordered

    def limit(self, most: int) -> None:
        """Keeps samples with hashes up to a bound only."""
        chosen = {shapes: (own, batch, own <= most) for shapes, (own, batch) in self._parts.items()}
        self._parts = {
            s: (own[rows], batch.select(rows)) for s, (own, batch, rows) in chosen.items() if rows.any()
        }

    def _prune(self) -> None:
        most = bound(self.hashes)
        if most < ALL:
            self.limit(most)


def _joined(first: Batch, second: Batch) -> Batch:
    return Batch(*pytree.tree_map(lambda *values: torch.cat(values), tuple(first), tuple(second)))
