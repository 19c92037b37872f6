"""What torch allocates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak(do: Callable[[], Any]) -> int:
    """Bytes that are held at most of what is allocated meanwhile, temporary ones of kernels included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        do()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, size in changes:
        held += size
        most = max(most, held)
    return most
