"""One budget of memory: what a task holds at its peak, and what of the limit each part of it may take.

Factorizations, those that are kept and one that is made, take a half; the values and targets of the samples that are
worked on at a time an eighth, and solving for them a sixteenth; values that held-out outputs have in common a
thirty-second; statistics, and the rows that they are summed from, what is left. All that follows depends on the limit,
the shapes of the model and nothing else, so that it is the same wherever the work is done.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, fx
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils import _pytree as pytree

from fxinvert.errors import SolveError
from fxinvert.linalg.memory import human
from fxinvert.training.batch import Batch

#: bytes that a task may take by default; the same everywhere and at any time, since which solver is taken, and so how its
#: result is rounded, depends on it
MEMORY_LIMIT = 2**31
#: of the limit: for factorizations; for what solves work on; for values and targets
SOLVERS, WORK, VALUES = 1 / 2, 1 / 16, 1 / 8
#: of the limit, values that held-out outputs have in common; and the most that is worth it, in bytes
COMMON, LARGEST_COMMON = 1 / 32, 2**26
#: of the limit, a block of rows; so many of its size are held at once; and the most that is worth it, in bytes
BLOCK, BLOCKS, LARGEST_BLOCK = 1 / 64, 4, 2**24
#: of the limit, for sums, at least
SUMS = 1 - SOLVERS - WORK - VALUES - COMMON - BLOCKS * BLOCK
#: values of the largest node of a sample that a rule works on, besides all anchors and targets
WORKED_ON = 4
#: sums that are held at once: over all chunks and over one, of all ops; over a batch and on the way, of one op
HELD, MAKING = 2, 1.5
#: the same of rows that are kept in place of a Gram matrix, of which up to twice as many are held as are kept
HELD_ROWS = 12
#: the largest number of rows that are kept in place of a Gram matrix, and the least that is of any use
MOST, FEWEST = 2048, 16
#: rows are kept, all of them, where there are at most this share of the features, of which there are so many that it matters
FEW, MANY = 1 / 4, 512
DOUBLE = 8

K = TypeVar("K")


@dataclass(frozen=True)
class Size:
    """Of the normal equations of an op: groups, outputs m and features n of each, whether G is diagonal, rows of a sample."""

    groups: int
    outputs: int
    features: int
    diagonal: bool = False
    rows: int = 1

    @property
    def gram(self) -> int:
        """Bytes of G and C."""
        columns = 1 if self.diagonal else self.features
        return DOUBLE * self.groups * self.features * (columns + self.outputs)

    @property
    def row(self) -> int:
        """Bytes of a row of features."""
        return DOUBLE * self.groups * self.features

    @property
    def cross(self) -> int:
        """Bytes of C."""
        return DOUBLE * self.groups * self.features * self.outputs

    def few(self, samples: float) -> int | None:
        """The rows of so many samples, if they are so few that G takes more than they do, in memory and in time."""
        rows = self.rows * samples
        return max(int(rows), 1) if not self.diagonal and rows <= FEW * self.features >= FEW * MANY else None

    def sums(self, samples: float) -> int:
        """Bytes of the sums over so many samples, or of what they are made of if that is less."""
        rows = self.few(samples)
        return self.gram if rows is None else DOUBLE * self.groups * rows * (self.features + self.outputs)


@dataclass(frozen=True)
class Budget:
    """What each part of a task may take.

    Attributes:
        limit: bytes, of all together.
    """

    limit: int

    @property
    def block(self) -> int:
        """Bytes of rows that are made at a time."""
        return min(int(BLOCK * self.limit), LARGEST_BLOCK)

    @property
    def common(self) -> int:
        """Bytes of values that are kept while held-out outputs are asked for again and again."""
        return min(int(COMMON * self.limit), LARGEST_COMMON)

    @property
    def sums(self) -> int:
        """Bytes of all sums that are held at once."""
        return int((1 - SOLVERS - WORK - VALUES - COMMON) * self.limit) - BLOCKS * self.block

    def parts(self, batch: Batch, each: int) -> Iterator[slice]:
        """The samples of a batch that are worked on at a time.

        Args:
            batch: the batch.
            each: bytes of a sample's values and targets.

        Raises:
            SolveError: not even one sample fits.
        """
        samples = len(batch)
        fit = int(VALUES * self.limit) // max(each, 1)
        if not fit:
            raise SolveError(
                f"a sample's values and targets take {human(each)}, and {human(VALUES * self.limit)} of "
                f"memory_limit={self.limit} are for them: at least {int(each / VALUES)} bytes "
                f"({human(each / VALUES)}) are needed"
            )
        count = -(-samples // fit)
        step = -(-samples // count) if count else 1
        return (slice(first, min(first + step, samples)) for first in range(0, samples, step))

    def rows(self, sizes: Mapping[K, Size], times: int = 1, samples: float = math.inf) -> dict[K, int | None]:
        """For ops that are trained together, the rows that are kept in place of a Gram matrix; None: the matrix is held.

        The largest matrices are not, as many as it takes for the others to fit into half of what there is; nor are those of ops
        with few rows in all, for which these take less.

        Args:
            sizes: of their equations.
            times: how often all of them are held, for as many output targets.
            samples: how many there are to sum over, at most.

        Raises:
            SolveError: the limit is too small for the least number of rows.
        """
        found = self._rows(sizes, times, samples)
        if _useful(found):
            few = {key: size.few(samples) for key, size in sizes.items()}
            return {key: few[key] if rows is None else rows for key, rows in found.items()}
        widest = max(
            (key for key, rows in found.items() if rows is not None), key=lambda key: sizes[key].features
        )
        wide = [sizes[key] for key, rows in found.items() if rows is not None]
        # half of what there is for sums always remains for these, unless all matrices fit
        cross = 2 * HELD * sum(size.cross for size in wide)
        least = min(
            2 * (cross + len(wide) * HELD_ROWS * FEWEST * max(size.row for size in wide)),
            _held([size.sums(samples) for size in sizes.values()]),
        )
        needed = math.ceil(times * least / SUMS) + 1
        raise SolveError(
            f"the statistics of ops that are trained together, the widest {widest} with {sizes[widest].features} features and "
            f"{sizes[widest].outputs} outputs, do not fit into memory_limit={self.limit}: at least {needed} bytes "
            f"({human(needed)}) are needed"
        )

    def passes(self, sizes: Mapping[K, Size], times: int = 1, samples: float = math.inf) -> list[list[K]]:
        """For ops that are trained together, those whose sums are made in each pass over the data.

        One, if the sums of all fit (`rows`); else as many ops at a time, in order, as have room for their matrices.

        Args:
            sizes, times, samples: as for `rows`.
        """
        if self.holds(sizes, times, samples):
            return [list(sizes)]
        found: list[list[K]] = [[]]
        for key in sizes:
            held = [sizes[other].sums(samples) for other in (*found[-1], key)]
            if found[-1] and _held(held) > self.sums / times:
                found.append([])
            found[-1].append(key)
        return found

    def holds(self, sizes: Mapping[K, Size], times: int = 1, samples: float = math.inf) -> bool:
        """Whether `rows` has an answer."""
        return _useful(self._rows(sizes, times, samples))

    def _rows(self, sizes: Mapping[K, Size], times: int, samples: float) -> dict[K, int | None]:
        """What `rows` gives, None also where all rows are few; fewer than are of any use where the limit is too small."""
        taken, room = {key: size.sums(samples) for key, size in sizes.items()}, self.sums / times
        ordered = sorted(sizes, key=lambda key: taken[key])
        if _held([taken[key] for key in ordered]) <= room:
            return dict.fromkeys(sizes)
        kept = len(ordered) - 1
        while kept and _held([taken[key] for key in ordered[:kept]]) > room / 2:
            kept -= 1
        wide = ordered[kept:]
        left = room - _held([taken[key] for key in ordered[:kept]])
        cross = 2 * HELD * sum(sizes[key].cross for key in wide)
        found = {key: int((left - cross) / len(wide)) // (HELD_ROWS * sizes[key].row) for key in wide}
        return {key: min(found[key], MOST) if key in found else None for key in sizes}


def budget_for(each: int, parameters: Iterable[Tensor]) -> Budget:
    """By default: 2 GiB, or what it takes to work on one sample of a model, or to hold the sums of its largest table.

    Args:
        each: bytes of a sample's values and targets.
        parameters: of the model. For the sums of tables, and of layers with more outputs than features as those that give a
            score for every row of one, nothing smaller can be kept.
    """
    shapes = (tuple(value.shape) for value in parameters if value.dim() == 2)
    tables = [
        size.gram
        for rows, columns in shapes
        if rows >= columns
        for size in (Size(1, columns, rows, diagonal=True), Size(1, rows, columns))
    ]
    sums = _held([max(tables, default=0)])
    return Budget(max(MEMORY_LIMIT, math.ceil(each / VALUES), math.ceil(sums / SUMS) + 1))


def _useful(kept: Mapping[K, int | None]) -> bool:
    """Whether so many rows are kept of each that has no matrix that these are of any use."""
    return all(rows is None or rows >= FEWEST for rows in kept.values())


def _held(sums: list[int]) -> float:
    """Bytes at the peak."""
    return HELD * sum(sums) + MAKING * max(sums, default=0)


def bytes_of_sample(graph: fx.GraphModule, samples: int) -> int:
    """Bytes that the values and targets of a sample take, at most, and what a rule works on.

    Args:
        graph: the normalized graph.
        samples: that it was traced with.
    """
    values: list[int] = [
        leaf.shape.numel() * leaf.dtype.itemsize // samples
        for node in graph.graph.nodes
        if node.op not in ("get_attr", "output")
        for leaf in pytree.tree_leaves(node.meta.get("tensor_meta"), is_leaf=_is_metadata)
        if _is_metadata(leaf)
    ]
    return 2 * sum(values) + WORKED_ON * max(values, default=0)


def _is_metadata(value: Any) -> bool:
    return isinstance(value, TensorMetadata)
