"""Labels and outputs that are read by their type, as written in `fxinvert.labels`, and most likely mean something else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, fx

from fxinvert.labels import is_classification
from fxinvert.training.batch import Batch, tensors_of

#: ops whose values are probabilities
PROBABILITIES = ("softmax", "sigmoid")
#: ops that leave values as they are
_MOVES = ("flatten", "reshape", "squeeze", "unsqueeze")


def misreadings(graph: fx.GraphModule, batches: Iterable[Batch]) -> Iterator[str]:
    """What is most likely meant otherwise, in sentences.

    Args:
        graph: the traced model.
        batches: some of the data.
    """
    last = _last_op(graph)
    labels = [leaf for batch in batches for leaf in tensors_of(batch.labels)]
    values = [own for own in labels if not is_classification(own)]
    if last not in PROBABILITIES and _zeros_and_ones(values):
        yield (
            "all labels are the floating-point numbers 0 and 1, and were taken as values that the outputs should have (mean "
            "squared error): for yes or no give truth values, labels.bool(); for one class of several its number, labels.argmax(1)"
        )
    if last in PROBABILITIES and any(map(is_classification, labels)):
        yield (
            f"the model ends in {last}, where labels ask for logits: its probabilities were taken as such, which loss and "
            f"accuracy mean little for; give the model without the {last}"
        )


def _zeros_and_ones(values: list[Tensor]) -> bool:
    zeros, ones = [own == 0 for own in values], [own == 1 for own in values]
    whole = all(bool((zero | one).all()) for zero, one in zip(zeros, ones, strict=True))
    return whole and any(map(Tensor.any, zeros)) and any(map(Tensor.any, ones))


def _last_op(graph: fx.GraphModule) -> str:
    (node,) = graph.graph.output_node().all_input_nodes
    while node.meta.get("op") in _MOVES:
        node = node.all_input_nodes[0]
    found: str = node.meta.get("op") or ""
    return found
