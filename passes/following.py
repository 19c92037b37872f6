"""Following: which values depend on those of some tensors, and how, as a model runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: ops that take only the shape of their input
_SHAPED = frozenset(
    ["empty_like", "full_like", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "ones_like", "rand_like",
     "randn_like", "zeros_like"]
)  # fmt: skip


class Following(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows which tensors have values that depend on those of some, and how."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        #: every op, the shapes that it gives, and what it is given: of tensors, which of the memory that is followed
        self.ops: list[tuple[Any, list[torch.Size], list[Any]]] = []
        self.everything = False  # numbers of rows depend on values: whatever comes may
        # memory that is followed, by address, and its number; kept, so that none takes another's place
        self.memory: dict[int, tuple[int, torch.UntypedStorage]] = {}
        self._mark(tensors)

    def decide(self, argument: Any) -> bool:
        """Whether a (nested) argument holds such a tensor."""
        return self.everything or any(self.number(value) is not None for value in tensors_in(argument))

    def number(self, value: Any) -> Any:
        """Which of the memory that is followed a tensor lies in; None: in none; anything else is itself."""
        known = isinstance(value, Tensor)
        return self.memory.get(value.untyped_storage()._cdata, (None,))[0] if known else value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [self.number(value) for value in tree_leaves((args, kwargs))]
        result = func(*args, **(kwargs or {}))
        self.ops.append((func, [value.shape for value in tensors_in(result)], given))
        if func.overloadpacket.__name__ not in _SHAPED and self.decide((args, kwargs)):
            self.everything |= _decides_rows(func, args)
            self._mark(tensors_in(result))
        return result

    def _mark(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.memory.setdefault(storage._cdata, (len(self.memory), storage))


def tensors_in(argument: Any) -> list[Tensor]:
    return [value for value in tree_leaves(argument) if isinstance(value, Tensor)]


def _decides_rows(op: Any, args: tuple[Any, ...]) -> bool:
    """Whether an op gives as many rows as the values of its inputs say; of indices those do that are truth values."""
    return torch.Tag.dynamic_output_shape in op.tags and (
        op is not torch.ops.aten.index.Tensor
        or any(value.dtype == torch.bool for value in tensors_in(args[1:]))
    )
