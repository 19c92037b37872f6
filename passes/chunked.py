"""Chunked: `chunk` along an axis whose length follows the batch, as a view of that many equal parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Chunked(TorchFunctionMode):
    """While it is on, a tensor whose length varies and is a multiple of the number of chunks is viewed as them.

    How many parts `chunk` gives depends on the length, which torch would ask for; of pairs of batches, as Siamese networks
    join them, it gives two whatever the batch size is.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "chunk":
            return _chunked(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _chunked(func: Any, input: Any, chunks: Any, dim: int = 0) -> Any:
    length = input.shape[dim] if isinstance(input, Tensor) else None
    if isinstance(length, torch.SymInt) and length % chunks == 0:
        return input.unflatten(dim, (chunks, length // chunks)).unbind(dim)
    return func(input, chunks, dim)
