"""Outputs of a model on batches, with several sets of parameters; what is asked for again on the same batches is kept."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fxinvert.passes.capture import evaluating
from fxinvert.training.batch import Batch
from fxinvert.training.context import Context
from fxinvert.training.variants import Variants

#: bytes of outputs that are kept
KEPT_BYTES = 2**26

#: gives each batch with its outputs, one for every variant of the context's parameters; see `outputs_over`
OutputsOver = Callable[
    [Context, Iterable[Batch], Sequence[Mapping[str, Tensor]]], Iterator[tuple[Batch, Iterator[Tensor]]]
]


def outputs_over(
    context: Context, batches: Iterable[Batch], changes: Sequence[Mapping[str, Tensor]]
) -> Iterator[tuple[Batch, Iterator[Tensor]]]:
    """Each batch with its outputs `(B, …)`, one for every variant; they are computed as they are taken, in order.

    Args:
        context: the model, with its parameters and buffers as they are.
        batches: the data.
        changes: for each variant, the parameters or buffers that it has instead, by name.
    """
    with torch.no_grad(), evaluating(context.graph):
        variants = Variants(context, changes)
        for batch in batches:
            yield batch, variants.outputs(batch.inputs)


class Remembered:
    """`outputs_over` for batches that are the same every time: what they give with nothing changed is computed once.

    Outputs are kept by the digest of the parameters and buffers; those used last, as many as fit into `KEPT_BYTES`.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, list[Tensor]] = OrderedDict()

    def __call__(
        self, context: Context, batches: Iterable[Batch], changes: Sequence[Mapping[str, Tensor]]
    ) -> Iterator[tuple[Batch, Iterator[Tensor]]]:
        batches = list(batches)
        if all(changes) or not context.loaded or _size(context, batches) > KEPT_BYTES:
            yield from outputs_over(context, batches, changes)
            return
        changed = [change for change in changes if change]
        start = self._unchanged(context, batches)
        for (batch, outputs), own in zip(outputs_over(context, batches, changed), start, strict=True):
            yield batch, (next(outputs) if change else own for change in changes)

    def _unchanged(self, context: Context, batches: Sequence[Batch]) -> list[Tensor]:
        if context.loaded not in self._known:
            self._known[context.loaded] = [next(own) for _, own in outputs_over(context, batches, [{}])]
        self._known.move_to_end(context.loaded)
        while len(self._known) * _size(context, batches) > KEPT_BYTES:
            self._known.popitem(last=False)
        return self._known[context.loaded]


def _size(context: Context, batches: Sequence[Batch]) -> int:
    """The bytes of a model's outputs on batches."""
    (output,) = context.graph.graph.find_nodes(op="output")
    meta = output.args[0].meta["tensor_meta"]
    each: int = math.prod(meta.shape[1:]) * meta.dtype.itemsize
    return sum(map(len, batches)) * each
