"""How long things take, compared with one another."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.benchmark import Timer


@dataclass(frozen=True)
class Ratio:
    """One measured ratio.

    Attributes:
        what: what was measured.
        compared_with: what it was measured against.
        ratio: median time over median time.
        aim: the largest ratio that is aimed at, None where none is stated.
        note: anything else that was measured on the way.
    """

    what: str
    compared_with: str
    ratio: float
    aim: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def seconds(function: Callable[[], object]) -> float:
    """Median time of a call, warm."""
    function()
    return float(
        Timer("function()", globals={"function": function}).blocked_autorange(min_run_time=0.3).median
    )


def ratio(
    what: str,
    function: Callable[[], object],
    compared_with: str,
    reference: Callable[[], object],
    aim: float | None = None,
    note: str = "",
) -> Ratio:
    """The time of a function over that of a reference, measured one after the other."""
    return Ratio(what, compared_with, seconds(function) / seconds(reference), aim, note)


def environment() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
