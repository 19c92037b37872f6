"""Interpreted: graph modules that are run node by node, and whose code is made only if somebody asks for it."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.fx.graph import PythonCode


class Interpreted(fx.GraphModule):
    """A graph module without code until somebody asks for it, or calls `recompile` or `forward`: making it takes as long as a small pass."""

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str) -> None:
        vars(self)["_begun"] = True
        super().__init__(root, graph, class_name)

    def recompile(self) -> PythonCode | None:  # type: ignore[override]  # nothing at first
        """Makes the code, but where torch's constructor asks for it."""
        return None if vars(self).pop("_begun", False) else super().recompile()

    @property
    def code(self) -> str:
        """The code; made if there is none yet."""
        if "_code" not in vars(self):
            self.recompile()
        return super().code

    def __reduce__(self) -> Any:
        self.recompile()  # pickles are made of code
        return super().__reduce__()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the code, which brings a method of its own, and runs it."""
        self.recompile()
        return self.forward(*args, **kwargs)


class Runner(fx.Interpreter):
    """Runs a graph node by node, without torch's notes of which node it is for what traces it meanwhile."""

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return getattr(self, n.op)(n.target, args, kwargs)
