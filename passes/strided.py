"""Strided: views by strides (`as_strided`) as the windows that they are of, which mean the same however a tensor lies in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Windowed(TorchFunctionMode):
    """While it is on, `as_strided` computes by `unfold`, where what it gives are windows along axes; else as it is."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "as_strided":
            found = _windows(*args, **(kwargs or {}))
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))


def _windows(
    x: Tensor, size: Sequence[Any], stride: Sequence[Any], storage_offset: Any = None
) -> Tensor | None:
    """The same of the tensor as it is, or with two of its axes that follow one another in memory taken as one."""
    size, stride = ([int(n) if isinstance(n, Tensor) else n for n in numbers] for numbers in (size, stride))
    if storage_offset is not None and not _same(storage_offset, x.storage_offset()):
        return None
    joined = [
        x.flatten(i, i + 1)
        for i in range(x.dim() - 1)
        if _same(x.stride(i), x.shape[i + 1] * x.stride(i + 1))
    ]
    found = (_unfolded(own, size, stride) for own in (x, *joined))
    return next((windows for windows in found if windows is not None), None)


def _unfolded(x: Tensor, size: Sequence[Any], stride: Sequence[Any]) -> Tensor | None:
    """Windows along axes of `x`, each of which is found again by its stride; None: it is something else."""
    left = list(range(len(size)))
    places: list[int] = []  # in the result, of every axis
    for axis in range(x.dim()):
        own = next((i for i in left if _same(stride[i], x.stride(axis))), None)
        if own is None or not surely(size[own] <= x.shape[axis]):
            return None
        left.remove(own)
        places.append(own)
    for axis, own in enumerate(list(places)):
        found = next(
            ((i, step) for i in left for step in _steps(x, axis) if _same(stride[i], step * x.stride(axis))),
            None,
        )
        if found is None:
            x = x if _same(size[own], x.shape[axis]) else x.narrow(axis, 0, size[own])
            continue
        windows, step = found
        if not surely((size[windows] - 1) * step + size[own] <= x.shape[axis]):
            return None
        x = x.unfold(axis, size[own], step).narrow(axis, 0, size[windows])
        left.remove(windows)
        places[axis] = windows
        places.append(own)
    return None if left else x.permute([places.index(i) for i in range(len(size))])


def _steps(x: Tensor, axis: int) -> range:
    """From window to window, along an axis of a length that is known."""
    length = x.shape[axis]
    return range(1, length if isinstance(length, int) else 1)


def _same(one: Any, other: Any) -> bool:
    return surely(one == other)


def surely(condition: Any) -> bool:
    """Whether a condition of sizes holds whatever the batch size is."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return statically_known_true(condition)
