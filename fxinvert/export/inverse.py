"""The inverse as an ONNX file: a feature and the output's target in, the reconstructed feature out.

The file runs the model from the feature to its output, and then the inverse of each op backwards from the output's target, so
that a deployed system can tell what a feature should have been without PyTorch. The node-by-node inverse is exported, and
not the linearized one: its linear maps are known beforehand and become matrices, while the derivative of the output differs from sample
to sample and would need a backward pass and a solver inside the file.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxinvert.errors import DataError, NoRuleError, TraceError
from fxinvert.export.annotate import set_metadata
from fxinvert.export.called import BATCH, Call
from fxinvert.export.facts import facts_of
from fxinvert.export.files import destination_of, move, workplace
from fxinvert.export.inputs import Case, check_settings, frozen_copy, like, rng_kept
from fxinvert.export.inverse_steps import Unmoved, step_of
from fxinvert.export.onnx_file import proven, save
from fxinvert.export.proof import Proof, prove
from fxinvert.export.summary import ExportReport
from fxinvert.export.translate import translate
from fxinvert.inversion import InverseGraph, invert
from fxinvert.passes import trace
from fxinvert.passes.capture import attribute, describe
from fxinvert.passes.flow import Flow, Stretch

ATOL, RTOL = 1e-4, 1e-3
"""Rounding of the forward pass is amplified by the condition of what is inverted."""

FEATURE, TARGET, RECONSTRUCTED = "feature", "output_target", "reconstructed"


def export_inverse(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    at: str | None = None,
    batch_sizes: Sequence[int] = (1, 2, 7),
    atol: float = ATOL,
    rtol: float = RTOL,
    opset: int = 20,
) -> ExportReport:
    """Export what reconstructs a feature from the output's target, and prove it.

    The file takes `feature`, the value of the node in the forward pass, and `output_target`, what the output should have been, both
    `(B, …)`; it gives `reconstructed`, the node's target. It is proven in onnxruntime against `InverseGraph` in torch, on features of the
    example and on output targets around the outputs.

    Args:
        model: The model; it stays as it is.
        example_inputs: As for `fxinvert.trace`.
        path: The file to write; its folder must exist.
        at: The node, as in `Reconstruction.names`; by default the model's input.
        batch_sizes: Batch sizes at which the file is proven.
        atol: Absolute tolerance.
        rtol: Tolerance relative to each expected element.
        opset: ONNX opset of the file, 18 or later.

    Returns:
        What was run and how large the differences are.

    Raises:
        NoRuleError: An op between the node and the output has no inverse that ONNX can express, or paths branch; it is named.
        ExportMismatchError: The file does not compute what the inverse graph computes.
        TraceError: The model cannot be captured.
        DataError: There is no such node, the path cannot be written, or settings do not fit.
    """
    sizes = check_settings(batch_sizes, atol, rtol)
    destination = destination_of(path)
    with workplace(destination) as folder, rng_kept():
        frozen = frozen_copy(model)
        call = Call.of(frozen, example_inputs)
        graph = trace(frozen, example_inputs)
        inverse = invert(graph, output_target=_as_given)
        node = _node(graph, at)
        with torch.no_grad():
            values = inverse.forward(call.inputs.arguments(call.example)[1] or call.example)
        chain = _chain(inverse, node, values)
        cases = [_case(inverse, call, node, size) for size in sizes]
        facts = facts_of(frozen, None, {"inverse_at": node.meta["path"]}, proven=proven(sizes, atol, rtol))
        given = Call.of(chain, tuple(cases[-1].inputs.values()))
        try:
            program = translate(chain, given, cases, opset, half=False, destination=destination)
        except TraceError as error:
            ops = ", ".join(repr(stretch.exit.meta["path"]) for stretch in _stretches(graph, node))
            raise NoRuleError(
                f"ONNX has no form for the inverse of one of the nodes {ops}: {error} Take a node behind it."
            ) from error
        set_metadata(program.model, facts)
        written = Path(folder) / destination.name
        save(program, written, destination, external=False)
        report = prove(written, Proof(chain, given, cases, atol, rtol), shown=destination)
        move(Path(folder), destination)
    return report


def _as_given(outputs: Tensor, labels: Tensor) -> Tensor:
    return labels


def _node(graph: fx.GraphModule, name: str | None) -> fx.Node:
    nodes = Flow(graph).line
    found = [node for node in nodes if name in (None, node.meta["path"], node.name)]
    if not found or found[0] is nodes[-1]:
        names = ", ".join(node.meta["path"] for node in nodes[:-1])
        raise DataError(f"no node {name!r} lies on every path from input to output; those that do: {names}")
    return found[0]


def _chain(inverse: InverseGraph, start: fx.Node, values: dict[fx.Node, Any]) -> fx.GraphModule:
    """A graph from a feature and the output's target to the feature's target."""
    stretches = _stretches(inverse.graph, start)
    graph, root = fx.Graph(), nn.Module()
    feature, wanted = graph.placeholder(FEATURE), graph.placeholder(TARGET)
    copies: dict[fx.Node, fx.Node] = {start: feature}

    def copied(node: fx.Node) -> fx.Node:
        if node in copies:
            return copies[node]
        if node.op == "placeholder":
            raise NoRuleError(
                f"{describe(node)} is needed to run the model from {start.meta['path']!r}, so that the inverse cannot be "
                "exported there"
            )
        for other in node.all_input_nodes:
            copied(other)
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "get_attr":
            name = str(node.target).replace(".", "_")
            copies[node].target = name
            root.register_buffer(name, attribute(inverse.graph, str(node.target)).detach())
        elif node.op == "call_module":
            name = str(node.target).replace(".", "_")
            copies[node].target = name
            root.add_module(name, inverse.graph.get_submodule(str(node.target)))
        return copies[node]

    for stretch in stretches:
        copied(stretch.exit)
    target = wanted
    for number, stretch in reversed(list(enumerate(stretches))):
        op = inverse.op_of(stretch, values)
        step = step_of(inverse.inverse_of(stretch).rule, op, describe(stretch.exit))
        root.add_module(f"inverse_{number}", step)
        target = graph.call_module(f"inverse_{number}", (target, copies[stretch.exit], copies[stretch.entry]))
    root.add_module("unmoved", Unmoved())
    found = graph.call_module("unmoved", (wanted, copies[stretches[-1].exit], feature, target))
    graph.output({RECONSTRUCTED: found})
    return fx.GraphModule(root, graph, "Inverse").eval()


def _stretches(graph: fx.GraphModule, start: fx.Node) -> list[Stretch]:
    """The single ops from a node to the output, in order.

    Raises:
        NoRuleError: paths branch in between.
    """
    flow = Flow(graph)
    by_entry = {stretch.entry: stretch for stretch in flow.stretches}
    found: list[Stretch] = []
    node = start
    while node is not flow.exit:
        stretch = by_entry[node]
        if stretch.is_region:
            raise NoRuleError(
                f"paths branch between {node.meta['path']!r} and {stretch.exit.meta['path']!r}: such a region is solved step by "
                f"step, which cannot be exported. Take a node from {stretch.exit.meta['path']!r} on."
            )
        found.append(stretch)
        node = stretch.exit
    return found


def _case(inverse: InverseGraph, call: Call, node: fx.Node, size: int) -> Case:
    """Features of the example, output targets around the outputs (the first is the output itself), and what is expected."""
    args, kwargs = call.inputs.arguments(like(call, {BATCH: size}, seed=0))
    with torch.no_grad():
        values = inverse.forward(kwargs or args)
    output = values[inverse.output_node]
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(size), dtype=output.dtype)
    wanted = output + noise * output.std()
    wanted[0] = output[0] if size > 1 else wanted[0]
    found = inverse.targets(values, wanted, [node])[node]
    return Case({BATCH: size}, {FEATURE: values[node], TARGET: wanted}, {RECONSTRUCTED: found})
