"""The inverses of ops that move, copy, average or choose entries, as plain tensor operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxinvert.rules import Op
from fxinvert.rules.pooling import maximum_index
from fxinvert.rules.reduction import Nearest


class Moved(nn.Module):
    """Every input moves by the mean of what its copies ask for; one that is not copied stays."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        count = op.anchor[0].numel()
        numbers = torch.arange(1, count + 1).to(op.anchor).reshape(1, *op.anchor.shape[1:])
        # y = A x + constant, with a single 1 or none in every row of A: numbers of the inputs, and 0 for constants
        source = (op.evaluate(numbers) - op.evaluate(torch.zeros_like(numbers))).flatten().round().long()
        counts = torch.bincount(source, minlength=count + 1)[1:]
        copies = torch.zeros(count, max(1, int(counts.max())), dtype=torch.long)
        present = torch.arange(copies.shape[1]) < counts[:, None]
        order = source.argsort(stable=True)
        copies[present] = order[source[order] > 0]
        self.register_buffer("copies", copies)
        self.register_buffer("weights", present.to(op.anchor.dtype) / counts.clamp(min=1)[:, None])

    def forward(self, target: Tensor, output: Tensor, anchor: Tensor) -> Tensor:
        """`(B, …)` three times → the target of the input, `(B, …)`."""
        missing = (target - output).reshape(anchor.shape[0], -1)
        asked = missing[:, self.get_buffer("copies")] * self.get_buffer("weights")
        return anchor + asked.sum(-1).reshape(anchor.shape)


class Reduced(nn.Module):
    """A reduction over some axes, inverted group by group as its rule does."""

    def __init__(self, nearest: Nearest, dims: Sequence[int]) -> None:
        super().__init__()
        self.nearest, self.dims = nearest, tuple(dims)

    def forward(self, target: Tensor, output: Tensor, anchor: Tensor) -> Tensor:
        """`(B, …)` three times → the target of the input, `(B, …)`."""
        last = tuple(range(-len(self.dims), 0))
        moved = anchor.movedim(self.dims, last)
        entries = moved.flatten(-len(self.dims))
        y, t = (value.reshape(*entries.shape[:-1], 1) for value in (output, target))
        return self.nearest(entries, y, t).reshape(moved.shape).movedim(last, self.dims)


class Maxima(nn.Module):
    """In every window, what is above the target comes down to it, and the first largest entry becomes it.

    That is the nearest input whose maxima are the target, where no entry lies in two windows; entries in none stay.
    """

    def __init__(self, index: Tensor, count: int) -> None:
        """
        Args:
            index: `(windows, entries)`, the flat place of every entry in the map, −1 for padding.
            count: how many entries the map has.
        """
        super().__init__()
        windows, size = index.shape
        inside = index >= 0
        place = torch.full((count,), -1)
        place[index[inside]] = torch.arange(windows * size).reshape(windows, size)[inside]
        self.register_buffer("index", index.clamp(min=0))
        self.register_buffer("inside", inside)
        self.register_buffer("covered", place >= 0)
        self.register_buffer("place", place.clamp(min=0))
        self.register_buffer("window", place.clamp(min=0) // size)

    def forward(self, target: Tensor, output: Tensor, anchor: Tensor) -> Tensor:
        """`(B, C, *positions)` twice and `(B, C, *size)` → the target of the input, `(B, C, *size)`."""
        wanted, largest, x = (value.flatten(2) for value in (target, output, anchor))
        hit = (x[:, :, self.get_buffer("index")] == largest[..., None]) & self.get_buffer("inside")
        first = hit & (hit.cumsum(-1) == 1)
        chosen = first.flatten(2)[:, :, self.get_buffer("place")]
        own = wanted[:, :, self.get_buffer("window")]
        moved = torch.where(chosen, own, torch.minimum(x, own))
        return torch.where(self.get_buffer("covered"), moved, x).reshape(anchor.shape)


def disjoint_windows(op: Op) -> Tensor | None:
    """The entries of every window `(windows, entries)`, −1 for padding; None if an entry lies in two windows."""
    index = maximum_index(op)
    places = index[index >= 0]
    return index if int(places.bincount().max()) == 1 else None
