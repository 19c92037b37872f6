"""A batch of tensors as vectors, one for every sample."""

from __future__ import annotations

import torch
from torch import Tensor


def flat(value: Tensor) -> Tensor:
    """Every sample as a vector: `(B, …)` → `(B, n)`, `(B,)` → `(B, 1)`."""
    return value.flatten(1) if value.dim() > 1 else value[:, None]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of every two samples: `(B, …)` → `(B,)`."""
    return flat(a * b).sum(1)


def norm(value: Tensor) -> Tensor:
    """Euclidean norm of every sample: `(B, …)` → `(B,)`."""
    norms: Tensor = torch.linalg.vector_norm(flat(value), dim=1)
    return norms


def per_sample(rows: Tensor, like: Tensor) -> Tensor:
    """Per-sample values `(B,)` that broadcast to `(B, …)`."""
    return rows.reshape(-1, *[1] * (like.dim() - 1))
