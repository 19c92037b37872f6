"""The inverse as an ONNX file: a feature and the output's target in, the reconstructed feature out.

The file runs the model from the feature to its output, and then backwards from the output's target, so that a deployed system can
tell what a feature should have been without PyTorch: through the inverse of each op where they form a chain, by the derivative of the
output where paths branch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fxinvert.errors import DataError, FxInvertError, NoRuleError, TraceError
from fxinvert.export.annotate import set_metadata
from fxinvert.export.called import BATCH, Call
from fxinvert.export.facts import facts_of
from fxinvert.export.files import destination_of, move, workplace
from fxinvert.export.inputs import SIZES, Case, check_settings, frozen_copy, like, rng_kept
from fxinvert.export.inverse_linearized import Linearized
from fxinvert.export.inverse_steps import Unmoved, step_of
from fxinvert.export.onnx_file import proven, save
from fxinvert.export.proof import Proof, prove
from fxinvert.export.summary import ExportReport
from fxinvert.export.translate import translate
from fxinvert.inversion import InverseGraph, invert
from fxinvert.inversion.inverse_graph import LINEARIZED_LIMIT, Reconstructed
from fxinvert.inversion.linearized import CAREFUL
from fxinvert.modes import as_usual
from fxinvert.passes import trace
from fxinvert.passes.capture import attribute, describe
from fxinvert.passes.flow import Flow, Stretch

ATOL, RTOL = 1e-4, 1e-3
"""Rounding of the forward pass is amplified by the condition of what is inverted."""

FEATURE, TARGET, RECONSTRUCTED = "feature", "output_target", "reconstructed"


@as_usual()
def export_inverse(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    at: str | None = None,
    reconstruction: Reconstructed | Literal["auto"] = "auto",
    batch_sizes: Sequence[int] | None = None,
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
        reconstruction: As for `fxinvert.invert`; `"auto"`: node by node on a chain, linearized where paths branch between the node
            and the output.
        batch_sizes: Batch sizes at which the file is proven; by default 1, 2 and 7.
        atol: Absolute tolerance.
        rtol: Tolerance relative to each expected element.
        opset: ONNX opset of the file, 18 or later.

    Returns:
        What was run and how large the differences are.

    Raises:
        NoRuleError: An op between the node and the output has no inverse that ONNX can express, it is named; or the inverse is
            linearized, and the output has too many numbers, or a derivative that ONNX cannot express.
        ExportMismatchError: The file does not compute what the inverse graph computes.
        TraceError: The model cannot be captured.
        DataError: There is no such node, the path cannot be written, or settings do not fit.
    """
    sizes = check_settings(batch_sizes, atol, rtol) or SIZES
    destination = destination_of(path)
    with workplace(destination) as folder, rng_kept():
        frozen = frozen_copy(model)
        call = Call.of(frozen, example_inputs)
        graph = trace(frozen, example_inputs)
        node = _node(graph, at)
        if reconstruction == "auto":
            branches = any(stretch.is_region for stretch in _stretches(graph, node))
            reconstruction = "linearized" if branches else "nodewise"
        inverse = invert(graph, output_target=_as_given, reconstruction=reconstruction)
        with torch.no_grad():
            values = inverse.forward(call.inputs.arguments(call.example)[1] or call.example)
        made = _linearized if reconstruction == "linearized" else _chain
        chain: nn.Module = made(inverse, node, values)
        cases = [_case(inverse, call, node, size) for size in sizes]
        facts = facts_of(
            frozen,
            None,
            {"inverse_at": node.meta["path"], "inverse_is": reconstruction},
            proven=proven(cases, atol, rtol),
        )
        given = Call.of(chain, tuple(cases[-1].inputs.values()))
        try:
            program = next(translate(chain, given, cases, opset, half=False, destination=destination))
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


