"""What a device gives: how much memory, how much of it factorizations may take, and the digits of its products."""

from __future__ import annotations

import math
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

#: part of the free memory that is taken unless a limit is set
SHARE = 0.25
#: bytes that are taken to be free in any case
LEAST = 2**28
#: control groups of Linux, version 2 and 1: the folder, and in it the limit, what is used, and what of that can be freed
CONTAINERS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device: what the system calls available, or else all it has, as far as this process may take it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(max(LEAST, min(_available(), *_allowed())))


def _allowed() -> Iterator[float]:
    """What the limits of this process, and of the container that it runs in, leave of them."""
    yield math.inf
    own = Path("/proc/self/statm")
    if own.exists():
        import resource  # where there is no such file there may be no such module

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit - int(own.read_text().split()[0]) * resource.getpagesize()
    for folder, most, used, cached in CONTAINERS:
        files = [Path(folder, name) for name in (most, used, "memory.stat")]
        if all(file.exists() for file in files) and (limits := files[0].read_text().strip()).isdigit():
            stat = dict(line.split() for line in files[2].read_text().splitlines())
            # files that nobody looked at lately make room
            yield int(limits) - int(files[1].read_text()) + int(stat.get(cached, 0))


def _available() -> int:
    known = Path("/proc/meminfo")
    if known.exists():
        fields = dict(line.split(":", 1) for line in known.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def waits(tensor: Tensor) -> bool:
    """Whether looking at a value waits for the device, or there is none yet: everywhere but on the processor, and while
    a kernel is traced."""
    return tensor.device.type != "cpu" or isinstance(tensor, FakeTensor)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products have the digits of float32 here, whatever the process allows elsewhere: no TF32 on CUDA."""
    if device.type != "cuda":
        yield
        return
    switches: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def human(size: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


class Ledger:
    """What all caches hold together, and what has to go when it is too much: what will be wanted last.

    An entry is due as long after its last use as that was after the one before it (Belady, IBM Syst. J. 5, 1966, with
    the future as the past was); one that has not come back by then as late again as it has been away. Where more is asked
    for in turn than fits, the newcomer is the last that is wanted again, and is not kept, so that of a round trip as much
    stays as fits: the least recently used, which is the next that is wanted, goes only where nothing is known of the newcomer.

    Args:
        limit: in bytes; by default a quarter of the memory that is free when something is added.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._now = 0
        self._held: OrderedDict[_Place, torch.device] = OrderedDict()
        # the last use and the time between the last two, of what is held and of what had to go
        self._last: dict[_Place, int] = {}
        self._between: dict[_Place, int] = {}

    @property
    def held(self) -> int:
        """Bytes of all that is held."""
        return sum(_size(entry) or 0 for entry in self._held)

    def used(self, owner: FactorCache, key: Any, device: torch.device) -> None:
        """Notes the use of an entry, and drops others while there are too many."""
        entry = (owner.itself, key)
        self._now += 1
        if entry in self._last:
            self._between[entry] = self._now - self._last[entry]
        self._last[entry] = self._now
        known = entry in self._held
        self._held[entry] = device
        self._held.move_to_end(entry)
        if not known:
            self._make_room(entry, device)

    def reserve(self, size: int, device: torch.device) -> None:
        """Drops entries until something of `size` bytes can be made within the limit, which is given."""
        self._make_room(None, device, size)

    def _make_room(self, newest: _Place | None, device: torch.device, size: int = 0) -> None:
        for uses in (self._last, self._between):
            for entry in [entry for entry in uses if entry[0]() is None]:
                del uses[entry]
        sizes = {entry: _size(entry) for entry in self._held}
        for entry in [entry for entry, size in sizes.items() if size is None]:
            del self._held[entry], sizes[entry]
        here = [entry for entry, its in self._held.items() if its == device]
        total = size + sum(sizes[entry] or 0 for entry in here)
        limit = self.limit if self.limit is not None else int(SHARE * (free_memory(device) + total))
        # what is in use stays if nothing else does
        while len(here) > (newest is not None) and total > limit:
            # of several the first: the least recently used
            last = max(here, key=lambda entry: self._due(entry, newest))
            here.remove(last)
            total -= sizes[last] or 0
            cache = last[0]()
            if cache is not None:
                cache.drop(last[1])
            del self._held[last]

    def _due(self, entry: _Place, newest: _Place | None) -> float:
        """When an entry will be wanted; if it never came back, as long after its use as the newest did."""
        last = self._last[entry]
        after = math.inf if newest is None else self._between.get(newest, math.inf)
        due = last + self._between.get(entry, after)
        return due if due >= self._now else self._now + (self._now - last)


class FactorCache:
    """Keeps what was computed from an op's parameters until the parameters change or the memory is needed.

    On the processor their values are compared. Elsewhere the comparison would wait for the device at every use: there
    a tensor that torch has counted no change of since is taken to be the same, so that what is written through
    `.data`, which torch does not count, goes unnoticed.

    Args:
        ledger: counts what all caches hold; by default one for the whole process.
    """

    def __init__(self, ledger: Ledger | None = None) -> None:
        self._entries: dict[Any, _Entry] = {}
        self._ledger = ledger or LEDGER
        self.itself = weakref.ref(self)

    def get(self, key: Any, parameters: tuple[Tensor, ...], build: Callable[[], Any]) -> Any:
        """The value built for `key` with these parameter values; built anew when any value differs."""
        known = self._entries.get(key)
        if known is None or not known.holds_for(parameters):
            self._entries.pop(key, None)  # two of them need not be held at once
            known = _Entry(parameters, build())
            self._entries[key] = known
        device = parameters[0].device if parameters else torch.device("cpu")
        self._ledger.used(self, key, device)
        return known.value

    def values(self) -> list[Any]:
        """All that is kept."""
        return [entry.value for entry in self._entries.values()]

    def __reduce__(self) -> tuple[Any, ...]:
        return FactorCache, ()  # a copy computes anew

    def drop(self, key: Any) -> None:
        """Forgets an entry."""
        self._entries.pop(key, None)

    def size(self, key: Any) -> int | None:
        """Bytes of an entry, None where it is not held."""
        known = self._entries.get(key)
        return None if known is None else known.nbytes


class _Entry:
    """A value, with the parameters that it was built from as they were then."""

    def __init__(self, parameters: tuple[Tensor, ...], value: Any) -> None:
        self.value = value
        self._copies = tuple(p.detach().clone() for p in parameters)
        self._seen = [(weakref.ref(p), _changes(p)) for p in parameters]

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self._copies) + int(getattr(self.value, "nbytes", 0))

    def holds_for(self, parameters: tuple[Tensor, ...]) -> bool:
        return all(map(self._is, range(len(parameters)), parameters))

    def _is(self, i: int, parameter: Tensor) -> bool:
        tensor, changes = self._seen[i]
        if (
            waits(parameter)
            and changes is not None
            and tensor() is parameter
            and _changes(parameter) == changes
        ):
            return True
        if not torch.equal(self._copies[i], parameter):
            return False
        self._seen[i] = weakref.ref(parameter), _changes(parameter)
        return True


def _changes(tensor: Tensor) -> int | None:
    """How often a tensor was written to, where torch counts that."""
    return None if tensor.is_inference() else tensor._version


#: a cache and the key of an entry
_Place = tuple[weakref.ref[FactorCache], Any]


def _size(entry: _Place) -> int | None:
    cache = entry[0]()
    return None if cache is None else cache.size(entry[1])


LEDGER = Ledger()
#: those with a limit of their own
_LIMITED: dict[int, Ledger] = {}


def ledger(limit: int) -> Ledger:
    """The one of this process that keeps to a limit in bytes."""
    return _LIMITED.setdefault(limit, Ledger(limit))
