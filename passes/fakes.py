"""Fakes: what ops give that `torch.export` cannot tell for any number of samples, as it has no kernel for their shapes alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: ops that give values, and which of these were not clamped
_QUANTIZING = (
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "fake_quantize_per_channel_affine_cachemask",
    "fake_quantize_per_tensor_affine_cachemask",
)


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
