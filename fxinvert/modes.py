"""Modes of torch that a caller may have switched on, and that would change what is computed here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

#: kinds of devices on which torch computes in less precision by itself where that was asked for
_KINDS = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def as_usual() -> Iterator[None]:
    """Outside of `torch.inference_mode` and of `torch.autocast`, as a block or a decorator.

    Derivatives are needed where the caller may want none, and solves in as much precision as their numbers have. What a model's own
    `forward` switches on is not affected.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
