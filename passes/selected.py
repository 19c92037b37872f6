"""Selected rows: what is computed on the rows that values select, as the same on all rows, of which those count.

A mixture of experts gives each expert the rows that a router chose for it, and loops over the experts that were given
any. How many rows that are, data says; `torch.export` follows none of it. If an expert computes row by row and its results
are added where its rows came from, it may as well be given all rows, if zeros are added for those that were not chosen:

    for e in chosen.any(1).nonzero():              for e in range(len(chosen)):
        (i,) = torch.where(chosen[e])          =       i = torch.arange(chosen.shape[1])
        y.index_add_(0, i, f(e, x[i]))                 y.index_add_(0, i, torch.where(chosen[e], f(e, x[i]), 0))

The same goes for `y[i] += f(e, x[i])`, and for `y[i] = …`, which adds what is to change.

Rows that a mask takes of every sample may be all of a sample's, if those that it does not take stand in front and what is
computed reads from the back, as where a sentence is what its last end marker has become:

    y = x[mask].view(len(x), -1, n)[:, -1]         =       i = mask.int().argsort(stable=True)
                                                           y = x[torch.arange(len(x))[:, None], i][:, -1]

Whether it does is tried: rows that were not chosen are given values that would be seen in the result, and there is one more
of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxinvert.errors import TraceError
from fxinvert.passes.as_run import AsRun
from fxinvert.passes.capture import called_at
from fxinvert.passes.inputs import Flat
from fxinvert.passes.lengths import whole_sizes
from fxinvert.passes.runs import difference, run

#: functions that give the places of what is not zero
_SELECT = frozenset(["argwhere", "nonzero", "where"])
#: functions that add rows at places
_ADD = frozenset(["index_add", "index_add_"])

_AMONG = "rows that values select are not computed by themselves"


class AllRows(TorchFunctionMode):
    """Selects all rows, and adds zeros for those that values did not select.

    Args:
        more: one more row for every selection, and one more round for every loop over some, which count for nothing.
    """

    def __init__(self, more: bool = False) -> None:
        super().__init__()
        self.more = more
        # which of the places that memory holds were selected; the places are kept, so that no others take their memory
        self.places: dict[int, tuple[Tensor, Tensor]] = {}
        self.rounds: list[Tensor] = []  # whether the rounds that loops are in were selected
        # rows that were read at places, by which index, and what was added to them since; they are kept as above
        self.read: dict[int, tuple[Tensor, Any, Any]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _SELECT and len(args) == 1:
            return self._all(args[0], name == "where" or kwargs.get("as_tuple", False))
        # a tensor is looped over by unbinding it
        if name == "unbind" and not any(args[1:]) and (chosen := self.chosen(args[0])) is not None:
            return self._looped(args[0], chosen)
        if name in _ADD:
            return self._added(func, *args, **kwargs)
        if name == "__getitem__" and (mask := _taking(args[1])) is not None:
            return args[0][self._behind(mask)]
        if name == "__getitem__":
            return self._read(func, *args)
        if name == "__setitem__":
            return self._written(func, *args)
        if name == "__iadd__" and id(args[0]) in self.read:
            rows, index, added = self.read[id(args[0])]
            self.read[id(rows)] = rows, index, args[1] if added is None else added + args[1]
        return func(*args, **kwargs)

    def chosen(self, places: Any) -> Tensor | None:
        """Which of some places were selected; None: they are no places of a selection."""
        if not isinstance(places, Tensor):
            return None
        return self.places.get(_memory(places), (None, None))[1]

    def _read(self, func: Any, values: Tensor, index: Any) -> Tensor:
        rows: Tensor = func(values, index)
        if self._selected(index) is not None:
            self.read[id(rows)] = rows, index, None
        return rows

    def _written(self, func: Any, into: Tensor, index: Any, value: Any) -> None:
        """Adds to rows what has been added to them since they were read, else what is to change."""
        chosen = self._selected(index)
        if chosen is None:
            func(into, index, value)
            return
        _, known, more = self.read.get(id(value), (value, None, None))
        own = into[index]
        more = value - own if more is None or known is not index else torch.as_tensor(more).to(own)
        more = torch.where(chosen.reshape(-1, *[1] * (own.dim() - 1)), more, own.new_zeros(()))
        into.index_put_(index if isinstance(index, tuple) else (index,), more, accumulate=True)

    def _selected(self, index: Any) -> Tensor | None:
        """Which of the rows at an index of places alone were selected; None: it has other parts."""
        chosen = [self.chosen(part) for part in (index if isinstance(index, tuple) else (index,))]
        return chosen[0] if chosen and all(part is not None for part in chosen) else None

    def _all(self, values: Tensor, apart: bool) -> Any:
        """All places, as one tensor or as one for each axis."""
        # the axis whose size varies while a model is captured is the batch: rows of a sample stay together
        order = sorted(range(values.dim()), key=lambda axis: isinstance(values.shape[axis], int))
        chosen = values.permute(order).reshape(-1) != 0
        for selected in self.rounds:
            chosen = chosen & selected
        rest = torch.arange(chosen.shape[0], device=values.device)
        places = [rest] * len(order)
        for axis in reversed(order[1:]):
            size = values.shape[axis]
            places[axis], rest = rest % size, rest // size
        places[order[0]] = rest
        if self.more:
            *places, chosen = (torch.cat([t, t.new_zeros(1)]) for t in (*places, chosen))
        found = tuple(places) if apart else (torch.stack(places, 1),)
        for tensor in found:
            self.places[_memory(tensor)] = tensor, chosen
        return found if apart else found[0]

    def _behind(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The places of all rows of each sample, those that a mask takes behind the others."""
        rows, size = mask.shape
        order = (mask.long() * size + torch.arange(size, device=mask.device)).argsort(1)
        chosen = mask.gather(1, order)
        if self.more:
            order, chosen = (torch.cat([t.new_zeros(rows, 1), t], 1) for t in (order, chosen))
        samples = torch.arange(rows, device=mask.device)[:, None].expand_as(order).reshape(-1)
        order = order.reshape(-1)
        self.places[_memory(order)] = order, chosen.reshape(-1)
        return samples, order

    def _looped(self, places: Tensor, chosen: Tensor) -> Iterator[Tensor]:
        """The rounds of a loop over the places of one axis, each of which is a number that code may ask for."""
        rounds = places.shape[0]
        if places.shape[1:] not in ((), (1,)) or not isinstance(rounds, int):
            raise TraceError("it loops over samples, or over places of several axes, that values select")
        for number in range(rounds):
            self.rounds.append(chosen[number])
            place = 0 if self.more and number == rounds - 1 else number
            try:
                yield torch.tensor(place, device=places.device).expand(places.shape[1:])
            finally:
                self.rounds.pop()

    def _added(self, func: Any, into: Tensor, dim: int, index: Tensor, source: Tensor, **kwargs: Any) -> Any:
        chosen = self.chosen(index)
        if chosen is not None:
            others = [1] * source.dim()
            others[dim] = -1
            source = torch.where(chosen.reshape(others), source, source.new_zeros(()))
        return func(into, dim, index, source, **kwargs)


