"""Trace: from a model to the normalized graph that every other pass works on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxinvert.errors import TraceError
from fxinvert.modes import as_usual
from fxinvert.passes.capture import CaptureError, evaluating, hides_parameters, symbolic_graph, unchanged
from fxinvert.passes.checks import check_devices, check_readable, check_reproduces, mixture, randomness
from fxinvert.passes.exported import SubgraphError, export_graphs, exported_graph
from fxinvert.passes.front import batch_in_front
from fxinvert.passes.inputs import Flat, Inputs
from fxinvert.passes.interpreted import Interpreted
from fxinvert.passes.joined import side_by_side
from fxinvert.passes.leaves import copied
from fxinvert.passes.normalize import RunError, normalize
from fxinvert.passes.outputs import Chosen, Key
from fxinvert.passes.ready import in_evaluation, is_exported
from fxinvert.passes.runs import batch_size, doubled, run
from fxinvert.rules import RuleSet
from fxinvert.rules.registry import in_force

log = logging.getLogger(__name__)


@as_usual()
def trace(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    *,
    output: Key | tuple[Key, ...] | None = None,
    rules: RuleSet | None = None,
) -> fx.GraphModule:
    """Captures a model as a normalized `torch.fx.GraphModule`, in evaluation mode.

    Symbolic tracing comes first; what it cannot follow is captured by `torch.export` (non-strict, dynamic batch), and
    `graph.meta["captured"]` says why. All spellings of an op (module, function, method, ATen, in-place) become one ATen
    call; parameters are read by the user's names and shared with the model, which is left as it was found. Every node
    has its shape in `meta["tensor_meta"]`. The graph takes the input tensors in order, and any batch size: that is
    checked with twice the example's.

    Args:
        model: a module, a `GraphModule` traced already, or an `ExportedProgram`.
        example_inputs: a tensor, the tuple of what the model takes by position, or the mapping of what it takes by
            name; each tensor `(B, …)`, nested in tuples, lists and dicts as the model wants them.
        output: which output is supervised, by index or key (`"maps.0"` in what is nested), for a model with several; or
            a tuple of those that are, which are joined to `(B, sum of sizes)`. None: of a dataclass the logits, or else
            the first of real numbers with a row for every sample.
        rules: the rules in force; modules and functions that they name are kept whole.

    Raises:
        TraceError: the model cannot be captured, does not run, has several outputs and none is named, computes with
            the batch size of the example or across its samples, or is random.
    """
    graph = interpreted(model, example_inputs, output=output, rules=rules)
    if graph is not model:
        graph.recompile()
    return graph


def interpreted(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    *,
    output: Key | tuple[Key, ...] | None = None,
    rules: RuleSet | None = None,
) -> fx.GraphModule:
    """As `trace`, for what runs the graph node by node: without code."""
    if isinstance(model, ExportedProgram):
        model = model.module()
    check_readable(model)
    if is_normalized(model):
        assert isinstance(model, fx.GraphModule)
        return model
    if isinstance(model, fx.GraphModule):
        model = in_evaluation(model)
    rules = in_force(rules)
    form = Inputs.of(model.forward, example_inputs)
    values = form.tensors(example_inputs)
    if not batch_size(values):
        raise TraceError("example_inputs holds no samples; the first axis counts them, and one is enough")
    check_devices(model, values)
    cuda = sorted({v.device.index for v in values if v.device.type == "cuda"})
    with evaluating(model), unchanged(model), torch.no_grad(), torch.random.fork_rng(devices=cuda):
        result = _result(model, form, values, rules)
        chosen = Chosen.of(result, output)
        if chosen.guessed:
            with suppress(TraceError):  # what does not run on other batch sizes is refused below
                chosen = chosen.with_rows(result, run(Flat(model, form, _whole), doubled(values)))
        try:
            graph = _captured(model, form, values, chosen, chosen(result), rules)
        except TraceError as error:
            # what runs sub-graphs is not run again: torch could no longer compile such ops
            again = not isinstance(error.__context__, SubgraphError)
            fault = _fault(Flat(model, form, chosen), values, chosen(result), str(error)) if again else ""
            taken = (
                f"; no output was named, and of {chosen.guessed} {chosen.keys[0]!r} was taken: name another by output=…"
                if chosen.guessed
                else ""
            )
            if not fault and not taken:
                raise
            raise TraceError(f"{fault}{error}{taken}") from error
    graph.meta["inputs"], graph.meta["heads"] = form, chosen.heads(result)
    return graph


def _result(model: nn.Module, form: Inputs, values: tuple[Tensor, ...], rules: RuleSet) -> Any:
    """What the model returns for the example.

    Raises:
        TraceError: it does not run on it; the message names the node where it can be found.
    """

    try:
        with unchanged(model):  # what forward() leaves on the model may say how large the batch was
            return run(Flat(model, form, _whole), values)
    except TraceError as error:
        found = error
        try:
            raw = model if isinstance(model, fx.GraphModule) else symbolic_graph(model, form, rules, _whole)
            normalize(raw, copied(values), rules)
        except CaptureError:  # what cannot be followed, too, is not why it does not run
            pass
        except TraceError as at_node:
            found = at_node
        raise TraceError(f"{found}{_given(model, values)}") from found.__cause__


def _given(model: nn.Module, values: tuple[Tensor, ...]) -> str:
    """What a message says of inputs that a model does not run on: the first of another type than it, or all of them."""
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    types = ", ".join(sorted(str(t).removeprefix("torch.") for t in own)) or "none"
    said = [
        f"input {i} is {str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}" for i, v in enumerate(values)
    ]
    for value, given in zip(values, said, strict=True):
        if value.is_floating_point() and own and value.dtype not in own:
            return f"; {given}, the model's parameters are {types}: convert one of them"
    return f"; {', '.join(said)}, the model's parameters are {types}"


def _fault(model: Flat, values: tuple[Tensor, ...], expected: Tensor, said: str) -> str:
    """What else is wrong with a model that cannot be captured, and that no capture would mend; followed by what was."""
    with suppress(TraceError):  # it may not run a second time
        found = randomness(model, values, expected)
        if not found and expected.dim() and len(expected) % batch_size(values) == 0:
            found = mixture(model, values, expected)
        if found and found.partition(":")[0] not in said:
            return f"{found}; besides, "
    return ""


def _whole(result: Any) -> Any:
    return result


def _captured(
    model: nn.Module,
    form: Inputs,
    values: tuple[Tensor, ...],
    chosen: Chosen,
    expected: Tensor,
    rules: RuleSet,
) -> fx.GraphModule:
    """The checked graph by symbolic tracing, or by `torch.export` where that fails, and the reason in its `meta`.

    Where functions of other libraries hide parameters from symbolic tracing, `torch.export` sees them; symbolic tracing
    is then the second choice.
    """

    def checked(raw: fx.GraphModule, in_front: bool = False) -> fx.GraphModule:
        try:
            graph, few = normalize(raw, copied(values), rules)
        except RunError as error:
            raise CaptureError(f"the model runs, but not as it was traced: {error}") from error
        woven = side_by_side(graph, few, batch_size(values))
        if woven is not None:
            with suppress(TraceError):  # whatever is wrong beyond that is found again
                return checked(woven)
        check_reproduces(Flat(model, form, chosen), graph, few, values, expected)
        turned = None if in_front else batch_in_front(graph, few)
        if turned is not None:
            with suppress(TraceError):  # so it stays as it is
                return checked(turned, in_front=True)
        return graph

    def first_checked(raws: Iterator[fx.GraphModule]) -> fx.GraphModule:
        failed: CaptureError | None = None  # perhaps for what it writes, or asks
        try:
            for raw in raws:
                try:
                    return checked(raw)
                except CaptureError as error:
                    failed = failed or error
        except TraceError as error:
            if failed is None:
                raise
            raise CaptureError(f"{failed}; {error}") from error
        assert failed is not None, "no graph, and no reason"
        raise failed

    def exported(reason: str) -> fx.GraphModule:
        graph = first_checked(export_graphs(model, form, values, chosen))
        graph.meta["captured"] = f"by torch.export, because {reason}"
        log.info("%s captured by torch.export, because %s", type(model).__name__, reason)
        return graph

    if isinstance(model, fx.GraphModule) and is_exported(model):
        return checked(exported_graph(model, form, chosen))
    if isinstance(model, fx.GraphModule):
        return checked(model if chosen.whole else symbolic_graph(model, form, rules, chosen))
    try:
        raw = symbolic_graph(model, form, rules, chosen)
        hidden = hides_parameters(raw, rules)
        if hidden is not None:
            with suppress(TraceError):
                return exported(hidden)
        return checked(raw)
    except CaptureError as error:
        try:
            return exported(str(error))
        except TraceError as second:
            raise TraceError(f"{error}; {second}") from error


def by_sample(graph: fx.GraphModule, example_inputs: Any, rules: RuleSet | None = None) -> fx.GraphModule:
    """A traced graph, or the same that gives `(B, k, …)` instead of an output `(B·k, …)` with k rows of every sample.

    Args:
        graph: from `trace`; one that joins several outputs comes back as it is.
        example_inputs: of the form that it was traced with.
        rules: the rules in force.
    """
    (output,) = graph.graph.output_node().all_input_nodes
    if graph.meta["heads"] or output.meta["rows"] < 2:
        return graph
    values = graph.meta["inputs"].tensors(example_inputs)
    apart = fx.Graph()
    rows = apart.graph_copy(graph.graph, {})
    assert isinstance(rows, fx.Node), "a graph of several outputs"
    apart.output(apart.call_function(torch.ops.aten.unflatten.int, (rows, 0, [-1, output.meta["rows"]])))
    with torch.no_grad():
        raw = Interpreted(graph, apart, type(graph).__name__)
        result, few = normalize(raw, copied(values), in_force(rules))
        flat = Flat(raw, Inputs.of(raw.forward, values), _whole)
        check_reproduces(flat, result, few, values, run(flat, values))
    result.meta.update(graph.meta, rows=output.meta["rows"])
    return result


def is_normalized(model: nn.Module) -> bool:
    """Whether a module is a graph that `trace` has made."""
    return isinstance(model, fx.GraphModule) and all(
        "path" in n.meta for n in model.graph.nodes if n.op != "output"
    )
