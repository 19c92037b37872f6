"""Samples by their number in the data, counted through the batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils._pytree import tree_map

from fxinvert.errors import DataError
from fxinvert.training import Batches
from fxinvert.training.batch import Batch


def pick(data: Batches, numbers: Sequence[int]) -> Batch:
    """The samples with these numbers, in this order, counted from 0 through the batches.

    Raises:
        DataError: there are not so many.
    """
    found, seen = dict[int, Batch](), 0
    for batch in data:
        for number in numbers:
            if seen <= number < seen + len(batch):
                found[number] = batch.select(torch.tensor([number - seen], device=data.device))
        seen += len(batch)
        if len(found) == len(set(numbers)):
            break
    missing = [number for number in numbers if number not in found]
    if missing:
        raise DataError(f"there is no sample {missing[0]} in {data.what}, which has {seen}: 0 to {seen - 1}")
    return join([found[number] for number in numbers])


def first(data: Batches, count: int) -> Batch:
    """The first samples, as many as there are up to `count`.

    Raises:
        DataError: there are none.
    """
    found: list[Batch] = []
    for batch in data:
        room = count - sum(map(len, found))
        found.append(batch.select(torch.arange(min(room, len(batch)), device=data.device)))
        if len(batch) >= room:
            break
    if not found:
        raise DataError(f"{data.what} has no samples")
    return join(found)


def join(batches: list[Batch]) -> Batch:
    """Several batches as one."""
    return Batch(*tree_map(lambda *values: torch.cat(values), *map(tuple, batches)))
