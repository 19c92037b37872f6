"""Content: the bytes of a tensor, for hashes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def content_of(tensor: Tensor) -> Any:
    """The values of a tensor, in order, as a buffer of bytes; its layout in memory does not matter."""
    dense = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return dense.flatten().view(torch.uint8).numpy().data
