"""The model that a graph was traced from: parameters that it has replaced by others since are taken over."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from fxinvert.passes.capture import attribute
from fxinvert.passes.synthesize import share


class Source:
    """A model and the parameters and buffers of it that a graph reads. A copy knows no model: it stands for itself.

    Args:
        model: the model; None for none.
        graph: traced from it, its parameters under the model's names.
    """

    def __init__(self, model: nn.Module | None = None, graph: fx.GraphModule | None = None) -> None:
        self.model, self._known = model, dict[str, Tensor]()
        if model is not None and graph is not None:
            for node in graph.graph.find_nodes(op="get_attr"):
                held = _held(model, str(node.target))
                if held is not None and held is attribute(graph, str(node.target)):
                    self._known[str(node.target)] = held

    def follow(self, graph: fx.GraphModule) -> None:
        """Makes the graph read what the model has now, where that is another object than before."""
        if self.model is None:
            return
        for name, known in self._known.items():
            held = _held(self.model, name)
            if held is not None and held is not known:
                share(graph, self.model, name)
                self._known[name] = held

    def __reduce__(self) -> tuple[Any, ...]:
        return Source, ()


def _held(model: nn.Module, name: str) -> Tensor | None:
    try:
        held = attribute(model, name)
    except AttributeError:
        return None
    return held if isinstance(held, Tensor) else None