def _memory(tensor: Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place


def _taking(index: Any) -> Tensor | None:
    """The mask by which an index takes rows of samples; None: it takes others, or other than rows."""
    mask, *rest = index if isinstance(index, tuple) else (index,)
    whole = all(part == slice(None) for part in rest if not isinstance(part, Tensor))
    rows = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() == 2
    return mask if rows and whole and not any(isinstance(part, Tensor) for part in rest) else None


def as_it_runs(flat: Flat, values: tuple[Tensor, ...]) -> Iterator[Flat]:
    """A model captured as it runs; then, where it computes on rows that values select, with all rows instead: as it runs, and as
    is; at last as it runs, with sizes that stay sizes where code makes numbers of them.

    Args:
        flat: the model.
        values: its inputs.

    Raises:
        TraceError: the model does not run, or what it computes on selected rows depends on others.
    """
    as_run = AsRun(flat, values)
    yield as_run
    if as_run.selects:
        check_rows(flat, values)
        with_all = Flat(flat.model, flat.inputs, flat.choose, AllRows)
        yield AsRun(with_all, values)
        yield with_all
    yield AsRun(Flat(flat.model, flat.inputs, flat.choose, partial(whole_sizes, flat.model)), values)


def check_rows(flat: Flat, values: tuple[Tensor, ...]) -> None:
    """What a model computes on selected rows does not depend on others.

    Args:
        flat: the model.
        values: its inputs.

    Raises:
        TraceError: it does, or may do.
    """
    expected = run(flat, values)
    for noise in (torch.nan, 1e3):

        def disturbed(*copies: Any, noise: float = noise) -> Any:
            rows = AllRows(more=True)
            with _Disturbing(rows, noise), rows:
                return flat(*copies)

        try:
            found = run(disturbed, values)  # type: ignore[arg-type]
        except TraceError as error:
            raise TraceError(f"{_AMONG} ({error})") from error
        for before, now in zip(tree_leaves(expected), tree_leaves(found), strict=True):
            if isinstance(before, Tensor) and (problem := difference(before, now)):
                raise TraceError(f"{_AMONG} ({problem})")


class _Disturbing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives rows that are taken from places that were not selected other values."""

    def __init__(self, rows: AllRows, noise: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows, self.noise = rows, noise

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for axis, chosen in self._taken(func, args):
            others = [1] * result.dim()
            others[axis] = -1
            other = torch.randn_like(result) * self.noise if result.is_floating_point() else ~result
            result = torch.where(chosen.reshape(others), result, other)
        return result

    def _taken(self, op: Any, args: tuple[Any, ...]) -> Iterator[tuple[int, Tensor]]:
        """The axes of an op's result that rows from places lie along, and which of them were selected."""
        name = op.overloadpacket.__name__
        if op.is_view or name in _ADD or (name == "index_put_" and args[3:] == (True,)):
            return
        if name == "index_select":
            args = (args[0], [None] * args[1] + [args[2]])
        if name in ("index", "index_select"):
            axes = [axis for axis, places in enumerate(args[1]) if places is not None]
            # what places along axes that are neighbours give stands where these stood, else in front
            axis = axes[0] if axes[-1] - axes[0] < len(axes) else 0
            for places in args[1]:
                if (chosen := self.rows.chosen(places)) is not None:
                    yield axis, chosen
        elif any(self.rows.chosen(value) is not None for value in tree_leaves(args)):
            raise TraceError(f"their places are given to {name}{_where()}")


def _where() -> str:
    place = called_at()
    return f", at {place}" if place else ""
