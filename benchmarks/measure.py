"""How long things take, compared with one another."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
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


#: what `mallopt` calls the size from which memory is mapped, and what is free before it is given back (malloc.h)
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
#: how long a ratio is measured, at least, and how often in turn
TIME, ROUNDS = 0.6, 5


@contextmanager
def quickly(quick: bool = True) -> Iterator[None]:
    """Inside, ratios are measured only once, and so only roughly."""
    global TIME, ROUNDS
    kept = TIME, ROUNDS
    if quick:
        TIME, ROUNDS = 0.05, 1
    try:
        yield
    finally:
        TIME, ROUNDS = kept


def seconds(function: Callable[[], object], *, warm: bool = True) -> float:
    """Median time of a call; a single one where it is not to be warm."""
    if not warm:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
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
    """The time of a function over that of a reference: the median of several, both measured in turn."""
    timers = [Timer("function()", globals={"function": f}) for f in (function, reference)]
    # the first call warms up
    calls = [max(1, int(TIME / 2 / ROUNDS / timer.timeit(1).mean)) for timer in timers]
    calls = [
        max(1, int(TIME / 2 / ROUNDS / timer.timeit(n).mean)) for timer, n in zip(timers, calls, strict=True)
    ]
    rounds = [[t.timeit(n).mean for t, n in zip(timers, calls, strict=True)] for _ in range(ROUNDS)]
    return Ratio(what, compared_with, median(ours / theirs for ours, theirs in rounds), aim, note)


def ratio_in_turn(
    what: str,
    function: Callable[[], object],
    compared_with: str,
    reference: Callable[[], object],
    aim: float | None = None,
    note: str = "",
) -> Ratio:
    """The same for calls that move more than they compute: one of each at a time, in processor time.

    Repeated by itself, a call that touches little finds all of it in the processor's cache, which it never does where
    other calls come between. And what else the machine does takes its turn during the longer calls, which would count.
    """
    calls = (function, reference)
    taken: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + TIME
    while len(taken[0]) < 2 * ROUNDS or time.perf_counter() < end:
        for call, seconds_taken in zip(calls, taken, strict=True):
            start = time.process_time()
            call()
            seconds_taken.append(time.process_time() - start)
    ours, theirs = (median(several[1:]) for several in taken)  # the first call warms up
    return Ratio(what, compared_with, ours / theirs, aim, note)


def keep_memory() -> None:
    """From now on glibc's allocator keeps what it has been given back; other C libraries do as they do.

    Else memory for a result of a few megabytes comes fresh from the system now and then, as the process's past decides, and
    an op that hardly computes takes three times as long.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    for parameter, value in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**31 - 1)):
        library.mallopt(parameter, value)


def environment(device: bool = False) -> dict[str, str]:
    """What the figures depend on; with the CUDA device's name where that is measured."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    } | ({"device": torch.cuda.get_device_name()} if device else {})
