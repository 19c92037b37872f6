"""Chunks: fixed pieces of the data, the same ones whoever reads them, so that sums over them can be shared out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Protocol

from fxinvert.errors import DataError
from fxinvert.training.data import Begun, batched

#: batches per chunk
CHUNK = 8


@dataclass(frozen=True)
class Chunk:
    """A fixed piece of the data.

    Attributes:
        index: its place.
        first: the number of its first batch, for messages.
        what: how messages call the data.
        read: gives its items, every time anew.
    """

    index: int
    first: int
    what: str
    read: Callable[[], Iterable[Any]]


class Source(Protocol):
    """Data in chunks; every pass gives the same ones.

    Attributes:
        local: whether only this process can read it, so that others have to be sent its chunks.
    """

    local: bool

    @property
    def beginning(self) -> Iterable[Any]:
        """The first items, as many as one likes, without beginning a pass of its own."""
        ...

    def chunks(self) -> Iterator[Chunk]: ...

    def chunk(self, index: int) -> Chunk:
        """One chunk, of a source that is not local."""
        ...


class LoaderSource:
    """A list, a `DataLoader`, any iterable: read here, one batch after the other."""

    local = True

    def __init__(self, loader: Iterable[Any], what: str, size: int) -> None:
        self.loader, self.what, self.size = Begun(batched(loader, what)), what, size

    @property
    def beginning(self) -> Iterable[Any]:
        return self.loader.beginning

    def chunks(self) -> Iterator[Chunk]:
        items = iter(self.loader)
        index = 0
        while piece := list(islice(items, self.size)):
            yield Chunk(index, index * self.size, self.what, partial(_same, piece))
            index += 1

    def chunk(self, index: int) -> Chunk:
        raise NotImplementedError("a loader is read from its beginning")


class IndexedSource:
    """What a factory makes, if it can be indexed: every process makes its own and reads the chunks it works on."""

    local = False

    def __init__(self, factory: Callable[[], Any], made: Sequence[Any], what: str, size: int) -> None:
        self.factory, self.what, self.size = factory, what, size
        self.count = len(made)
        self._made: Sequence[Any] | None = made

    @property
    def beginning(self) -> Iterable[Any]:
        return _items(self)

    def chunks(self) -> Iterator[Chunk]:
        return map(self.chunk, range(-(-self.count // self.size)))

    def chunk(self, index: int) -> Chunk:
        start = index * self.size
        return Chunk(index, start, self.what, partial(self._read, start, min(start + self.size, self.count)))

    def _read(self, start: int, stop: int) -> Iterator[Any]:
        if self._made is None:
            self._made = self.factory()
        made = self._made
        if len(made) < self.count:
            raise DataError(
                f"{self.what} has {len(made)} batches in another process and {self.count} where the run began; "
                "its factory must make the same everywhere"
            )
        return (made[i] for i in range(start, stop))

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_made": None}


class Shards:
    """Factories of batches, one for each shard of some data; iterated, the batches of all of them.

    Args:
        factories: called anew for every pass.
    """

    def __init__(self, factories: Sequence[Callable[[], Iterable[Any]]]) -> None:
        self.factories = factories

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(factory() for factory in self.factories)


class ShardSource:
    """Every shard is a chunk, read where it is worked on."""

    local = False

    def __init__(self, shards: Sequence[Callable[[], Iterable[Any]]], what: str) -> None:
        self.shards, self.what = shards, what

    @property
    def beginning(self) -> Iterable[Any]:
        return _items(self)

    def chunks(self) -> Iterator[Chunk]:
        return map(self.chunk, range(len(self.shards)))

    def chunk(self, index: int) -> Chunk:
        return Chunk(index, 0, f"shard {index} of {self.what}", self.shards[index])


def source_of(data: Any, what: str = "train_data", size: int = CHUNK) -> Source:
    """Data as a user gives it, in chunks.

    Args:
        data: an iterable of `(inputs, labels)` batches that can be iterated more than once; one such pair of all samples,
            or a dataset; a factory of batches, which may be a generator; or a list of factories, one for each shard.
        what: how messages call it.
        size: batches per chunk; shards are chunks as they are.

    Raises:
        DataError: it is none of these.
    """
    if is_shards(data):
        data = Shards(data)
    if isinstance(data, Shards):
        return ShardSource(data.factories, what)
    if callable(data) and not isinstance(data, Iterable):
        made = data()
        if hasattr(made, "__getitem__") and hasattr(made, "__len__"):
            return IndexedSource(data, made, what, size)
        return LoaderSource(_Anew(data, what), what, size)
    return LoaderSource(data, what, size)


def is_shards(data: Any) -> bool:
    """Whether some data are a list of factories, one for each shard."""
    return isinstance(data, list | tuple) and len(data) > 0 and all(map(callable, data))


class _Anew:
    """What a factory makes, made anew for every pass, so that it may be an iterator."""

    def __init__(self, factory: Callable[[], Iterable[Any]], what: str) -> None:
        self.factory, self.what = factory, what

    def __iter__(self) -> Iterator[Any]:
        made = self.factory()
        if not isinstance(made, Iterable):
            raise DataError(f"the factory of {self.what} made {type(made).__name__}; batches are needed")
        return iter(made)


def _items(source: Source) -> Iterator[Any]:
    return (item for chunk in source.chunks() for item in chunk.read())


def _same(items: list[Any]) -> list[Any]:
    return items
