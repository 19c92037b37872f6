"""The sample of held-out data that steps are searched on: bounded, in memory, the same in whatever order data come."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxinvert.training.batch import Batch, tensors_of
from fxinvert.training.fingerprint import bits_hash

#: samples that are kept, at most
KEPT = 1024

Shapes = tuple[tuple[int, ...], ...]


class HeldOutSample:
    """The samples whose inputs have the least hashes of all that were added: a random choice that repeats.

    Args:
        share: one sample in so many of the data's batches is added.

    Attributes:
        seen: how many samples were added.
    """

    def __init__(self, share: int = 1) -> None:
        self.share, self.seen, self._largest = share, 0, 0
        self._parts: dict[Shapes, tuple[Tensor, Batch]] = {}

    def add(self, batch: Batch) -> None:
        """Takes in the samples of a batch, as far as they belong to those that are kept."""
        self.seen += len(batch)
        self._largest = max(self._largest, len(batch))
        shapes = tuple(tuple(value.shape[1:]) for value in pytree.tree_leaves((batch.inputs, batch.labels)))
        hashes = bits_hash(tensors_of(batch.inputs)[0]).cpu()
        if shapes in self._parts:
            before, kept = self._parts[shapes]
            hashes, batch = torch.cat([before, hashes]), _joined(kept, batch)
        self._parts[shapes] = hashes, batch
        if sum(len(own) for own, _ in self._parts.values()) > 2 * KEPT:
            self._prune()

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left out."""
        return self.seen <= KEPT

    def batches(self) -> list[Batch]:
        """The samples, in batches about as large as those of the data."""
        self._prune()
        ordered = []
        for _, (hashes, batch) in sorted(self._parts.items(), key=lambda part: part[0]):
            rows = hashes.argsort(stable=True)
            ordered += [batch.select(own) for own in torch.split(rows, self.share * self._largest)]
        return ordered

    def _prune(self) -> None:
        hashes = torch.cat([own for own, _ in self._parts.values()] or [torch.zeros(0, dtype=torch.int64)])
        if len(hashes) <= KEPT:
            return
        most = hashes.sort().values[KEPT - 1]
        chosen = {shapes: (own, batch, own <= most) for shapes, (own, batch) in self._parts.items()}
        self._parts = {
            s: (own[rows], batch.select(rows)) for s, (own, batch, rows) in chosen.items() if rows.any()
        }


def _joined(first: Batch, second: Batch) -> Batch:
    return Batch(*pytree.tree_map(lambda *values: torch.cat(values), tuple(first), tuple(second)))
