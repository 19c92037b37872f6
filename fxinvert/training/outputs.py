"""Outputs of a model on batches, with several sets of parameters; what is asked for again on the same batches is kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxinvert.inversion.replay import Values
from fxinvert.passes.capture import evaluating
from fxinvert.training.batch import Batch
from fxinvert.training.context import Context
from fxinvert.training.variants import Variants

#: gives each batch with its outputs, one for every variant of the context's parameters; see `outputs_over`
OutputsOver = Callable[
    [Context, Iterable[Batch], Sequence[Mapping[str, Tensor]]], Iterator[tuple[Batch, Iterator[Tensor]]]
]


def outputs_over(
    context: Context, batches: Iterable[Batch], changes: Sequence[Mapping[str, Tensor]]
) -> Iterator[tuple[Batch, Iterator[Tensor]]]:
    """Each batch, in parts if need be, with its outputs `(B, …)`, one for every variant; computed as they are taken, in order.

    Args:
        context: the model, with its parameters and buffers as they are.
        batches: the data.
        changes: for each variant, the parameters or buffers that it has instead, by name.
    """
    with torch.no_grad(), evaluating(context.graph):
        variants = Variants(context, changes)
        for batch in batches:
            for part in context.parts(batch):
                yield part, variants.outputs(variants.common(part.inputs), part.inputs)


class Remembered:
    """`outputs_over` for batches that are the same every time: what the variants have in common is computed once.

    So the multiples of an update that are tried one after the other share all that comes before the op, and the outputs
    with nothing changed are computed once. Values are kept by the digest of the parameters and buffers; those used last,
    as many as fit into their part of the budget.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, ...], list[Values]] = OrderedDict()

    def __call__(
        self, context: Context, batches: Iterable[Batch], changes: Sequence[Mapping[str, Tensor]]
    ) -> Iterator[tuple[Batch, Iterator[Tensor]]]:
        batches = [part for batch in batches for part in context.parts(batch)]
        changed = [change for change in changes if change]
        sets: list[Sequence[Mapping[str, Tensor]]] = (
            [changed] if len(changed) == len(changes) else [changed, [{}]]
        )
        with torch.no_grad(), evaluating(context.graph):
            groups = [Variants(context, own) for own in sets]
            commons = [self._common(own, batches) for own in groups]
            for batch, *parts in zip(batches, *commons, strict=True):
                outputs, *start = (
                    own.outputs(part, batch.inputs) for own, part in zip(groups, parts, strict=True)
                )
                unchanged = [next(own) for own in start]
                yield batch, (next(outputs) if change else unchanged[0] for change in changes)

    def _common(self, variants: Variants, batches: Sequence[Batch]) -> Iterator[Values]:
        """What variants have in common, batch by batch; computed only if it is not kept."""
        loaded, most = variants.context.loaded, variants.context.budget.common
        key = (loaded, *(node.name for node in variants.shared))
        if not variants.shared:
            yield from ({} for _ in batches)
            return
        if key in self._known:
            self._known.move_to_end(key)
            yield from self._known[key]
            return
        found = list[Values]()
        for batch in batches:
            own = variants.common(batch.inputs)
            if loaded and _size([*found, own]) <= most:
                found.append(own)
            yield own
        if len(found) == len(batches):
            self._known[key] = found
            while sum(map(_size, self._known.values())) > most:
                self._known.popitem(last=False)


def _size(values: Sequence[Values]) -> int:
    """The bytes of values that are neither inputs nor parameters."""
    computed = (v for own in values for n, v in own.items() if n.op not in ("placeholder", "get_attr"))
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(list(computed)) if isinstance(leaf, Tensor))
