"""Content: what a model consists of, and the bytes of a tensor, for hashes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def content_of(tensor: Tensor) -> Any:
    """The values of a tensor, in order, as a buffer of bytes; its layout in memory does not matter."""
    dense = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return dense.flatten().view(torch.uint8).numpy().data


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model's state dict themselves, by name; modules may keep other things there, too."""
    found = model.state_dict(keep_vars=True)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
