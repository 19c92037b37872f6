"""Ties: which of equal values a model takes first, where torch leaves it open.

`torch.topk` promises the largest values, but neither which of several equal ones nor, with `sorted=False`, in what order: that
depends on the device and on the algorithm that a size is given to. ONNX is definite: of equal values the first ones (TopK, since
opset 11). A file can therefore compute what the model computes and give something else, which no tolerance allows for; the model is
then asked as a file has to read it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

TIES = (
    "torch.topk leaves open which of equal values it takes, and in what order without sorting: the file is compared with the model that "
    "takes the first ones, as ONNX does."
)


class FirstOfEqual(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs `topk` as ONNX does: in order, and of equal values the first ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.aten.topk.default:
            return func(*args, **(kwargs or {}))
        values, count, dim, largest = (*args, *(-1, True)[len(args) - 2 :])[:4]
        ordered, places = torch.sort(values, dim=dim, descending=largest, stable=True)
        first = (part.narrow(dim, 0, count) if part.dim() else part for part in (ordered, places))
        return torch.return_types.topk((*first,))  # type: ignore[arg-type]
