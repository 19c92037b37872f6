"""Batched: ops that torch computes in ways that depend on the batch size, as those that mean the same for any.

`torch.export` follows sizes, and so cannot capture for any batch what asks how large it is. How many parts `chunk` and
`split` give depends on the length; of pairs of batches, as Siamese networks join them, or of stages, it is the same whatever
the batch size is. `cdist` takes products from 25 rows on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxinvert.passes.decompose import distances
from fxinvert.passes.strided import surely

#: joined batches are looked for up to this number
_MOST = 64


class Batched(TorchFunctionMode):
    """While it is on, a tensor whose length varies is viewed as its equal parts where it is cut into them; `cdist` and
    `take_along_dim`, of which torch makes what holds for the example's length, are written out."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if isinstance(args[0] if args else None, Tensor):
            if name in ("chunk", "split"):
                return func(*args, **kwargs) if (parts := _cut(name, *args, **kwargs)) is None else parts
            if name == "cdist":
                return distances(*args, **kwargs)
            if name == "take_along_dim":
                return _taken(*args, **kwargs)
        return func(*args, **kwargs)


def _cut(name: str, tensor: Tensor, *by: Any, dim: int = 0, **named: Any) -> tuple[Tensor, ...] | None:
    """What `chunk` gives for a number of parts, and `split` for their length; None: of another length, it would be others."""
    number, axis = (*by, *named.values(), dim)[:2]
    axis %= tensor.dim()
    length = tensor.shape[axis]
    if isinstance(length, torch.SymInt) and isinstance(number, int | torch.SymInt):
        for count in [number] if name == "chunk" else range(1, _MOST + 1):
            # of batches that are joined torch has to be asked whether they are equally long
            if length % count == 0 if name == "chunk" else surely(length == count * number):
                parts: Any = torch.unflatten(tensor, axis, (count, length // count))
                return tuple(parts.unbind(axis))
    return None


def _taken(tensor: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """What `take_along_dim` gives."""
    if dim is None:
        return tensor.flatten().gather(0, indices.flatten())
    axis = dim % tensor.dim()
    others: Any = torch.broadcast_shapes(*(t.select(axis, 0).shape for t in (tensor, indices)))  # type: ignore[no-untyped-call]
    tensor, indices = (t.expand(*others[:axis], t.shape[axis], *others[axis:]) for t in (tensor, indices))
    return tensor.gather(axis, indices)
