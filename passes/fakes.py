"""Fakes: what `torch.export` cannot follow with tensors that have no values: ops without a kernel for shapes alone, and subclasses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxinvert.passes.flexible import flexible_written
from fxinvert.passes.lengths import lengths_followed

#: ops that give values, and which of these were not clamped
_QUANTIZING = (
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "fake_quantize_per_channel_affine_cachemask",
    "fake_quantize_per_tensor_affine_cachemask",
)
#: what reads `x.data`
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


@contextmanager
def with_fakes() -> Iterator[None]:
    """Runs the body with such kernels, where this torch has none."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name in _QUANTIZING:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Meta"):
            library.impl(name, _quantizing, "Meta")  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


def _quantizing(value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(value), torch.empty_like(value, dtype=torch.bool)


@contextmanager
def exportable(model: nn.Module) -> Iterator[None]:
    """Runs the body with what `torch.export` needs to follow a model: plain tensors, attention written out, lengths that vary."""
    with plain_tensors(), flexible_written(), lengths_followed(model):
        yield


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Runs the body with tensors that stay what they are.

    A subclass that a model makes its tensors of, as fastai does, says what they mean; what is computed is the same. The
    numbers alone (`weight.data`), which the exporter takes for another tensor, are those of a detached one.
    """
    own = vars(Tensor).get("as_subclass")  # a library may have put another in place of torch's
    Tensor.as_subclass = _as_it_is  # type: ignore[method-assign, assignment]
    try:
        with _Detaching():
            yield
    finally:
        if own is None:
            del Tensor.as_subclass
        else:
            Tensor.as_subclass = own  # type: ignore[method-assign]


class _Detaching(TorchFunctionMode):
    """Reads `x.data` as `x.detach()`, which is an op."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0].detach() if func == _DATA else func(*args, **(kwargs or {}))


def _as_it_is(value: Tensor, _: type[Tensor]) -> Tensor:
    return value