class _Forward:
    """Copies of the model's nodes from a feature on, in a graph of their own."""

    def __init__(self, model: fx.GraphModule, start: fx.Node) -> None:
        self.model, self.start, self.graph, self.root = model, start, fx.Graph(), nn.Module()
        self.copies = {start: self.graph.placeholder(FEATURE)}

    def __getitem__(self, node: fx.Node) -> fx.Node:
        """The copy of a node.

        Raises:
            NoRuleError: it needs an input of the model besides the feature.
        """
        if node in self.copies:
            return self.copies[node]
        if node.op == "placeholder":
            raise NoRuleError(
                f"{describe(node)} is needed to run the model from {self.start.meta['path']!r}, so that the inverse cannot be "
                "exported there"
            )
        copy = self.copies[node] = self.graph.node_copy(node, self.__getitem__)
        if node.op in ("get_attr", "call_module"):
            copy.target = name = str(node.target).replace(".", "_")
            if node.op == "get_attr":
                self.root.register_buffer(name, attribute(self.model, str(node.target)).detach())
            else:
                self.root.add_module(name, self.model.get_submodule(str(node.target)))
        return copy

    def module(self, result: Any) -> fx.GraphModule:
        """What has been copied, as a module that gives a result."""
        self.graph.output(result)
        return fx.GraphModule(self.root, self.graph, "Inverse").eval()


def _chain(inverse: InverseGraph, start: fx.Node, values: dict[fx.Node, Any]) -> fx.GraphModule:
    """From a feature and the output's target to the feature's target, node by node.

    Raises:
        NoRuleError: an op has no inverse that ONNX can express, or paths branch.
    """
    stretches = _stretches(inverse.graph, start)
    region = next((stretch for stretch in stretches if stretch.is_region), None)
    if region is not None:
        raise NoRuleError(
            f"paths branch between {_ends(region)}: node by node such a region is solved step by step, which cannot be exported; "
            'linearized it can be. Take a node behind it, or reconstruction="linearized".'
        )
    forward = _Forward(inverse.graph, start)
    graph, root, feature = forward.graph, forward.root, forward[start]
    wanted = target = graph.placeholder(TARGET)
    for stretch in stretches:
        forward[stretch.exit]
    for number, stretch in reversed(list(enumerate(stretches))):
        rule = inverse.inverse_of(stretch).rule
        step = step_of(rule, inverse.op_of(stretch, values), describe(stretch.exit))
        root.add_module(f"inverse_{number}", step)
        target = graph.call_module(
            f"inverse_{number}", (target, forward[stretch.exit], forward[stretch.entry])
        )
    root.add_module("unmoved", Unmoved())
    found = graph.call_module("unmoved", (wanted, forward[stretches[-1].exit], feature, target))
    return forward.module({RECONSTRUCTED: found})


def _linearized(inverse: InverseGraph, start: fx.Node, values: dict[fx.Node, Any]) -> Linearized:
    """The same by the derivative of the output.

    Raises:
        NoRuleError: the output has too many numbers, or a derivative that is no sequence of plain operations.
    """
    exit, path = inverse.output_node, start.meta["path"]
    size = math.prod(values[exit].shape[1:])
    several = next((node for node in (start, exit) if node.meta["rows"] != 1), None)
    if several is not None or size > CAREFUL.rows:
        region = next((stretch for stretch in _stretches(inverse.graph, start) if stretch.is_region), None)
        why = f"paths branch between {_ends(region)}" if region else "so it was asked for"
        problem = (
            f"the output has {size}" if several is None else f"{several.meta['path']!r} has several rows"
        )
        raise NoRuleError(
            f"the inverse at {path!r} can only be exported linearized, as {why}; that takes an output of at most {CAREFUL.rows} numbers and "
            f"one row per sample, but {problem}. Take a node behind it."
        )
    rest = _Forward(inverse.graph, start)
    try:
        return Linearized(rest.module(rest[exit]), values[start], size, LINEARIZED_LIMIT)
    except FxInvertError:
        raise
    except Exception as error:  # of torch's tracing and of its derivatives
        raise NoRuleError(
            f"the derivative between {path!r} and the output cannot be traced: {error}. Take a node behind it."
        ) from error


def _stretches(graph: fx.GraphModule, start: fx.Node) -> list[Stretch]:
    """What lies between a node and the output, in order: single ops, and regions where paths branch."""
    flow = Flow(graph)
    by_entry = {stretch.entry: stretch for stretch in flow.stretches}
    found: list[Stretch] = []
    node = start
    while node is not flow.exit:
        found.append(by_entry[node])
        node = found[-1].exit
    return found


def _ends(stretch: Stretch) -> str:
    return f"{stretch.entry.meta['path']!r} and {stretch.exit.meta['path']!r}"


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
