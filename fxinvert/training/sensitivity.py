"""How sensitive the output is to the outputs of ops.

For an op's output y and the model's output o, a product r·∂o/∂y with random signs r is in expectation of its square
‖∂o/∂y‖² (Hutchinson 1989): one backward pass per probe, whatever the size of y.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fxinvert.inversion.inverse_graph import InverseGraph
from fxinvert.training.batch import Batch

#: probes per batch
PROBES = 2


def sensitivities(inverse: InverseGraph, nodes: Sequence[fx.Node], batch: Batch) -> dict[fx.Node, Tensor]:
    """The root mean square, over probes, of r·∂o/∂y for every entry of the ops' outputs: `(B, …)` by node.

    Args:
        inverse: with the model's graph.
        nodes: the ops.
        batch: the samples.
    """
    runner = fx.Interpreter(inverse.graph, garbage_collect_values=False)
    runner.env = dict(inverse.forward(batch.inputs))
    changed: set[fx.Node] = set()
    with torch.enable_grad():
        for node in inverse.graph.graph.nodes:
            if node.op != "output" and any(n in changed for n in node.all_input_nodes):
                runner.env[node] = runner.run_node(node)
                changed.add(node)
            if node in nodes:
                value = runner.env[node]
                runner.env[node] = value if value.requires_grad else value.detach().requires_grad_()
                changed.add(node)
        output, inputs = runner.env[inverse.output_node], [runner.env[node] for node in nodes]
        generator = torch.Generator().manual_seed(0)
        squares = [torch.zeros_like(value) for value in inputs]
        for _ in range(PROBES):
            # the same signs for every sample, so that none depends on its place in the batch
            signs = torch.randint(0, 2, output.shape[1:], generator=generator).to(output) * 2 - 1
            found = torch.autograd.grad(output, inputs, signs.expand_as(output), retain_graph=True)
            for square, gradient in zip(squares, found, strict=True):
                square += gradient.square()
    return {node: (square / PROBES).sqrt() for node, square in zip(nodes, squares, strict=True)}
